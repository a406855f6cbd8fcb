"""Tables as loggers write them: a long, wide or nested layout, told from the names of the columns.

Works on Arrow record batches, whatever file they came from.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.collector import Collector
from moetrace.errors import TraceError, shown
from moetrace.formats.arrow import to_numpy
from moetrace.formats.stream.cells import Cells
from moetrace.trace import FLOAT64_EXACT, Counts, whole_counts

if TYPE_CHECKING:
    import pyarrow as pa

# Names are matched in lower case without punctuation; the first that is there is taken.
STEP_NAMES = ("step", "iteration", "iter", "globalstep", "trainstep", "steps")
LAYER_NAMES = ("layer", "layerid", "layeridx", "layerindex", "layernumber", "moelayer")
EXPERT_NAMES = ("expert", "expertid", "expertidx", "expertindex")
COUNT_NAMES = ("tokens", "count", "counts", "load", "ntokens", "numtokens", "tokencount", "tokensperexpert")
SHARE_NAMES = ("share", "shares", "proportion", "fraction", "prob", "frequency")
# The count of an expert over the mean count of its layer.
UTILISATION_NAMES = ("utilisation", "utilization", "expertutilization", "expertutilisation")
PHYSICAL_NAMES = ("physicalcount", "globalphysicalcount", "physicalload")
VALUE_NAMES = (*COUNT_NAMES, *SHARE_NAMES, *UTILISATION_NAMES, *PHYSICAL_NAMES)
WIDE = re.compile(r"^(?:layer_?(?P<layer>\d{1,15})_)?(?:expert|e)_?(?P<expert>\d{1,15})$", re.IGNORECASE)
# 256 layers of 512 experts side by side.
MOST_COLUMNS = 1 << 17
# How far a share times the tokens of a step may be from a whole count: the rounding error of a
# float32 share at 500,000 tokens is 0.03.
WHOLE_TOLERANCE = 0.05


@dataclass(frozen=True)
class Layout:
    """Which columns to read and how to turn a batch of rows into cells.

    *width* is the number of cells of one row, where the schema tells.
    """

    columns: list[str]
    width: int
    assumptions: tuple[str, ...]
    cells: Callable[[pa.RecordBatch, int, str], Cells]
    collector: Collector


@dataclass(frozen=True)
class TableFormat:
    """The settings of a format whose values may be shares or utilisation.

    *tokens_per_step* turns shares into counts, and with the *experts* of a layer utilisation as well.
    """

    tokens_per_step: int | None = None
    experts: int | None = None

    def values(self) -> Values:
        """How the values of one dump become counts."""
        return Values(Collector(), self.tokens_per_step, self.experts)


def match_layout(schema: pa.Schema, where: str, reader: Values) -> Layout:
    """The layout whose columns are there, their values taken by *reader*; raises `TraceError` when none is."""
    try:
        names = schema.names
    except UnicodeDecodeError as error:
        raise TraceError(where, "has a column whose name is no UTF-8", "save it as UTF-8") from error
    named = {simple_name(name): name for name in reversed(names)}
    step = _first(named, STEP_NAMES)
    if step is None:
        raise TraceError(where, f"has no column for the step among {shown(names)}", "name one `step`")
    layer = _first(named, LAYER_NAMES)
    wide = {name: match for name in names if (match := WIDE.match(name))}
    expert = _first(named, EXPERT_NAMES)
    value = _first(named, VALUE_NAMES)
    if value and _is_list(schema.field(value).type):
        return _nested(step, layer, value, reader)
    if expert and value:
        return _long(step, layer, expert, value, reader)
    if wide:
        return _wide(step, layer, wide, reader)
    raise TraceError(
        where,
        f"no layout fits its columns {shown(names)}",
        "long needs step, layer, expert, tokens; wide step, layer, expert_0 ...; nested step, layer, counts",
    )


def simple_name(name: str) -> str:
    """A column's name in lower case, without punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def few_columns(n: int, where: str) -> None:
    """Raise `TraceError` for a table of more than `MOST_COLUMNS` columns, before each of them costs time and memory."""
    if n > MOST_COLUMNS:
        raise TraceError(
            where, f"has {n:,} columns, and at most {MOST_COLUMNS:,} are read", "log one row for each step and layer"
        )


