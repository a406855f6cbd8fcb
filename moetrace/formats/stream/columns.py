"""Columns as arrays: numbers as they are or as people write them, lists, counts; and the numbers in their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as types
from numpy.typing import NDArray

from moetrace.doctor import HALVES, Collector
from moetrace.errors import TraceError, shown
from moetrace.formats.sources import library_errors
from moetrace.formats.stream.cells import Cells, Format, Reading, to_numpy
from moetrace.formats.stream.text import json_of
from moetrace.trace import FLOAT64_EXACT, Counts, whole_counts

COUNT_NAMES = (
    "tokens", "count", "counts", "load", "ntokens", "numtokens", "tokencount", "tokensperexpert", "expertcount",
    "expertcounts", "expertload", "expertdistribution",
)  # fmt: skip
SHARE_NAMES = ("share", "shares", "proportion", "fraction", "prob", "frequency")
# The count of an expert over the mean count of its layer.
UTILISATION_NAMES = ("utilisation", "utilization", "expertutilization", "expertutilisation")
PHYSICAL_NAMES = ("physicalcount", "globalphysicalcount", "physicalload")
VALUE_NAMES = (*COUNT_NAMES, *SHARE_NAMES, *UTILISATION_NAMES, *PHYSICAL_NAMES)
# How far a share times the tokens of a step may be from a whole count: the rounding error of a
# float32 share at 500,000 tokens is 0.03.
WHOLE_TOLERANCE = 0.05
# Rows that it takes to tell numbers of experts from counts, and where no row has a number twice; and zeros and ones.
LEAST_ROWS, LEAST_CHOSEN, LEAST_MAPPED = 100, 16, 32
# Experts that a layer may have, and the part of tokens that may seem to choose one twice.
MOST_CHOSEN = 1024
TWICE = 0.02
# Totals of steps may differ by so much of their mean: dropped tokens and ragged batches move them by a few percent,
# numbers of experts that are added up by far more.
TOTALS_VARY = 0.1
# 256 layers of 512 experts side by side.
MOST_COLUMNS = 1 << 17
# In seconds since 1970 the spring of 1973: lower numbers are how long something took.
LEAST_SECONDS = 10**8
WHOLE_ROWS = "every row needs a value; --where COLUMN=VALUE takes some rows alone"
# Between a word and its number, also as in labels of Prometheus: layer="3".
BETWEEN = r"(?:[_/.\-\[ ]|=\"?)?"
PATTERN = rf"layers?{BETWEEN}(?P<layer>\d{{1,15}}).*?experts?{BETWEEN}(?P<expert>\d{{1,15}})"
EXPERT_FIRST = rf"experts?{BETWEEN}(?P<expert>\d{{1,15}}).*?layers?{BETWEEN}(?P<layer>\d{{1,15}})"
# Of a tag whose values are the counts of all experts.
VECTOR = re.compile(r"layers?[_/.\-\[ ]?(?P<layer>\d{1,15})", re.IGNORECASE)
# What an export of a chart adds to each of its columns.
OF_CHARTS = ("__MIN", "__MAX")
# A number of a step, a layer or an expert; and one with commas between its thousands, as spreadsheets write it.
BARE = re.compile(r"\d{1,15}")
BY_COMMAS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+")
# The number of a layer in the name of a module: what follows a word for it, or else the only number.
OF_LAYER = re.compile(r"(?:layers?|blocks?|(?<![a-z])h)[._/\[-]?(\d{1,15})", re.IGNORECASE)


def simple_name(name: str) -> str:
    """A column's name in lower case, without punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def doubt_of(head: NDArray[Any] | list[Any], by_token: bool = False) -> str:
    """What numbers (rows, [layers,] numbers) may be instead of counts: ``choices`` of tokens, a ``map`` of such, or "".

    By their beginning: tokens of steps add up to about the same, and to the same in all layers of one; numbers of
    experts do not, and a token chooses none twice; it may in several layers, where a row is a token *by_token*. A map
    has a one where a token chose an expert.
    """
    try:
        head = np.asarray(head)
    except ValueError:  # lists of unlike lengths
        return ""
    whole = head.dtype.kind in "biu" or (head.dtype.kind == "f" and bool((head == np.rint(head)).all()))
    if head.ndim not in (2, 3) or not whole or 0 in head.shape:
        return ""
    head = head.astype(np.int64)
    by_layer = head.ndim == 3 and head.shape[1] > 1 and head.shape[0] >= LEAST_CHOSEN
    head = head if by_layer else head.reshape(-1, head.shape[-1])
    rows, last = head.shape[0], head.shape[-1]
    lowest, highest, totals = int(head.min()), int(head.max()), head.sum(axis=-1)
    if rows >= LEAST_MAPPED and (lowest, highest) == (0, 1) and last > 2 and (totals == totals.flat[0]).all():
        return "map"
    if not -1 <= lowest <= highest < MOST_CHOSEN or last >= MOST_CHOSEN:
        return ""
    ordered = np.sort(head, axis=-1)
    twice = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] > 0)).any(axis=-1)
    alone = ordered[..., 0] == ordered[..., -1]  # rows that nothing was written to
    chosen = last > 1 and np.mean(twice & ~alone) < TWICE
    if rows < (LEAST_CHOSEN if chosen else LEAST_ROWS) or not (chosen or by_layer or by_token):
        return ""
    spread = totals.std(axis=1).mean() if by_layer else totals.std()
    dense = len(np.unique(head)) > highest // 2
    return "choices" if lowest == -1 or (dense and spread > TOTALS_VARY * totals.mean()) else ""


