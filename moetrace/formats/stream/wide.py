"""Names that hold a layer and an expert: tags of scalars, and tables whose columns or rows are named like them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.arrow import to_numpy
from moetrace.formats.stream.cells import Cells
from moetrace.formats.stream.columns import BARE, column, null
from moetrace.formats.stream.tables import (
    KEY_NAMES,
    ColumnRoles,
    Layout,
    Naming,
    first_named,
    long_layout,
    match_columns,
    nested_layout,
    no_layout,
)
from moetrace.formats.stream.values import SHARE_NAMES, UTILISATION_NAMES, Values, simple_name

if TYPE_CHECKING:
    import pyarrow as pa

PATTERN = r"layers?[_/.\-\[ ]?(?P<layer>\d{1,15}).*?experts?[_/.\-\[ ]?(?P<expert>\d{1,15})"
EXPERT_FIRST = r"experts?[_/.\-\[ ]?(?P<expert>\d{1,15}).*?layers?[_/.\-\[ ]?(?P<layer>\d{1,15})"
# Of a column for an expert of the layer that each row names.
EXPERT_ONLY = re.compile(r"experts?[_/.\-\[ ]?(\d{1,15})(?!\d)", re.IGNORECASE)
# Of a tag whose values are the counts of all experts.
VECTOR = r"layers?[_/.\-\[ ]?(?P<layer>\d{1,15})"
WIDE = re.compile(r"^(?:layer_?(?P<layer>\d{1,15})_)?(?:expert|e)_?(?P<expert>\d{1,15})$", re.IGNORECASE)
# Of a layer's or expert's number.
MOST_DIGITS = 15
# What an export of a chart adds to each of its columns.
OF_CHARTS = ("__MIN", "__MAX")


# --- tags --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tags:
    """How tags are matched: the first of *patterns* that is found in one gives its layer and its expert."""

    patterns: tuple[re.Pattern[str], ...]
    assumption: str

    def match(self, tag: str, where: str) -> tuple[int, int] | None:
        """The layer and the expert in *tag*, None where it names none; no layer is layer 0.

        Raises `TraceError` for a group of the pattern that is not a number.
        """
        for pattern in self.patterns:
            found = pattern.search(tag)
            if found is not None and "expert" in pattern.groupindex:
                layer = _number(found, "layer", where) if "layer" in pattern.groupindex else 0
                return layer, _number(found, "expert", where)
        return None

    def layer(self, tag: str, where: str) -> int | None:
        """The layer in the tag of a vector, None where it names none."""
        named = [pattern for pattern in self.patterns if set(pattern.groupindex) == {"layer"}]
        for pattern in named or [re.compile(VECTOR, re.IGNORECASE)]:
            found = pattern.search(tag)
            if found is not None:
                return _number(found, "layer", where)
        return None


def tags_by(pattern: str | None, where: str) -> Tags:
    """The tags that *pattern* matches, the usual ones if it is None; raises `TraceError` where it does not compile."""
    texts = [pattern] if pattern else [PATTERN, EXPERT_FIRST]
    try:
        patterns = tuple(re.compile(text, re.IGNORECASE) for text in texts)
    except re.error as error:
        raise TraceError(where, f"--pattern is not a regular expression: {error}", "see the Python manual") from None
    if not {"layer", "expert"} & set(patterns[0].groupindex):
        raise TraceError(where, "--pattern names no layer and expert", "use (?P<layer>\\d+) and (?P<expert>\\d+)")
    return Tags(patterns, f"tags are matched by {' or '.join(texts)}")


def _number(match: re.Match[str], name: str, where: str) -> int:
    text = match[name] or ""
    if not text.isdecimal() or len(text) > MOST_DIGITS:
        raise TraceError(f"{where}, tag {match.string[:80]}", f"has {text[:80]!r} as its {name}", "check --pattern")
    return int(text)


def template(tag: str) -> str:
    """*tag* with # for its numbers: what tags of one kind have in common."""
    return re.sub(r"\d+", "#", tag)