def _first(named: dict[str, str], wanted: tuple[str, ...]) -> str | None:
    return next((named[name] for name in wanted if name in named), None)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _matched(roles: dict[str, str | None]) -> tuple[str, ...]:
    """The columns taken under another name than ours, and a layer that was not there."""
    assumptions = [f"column {column} is the {role}" for role, column in roles.items() if column and column != role]
    return (*assumptions, *(["no layer column: one layer, number 0"] if roles.get("layer", "") is None else []))


def _long(step: str, layer: str | None, expert: str, value: str, reader: Values) -> Layout:
    def cells(batch: pa.RecordBatch, row: int, where: str) -> Cells:
        return Cells(
            numbers(batch, step, row, where),
            _layers_of(batch, layer, row, where),
            numbers(batch, expert, row, where),
            reader.counts(_column(batch, value, row, where), value, row, where),
        )

    columns = [name for name in (step, layer, expert, value) if name]
    assumptions = _matched({"step": step, "layer": layer, "expert": expert, "tokens": value})
    return Layout(columns, 1, assumptions, cells, reader.collector)


def _nested(step: str, layer: str | None, value: str, reader: Values) -> Layout:
    def cells(batch: pa.RecordBatch, row: int, where: str) -> Cells:
        lists = batch.column(value)
        if lists.null_count:
            raise _null(lists, value, row, where)
        flat = lists.flatten()
        sizes = np.diff(_offsets(lists))
        if (sizes == 0).any():
            empty = row + int(np.argmax(sizes == 0))
            raise TraceError(f"{where}, column {value}, row {empty}", "is an empty list", "log a count for each expert")
        row_of = np.repeat(np.arange(len(lists)), sizes)
        if flat.null_count:
            bad = row_of[flat.is_null().to_numpy(zero_copy_only=False).argmax()]
            raise TraceError(f"{where}, column {value}, row {row + bad}", "holds a null", "counts are whole numbers")
        values = flat.to_numpy(zero_copy_only=False)
        starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
        return Cells(
            numbers(batch, step, row, where)[row_of],
            _layers_of(batch, layer, row, where)[row_of],
            np.arange(len(flat)) - starts,
            _rows_named(values, row_of, value, row, where, reader),
        )

    columns = [name for name in (step, layer, value) if name]
    assumptions = _matched({"step": step, "layer": layer, "counts": value})
    return Layout(columns, 1, assumptions, cells, reader.collector)


def _rows_named(
    values: NDArray[Any], row_of: NDArray[np.intp], column: str, row: int, where: str, reader: Values
) -> Counts:
    """Counts of flattened lists; an error names the row, not the place in the flat array."""
    try:
        return reader.counts(values, column, row, where)
    except TraceError:
        # Once more row by row, only to name the first bad one.
        for i in np.unique(row_of):
            reader.counts(values[row_of == i][None], column, row + int(i), where)
        raise


def _offsets(lists: Any) -> NDArray[np.int64]:
    import pyarrow.compute as pc

    return np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_numpy(zero_copy_only=False))]).astype(np.int64)


def _wide(step: str, layer: str | None, matches: dict[str, re.Match[str]], reader: Values) -> Layout:
    names = list(matches)
    experts = np.array([int(match["expert"]) for match in matches.values()])
    in_name = [match["layer"] for match in matches.values()]
    by_name = None if any(number is None for number in in_name) else np.array([int(n) for n in in_name])

    def cells(batch: pa.RecordBatch, row: int, where: str) -> Cells:
        rows = batch.num_rows
        values = np.stack(
            [reader.counts(_column(batch, name, row, where), name, row, where) for name in names], axis=1
        )  # (rows, columns)
        at = _layers_of(batch, layer, row, where)[:, None] if by_name is None else by_name
        shape = (rows, len(names))
        return Cells(
            np.repeat(numbers(batch, step, row, where), len(names)),
            np.broadcast_to(at, shape).ravel(),
            np.broadcast_to(experts, shape).ravel(),
            values.ravel(),
        )

    columns = [step, *([layer] if layer and by_name is None else []), *names]
    roles = {"step": step, **({"layer": layer} if by_name is None else {})}
    return Layout(columns, len(names), _matched(roles), cells, reader.collector)


# --- columns to arrays -------------------------------------------------------------------------