def kind_of(kind: Any) -> str:
    """Whether an Arrow type is one of ``text``, ``number`` or ``list``, else an empty text."""
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return "list"
    return "number" if types.is_integer(kind) or types.is_floating(kind) else ""


def flattened(lists: Any) -> tuple[Any, list[NDArray[np.int64]], bool]:
    """The values of nested Arrow *lists*, the sizes of lists by level, 0 for nulls, and whether there are any nulls."""
    levels, nulls = [], False
    while kind_of(lists.type) == "list":
        levels.append(pc.fill_null(lists.value_lengths(), 0).to_numpy(zero_copy_only=False).astype(np.int64))
        lists, nulls = lists.flatten(), nulls or lists.null_count > 0
    return lists, levels, nulls


def places(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each value in its list, of lists of *sizes* one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


class Rows(NamedTuple):
    """A batch of rows of the table *where*; *first* is the number of its first row."""

    batch: pa.RecordBatch
    first: int
    where: str

    def place(self, name: str, row: int | None = None) -> str:
        """Where an error is: a column, and a row of this batch."""
        return f"{self.where}, column {name}" + ("" if row is None else f", row {self.first + row}")

    def refuse_nulls(self, name: str, values: Any) -> None:
        """Raise `TraceError` for the first gap in the *values* of a column."""
        if values.null_count:
            first = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
            raise TraceError(self.place(name, first), "is null (or NaN)", WHOLE_ROWS)

    def coded(self, name: str) -> tuple[list[str], NDArray[np.int64]]:
        """The different values of a column as texts, and which of them each row has, shape (rows,)."""
        encoded = self.batch.column(name).dictionary_encode("encode")
        return [str(value) for value in encoded.dictionary.to_pylist()], to_numpy(encoded.indices).astype(np.int64)

    def of(self, only: Mapping[str, str]) -> Rows:
        """The rows with these values alone, by column."""
        keep = np.ones(self.batch.num_rows, bool)
        for name, value in only.items():
            texts, codes = self.coded(name)
            keep &= np.array([text.lower() == value.lower() for text in texts], bool)[codes]
        return self if keep.all() else self._replace(batch=self.batch.filter(pa.array(keep)))

    def check_one(self, name: str, seen: set[str], more: str = "") -> None:
        """Raise `TraceError` where a column has other values than those *seen*; *more* is a way beside --where."""
        seen.update(self.coded(name)[0])
        if len(seen) > 1:
            one, other = sorted(seen)[:2]
            way_out = f"take one with --where {name}={one}{more}"
            raise TraceError(self.where, f"has {one} and {other} in the column {name}", way_out)

    def column(self, name: str, gaps: bool = False) -> NDArray[Any]:
        """A column (rows,), nulls as NaN if there may be *gaps*; else `TraceError`."""
        values = self.batch.column(name)
        if not gaps:
            self.refuse_nulls(name, values)
        if not values.null_count and kind_of(values.type) == "number":
            return to_numpy(values)
        if pa.types.is_null(values.type):
            return np.full(len(values), np.nan)
        if pa.types.is_decimal(values.type):  # as databases add up integers
            values = values.cast(pa.int64() if values.type.scale == 0 else pa.float64())
        try:
            found = np.asarray(values.to_numpy(zero_copy_only=False))
        except (TypeError, NotImplementedError):
            raise TraceError(self.place(name), f"holds {values.type}", "give numbers") from None
        return self._as_written(name, found) if kind_of(values.type) == "text" else found

    def _as_written(self, name: str, texts: NDArray[Any]) -> NDArray[Any]:
        """Texts that are numbers as spreadsheets write them as numbers, percentages as shares; other texts stay.

        A comma sets thousands apart where all of them do, and is a decimal comma otherwise.
        """
        stripped = ["" if text is None else re.sub(r"[\s\u00a0\u202f']", "", text) for text in texts]
        percents = np.array([text.endswith("%") for text in stripped])
        if percents.any() and not percents[[bool(text) for text in stripped]].all():
            at = self.place(name, int(np.argmax(percents)))
            raise TraceError(at, "is a percentage, and others are not", "write one kind")
        plain = [text.rstrip("%") for text in stripped]
        thousands = all(BY_COMMAS.fullmatch(text) for text in plain if "," in text)
        try:
            numbers = [float(text.replace(",", "" if thousands else ".") or "nan") for text in plain]
        except ValueError:
            for row in np.flatnonzero(texts == name)[:1]:
                problem = "is the header again, as where files were put together"
                way_out = f"leave it out: awk 'NR == 1 {{h = $0}} NR == 1 || $0 != h' {self.where} > NEW.csv"
                raise TraceError(self.place(name, row), problem, way_out) from None
            return texts
        return np.array(numbers) / (100 if percents.any() else 1)

    def numbers(self, name: str, of_layers: bool = False) -> NDArray[np.int64]:
        """A column of steps, layers or experts (rows,): whole numbers, or texts with one each, like ``expert_3``.

        Texts *of_layers* may be names of modules such as ``model.layers.3.mlp`` with experts. Raises `TraceError` for
        anything but whole numbers.
        """
        values = self.batch.column(name)
        if kind_of(values.type) == "text" and not values.null_count:
            encoded = values.dictionary_encode()  # each different text is looked at once
            found: list[int | None] = []
            for text in encoded.dictionary.to_pylist():
                every = [text] if re.fullmatch(r"-\d{1,15}", text) else BARE.findall(text)
                if of_layers and (named := OF_LAYER.search(text)):
                    every = [named[1]]
                elif of_layers and len(every) != 1:
                    raise TraceError(self.place(name), f"names no layer in {text[:60]!r}", "name layers by numbers")
                found.append(int(every[0]) if len(every) == 1 else None)
            if None not in found:
                by_text: NDArray[np.int64] = np.array(found, np.int64)[to_numpy(encoded.indices)]
                return by_text
        array = self.column(name)
        # Hive partitions and dictionaries arrive as text; lists of one number are none.
        if array.dtype.kind == "O" and not values.type.num_fields:
            with suppress(TypeError, ValueError, OverflowError):
                array = array.astype(np.int64)
        if array.dtype.kind not in "iuf":
            held = "text" if array.dtype.kind == "O" else array.dtype
            raise TraceError(self.place(name), f"holds {held}, not numbers", "give whole numbers")
        if array.dtype.kind == "f":
            with np.errstate(invalid="ignore"):
                bad = np.flatnonzero(~(np.abs(array) < FLOAT64_EXACT) | (np.floor(array) != array))
            for row in bad[:1]:
                raise TraceError(self.place(name, row), f"{array[row]} is not a whole number", "give whole numbers")
        return array.astype(np.int64, copy=False)

    def times(self, name: str) -> NDArray[np.int64]:
        """A column of a clock (rows,), in microseconds, or in its own unit where it has numbers."""
        array = self.column(name)
        if array.dtype.kind == "M":
            return array.astype("datetime64[us]").astype(np.int64)
        seconds = self.numbers(name)
        for row in np.flatnonzero(seconds < LEAST_SECONDS)[:1]:
            problem = f"{seconds[row]} is no date, and there is no step"
            raise TraceError(self.place(name, row), problem, "say which column is the step with --column step=NAME")
        return seconds

    def lists(self, name: str) -> pa.Array:
        """A column of lists; texts such as ``[3, 0, 5]`` become lists. Raises `TraceError` for any other text."""
        values = self.batch.column(name)
        self.refuse_nulls(name, values)
        if kind_of(values.type) == "list":
            return values
        if kind_of(values.type) != "text":
            raise TraceError(self.place(name), f"holds {values.type}", "give a list in each row")
        texts = values.to_pylist()
        lists = [json_of(text) for text in texts]
        for i, text in enumerate(texts):
            if not isinstance(lists[i], list):
                way_out = "write lists as [3, 0, 5], or take them apart with --sql (docs/recipes.md)"
                raise TraceError(self.place(name, i), f"is not a list of numbers: {text[:60]!r}", way_out)
        with library_errors(self.place(name), "holds lists that are not of numbers", "write counts in them"):
            return pa.array(lists)

    def doubt(self, name: str) -> str:
        """What the lists in a column may be instead of counts, by its first rows."""
        there = self.batch.filter(self.batch.column(name).is_valid()).slice(0, LEAST_ROWS)
        return doubt_of(self._replace(batch=there).lists(name).to_pylist())


def as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers of bfloat16, which NumPy holds as two bytes each, as those of 32 bits."""
    return (np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Values:
    """How the values of the dump *where* become counts; *collector* gets the findings about them.

    *tokens* is what a layer routes in a step, *experts* how many a layer has, where they are known.
    """

    where: str
    tokens: float | None = None
    experts: int | None = None
    collector: Collector = field(default_factory=Collector)

    def reading(self, cells: Callable[[], Iterator[Cells]], **known: Any) -> Reading:
        """What streams the *cells* of the dump, with what else is *known* of it."""
        return Reading(cells, where=self.where, collector=self.collector, **known)

    def counts(self, values: NDArray[Any], column: str, row: int = 0, kind: str | None = None) -> Counts:
        """*values* as counts of the same shape; shares become counts where the tokens of a step are known.

        *row* is the number of the first of them, for the `TraceError` that names the first bad one, and *kind* says
        what they are where the name of their column does not.
        """
        simple, at = simple_name(kind or column), f"{self.where}, column {column}"
        if values.dtype.kind in "OUS":
            raise TraceError(at, "holds text, not numbers", "give counts of tokens, as docs/recipes.md shows")
        if values.dtype.kind == "V" and values.dtype.itemsize == 2:  # as NumPy has bfloat16
            values = as_float32(values)
            self.collector.note_half(values, 2 ** HALVES["bfloat16"], "bfloat16", column, row)
        elif values.dtype == np.float16:
            self.collector.check_precision(values, column, row)
            values = values.astype(np.float32)
        if simple in PHYSICAL_NAMES:
            self.collector.note("physical", f"column {column}", "counts are of physical experts, replicas apart")
        if simple in UTILISATION_NAMES and (self.tokens is None or self.experts is None):
            problem = "holds utilisation, the load over the mean load of the layer, and no totals"
            raise TraceError(at, problem, "give them with --tokens-per-step N and --experts N, or log counts")
        if simple in SHARE_NAMES and self.tokens is None:
            raise TraceError(at, "holds shares, not counts", "give the tokens of a step with --tokens-per-step N")
        named = simple in (*SHARE_NAMES, *UTILISATION_NAMES)
        # Where the name does not say it, numbers up to 1 are shares of the tokens that were given.
        look_like_shares = values.dtype.kind == "f" and values.size and values.max() <= 1
        if self.tokens is None or not (named or look_like_shares):
            self.collector.check_precision(values, column, row)
            return whole_counts(values, self.where, column, row)
        tokens_per_unit = self.tokens / (self.experts or 1) if simple in UTILISATION_NAMES else self.tokens
        scaled = values.astype(np.float64) * tokens_per_unit
        near = np.rint(scaled)
        bad = np.argwhere(~(np.abs(scaled - near) <= WHOLE_TOLERANCE) | (near < 0))
        if bad.size:
            first = tuple(int(i) for i in bad[0])
            problem = f"a share of {values[first]} of {tokens_per_unit} tokens is not a whole count"
            way_out = "check --tokens-per-step: it is the tokens routed in one layer in one step (times top-k)"
            raise TraceError(f"{at}, row {row + first[0]}", problem, way_out)
        return near.astype(np.int64)


@dataclass(frozen=True)
class ValueFormat(Format):
    """The settings of a format whose values may be shares or utilisation.

    *tokens_per_step* turns shares into counts, and with the *experts* of a layer utilisation as well.
    """

    tokens_per_step: int | None = None
    experts: int | None = None

    def values(self, where: object) -> Values:
        """How the values of one dump become counts."""
        return Values(str(where), self.tokens_per_step, self.experts)


def pairs_of(given: str | Mapping[str, str] | None) -> dict[str, str]:
    """A mapping written as ``a=b,c=d``, or as it is."""
    return dict(part.partition("=")[::2] for part in given.split(",")) if isinstance(given, str) else dict(given or {})


@dataclass(frozen=True)
class Tags:
    """How tags of *where* are matched: the first of *patterns* that is found in one gives its layer and its expert."""

    patterns: tuple[re.Pattern[str], ...]
    assumption: str
    where: str

    def match(self, tag: str) -> tuple[int, int] | None:
        """The layer, 0 where none is meant, and the expert in *tag*, None where it names none."""
        for pattern in self.patterns:
            found = pattern.search(tag) if "expert" in pattern.groupindex else None
            if found is not None:
                layer = self._number(found, "layer") if "layer" in pattern.groupindex else 0
                return layer, self._number(found, "expert")
        return None

    def layer(self, tag: str) -> int | None:
        """The layer in the tag of a vector, None where it names none."""
        named = [pattern for pattern in self.patterns if set(pattern.groupindex) == {"layer"}]
        found = next((found for pattern in named or [VECTOR] if (found := pattern.search(tag))), None)
        return None if found is None else self._number(found, "layer")

    def _number(self, match: re.Match[str], name: str) -> int:
        text = match[name] or ""
        if not text.isdecimal() or len(text) > 15:
            at = f"{self.where}, tag {match.string[:80]}"
            raise TraceError(at, f"has {text[:80]!r} as its {name}", "check --pattern")
        return int(text)


def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """The *pattern* of a user, without regard to case; raises `TraceError` for an invalid one."""
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise TraceError(where, f"--pattern is not a regular expression: {error}", "see the Python manual") from None


def tags_by(pattern: str | None, where: str) -> Tags:
    """The tags that *pattern* matches, the usual ones if it is None; raises `TraceError` where it can match none."""
    texts = [pattern] if pattern else [PATTERN, EXPERT_FIRST]
    patterns = tuple(compiled(text, where) for text in texts)
    if re.search(r"expert[^a-z]*\(\?P<layer>|layer[^a-z]*\(\?P<expert>", texts[0], re.IGNORECASE):
        problem = "--pattern takes an expert for a layer, or a layer for an expert"
        raise TraceError(where, problem, "exchange its groups")
    if not {"layer", "expert"} & set(patterns[0].groupindex):
        raise TraceError(where, "--pattern names no layer and expert", "use (?P<layer>\\d+) and (?P<expert>\\d+)")
    return Tags(patterns, f"tags are matched by {' or '.join(texts)}", where)


def template(tag: str) -> str:
    """*tag* with # for its numbers: what tags of one kind have in common."""
    return re.sub(r"\d+", "#", tag)


def one_kind(tags: Sequence[str], seen: set[str], where: str) -> str:
    """What the values of *tags* are, utilisation, shares, or else counts; *seen* is what all so far have in common.

    Raises `TraceError` for two kinds.
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
        names = ["layer", "expert"]
        if re.search("expert.*layer", numbered[0], re.IGNORECASE):
            names.reverse()
        groups = [f"(?P<{names[0]}>\\d+)", *["\\d+"] * (len(parts) - 3), f"(?P<{names[1]}>\\d+)", ""]
        way_out = f"give a pattern such as --pattern '{''.join(map(str.__add__, parts, groups))}'"
    seen = shown(sorted(set(map(template, tags))), 5) if tags else "none"
    return TraceError(where, f"holds no rows: no {what} names a layer and an expert; there are {seen}", way_out)


def no_layout(names: list[str], known: dict[str, str | None], where: str) -> TraceError:
    """The error that columns of these *names* make no table of counts, with the line that takes them as one.

    *known* are the columns of the step, the layer, the expert and the tokens, as far as they are there.
    """
    step = known["step"]
    if all(re.fullmatch(r"-?\d+(\.\d+)?", name) for name in names):
        way_out = "begin it with the names of its columns, such as layer,expert_0,expert_1"
        return TraceError(where, "has no header: its first line holds numbers", way_out)
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
    sql = f'SELECT {", ".join(columns)} FROM "{where}"'
    query = f"rows of any form go with --sql {sql!r} (docs/recipes.md)"
    if step is None:
        problem = f"has no column for the step among {shown(names)}"
        return TraceError(where, problem, f"name one `step`, or say --column step=NAME; {query}")
    return TraceError(
        where,
        f"no layout fits its columns {shown(names)}",
        "long needs step, layer, expert, tokens; wide step, layer, expert_0 ...; nested step, layer, counts; "
        f"--column tokens=NAME says which is which; choices of tokens go with --from routing; {query}",
    )


def few_columns(n: int, where: str) -> None:
    """Raise `TraceError` for a table of more than `MOST_COLUMNS` columns, before each of them costs time and memory."""
    if n > MOST_COLUMNS:
        problem = f"has {n:,} columns, and at most {MOST_COLUMNS:,} are read"
        raise TraceError(where, problem, "log one row for each step and layer")