def one_kind(tags: Sequence[str], seen: set[str], where: str) -> str:
    """What the values of *tags* are, utilisation, shares, or else counts, by the words in them.

    *seen* holds what all so far have in common, and gets what these have. Raises `TraceError` for two kinds.
    """
    seen.update(map(template, tags))
    if len(seen) > 1:
        first, second = sorted(seen)[:2]
        raise TraceError(where, f"has tags like {first} and like {second}", "choose one kind with --pattern")
    words = set(re.findall(r"[a-z]+", next(iter(seen), "").lower()))
    return next((name for name in (*UTILISATION_NAMES, *SHARE_NAMES) if name in words), "tokens")


def no_match(tags: Sequence[str], what: str, where: str) -> TraceError:
    """The error that none of *tags* names a layer and an expert, with some of them, and a pattern that would fit."""
    numbered = [tag for tag in tags if len(re.findall(r"\d+", tag)) >= 2]
    way_out = "is it the right file?"
    if numbered:
        parts = [re.escape(part) for part in re.split(r"\d+", numbered[0])]
        first, last = ("layer", "expert")
        if re.search("expert.*layer", numbered[0], re.IGNORECASE):
            first, last = last, first
        groups = [f"(?P<{first}>\\d+)", *["\\d+"] * (len(parts) - 3), f"(?P<{last}>\\d+)", ""]
        way_out = f"give a pattern such as --pattern '{''.join(map(str.__add__, parts, groups))}'"
    seen = shown(sorted(set(map(template, tags))), 5) if tags else "none"
    return TraceError(where, f"holds no rows: no {what} names a layer and an expert; there are {seen}", way_out)


# --- tables ------------------------------------------------------------------------------------


def match_layout(
    schema: pa.Schema, where: str, reader: Values, naming: Naming = Naming(), first: pa.RecordBatch | None = None
) -> Layout:
    """The layout whose columns are there, their values taken by *reader*; raises `TraceError` when none is.

    *first* is a batch of rows, to look at text in.
    """
    found = match_columns(schema, where, naming, first)
    names = schema.names
    if found.value and (found.expert or found.value in found.lists):
        if naming.pattern:
            raise SettingError(f"{where} names experts in rows, and has no use for --pattern")
        return nested_layout(found, reader, first) if found.value in found.lists else long_layout(found, reader)
    columns, assumption = wide_columns(names, found)
    if columns and (found.step or found.layer):
        return wide_layout(found, columns, assumption, reader)
    named = {simple_name(name): name for name in reversed(names)}
    key = naming.roles.get("key") or first_named(named, KEY_NAMES)
    value = naming.roles.get("value") or first_named(named, ["value"])
    if key and value and found.step:
        return keyed_layout(found, key, value, reader)
    tagged = [name for name in names if len(re.findall(r"\d+", name)) >= 2]
    raise no_match(tagged, "column", where) if found.step and tagged else no_layout(names, found)


def wide_columns(names: Sequence[str], found: ColumnRoles) -> tuple[dict[str, tuple[int | None, int]], str]:
    """The columns with an expert in their names: its layer, None where rows have them, and its number; and why."""
    names = [name for name in names if not name.endswith(OF_CHARTS)]
    pattern = found.naming.pattern
    if pattern is None:
        matches = {name: match for name in names if (match := WIDE.match(name))}
        if matches:
            of_layers = all(match["layer"] for match in matches.values())
            places = {
                name: (int(match["layer"]) if of_layers else None, int(match["expert"]))
                for name, match in matches.items()
            }
            return places, f"columns like {template(next(iter(matches)))} hold the counts of experts"
        bare = [name for name in names if BARE.fullmatch(name)]
        if len(bare) > 1:
            return {name: (None, int(name)) for name in bare}, "columns with bare numbers are experts"
    tags = tags_by(pattern, found.where)
    tagged = {name: place for name in names if (place := tags.match(name, found.where))}
    if tagged:
        return {**tagged}, tags.assumption.replace("tags", "columns")
    alone = {name: int(match[1]) for name in names if (match := EXPERT_ONLY.search(name))}
    if pattern is not None or len(alone) < 2 or len(set(alone.values())) < len(alone):
        return {}, ""
    # Such as tokens_expert_3.
    return {
        name: (None, expert) for name, expert in alone.items()
    }, f"columns like {template(next(iter(alone)))} are experts"


