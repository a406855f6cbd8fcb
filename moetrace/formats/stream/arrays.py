"""Arrays of counts, wherever they lie: which axis is what, one for all layers or one for each, and their steps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.location import Location, layer_in_name, step_in_name
from moetrace.formats.stream.cells import Cells, Reading, dense_cells
from moetrace.formats.stream.columns import OF_LAYER, Values, as_float32, doubt_of, simple_name
from moetrace.formats.stream.keys import keys_in
from moetrace.formats.stream.tables import LAYER_NAMES, STEP_NAMES
from moetrace.trace import check_steps

# Names under which a file holds its counts; with a single array in it any name will do.
COUNTS_KEYS = (
    "counts", "tokens_per_expert", "load", "expert_counts", "logical_expert_load", "expert_load", "logical_count",
)  # fmt: skip
# Numbers beside the counts that say which part of the experts they are of.
PART = ("ep_rank", "ep_size")
# Arrays by the names of their files, and what their axes are: a rank's experts side by side with those of others.
AXES_BY_NAME = {"moe_load_": "layers,ranks,experts", "mcore_ep_loads_": "layers,steps,experts"}
AXES_BY_NAME |= {"expert_load_view": "layers,experts"}  # vLLM's
# More layers than any model has: so many rows are steps.
MOST_LAYERS = 150
# Arrays of numbers beside the counts, as we call them, and other names of each.
NUMBERS = {"steps": STEP_NAMES, "layers": LAYER_NAMES}
AXES = ("steps", "layers", "ranks", "experts")
# Cells handed on at a time.
BATCH_CELLS = 1 << 18
# Numbers of an array looked at to distinguish choices from counts.
LOOKED_AT = 1 << 18


@dataclass(frozen=True)
class Array:
    """An array of *shape*: *rows* reads so many at a time along its first axis, *whole* all of it into memory."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rows: Callable[[int], Iterator[NDArray[Any]]]
    whole: Callable[[], NDArray[Any]]

    def head(self) -> NDArray[Any]:
        """Its beginning, large enough to see what its numbers are."""
        return next(self.rows(max(1, LOOKED_AT // max(1, math.prod(self.shape[1:])))), np.empty(0))

    @classmethod
    def held(cls, values: NDArray[Any]) -> Array:
        """An array that is in memory."""
        rows = lambda n: (values[a : a + n] for a in range(0, len(values), n))  # noqa: E731
        return cls(values.shape, values.dtype, rows, lambda: values)


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


def array_reading(
    arrays: Mapping[str, Array], path: Location, axes: str | None, values: Values, assumed: tuple[str, ...] = ()
) -> Reading:
    """The counts among the *arrays* of one file, with the *axes* that were given; raises `TraceError` for none."""
    where = str(path)
    log = _log(arrays, path, axes)
    n_steps, n_layers, experts = log.shape
    in_name, layer = step_in_name(path), layer_in_name(path)
    if in_name is None and path.name.startswith("moe_load_"):
        digits = path.stem.removeprefix("moe_load_")
        in_name = int(digits) if digits.isdecimal() and len(digits) <= 15 else None
    by_name = in_name is not None and n_steps == 1
    steps, of_steps = np.array([in_name or 0]), "the step is the number in the name of the file"
    if not by_name:
        steps, of_steps = np.arange(1, n_steps + 1), "steps are numbered from 1"
    layers, of_layers = np.arange(n_layers), "layers are numbered from 0"
    if n_layers == 1 and layer is not None:
        layers, of_layers = np.array([layer]), f"layer {layer}, by the name of the file"
    named_steps, named_layers = (
        _numbers(arrays, ours, names, n, where) for (ours, names), n in zip(NUMBERS.items(), (n_steps, n_layers))
    )
    steps, of_steps = named_steps or (steps, of_steps)
    layers, of_layers = named_layers or (layers, of_layers)
    if log.layers is not None:
        layers, of_layers = log.layers, ""

    head = arrays.get(log.key, next(iter(arrays.values()))).head()
    head = as_float32(head) if head.dtype.kind == "V" else head
    if head.dtype.kind == "f" and head.ndim > 1 and not (head == np.rint(head)).all():
        negative, of_one = bool((head < 0).any()), np.allclose(head.sum(axis=-1), 1, atol=1e-2)
        if negative or (of_one and values.tokens is None):
            problem = "holds scores of the router, which are no counts"
            problem = problem if negative else "holds fractions of 1: scores of the router for each token, or shares"
            way_out = "save the numbers of the k highest scores of each token, and count them with --from routing"
            raise TraceError(where, problem, way_out + ("" if negative else "; for shares give --tokens-per-step N"))

    def cells() -> Iterator[Cells]:
        start = 0
        for part in log.rows(max(1, BATCH_CELLS // (n_layers * experts))):
            part = part.astype(np.int8) if part.dtype == bool else part
            counts = values.counts(part, log.key, start, where)
            yield dense_cells(steps[start : start + len(part)], layers, counts)
            start += len(part)

    rank, size = (int(arrays[name].whole()) if name in arrays and not arrays[name].shape else 1 for name in PART)
    return Reading(
        cells,
        part=f"{PART[0]} is {rank} of {PART[1]} {size}: a part of the experts" if size > 1 else "",
        rows=math.prod(log.shape),
        assumptions=tuple(text for text in (*assumed, *log.assumptions, of_steps, of_layers) if text),
        where=where,
        collector=values.collector,
        steps_are_implicit=named_steps is None and not by_name,
        # With experts in another place, its last axis is none of choices.
        doubt=doubt_of(head, by_token=True) if axes is None or axes.replace(" ", "").endswith("experts") else "",
    )


def _numbers(
    arrays: Mapping[str, Array], ours: str, names: Sequence[str], n: int, where: str
) -> tuple[NDArray[np.int64], str] | None:
    """The *n* numbers in the array that we call *ours*, or in one of these *names*, and which one that is."""
    shapes = ((n,), ()) if n == 1 else ((n,),)
    fits = {
        name: array.shape in shapes and simple_name(name).removesuffix("s") in names for name, array in arrays.items()
    }
    key = ours if ours in arrays else next((name for name, good in fits.items() if good), None)
    if key is None:
        return None
    found = np.atleast_1d(arrays[key].whole())
    check_steps(found, n, f"{where}, array {key}")
    return found.astype(np.int64), "" if key == ours else f"array {key} has the numbers of the {ours}"


def _log(arrays: Mapping[str, Array], path: Location, axes: str | None) -> Log:
    """The counts among *arrays*: one array, or one for each layer."""
    named = next((name for name in COUNTS_KEYS if name in arrays), None)
    if named is None and path.name.startswith("mcore_ep_loads_") and "loads" in arrays:
        named = "loads"
    in_names = {name: OF_LAYER.search(name) or re.fullmatch(r"(\d{1,15})", name) for name in arrays}
    by_layer = {int(found[1]): arrays[name] for name, found in in_names.items() if found}
    if named is None and by_layer and len(by_layer) == len(arrays):
        if axes is not None:
            raise SettingError(f"{path.name} holds an array for each layer, and has no use for --axes")
        return _of_layers(dict(sorted(by_layer.items())), str(path))
    key = named or (next(iter(arrays)) if len(arrays) == 1 else None)
    if key is None:
        problem = f"holds {shown(arrays) or 'no array'}, and none is the counts"
        way_out = "name it `counts`, or one array for each layer"
        raise TraceError(str(path), problem, f"{way_out}; or {keys_in(arrays)}" if arrays else way_out)
    assumption = () if named else (f"array {key} is the counts",)
    shape = arrays[key].shape
    if axes is None and len(shape) == 2:
        simple = {simple_name(name).removesuffix("s") for name, array in arrays.items() if array.shape == shape[:1]}
        axes = next((f"{ours},experts" for ours, names in NUMBERS.items() if simple & set(names)), None)
    return arranged(arrays[key], _axes_of(shape, path, axes), key, assumption)


def _axes_of(shape: tuple[int, ...], path: Location, given: str | None) -> tuple[str, ...]:
    """The axes of an array, by what was given, by the name of the file, or by how many there are."""
    by_name = next((axes for name, axes in AXES_BY_NAME.items() if path.name.startswith(name)), "")
    # Where a file is one step, two dimensions are not.
    of_step = step_in_name(path) is not None and layer_in_name(path) is None
    usual = {1: "experts", 2: "layers,experts" if of_step else "steps,experts", 3: "steps,layers,experts"}
    named = by_name or of_step or layer_in_name(path) is not None
    if given is None and len(shape) == 2 and 1 < shape[0] <= MOST_LAYERS and not named:
        problem = f"has the shape {shape}, which may be steps of one layer, or the layers of one window"
        raise TraceError(str(path), problem, "say which with --axes steps,experts or --axes layers,experts")
    text = given or (by_name if len(by_name.split(",")) == len(shape) else usual.get(len(shape)))
    if not text or min(shape, default=0) < 1:
        way_out = "give an array (steps, layers, experts), or say --axes, such as steps,layers,ranks,experts"
        raise TraceError(str(path), f"counts have the shape {shape}", way_out)
    axes = tuple(part.strip() for part in text.split(","))
    if len(set(axes)) != len(axes) or "experts" not in axes or not set(axes) <= set(AXES):
        raise SettingError(f"--axes are some of {', '.join(AXES)} and each once, with experts, not {text!r}")
    if len(axes) != len(shape):
        raise SettingError(f"--axes {text} are {len(axes)}, and {path.name} has the shape {shape}")
    return axes


def _of_layers(arrays: dict[int, Array], where: str) -> Log:
    """Arrays (steps, experts) or (experts,) of each layer, read side by side."""
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1:
        each = " and ".join(f"{shape}" for shape in sorted(shapes)[:4])
        raise TraceError(where, f"has arrays of layers of unlike shapes {each}", "save each layer alike")
    (shape,) = shapes
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise TraceError(where, f"has layers of shape {shape}", "give (steps, experts) for each layer")
    steps = shape[0] if len(shape) == 2 else 1

    def rows(size: int) -> Iterator[NDArray[Any]]:
        if len(shape) == 1:
            yield np.stack([array.whole() for array in arrays.values()])[None]
            return
        for parts in zip(*(array.rows(size) for array in arrays.values())):
            yield np.stack(parts, axis=1)

    axes = "steps, experts" if len(shape) == 2 else "experts"
    assumption = f"an array for each layer, {axes}: {' x '.join(map(str, shape))}"
    return Log(rows, (steps, len(arrays), shape[-1]), "counts", (assumption,), np.array(list(arrays), np.int64))


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
