"""Tables as loggers write them: which column is what, and the long, nested, wide and keyed layouts of their rows.

Works on Arrow record batches, whatever file they came from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.collector import Collector
from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.arrow import to_numpy
from moetrace.formats.errors import WRITE_AGAIN, library_errors
from moetrace.formats.location import Location, layer_in_name, step_in_name
from moetrace.formats.stream.cells import Cells, Reading
from moetrace.formats.stream.columns import (
    BARE,
    COUNT_NAMES,
    VALUE_NAMES,
    Rows,
    Values,
    is_list,
    is_text,
    simple_name,
)
from moetrace.formats.stream.tags import OF_CHARTS, no_match, one_kind, tags_by, template
from moetrace.trace import Finding

if TYPE_CHECKING:
    import pyarrow as pa

# Names are matched in lower case without punctuation; the first that is there is taken.
STEP_NAMES = (
    "step", "iteration", "iter", "globalstep", "trainstep", "steps", "iterations", "trainerglobalstep",
    "trainglobalstep", "batchidx",
)  # fmt: skip
NUMBERED = ("", "id", "idx", "index", "number", "num", "no")
LAYER_NAMES = (
    *(f"{kind}layer{number}" for kind in ("", "moe") for number in NUMBERED), "layername", "module", "modulename",
)  # fmt: skip
EXPERT_NAMES = tuple(f"expert{number}" for number in NUMBERED)
ROLES = {"step": STEP_NAMES, "layer": LAYER_NAMES, "expert": EXPERT_NAMES}
# Of tables with the name of a scalar in each row, such as MLflow's: key, value, step.
KEY_NAMES = ("key", "tag", "metric", "metricname", "name")
# Columns of an expert, and of a layer where rows have none; and of an expert of the layer that each row names.
WIDE = re.compile(r"^(?:layer_?(?P<layer>\d{1,15})_)?(?:expert|e)_?(?P<expert>\d{1,15})$", re.IGNORECASE)
EXPERT_ONLY = re.compile(r"experts?[_/.\-\[ ]?(\d{1,15})(?!\d)", re.IGNORECASE)
# 256 layers of 512 experts side by side.
MOST_COLUMNS = 1 << 17


@dataclass(frozen=True)
class ValueFormat:
    """The settings of a format whose values may be shares or utilisation.

    *tokens_per_step* turns shares into counts, and with the *experts* of a layer utilisation as well.
    """

    tokens_per_step: int | None = None
    experts: int | None = None

    def values(self) -> Values:
        """How the values of one dump become counts."""
        return Values(Collector(), self.tokens_per_step, self.experts)


@dataclass(frozen=True)
class TableFormat(ValueFormat):
    """The settings of a format with columns: *column* says which is what, ``tokens=routed,step=pass``, or a mapping.

    *pattern* is a regular expression for columns that are each of an expert, with the groups ``layer`` and ``expert``.
    """

    column: str | Mapping[str, str] | None = None
    pattern: str | None = None

    def naming(self, path: Location) -> Naming:
        """What the columns of the file at *path* are called; raises `SettingError` for an unknown role."""
        given = self.column or {}
        pairs = dict(part.partition("=")[::2] for part in given.split(",")) if isinstance(given, str) else given
        for role, name in pairs.items():
            if not name or simple_name(role) not in {*ROLES, *VALUE_NAMES, "key", "value"}:
                known = "--column is role=name with step, layer, expert, tokens or share"
                raise SettingError(f"{known}, not {role + '=' * bool(name) + name!r}")
        roles = {simple_name(role): name for role, name in pairs.items()}
        return Naming(roles, self.pattern, step_in_name(path), layer_in_name(path))


@dataclass(frozen=True)
class Naming:
    """What is known of the columns of a table: the *roles* that were given, and what the file's name says."""

    roles: dict[str, str] = field(default_factory=dict)
    pattern: str | None = None
    step: int | None = None
    layer: int | None = None


