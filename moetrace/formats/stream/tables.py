"""Tables as loggers write them: which column is what, and the long, nested and wide layouts of their rows.

Works on Arrow record batches, whatever file they came from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.collector import Collector
from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.errors import WRITE_AGAIN, library_errors
from moetrace.formats.location import Location
from moetrace.formats.stream.cells import Cells, Reading
from moetrace.formats.stream.columns import column, holds_lists, is_list, layers_in, lists_in, null, numbers
from moetrace.formats.stream.names import layer_in_name, step_in_name
from moetrace.formats.stream.values import COUNT_NAMES, VALUE_NAMES, Values, simple_name
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
        roles = {simple_name(role): name for role, name in pairs.items()}
        for role, name in pairs.items():
            if not name or simple_name(role) not in {*ROLES, *VALUE_NAMES, "key", "value"}:
                known = "--column is role=name with step, layer, expert, tokens or share"
                raise SettingError(f"{known}, not {role + '=' * bool(name) + name!r}")
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
    """Which columns to read and how to turn a batch of rows into cells.

    *width* is the number of cells of one row, if the schema shows it; *steps_are_implicit* is whether there is no step.
    """

    columns: list[str]
    width: int
    assumptions: tuple[str, ...]
    cells: Callable[[pa.RecordBatch, int, str], Cells]
    collector: Collector
    steps_are_implicit: bool = False

    def reading(
        self,
        where: str,
        batches: Callable[[], Iterator[pa.RecordBatch]],
        *,
        rows: int | None = None,
        assumed: tuple[str, ...] = (),
        findings: tuple[Finding, ...] = (),
    ) -> Reading:
        """The reading of a table whose *batches* are opened anew each time, *rows* in all."""

        def cells() -> Iterator[Cells]:
            row = 0
            with library_errors(where, lambda: f"cannot be read after row {row}", WRITE_AGAIN):
                for batch in batches():
                    if batch.num_rows:
                        yield self.cells(batch.select(self.columns), row, where)
                    row += batch.num_rows

        return Reading(
            cells,
            rows=None if rows is None else rows * self.width,
            assumptions=(*assumed, *self.assumptions),
            findings=findings,
            where=where,
            collector=self.collector,
            steps_are_implicit=self.steps_are_implicit,
        )


@dataclass(frozen=True)
class ColumnRoles:
    """The columns of a table by their roles, None for those that are not there; *kind* is what the values are.

    *others* are columns that could be the step as well, *lists* those that hold lists.
    """

    step: str | None
    layer: str | None
    expert: str | None
    value: str | None
    kind: str | None
    naming: Naming
    where: str
    others: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()

    def steps(self, batch: pa.RecordBatch, row: int, where: str) -> NDArray[np.int64]:
        """The steps of the rows, shape (rows,)."""
        if self.step is not None:
            return numbers(batch, self.step, row, where)
        return np.full(batch.num_rows, 1 if self.naming.step is None else self.naming.step)

    def layers(self, batch: pa.RecordBatch, row: int, where: str) -> NDArray[np.int64]:
        """The layers of the rows, shape (rows,)."""
        if self.layer is not None:
            return layers_in(batch, self.layer, row, where)
        return np.full(batch.num_rows, self.naming.layer or 0)

    def layout(
        self,
        columns: Sequence[str | None],
        width: int,
        cells: Any,
        reader: Values,
        assumption: str = "",
        layer: str = "",
    ) -> Layout:
        """The layout of these columns besides step and layer, with what it assumes.

        Those are the columns taken under another name than ours, what is not there, *assumption*, and *layer* where the
        layers are neither in a column nor in the name of the file.
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
        texts += [text for text in (layer, assumption) if text]
        read = [name for name in (self.step, self.layer, *columns) if name]
        implicit = self.step is None and self.naming.step is None
        return Layout(list(dict.fromkeys(read)), width, tuple(texts), cells, reader.collector, implicit)


def first_named(named: Mapping[str, str], wanted: Sequence[str]) -> str | None:
    """The column whose simple name comes first among *wanted*."""
    return next((named[name] for name in wanted if name in named), None)


def match_columns(schema: pa.Schema, where: str, naming: Naming, first: pa.RecordBatch | None) -> ColumnRoles:
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
    lists = [
        name
        for i, name in enumerate(names)
        if is_list(schema.types[i]) or (first is not None and holds_lists(first.column(i)))
    ]
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
    return ColumnRoles(step, layer, expert, value, kind, naming, where, tuple(steps[1:]), tuple(lists))


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


def long_layout(found: ColumnRoles, reader: Values) -> Layout:
    """The layout of a row for each step, layer and expert."""
    expert, value = found.expert or "", found.value or ""

    def cells(batch: pa.RecordBatch, row: int, where: str) -> Cells:
        return Cells(
            found.steps(batch, row, where),
            found.layers(batch, row, where),
            numbers(batch, expert, row, where),
            reader.counts(column(batch, value, row, where), value, row, where, found.kind),
        )

    return found.layout([expert, value], 1, cells, reader)


def nested_layout(found: ColumnRoles, reader: Values, first: pa.RecordBatch | None) -> Layout:
    """The layout of lists of experts, or of layers of experts, in the rows."""
    value = found.value or ""
    of_layers = False
    if found.layer is None and first is not None and first.num_rows:
        lists = lists_in(first.column(value).drop_null().slice(0, 1), value, 0, found.where)
        of_layers = is_list(lists.type.value_type)

    def cells(batch: pa.RecordBatch, row: int, where: str) -> Cells:
        lists = lists_in(batch.column(value), value, row, where)
        steps, layers = found.steps(batch, row, where), found.layers(batch, row, where)
        row_of = np.arange(len(lists))
        flat, sizes, place = _flattened(lists, value, row, where)
        if is_list(flat.type):  # layers by experts
            if found.layer is not None:
                raise TraceError(f"{where}, column {value}", "holds lists of lists and a layer", "log one list a layer")
            row_of = np.repeat(row_of, sizes)
            steps, layers = steps[row_of], place
            flat, sizes, place = _flattened(flat, value, row, where)
        of_list = np.repeat(np.arange(len(sizes)), sizes)
        values = flat.to_numpy(zero_copy_only=False)
        try:
            counts = reader.counts(values, value, row, where, found.kind)
        except TraceError:
            for i in range(len(lists)):  # once more row by row, only to name the first bad one
                reader.counts(values[row_of[of_list] == i][None], value, row + i, where, found.kind)
            raise
        return Cells(steps[of_list], layers[of_list], place, counts)

    assumption = "lists of lists are layers of experts, numbered from 0" if of_layers else ""
    return found.layout([value], 1, cells, reader, layer=assumption)


def _flattened(lists: Any, name: str, row: int, where: str) -> tuple[Any, NDArray[np.int64], NDArray[np.int64]]:
    """The values of *lists* one after the other, how many each holds, and the place of each value in its list.

    Raises `TraceError` for a list that is null, empty, or holds a null.
    """
    import pyarrow.compute as pc

    if lists.null_count:
        raise null(lists, name, row, where)
    flat = lists.flatten()
    sizes = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    if (sizes == 0).any():
        empty = row + int(np.argmax(sizes == 0))
        raise TraceError(f"{where}, column {name}, row {empty}", "is an empty list", "log a count for each expert")
    if flat.null_count:
        bad = int(np.searchsorted(np.cumsum(sizes), flat.is_null().to_numpy(zero_copy_only=False).argmax(), "right"))
        raise TraceError(f"{where}, column {name}, row {row + bad}", "holds a null", "counts are whole numbers")
    return flat, sizes, np.arange(len(flat)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