def _column(batch: pa.RecordBatch, name: str, row: int, where: str) -> NDArray[Any]:
    import pyarrow as pa

    column = batch.column(name)
    if column.null_count:
        raise _null(column, name, row, where)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return to_numpy(column)
    try:
        return np.asarray(column.to_numpy(zero_copy_only=False))
    except (TypeError, NotImplementedError):
        raise TraceError(f"{where}, column {name}", f"holds {column.type}", "give numbers") from None


def _null(column: Any, name: str, row: int, where: str) -> TraceError:
    first = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
    return TraceError(f"{where}, column {name}, row {row + first}", "is null (or NaN)", "every row needs a value")


def numbers(batch: pa.RecordBatch, name: str, row: int, where: str) -> NDArray[np.int64]:
    """A column of whole numbers (step, layer, expert), shape (rows,)."""
    values = _column(batch, name, row, where)
    if values.dtype.kind == "O":  # hive partitions and dictionaries arrive as text
        try:
            values = values.astype(np.int64)
        except (TypeError, ValueError, OverflowError):
            raise TraceError(f"{where}, column {name}", "holds text, not numbers", "give whole numbers") from None
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            bad = np.flatnonzero(~(np.abs(values) < FLOAT64_EXACT) | (np.floor(values) != values))
        if bad.size:
            raise TraceError(
                f"{where}, column {name}, row {row + bad[0]}",
                f"{values[bad[0]]} is not a whole number",
                "give whole numbers",
            )
    if values.dtype.kind not in "iuf":
        raise TraceError(f"{where}, column {name}", f"holds {values.dtype}, not numbers", "give whole numbers")
    return values.astype(np.int64, copy=False)


def _layers_of(batch: pa.RecordBatch, layer: str | None, row: int, where: str) -> NDArray[np.int64]:
    return np.zeros(batch.num_rows, np.int64) if layer is None else numbers(batch, layer, row, where)


@dataclass(frozen=True)
class Values:
    """How the values of a dump become counts; *collector* gets the findings about them.

    *tokens* is what a layer routes in a step, *experts* how many a layer has, where they are known.
    """

    collector: Collector
    tokens: int | None = None
    experts: int | None = None

    def counts(self, values: NDArray[Any], column: str, row: int, where: str) -> Counts:
        """*values* as counts of the same shape; shares become counts where the tokens of a step are known.

        *row* is the number of the first of them, for the `TraceError` that names the first bad one.
        """
        simple = simple_name(column)
        if simple in PHYSICAL_NAMES:
            self.collector.note("physical", f"column {column}", "counts are of physical experts, replicas apart")
        whole = self._unit(simple, column, where)
        if whole is None or (whole.is_guess and not _look_like_shares(values)):
            self.collector.check_precision(values, column, row)
            return whole_counts(values, where, column, row)
        scaled = values.astype(np.float64) * whole.unit
        near = np.rint(scaled)
        bad = np.argwhere(~(np.abs(scaled - near) <= WHOLE_TOLERANCE) | (near < 0))
        if bad.size:
            at = tuple(int(i) for i in bad[0])
            raise TraceError(
                f"{where}, column {column}, row {row + at[0]}",
                f"a share of {values[at]} of {whole.unit} tokens is not a whole count",
                "check --tokens-per-step: it is the tokens routed in one layer in one step (times top-k)",
            )
        return near.astype(np.int64)

    def _unit(self, simple: str, column: str, where: str) -> Unit | None:
        """What a value of 1 is in tokens; None for counts."""
        tokens, experts = self.tokens, self.experts
        if simple in UTILISATION_NAMES:
            if tokens is None or experts is None:
                raise TraceError(
                    f"{where}, column {column}",
                    "holds utilisation, the load over the mean load of the layer, and no totals",
                    "give them with --tokens-per-step N and --experts N, or log counts",
                )
            return Unit(tokens / experts, is_guess=False)
        if simple in SHARE_NAMES and tokens is None:
            raise TraceError(
                f"{where}, column {column}",
                "holds shares, not counts",
                "give the tokens of a step with --tokens-per-step N",
            )
        return None if tokens is None else Unit(tokens, is_guess=simple not in SHARE_NAMES)


@dataclass(frozen=True)
class Unit:
    """Tokens that a value of 1 stands for; a guess where only the values can tell."""

    unit: float
    is_guess: bool


def _look_like_shares(values: NDArray[Any]) -> bool:
    return values.dtype.kind == "f" and bool(values.size) and bool(values.max() <= 1)