@dataclass(frozen=True)
class Layout:
    """How rows become cells: which *columns* to read; *width* cells a row; whether there is no step at all."""

    columns: list[str]
    width: int
    assumptions: tuple[str, ...]
    cells: Callable[[Rows], Cells]
    collector: Collector
    steps_are_implicit: bool = False

    def reading(self, where: str, batches: Callable[[], Iterator[pa.RecordBatch]], rows: int | None = None) -> Reading:
        """The reading of a table whose *batches* are opened anew each time, *rows* in all."""

        def cells() -> Iterator[Cells]:
            row = 0
            with library_errors(where, lambda: f"cannot be read after row {row}", WRITE_AGAIN):
                for batch in batches():
                    if batch.num_rows:
                        yield self.cells(Rows(batch.select(self.columns), row, where))
                    row += batch.num_rows

        return Reading(
            cells,
            rows=None if rows is None else rows * self.width,
            assumptions=self.assumptions,
            where=where,
            collector=self.collector,
            steps_are_implicit=self.steps_are_implicit,
        )


@dataclass(frozen=True)
class ColumnRoles:
    """The columns of the table *where* by their roles, None for those that are not there.

    *kind* is what the values are, *others* are columns that could be the step as well, *lists* those that hold lists.
    """

    step: str | None
    layer: str | None
    expert: str | None
    value: str | None
    kind: str | None
    naming: Naming
    values: Values
    where: str
    others: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()

    def steps(self, rows: Rows) -> NDArray[np.int64]:
        """The steps of the rows, shape (rows,)."""
        if self.step is not None:
            return rows.numbers(self.step)
        return np.full(rows.batch.num_rows, 1 if self.naming.step is None else self.naming.step)

    def layers(self, rows: Rows) -> NDArray[np.int64]:
        """The layers of the rows, shape (rows,)."""
        return np.full(rows.batch.num_rows, self.naming.layer or 0) if self.layer is None else rows.layers(self.layer)

    def layout(
        self, columns: Sequence[str], cells: Callable[[Rows], Cells], width: int = 1, text: str = "", layer: str = ""
    ) -> Layout:
        """The layout of these columns besides step and layer, with what it assumes, such as columns of other names.

        *text* is assumed too, and *layer* where layers are neither in a column nor in the name of the file.
        """
        roles = (("step", self.step), ("layer", self.layer), ("expert", self.expert))
        texts = [f"column {name} is the {role}" for role, name in roles if name and name != role]
        texts += [f"column {self.value} holds the counts"] if self.value else []
        texts += [f"column {name} is left out, since {self.step} is the step" for name in self.others]
        if self.step is None:
            in_name = self.naming.step is not None
            texts.append("the step is the number in the name of the file" if in_name else "no step column: one step")
        if self.layer is None and not layer:
            number = self.naming.layer
            none = "no layer column: one layer, number 0"
            texts.append(none if number is None else f"layer {number}, by the name of the file")
        texts += [text for text in (layer, text) if text]
        read = dict.fromkeys(name for name in (self.step, self.layer, *columns) if name)
        implicit = self.step is None and self.naming.step is None
        return Layout(list(read), width, tuple(texts), cells, self.values.collector, implicit)


def table_reading(
    where: str,
    open_batches: Callable[[], Any],
    values: Values,
    naming: Naming,
    assumed: tuple[str, ...] = (),
    findings: tuple[Finding, ...] = (),
) -> Reading:
    """The reading of a table that *open_batches* opens anew each time, as an Arrow batch reader."""
    with library_errors(where, "cannot be read", WRITE_AGAIN), closing(open_batches()) as batches:
        schema, first = batches.schema, next(iter(batches), None)
    layout = match_layout(schema, where, values, naming, first)

    def every() -> Iterator[Any]:
        with closing(open_batches()) as batches:
            yield from batches

    reading = layout.reading(where, every)
    return replace(reading, assumptions=(*assumed, *reading.assumptions), findings=findings)


