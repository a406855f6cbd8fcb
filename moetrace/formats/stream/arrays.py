"""Arrays of counts, wherever they lie: which axis is what, one for all layers or one for each, and their steps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.collector import Collector
from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.location import Location
from moetrace.formats.stream.cells import Cells, Reading, dense_cells
from moetrace.formats.stream.columns import OF_LAYER
from moetrace.formats.stream.names import layer_in_name, step_in_name
from moetrace.formats.stream.tables import LAYER_NAMES, STEP_NAMES
from moetrace.formats.stream.values import Values, simple_name
from moetrace.trace import check_steps

# Names under which a file holds its counts; with a single array in it any name will do.
COUNTS_KEYS = (
    "counts", "tokens_per_expert", "load", "expert_counts", "logical_expert_load", "expert_load", "logical_count",
)  # fmt: skip
# Arrays by the names of their files, and what their axes are: a rank's experts side by side with those of others.
AXES_BY_NAME = {"moe_load_": "layers,ranks,experts", "mcore_ep_loads_": "layers,steps,experts"}
AXES = ("steps", "layers", "ranks", "experts")
STEP_BY_NAME = "the step is the number in the name of the file"
# Cells handed on at a time.
BATCH_CELLS = 1 << 18


@dataclass(frozen=True)
class Array:
    """An array of *shape*: *rows* reads so many at a time along its first axis, *whole* all of it into memory."""

    shape: tuple[int, ...]
    rows: Callable[[int], Iterator[NDArray[Any]]]
    whole: Callable[[], NDArray[Any]]

    @classmethod
    def held(cls, values: NDArray[Any]) -> Array:
        """An array that is in memory."""
        return cls(values.shape, lambda n: (values[a : a + n] for a in range(0, len(values), n)), lambda: values)


@dataclass(frozen=True)
class Log:
    """Counts of *shape* (steps, layers, experts): *rows* reads them from the start, some steps at a time.

    *layers* are their numbers where the source names them; *key* is what it calls the counts.
    """

    rows: Callable[[int], Iterator[NDArray[Any]]]
    shape: tuple[int, int, int]
    key: str
    assumptions: tuple[str, ...]
    layers: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Arrays:
    """The arrays of one file by name, and how they are read: *axes* as they were given, *values* as counts."""

    arrays: Mapping[str, Array]
    path: Location
    axes: str | None = None
    values: Values = field(default_factory=lambda: Values(Collector()))
    assumption: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return str(self.path)

    def reading(self) -> Reading:
        """The reading of the counts in them; raises `TraceError` where there are none."""
        log = self._log()
        steps, of_steps, implicit = self._steps(log)
        layers, of_layers = self._layers(log)

        def cells() -> Iterator[Cells]:
            start = 0
            for part in log.rows(max(1, BATCH_CELLS // (log.shape[1] * log.shape[2]))):
                counts = self.values.counts(part, log.key, start, self.where)
                yield dense_cells(steps[start : start + len(part)], layers, counts)
                start += len(part)

        return Reading(
            cells,
            rows=math.prod(log.shape),
            assumptions=(*self.assumption, *log.assumptions, *of_steps, *of_layers),
            where=self.where,
            collector=self.values.collector,
            steps_are_implicit=implicit,
        )

    def _log(self) -> Log:
        named = next((name for name in COUNTS_KEYS if name in self.arrays), None)
        if named is None and self.path.name.startswith("mcore_ep_loads_") and "loads" in self.arrays:
            named = "loads"
        key = named or (next(iter(self.arrays)) if len(self.arrays) == 1 else None)
        in_names = {name: OF_LAYER.search(name) or re.fullmatch(r"(\d{1,15})", name) for name in self.arrays}
        by_layer = {int(found[1]): self.arrays[name] for name, found in in_names.items() if found}
        if named is None and by_layer and len(by_layer) == len(self.arrays):
            return self._of_layers(dict(sorted(by_layer.items())))
        if key is None:
            names = shown(self.arrays) or "no array"
            raise TraceError(
                self.where, f"holds {names}, and none is the counts", "name it `counts`, or one array for each layer"
            )
        assumption = () if named else (f"array {key} is the counts",)
        return arranged(self.arrays[key], self._axes_of(self.arrays[key]), key, assumption)

    def _axes_of(self, array: Array) -> tuple[str, ...]:
        """The axes of *array*, by what was given, by the name of the file, or by how many there are."""
        shape = array.shape
        by_name = next((axes for name, axes in AXES_BY_NAME.items() if self.path.name.startswith(name)), None)
        given = self.axes or (by_name if by_name and len(by_name.split(",")) == len(shape) else None)
        # Where a file is one step, two dimensions are not.
        of_step = step_in_name(self.path) is not None and layer_in_name(self.path) is None
        usual = {1: "experts", 2: "layers,experts" if of_step else "steps,experts", 3: "steps,layers,experts"}
        text = given or usual.get(len(shape))
        if text is None or min(shape, default=0) < 1:
            raise TraceError(
                self.where,
                f"counts have the shape {shape}",
                "give an array (steps, layers, experts), or say --axes, such as steps,layers,ranks,experts",
            )
        axes = tuple(part.strip() for part in text.split(","))
        if len(set(axes)) != len(axes) or "experts" not in axes or not set(axes) <= set(AXES):
            raise SettingError(f"--axes are some of {', '.join(AXES)} and each once, with experts, not {text!r}")
        if len(axes) != len(shape):
            raise SettingError(f"--axes {text} are {len(axes)}, and {self.path.name} has the shape {shape}")
        return axes

    def _of_layers(self, arrays: dict[int, Array]) -> Log:
        """Arrays (steps, experts) or (experts,) of each layer, read side by side."""
        if self.axes is not None:
            raise SettingError(f"{self.path.name} holds an array for each layer, and has no use for --axes")
        shapes = {array.shape for array in arrays.values()}
        if len(shapes) > 1:
            each = " and ".join(f"{shape}" for shape in sorted(shapes)[:4])
            raise TraceError(self.where, f"has arrays of layers of unlike shapes {each}", "save each layer alike")
        (shape,) = shapes
        if len(shape) not in (1, 2) or min(shape) < 1:
            raise TraceError(self.where, f"has layers of shape {shape}", "give (steps, experts) for each layer")
        steps = shape[0] if len(shape) == 2 else 1

        def rows(size: int) -> Iterator[NDArray[Any]]:
            if len(shape) == 1:
                yield np.stack([array.whole() for array in arrays.values()])[None]
                return
            for parts in zip(*(array.rows(size) for array in arrays.values())):
                yield np.stack(parts, axis=1)

        axes = "steps, experts" if len(shape) == 2 else "experts"
        assumption = f"an array for each layer, {axes}: {' x '.join(map(str, shape))}"
        numbers = np.array(list(arrays), np.int64)
        return Log(rows, (steps, len(arrays), shape[-1]), "counts", (assumption,), numbers)

    def _steps(self, log: Log) -> tuple[NDArray[np.int64], tuple[str, ...], bool]:
        """The numbers of the steps, what is assumed of them, and whether they are only counted."""
        n = log.shape[0]
        named = self._numbers("steps", STEP_NAMES, n)
        if named is not None:
            return *named, False
        in_name = step_in_name(self.path)
        if in_name is None and self.path.name.startswith("moe_load_"):
            digits = self.path.stem.removeprefix("moe_load_")
            in_name = int(digits) if digits.isdecimal() and len(digits) <= 15 else None
        if n == 1 and in_name is not None:
            return np.array([in_name]), (STEP_BY_NAME,), False
        return np.arange(1, n + 1), ("steps are numbered from 1",), True

    def _numbers(self, ours: str, names: Sequence[str], n: int) -> tuple[NDArray[np.int64], tuple[str, ...]] | None:
        """The *n* numbers in the array that we call *ours*, or in one of these *names*, and which one that is."""
        shapes = ((n,), ()) if n == 1 else ((n,),)
        others = (
            name
            for name, array in self.arrays.items()
            if simple_name(name).removesuffix("s") in names and array.shape in shapes
        )
        key = ours if ours in self.arrays else next(others, None)
        if key is None:
            return None
        found = np.atleast_1d(self.arrays[key].whole())
        check_steps(found, n, f"{self.where}, array {key}")
        return found.astype(np.int64), () if key == ours else (f"array {key} has the numbers of the {ours}",)

    def _layers(self, log: Log) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        n = log.shape[1]
        if log.layers is not None:
            return log.layers, ()
        named = self._numbers("layers", LAYER_NAMES, n)
        if named is not None:
            return named
        in_name = layer_in_name(self.path)
        if n == 1 and in_name is not None:
            return np.array([in_name]), (f"layer {in_name}, by the name of the file",)
        return np.arange(n), ("layers are numbered from 0",)


def arranged(array: Array, axes: Sequence[str], key: str, assumption: tuple[str, ...] = ()) -> Log:
    """The log of an *array* with these *axes*; one whose steps do not come first has to be held whole."""
    size = dict(zip(axes, array.shape))
    shape = (size.get("steps", 1), size.get("layers", 1), size["experts"] * size.get("ranks", 1))
    text = f"axes are {', '.join(axes)}: {' x '.join(map(str, array.shape))}"
    text += "" if "layers" in axes else ", one layer" if "steps" in axes else ", one layer and step"
    assumption = (*assumption, text + ("" if "steps" in axes or "layers" not in axes else ", one step"))
    order = [axes.index(axis) for axis in AXES if axis in axes]
    if order == sorted(order) and axes[0] == "steps":
        return Log(lambda n: (part.reshape(-1, *shape[1:]) for part in array.rows(n)), shape, key, assumption)

    def rows(n: int) -> Iterator[NDArray[Any]]:
        cube = np.transpose(array.whole(), order).reshape(shape)
        return (cube[a : a + n] for a in range(0, shape[0], n))

    return Log(rows, shape, key, assumption)
