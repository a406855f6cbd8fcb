"""Tables as loggers write them: which column is what, and which rows are of one trace."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.location import Location, layer_in_name, step_in_name
from moetrace.formats.stream.cells import Format
from moetrace.formats.stream.columns import COUNT_NAMES, VALUE_NAMES, Rows, Values, kind_of, simple_name

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
# Of a clock, whose times are numbered where there is no step.
CLOCK_NAMES = ("time", "timestamp", "datetime", "date", "walltime")
ROLES = {"step": STEP_NAMES, "layer": LAYER_NAMES, "expert": EXPERT_NAMES}
# Columns whose values are not of one trace, unless they are said to be.
PHASE_NAMES = ("phase", "forwardmode", "mode", "stage")
MODEL_NAMES = ("model", "modelname")
# 256 layers of 512 experts side by side.
MOST_COLUMNS = 1 << 17


@dataclass(frozen=True)
class ValueFormat(Format):
    """The settings of a format whose values may be shares or utilisation.

    *tokens_per_step* turns shares into counts, and with the *experts* of a layer utilisation as well.
    """

    tokens_per_step: int | None = None
    experts: int | None = None

    def values(self) -> Values:
        """How the values of one dump become counts."""
        return Values(self.tokens_per_step, self.experts)


@dataclass(frozen=True)
class TableFormat(ValueFormat):
    """The settings of a format with columns: *column* says which is what, ``tokens=routed,step=pass``, or a mapping.

    *pattern* is a regular expression for columns that are each of an expert, with the groups ``layer`` and ``expert``.
    *where* takes rows of one value, ``phase=decode``, *phase* those of that phase; *sum_over* is a column, such as a
    rank, over whose values counts are added up.
    """

    column: str | Mapping[str, str] | None = None
    pattern: str | None = None
    where: str | Mapping[str, str] | None = None
    sum_over: str | None = None
    phase: Literal["prefill", "decode"] | None = None

    def naming(self, path: Location) -> Naming:
        """What the columns of the file at *path* are called; raises `SettingError` for an unknown role."""
        pairs, only = pairs_of(self.column), pairs_of(self.where)
        for role, name in pairs.items():
            if not name or simple_name(role) not in {*ROLES, *VALUE_NAMES, "key", "value"}:
                known = "--column is role=name with step, layer, expert, tokens or share"
                raise SettingError(f"{known}, not {role + '=' * bool(name) + name!r}")
        roles = {simple_name(role): name for role, name in pairs.items()}
        of_file = step_in_name(path), layer_in_name(path)
        return Naming(roles, self.pattern, *of_file, only, self.sum_over, self.phase, self.values())


def pairs_of(given: str | Mapping[str, str] | None) -> dict[str, str]:
    """A mapping written as ``a=b,c=d``, or as it is."""
    return dict(part.partition("=")[::2] for part in given.split(",")) if isinstance(given, str) else dict(given or {})


@dataclass(frozen=True)
class Naming:
    """What is known of the columns of a table: the *roles* that were given, and what the file's name says.

    *only* is the value that the rows have in some columns, *sum_over* a column that counts are added up over, *values*
    is how they become counts.
    """

    roles: dict[str, str] = field(default_factory=dict)
    pattern: str | None = None
    step: int | None = None
    layer: int | None = None
    only: dict[str, str] = field(default_factory=dict)
    sum_over: str | None = None
    phase: str | None = None
    values: Values = field(default_factory=Values)


@dataclass(frozen=True)
class Table:
    """What is known of the table *where* with the columns *names*: the columns by their roles, None for others.

    *kind* is what the values are, *others* are columns that could be the step as well, *lists* those that hold lists.
    *first* are the first rows, None where there are none.
    """

    where: str
    names: list[str]
    first: pa.RecordBatch | None
    naming: Naming
    values: Values
    step: str | None
    layer: str | None
    expert: str | None
    value: str | None
    kind: str | None
    others: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    percent: bool = False
    clock: bool = False

    @property
    def named(self) -> dict[str, str]:
        """The columns by their simple names."""
        return {simple_name(name): name for name in reversed(self.names)}

    def steps(self, rows: Rows) -> NDArray[np.int64]:
        """The steps of the rows, shape (rows,)."""
        if self.step is not None:
            return rows.times(self.step) if self.clock else rows.numbers(self.step)
        return np.full(rows.batch.num_rows, 1 if self.naming.step is None else self.naming.step)

    def layers(self, rows: Rows) -> NDArray[np.int64]:
        """The layers of the rows, shape (rows,)."""
        return np.full(rows.batch.num_rows, self.naming.layer or 0) if self.layer is None else rows.layers(self.layer)

    def by_total(self, total: float) -> Table:
        """The same where the shares of a layer in a step have this *total*: of about 100 they are percentages."""
        if self.values.tokens is None or not 99 <= total <= 101:
            return self
        return replace(self, percent=True, values=replace(self.values, tokens=self.values.tokens / 100))


def first_named(named: Mapping[str, str], wanted: Sequence[str]) -> str | None:
    """The column whose simple name comes first among *wanted*."""
    return next((named[name] for name in wanted if name in named), None)


def table_of(schema: pa.Schema, first: pa.RecordBatch | None, where: str, naming: Naming) -> Table:
    """The columns by their roles; raises `TraceError` for one that is not there, or there twice, or two of counts."""
    try:
        names = schema.names
    except UnicodeDecodeError as error:
        raise TraceError(where, "has a column whose name is not UTF-8", "save it as UTF-8") from error
    for option, columns in (("column", naming.roles.values()), ("where", naming.only), ("sum-over", [naming.sum_over])):
        absent = [name for name in columns if name is not None and name not in names]
        if absent:
            raise TraceError(where, f"has no column {absent[0]} among {shown(names)}", f"check --{option}")
    named = {simple_name(name): name for name in reversed(names)}
    if naming.phase is not None:
        column = first_named(named, PHASE_NAMES)
        if column is None:
            raise SettingError(f"{where} has no column for the phase among {shown(names)}: leave out --phase")
        naming = replace(naming, only={**naming.only, column: naming.phase})
    step, layer, expert = (naming.roles.get(role) or first_named(named, wanted) for role, wanted in ROLES.items())
    step = step or (first_named(named, CLOCK_NAMES) if naming.step is None else None)
    # Times are no steps, unless they are numbers and the user says so.
    clock = step is not None and simple_name(step) in CLOCK_NAMES
    clock = clock and not ("step" in naming.roles and kind_of(schema.field(step).type) == "number")
    steps = [named[name] for name in STEP_NAMES if name in named and "step" not in naming.roles]
    lists = []
    for i, (name, type_) in enumerate(zip(names, schema.types)):
        # Text holds lists where the first one is written like one.
        texts = first.column(i).slice(0, 100).to_pylist() if first is not None and kind_of(type_) == "text" else []
        if kind_of(type_) == "list" or next((text for text in texts if text), "").lstrip().startswith("["):
            lists.append(name)
    kind = next((role for role in naming.roles if role in VALUE_NAMES), None)
    value = naming.roles[kind] if kind else first_named(named, VALUE_NAMES)
    if kind is None and (expert or lists):
        taken = {step, layer, expert, *steps}
        candidates = [name for name in dict.fromkeys(names) if name not in taken and simple_name(name) in COUNT_NAMES]
        if lists and not (expert and value and value not in lists):
            candidates = [name for name in candidates if name in lists] or lists
        head = None if first is None else Rows(first, 0, where)
        chosen = [name for name in candidates if name in lists and head and head.doubt(name)]
        candidates = chosen[:1] or candidates
        if len(candidates) > 1:
            ways = " or ".join(f"--column tokens={name}" for name in candidates[:2])
            raise TraceError(where, f"columns {' and '.join(candidates)} may be the counts", f"say which with {ways}")
        value = candidates[0] if candidates else value
    twice = [name for name in (step, layer, expert, value) if name and names.count(name) > 1]
    if twice:
        raise TraceError(where, f"has {names.count(twice[0])} columns called {twice[0]}", "give each a name of its own")
    first = first if first is not None and first.num_rows else None
    if kind is None and expert and value and value not in lists and first is not None:
        text = first.column(value)[0].as_py()
        kind = "share" if isinstance(text, str) and text.strip().endswith("%") else None
    found = (step, layer, expert, value, kind, tuple(steps[1:]), tuple(lists))
    return Table(where, names, first, naming, naming.values, *found, clock=clock)


def no_layout(found: Table) -> TraceError:
    """The error that the columns make no table of counts, with the line that takes them as one."""
    names = found.names
    known = {"step": found.step, "layer": found.layer, "expert": found.expert, "tokens": found.value}
    if all(re.fullmatch(r"-?\d+(\.\d+)?", name) for name in names):
        way_out = "begin it with the names of its columns, such as layer,expert_0,expert_1"
        return TraceError(found.where, "has no header: its first line holds numbers", way_out)
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