def match_layout(schema: pa.Schema, where: str, values: Values, naming: Naming, first: pa.RecordBatch | None) -> Layout:
    """The layout whose columns are there, text looked at in the rows of *first*; raises `TraceError` when none is."""
    found = match_columns(schema, where, values, naming, first)
    names = schema.names
    if found.value and (found.expert or found.value in found.lists):
        if naming.pattern:
            raise SettingError(f"{where} names experts in rows, and has no use for --pattern")
        return nested_layout(found, first) if found.value in found.lists else long_layout(found)
    columns, text = wide_columns(names, found)
    if columns and (found.step or found.layer):
        return wide_layout(found, columns, text)
    named = {simple_name(name): name for name in reversed(names)}
    key = naming.roles.get("key") or first_named(named, KEY_NAMES)
    value = naming.roles.get("value") or first_named(named, ["value"])
    if key and value and found.step:
        return keyed_layout(found, key, value)
    tagged = [name for name in names if len(re.findall(r"\d+", name)) >= 2]
    raise no_match(tagged, "column", where) if found.step and tagged else no_layout(names, found)


def first_named(named: Mapping[str, str], wanted: Sequence[str]) -> str | None:
    """The column whose simple name comes first among *wanted*."""
    return next((named[name] for name in wanted if name in named), None)


def match_columns(
    schema: pa.Schema, where: str, values: Values, naming: Naming, first: pa.RecordBatch | None
) -> ColumnRoles:
    """The columns by their roles; raises `TraceError` for one that is not there, or there twice, or two of counts."""
    try:
        names = schema.names
    except UnicodeDecodeError as error:
        raise TraceError(where, "has a column whose name is not UTF-8", "save it as UTF-8") from error
    absent = [name for name in naming.roles.values() if name not in names]
    if absent:
        raise TraceError(where, f"has no column {absent[0]} among {shown(names)}", "check --column")
    named = {simple_name(name): name for name in reversed(names)}
    step, layer, expert = (naming.roles.get(role) or first_named(named, wanted) for role, wanted in ROLES.items())
    kind = next((role for role in naming.roles if role in VALUE_NAMES), None)
    value = naming.roles[kind] if kind else first_named(named, VALUE_NAMES)
    steps = [named[name] for name in STEP_NAMES if name in named and "step" not in naming.roles]
    lists = []
    for i, (name, type_) in enumerate(zip(names, schema.types)):
        # Text holds lists where the first one is written like one.
        texts = first.column(i).slice(0, 100).to_pylist() if first is not None and is_text(type_) else []
        if is_list(type_) or next((text for text in texts if text), "").lstrip().startswith("["):
            lists.append(name)
    if kind is None and (expert or lists):
        taken = {step, layer, expert, *steps}
        candidates = [name for name in dict.fromkeys(names) if name not in taken and simple_name(name) in COUNT_NAMES]
        if lists and not (expert and value and value not in lists):
            candidates = [name for name in candidates if name in lists] or lists
        if len(candidates) > 1:
            ways = " or ".join(f"--column tokens={name}" for name in candidates[:2])
            raise TraceError(where, f"columns {' and '.join(candidates)} may be the counts", f"say which with {ways}")
        value = candidates[0] if candidates else value
    twice = [name for name in (step, layer, expert, value) if name and names.count(name) > 1]
    if twice:
        raise TraceError(where, f"has {names.count(twice[0])} columns called {twice[0]}", "give each a name of its own")
    if kind is None and expert and value and value not in lists and first is not None and first.num_rows:
        text = first.column(value)[0].as_py()
        kind = "share" if isinstance(text, str) and text.strip().endswith("%") else None
    return ColumnRoles(step, layer, expert, value, kind, naming, values, where, tuple(steps[1:]), tuple(lists))