def wide_layout(
    found: ColumnRoles, columns: Mapping[str, tuple[int | None, int]], assumption: str, reader: Values
) -> Layout:
    """The layout of a column for each expert, and for each layer unless the rows have them.

    Raises `TraceError` where two *columns* are of one expert, or not all of one kind.
    """
    of_names = one_kind(list(columns), set(), found.where)
    kind = found.kind or of_names
    again = [place for place, n in Counter(columns.values()).items() if n > 1]
    if again:
        both = [name for name, place in columns.items() if place == again[0]]
        raise TraceError(found.where, f"columns {both[0]} and {both[1]} are of one expert", "choose with --pattern")
    names, of_rows = list(columns), any(layer is None for layer, _ in columns.values())
    layers = np.array([layer or 0 for layer, _ in columns.values()])
    experts = np.array([expert for _, expert in columns.values()])
    found = replace(found, value=None, layer=found.layer if of_rows else None)

    def cells(batch: pa.RecordBatch, row: int, where: str) -> Cells:
        import pyarrow as pa

        raw = [column(batch, name, row, where, gaps=True) for name in names]
        # Rows of other metrics have empty cells here, and so may rows of other layers.
        there = np.stack([values == values for values in raw], axis=1)  # (rows, columns), False for NaN
        counts = np.zeros(there.shape, np.int64)
        for i, (name, values) in enumerate(zip(names, raw)):
            whole = values if there[:, i].all() else np.where(there[:, i], values, 0)
            counts[:, i] = reader.counts(whole, name, row, where, kind)
        if found.step is None or not batch.column(found.step).null_count:
            steps = found.steps(batch, row, where)
        else:  # rows without any value need have no step
            with_value = there.any(axis=1)
            steps = np.zeros(len(there), np.int64)
            steps[with_value] = found.steps(batch.filter(pa.array(with_value)), row, where)
        at = found.layers(batch, row, where)[:, None] if of_rows else layers
        every = slice(None) if there.all() else there.ravel()
        return Cells(
            np.repeat(steps, len(names))[every],
            np.broadcast_to(at, there.shape).ravel()[every],
            np.broadcast_to(experts, there.shape).ravel()[every],
            counts.ravel()[every],
        )

    texts = (assumption, "") if of_rows else ("", assumption)
    return found.layout(names, len(names), cells, reader, *texts)


def keyed_layout(found: ColumnRoles, key: str, value: str, reader: Values) -> Layout:
    """The layout of a scalar in each row, its name in the column *key*."""
    tags = tags_by(found.naming.pattern, found.where)
    seen: set[str] = set()

    def cells(batch: pa.RecordBatch, row: int, where: str) -> Cells:
        import pyarrow as pa

        encoded = batch.column(key).cast(pa.string()).dictionary_encode()
        if encoded.null_count:
            raise null(encoded, key, row, where)
        texts, indices = encoded.dictionary.to_pylist(), to_numpy(encoded.indices)
        matches = [tags.match(text, where) for text in texts]
        kind = one_kind([text for text, match in zip(texts, matches) if match], seen, where)
        matched = np.array([match is not None for match in matches], bool)[indices]
        at = np.array([match or (0, 0) for match in matches], np.int64).reshape(-1, 2)[indices][matched]
        inside = batch.filter(pa.array(matched))
        counts = reader.counts(column(inside, value, row, where), value, row, where, kind)
        return Cells(found.steps(inside, row, where), at[:, 0], at[:, 1], counts)

    return found.layout([key, value], 1, cells, reader)
