"""The columns of a table by what they are: step, layer, expert and counts, by their names or as they were given."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.collector import Collector
from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.stream.cells import Cells
from moetrace.formats.stream.columns import layers_in, numbered
from moetrace.formats.stream.values import COUNT_NAMES, VALUE_NAMES, Values, simple_name

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
# Words in the names of columns that may be counts, and in those of sums, settings and measures that are none.
COUNT_WORDS = {
    "token", "tokens", "count", "counts", "load", "routed", "assigned", "dispatched", "received", "processed", "kept",
    "hits",
}  # fmt: skip
NO_COUNT_WORDS = {
    "total", "sum", "per", "max", "min", "mean", "avg", "average", "std", "var", "time", "latency", "ms", "id", "idx",
    "index", "position", "dropped", "capacity", "bias", "loss", "ratio", "balance", "share", "fraction", "prob",
    "entropy", "cv", "step", "batch", "expected", "limit", "name", "number",
}  # fmt: skip
# Of tables with the name of a scalar in each row, such as MLflow's: key, value, step.
KEY_NAMES = ("key", "tag", "metric", "metricname", "name")
ROLES = {"step": STEP_NAMES, "layer": LAYER_NAMES, "expert": EXPERT_NAMES}


@dataclass(frozen=True)
class Layout:
    """Which columns to read and how to turn a batch of rows into cells.

    *width* is the number of cells of one row, where the schema tells; *numbered* is whether it names no step.
    """

    columns: list[str]
    width: int
    assumptions: tuple[str, ...]
    cells: Callable[[pa.RecordBatch, int, str], Cells]
    collector: Collector
    numbered: bool = False


@dataclass(frozen=True)
class Naming:
    """What is known of the columns of a table: the *roles* that were given, and what the file's name says."""

    roles: dict[str, str] = field(default_factory=dict)
    pattern: str | None = None
    step: int | None = None
    layer: int | None = None


def roles_in(text: str | None) -> dict[str, str]:
    """The columns in ``role=column,role=column``; raises `SettingError` for a role that there is not."""
    roles = {}
    for part in (text or "").split(",") if text else []:
        role, given, name = part.partition("=")
        if not given or simple_name(role) not in {*ROLES, *VALUE_NAMES, "key", "value"}:
            raise SettingError(f"--column is role=name with step, layer, expert, tokens or share, not {part!r}")
        roles[simple_name(role)] = name
    return roles


@dataclass(frozen=True)
class Found:
    """The columns of a table by their roles, None for those that are not there; *kind* is what the values are."""

    step: str | None
    layer: str | None
    expert: str | None
    value: str | None
    kind: str | None
    naming: Naming
    where: str
    others: tuple[str, ...] = ()

    @property
    def assumptions(self) -> tuple[str, ...]:
        """The columns taken under another name than ours, and what was not there."""
        found = [f"column {name} is the {role}" for role, name in self._named() if name and name != role]
        found += [f"column {self.value} holds the counts"] if self.value else []
        found += [f"column {name} is left out, since {self.step} is the step" for name in self.others]
        if self.step is None:
            in_name = self.naming.step is not None
            found.append("the step is the number in the name of the file" if in_name else "no step column: one step")
        if self.layer is None:
            layer = self.naming.layer
            found.append(
                "no layer column: one layer, number 0" if layer is None else f"layer {layer}, by the name of the file"
            )
        return tuple(found)

    def _named(self) -> list[tuple[str, str | None]]:
        return [("step", self.step), ("layer", self.layer), ("expert", self.expert)]

    def steps(self, batch: pa.RecordBatch, row: int, where: str) -> NDArray[np.int64]:
        """The steps of the rows, shape (rows,)."""
        if self.step is not None:
            return numbered(batch, self.step, row, where)
        return np.full(batch.num_rows, 1 if self.naming.step is None else self.naming.step)

    def layers(self, batch: pa.RecordBatch, row: int, where: str) -> NDArray[np.int64]:
        """The layers of the rows, shape (rows,)."""
        if self.layer is not None:
            return layers_in(batch, self.layer, row, where)
        return np.full(batch.num_rows, self.naming.layer or 0)

    def layout(self, columns: Sequence[str | None], width: int, cells: Any, reader: Values) -> Layout:
        """The layout of these columns besides step and layer."""
        read = [name for name in (self.step, self.layer, *columns) if name]
        numbered = self.step is None and self.naming.step is None
        return Layout(list(dict.fromkeys(read)), width, self.assumptions, cells, reader.collector, numbered)


def found_in(names: Sequence[str], where: str, naming: Naming) -> Found:
    """The columns by their roles; raises `TraceError` for a column that is not there."""
    absent = [name for name in naming.roles.values() if name not in names]
    if absent:
        raise TraceError(where, f"has no column {absent[0]} among {shown(list(names))}", "check --column")
    named = {simple_name(name): name for name in reversed(names)}
    roles = {role: naming.roles.get(role) or _first(named, wanted) for role, wanted in ROLES.items()}
    given = next((role for role in naming.roles if role in VALUE_NAMES), None)
    value = naming.roles[given] if given else _first(named, VALUE_NAMES)
    steps = [named[name] for name in STEP_NAMES if name in named and "step" not in naming.roles]
    return Found(roles["step"], roles["layer"], roles["expert"], value, given, naming, where, tuple(steps[1:]))


def may_be_counts(names: Sequence[str], found: Found) -> list[str]:
    """The columns among *names* that may be the counts, by their words, those that have another role left out."""
    others = {found.step, found.layer, found.expert, *found.others}
    words = {name: set(re.findall(r"[a-z]+|\d+", name.lower())) for name in names if name not in others}
    return [
        name
        for name, those in words.items()
        if simple_name(name) in COUNT_NAMES or (those & COUNT_WORDS and not those & NO_COUNT_WORDS)
    ]


def key_and_value(names: Sequence[str], naming: Naming) -> tuple[str | None, str | None]:
    """The columns of a table with a name and a value in each row."""
    named = {simple_name(name): name for name in reversed(names)}
    return naming.roles.get("key") or _first(named, KEY_NAMES), naming.roles.get("value") or _first(named, ("value",))


def _first(named: dict[str, str], wanted: tuple[str, ...]) -> str | None:
    return next((named[name] for name in wanted if name in named), None)