def no_layout(names: Sequence[str], found: ColumnRoles) -> TraceError:
    """The error that the columns make no table of counts, with the line that takes them as one."""
    known = {"step": found.step, "layer": found.layer, "expert": found.expert, "tokens": found.value}
    names = [name or "(unnamed)" for name in names]
    left = [name for name in names if name not in known.values()]
    unknown = [role for role, name in known.items() if name is None and role != "layer"]
    if len(left) == len(unknown) == 1:
        known[unknown[0]] = left[0]
    columns = []
    for role, name in known.items():
        text = name or ("0" if role == "layer" else role.upper())  # in capitals what is to be filled in
        text = text if re.fullmatch(r"\w+", text) else '"' + text.replace('"', '""') + '"'
        columns.append(text if text == role else f"{text} AS {role}")
    sql = f'SELECT {", ".join(columns)} FROM "{found.where}"'
    query = f"rows of any form go with --sql {sql!r} (docs/recipes.md)"
    if found.step is None:
        problem = f"has no column for the step among {shown(names)}"
        return TraceError(found.where, problem, f"name one `step`, or say --column step=NAME; {query}")
    return TraceError(
        found.where,
        f"no layout fits its columns {shown(names)}",
        "long needs step, layer, expert, tokens; wide step, layer, expert_0 ...; nested step, layer, counts; "
        f"--column tokens=NAME says which is which; choices of tokens go with --from routing; {query}",
    )


def few_columns(n: int, where: str) -> None:
    """Raise `TraceError` for a table of more than `MOST_COLUMNS` columns, before each of them costs time and memory."""
    if n > MOST_COLUMNS:
        problem = f"has {n:,} columns, and at most {MOST_COLUMNS:,} are read"
        raise TraceError(where, problem, "log one row for each step and layer")


# --- layouts -----------------------------------------------------------------------------------


def long_layout(found: ColumnRoles) -> Layout:
    """The layout of a row for each step, layer and expert."""
    expert, value = found.expert or "", found.value or ""

    def cells(rows: Rows) -> Cells:
        counts = found.values.counts(rows.column(value), value, rows.first, rows.where, found.kind)
        return Cells(found.steps(rows), found.layers(rows), rows.numbers(expert), counts)

    return found.layout([expert, value], cells)


def nested_layout(found: ColumnRoles, first: pa.RecordBatch | None) -> Layout:
    """The layout of lists of experts, or of layers of experts, in the rows."""
    value = found.value or ""
    of_layers = False
    if found.layer is None and first is not None and first.num_rows:
        there = first.filter(first.column(value).is_valid()).slice(0, 1)
        of_layers = is_list(Rows(there, 0, found.where).lists(value).type.value_type)

    def flattened(rows: Rows, lists: Any) -> tuple[Any, NDArray[np.int64], NDArray[np.int64]]:
        """The values one after the other, how many each list holds, and the place of each value in its list."""
        import pyarrow.compute as pc

        if lists.null_count:
            raise rows.null(value, lists)
        flat = lists.flatten()
        sizes = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        if (sizes == 0).any():
            at = rows.place(value, int(np.argmax(sizes == 0)))
            raise TraceError(at, "is an empty list", "log a count for each expert")
        if flat.null_count:
            null = flat.is_null().to_numpy(zero_copy_only=False).argmax()
            at = rows.place(value, int(np.searchsorted(np.cumsum(sizes), null, "right")))
            raise TraceError(at, "holds a null", "counts are whole numbers")
        return flat, sizes, np.arange(len(flat)) - np.repeat(np.cumsum(sizes) - sizes, sizes)

    def cells(rows: Rows) -> Cells:
        lists, steps, layers = rows.lists(value), found.steps(rows), found.layers(rows)
        row_of = np.arange(len(lists))
        flat, sizes, place = flattened(rows, lists)
        if is_list(flat.type):  # layers by experts
            if found.layer is not None:
                raise TraceError(rows.place(value), "holds lists of lists and a layer", "log one list a layer")
            row_of = np.repeat(row_of, sizes)
            steps, layers = steps[row_of], place
            flat, sizes, place = flattened(rows, flat)
        of_list = np.repeat(np.arange(len(sizes)), sizes)
        numbers = flat.to_numpy(zero_copy_only=False)
        try:
            counts = found.values.counts(numbers, value, rows.first, rows.where, found.kind)
        except TraceError:
            for i in range(len(lists)):  # once more row by row, only to name the first bad one
                one = numbers[row_of[of_list] == i][None]
                found.values.counts(one, value, rows.first + i, rows.where, found.kind)
            raise
        return Cells(steps[of_list], layers[of_list], place, counts)

    text = "lists of lists are layers of experts, numbered from 0" if of_layers else ""
    return found.layout([value], cells, layer=text)


def wide_columns(names: Sequence[str], found: ColumnRoles) -> tuple[dict[str, tuple[int | None, int]], str]:
    """The columns with an expert in their names: its layer, None where rows have them, and its number; and why."""
    names = [name for name in names if not name.endswith(OF_CHARTS)]
    pattern = found.naming.pattern
    if pattern is None:
        matches = {name: match for name in names if (match := WIDE.match(name))}
        if matches:
            layered = all(match["layer"] for match in matches.values())
            places = {name: (int(m["layer"]) if layered else None, int(m["expert"])) for name, m in matches.items()}
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
    text = f"columns like {template(next(iter(alone)))} are experts"
    return {name: (None, expert) for name, expert in alone.items()}, text


def wide_layout(found: ColumnRoles, columns: Mapping[str, tuple[int | None, int]], text: str) -> Layout:
    """The layout of a column for each expert, and for each layer unless the rows have them."""
    kind = found.kind or one_kind(list(columns), set(), found.where)
    again = [place for place, n in Counter(columns.values()).items() if n > 1]
    if again:
        both = [name for name, place in columns.items() if place == again[0]]
        raise TraceError(found.where, f"columns {both[0]} and {both[1]} are of one expert", "choose with --pattern")
    names, of_rows = list(columns), any(layer is None for layer, _ in columns.values())
    layers = np.array([layer or 0 for layer, _ in columns.values()])
    experts = np.array([expert for _, expert in columns.values()])
    found = replace(found, value=None, layer=found.layer if of_rows else None)

    def cells(rows: Rows) -> Cells:
        import pyarrow as pa

        raw = [rows.column(name, gaps=True) for name in names]
        # Rows of other metrics have empty cells here, and so may rows of other layers.
        there = np.stack([values == values for values in raw], axis=1)  # (rows, columns), False for NaN
        counts = np.zeros(there.shape, np.int64)
        for i, (name, values) in enumerate(zip(names, raw)):
            whole = values if there[:, i].all() else np.where(there[:, i], values, 0)
            counts[:, i] = found.values.counts(whole, name, rows.first, rows.where, kind)
        if found.step is None or not rows.batch.column(found.step).null_count:
            steps = found.steps(rows)
        else:  # rows without any value need have no step
            with_value = there.any(axis=1)
            steps = np.zeros(len(there), np.int64)
            steps[with_value] = found.steps(rows._replace(batch=rows.batch.filter(pa.array(with_value))))
        at = found.layers(rows)[:, None] if of_rows else layers
        every = slice(None) if there.all() else there.ravel()
        return Cells(
            np.repeat(steps, len(names))[every],
            np.broadcast_to(at, there.shape).ravel()[every],
            np.broadcast_to(experts, there.shape).ravel()[every],
            counts.ravel()[every],
        )

    texts = {"text": text} if of_rows else {"layer": text}
    return found.layout(names, cells, len(names), **texts)


def keyed_layout(found: ColumnRoles, key: str, value: str) -> Layout:
    """The layout of a scalar in each row, its name in the column *key*."""
    tags = tags_by(found.naming.pattern, found.where)
    seen: set[str] = set()

    def cells(rows: Rows) -> Cells:
        import pyarrow as pa

        encoded = rows.batch.column(key).cast(pa.string()).dictionary_encode()
        if encoded.null_count:
            raise rows.null(key, encoded)
        texts, indices = encoded.dictionary.to_pylist(), to_numpy(encoded.indices)
        matches = [tags.match(text, rows.where) for text in texts]
        kind = one_kind([text for text, match in zip(texts, matches) if match], seen, rows.where)
        matched = np.array([match is not None for match in matches], bool)[indices]
        at = np.array([match or (0, 0) for match in matches], np.int64).reshape(-1, 2)[indices][matched]
        inside = rows._replace(batch=rows.batch.filter(pa.array(matched)))
        counts = found.values.counts(inside.column(value), value, rows.first, rows.where, kind)
        return Cells(found.steps(inside), at[:, 0], at[:, 1], counts)

    return found.layout([key, value], cells)
