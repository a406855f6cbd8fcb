"""Arrays of counts: in `.npy` and `.npz`, read a few steps at a time, tensors of `torch.save`, or lists of a document.

Which axis is what, one array for all layers or one for each, and their steps.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.readers.tensors import ZIP_MAGIC, is_torch, loaded, tensor_array
from moetrace.formats.sources import Location, layer_in_name, library_errors, require, step_in_name
from moetrace.formats.stream import text
from moetrace.formats.stream.cells import Cells, Reading, dense_cells
from moetrace.formats.stream.columns import OF_LAYER, ValueFormat, Values, as_float32, doubt_of, simple_name
from moetrace.formats.stream.tables import LAYER_NAMES, STEP_NAMES
from moetrace.trace import check_steps

MOST_NAMES = 10_000
# How errors of the libraries are put.
NO_DATA = ("cannot be read as NumPy data", "save plain numbers again; nothing is unpickled")
DAMAGED = "it is cut or damaged: save it again"
# Names under which a file holds its counts; with a single array in it any name will do.
COUNTS_KEYS = (
    "counts", "tokens_per_expert", "load", "expert_counts", "logical_expert_load", "expert_load", "logical_count",
)  # fmt: skip
# Numbers beside the counts that say which part of the experts they are of.
PART = ("ep_rank", "ep_size")
# Arrays by the names of their files, and what their axes are: a rank's experts beside those of others; vLLM's.
AXES_BY_NAME = {
    "moe_load_": "layers,ranks,experts",
    "mcore_ep_loads_": "layers,steps,experts",
    "expert_load_view": "layers,experts",
}
# More layers than any model has: so many rows are steps.
MOST_LAYERS = 150
# Arrays of numbers beside the counts, as we call them, and other names of each.
NUMBERS = {"steps": STEP_NAMES, "layers": LAYER_NAMES}
AXES = ("steps", "layers", "ranks", "experts")
# Cells handed on at a time, and numbers of an array looked at to distinguish choices from counts.
BATCH_CELLS = LOOKED_AT = 1 << 18
# Keys that are listed where none is known, and levels that are looked into for them.
MOST_SHOWN, MOST_LEVELS = 6, 6


@dataclass(frozen=True)
class NumpyFormat(ValueFormat):
    """.npy (steps, layers, experts), or (steps, experts) in layer_<N>.npy; or .npz with counts and, where they are not
    1, 2, ..., steps and layers, or an array for each layer; --axes says which axis is what.

    *tokens_per_step* turns shares into counts, *axes* says what the axes are, such as ``layers,steps,experts``.
    """

    axes: str | None = None
    key: str | None = None
    name: ClassVar[str] = "numpy"

    def claims(self, path: Path) -> bool:
        return path.is_file() and path.suffix.lower() in {".npy", ".npz"}

    def read(self, path: Path) -> Reading:
        """Look at the headers; what is streamed later is read from the file in pieces."""
        with library_errors(str(path), *NO_DATA):
            arrays, axes = arrays_in(path, self.key), self.axes
            of_lmdeploy = is_torch(path) and {"counts", "total_tokens"} <= set(arrays)
            if of_lmdeploy and axes is None and len(arrays["counts"].shape) == 2:
                axes = "layers,experts"
            return array_reading(arrays, path, axes, self.values(path))


@dataclass(frozen=True)
class TensorsFormat(NumpyFormat):
    """A .pt file with a tensor (steps, layers, experts), a dict with counts and steps, or tensors by layer; --axes
    says which axis is what.

    *axes* says what the axes are, such as ``layers,steps,experts``; *tokens_per_step* turns shares into counts.
    """

    name: ClassVar[str] = "torch"

    def claims(self, path: Path) -> bool:
        return is_torch(path)


def arrays_in(path: Path, key: str | None = None) -> dict[str, Array]:
    """The arrays of a file by name, a lone one, or one at *key*, as counts; JSON may hold them in lists.

    Raises `TraceError` for object arrays, truncated files, and files without an array.
    """
    where = str(path)
    if path.suffix.lower() in (".npy", ".npz"):
        with library_errors(where, *NO_DATA):
            stored = stored_arrays(path)
        numbers = {name: array for name, array in stored.items() if name in ("steps", "layers")}
        return stored if key is None else {"counts": dig(stored, key, where), **numbers}
    document = dig(loaded(path) if is_torch(path) else text.document(path), key, where)
    found = document if isinstance(document, dict) else {"counts": document}
    if len(found) > MOST_NAMES:
        raise TraceError(where, f"holds {len(found):,} names", "a trace needs counts, steps and layers")
    held = {str(name): tensor_array(value, path) for name, value in found.items()}
    arrays = {name: Array.held(array) for name, array in held.items() if array is not None}
    if not arrays:
        names = shown(list(document)) or "nothing" if isinstance(document, dict) else f"a {type(document).__name__}"
        raise TraceError(where, f"holds {names}", keys_in(document) or "give a tensor of counts, or a dict of tensors")
    return arrays


# Arrays are known by their headers and read a few rows at a time: NumPy itself would hold an array of an archive whole,
# and take the memory its header asks for before it looks at what is there.


def stored_arrays(path: Path) -> dict[str, Array]:
    """The arrays of *path* by name, a lone one as counts; raises `TraceError` for objects, and for one cut short."""
    if not text.begins_with(path, ZIP_MAGIC):
        with path.open("rb") as file:
            return {"counts": _described(file, path, None, path.stat().st_size)}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MOST_NAMES:
            raise TraceError(str(path), f"holds {len(members):,} members", "a trace needs counts, steps and layers")
        arrays: dict[str, Array] = {}
        for member in members:
            with archive.open(member) as packed:
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise TraceError(str(path), f"holds {member.filename} several times", "save each array once")
                arrays[name] = _described(packed, path, member.filename, member.file_size)
        return arrays


def _described(file: IO[bytes], path: Path, member: str | None, length: int) -> Array:
    """What the header at the beginning of *file*, which has *length* bytes, says."""
    where = str(path) if member is None else f"{path}, array {member}"
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise TraceError(where, f"has a header of version {version}", "save plain numbers again")
    shape, columns_first, dtype = read(file)
    if dtype.hasobject or not dtype.itemsize:
        raise TraceError(where, "holds Python objects, not numbers", "save plain numbers; nothing is unpickled")
    start, size = file.tell(), math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or start + size > length:
        problem = f"says that its shape is {shape} of {dtype}, but has no such {size:,} bytes"
        raise TraceError(where, problem, DAMAGED)

    whole = columns_first or not shape
    row = size if whole else math.prod(shape[1:]) * dtype.itemsize

    def rows(n: int) -> Iterator[NDArray[Any]]:
        if whole or n >= shape[0]:
            way_out = "save it with steps first, in C order"
            require(4 * size, str(path), "the array, which has to be held whole,", way_out)
        require(8 * row * (not whole), str(path), "one step of it", "log steps that fit")
        sizes = [size] if whole else [row * min(n, shape[0] - a) for a in range(0, shape[0], n)]
        for data in _pieces(path, member, start, sizes):
            values = np.frombuffer(data, dtype)
            if whole:
                yield from Array.held(values.reshape(shape, order="F" if columns_first else "C")).rows(n)
            else:
                yield values.reshape(-1, *shape[1:])

    return Array(shape, dtype, rows)


def _pieces(path: Path, member: str | None, start: int, sizes: Sequence[int]) -> Iterator[bytes]:
    """Pieces of so many bytes of a file, or of a member of it, from *start* on; `TraceError` where it ends early."""
    with ExitStack() as stack:
        if member is None:
            file: IO[bytes] = stack.enter_context(path.open("rb"))
        else:
            file = stack.enter_context(stack.enter_context(zipfile.ZipFile(path)).open(member))
        left = start
        while left > 0 and (got := len(file.read(left))):
            left -= got
        for size in sizes:
            data = file.read(size)
            if len(data) < size:
                raise TraceError(str(path), f"ends {size - len(data):,} bytes early", DAMAGED)
            yield data
        file.read(1)  # only at its end is the checksum of a member compared


@dataclass(frozen=True)
class Array:
    """An array of *shape*: *rows* reads so many at a time along its first axis, from the start."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rows: Callable[[int], Iterator[NDArray[Any]]]

    @classmethod
    def held(cls, values: NDArray[Any]) -> Array:
        """An array that is in memory."""
        rows = lambda n: (values[a : a + n] for a in range(0, len(values), n)) if values.ndim else iter([values])  # noqa: E731
        return cls(values.shape, values.dtype, rows)

    def whole(self) -> NDArray[Any]:
        """All of it."""
        pieces = list(self.rows(max([1, *self.shape[:1]])))  # to the end, where an archive has a checksum
        return pieces[0] if pieces else np.empty(self.shape, self.dtype)

    def head(self) -> NDArray[Any]:
        """Its beginning, large enough to see what its numbers are."""
        return next(self.rows(max(1, LOOKED_AT // max(1, math.prod(self.shape[1:])))), np.empty(0))


def array_reading(
    arrays: Mapping[str, Array], path: Location, axes: str | None, values: Values, assumed: tuple[str, ...] = ()
) -> Reading:
    """The counts among the *arrays* of one file, with the given *axes*; raises `TraceError` if there are none."""
    where = str(path)
    key, first, cube, by_layer, texts = _counts_among(arrays, path, axes)
    n_steps, n_layers, experts = cube.shape
    in_name, layer = step_in_name(path), layer_in_name(path)
    if in_name is None and (window := re.fullmatch(r"moe_load_(\d{1,15})", path.stem)):
        in_name = int(window[1])
    steps = _numbers(arrays, "steps", n_steps, where)
    implicit = steps is None and (in_name is None or n_steps > 1)
    if implicit:
        steps = np.arange(1, n_steps + 1), "steps are numbered from 1"
    elif steps is None:
        steps = np.array([in_name]), "the step is the number in the name of the file"
    layers = (np.array(by_layer), "") if by_layer else _numbers(arrays, "layers", n_layers, where)
    if layers is None and n_layers == 1 and layer is not None:
        layers = np.array([layer]), f"layer {layer}, by the name of the file"
    elif layers is None:
        layers = np.arange(n_layers), "layers are numbered from 0"
    head = first.head()
    head = as_float32(head) if head.dtype.kind == "V" else head
    _refuse_scores(head, values, where)

    def cells() -> Iterator[Cells]:
        start = 0
        with library_errors(where, *NO_DATA):
            for part in cube.rows(max(1, BATCH_CELLS // (n_layers * experts))):
                part = part.astype(np.int8) if part.dtype == bool else part
                counts = values.counts(part, key, start)
                yield dense_cells(steps[0][start : start + len(part)], layers[0], counts)
                start += len(part)

    rank, size = (int(arrays[name].whole()) if name in arrays and not arrays[name].shape else 1 for name in PART)
    return values.reading(
        cells,
        part=f"{PART[0]} is {rank} of {PART[1]} {size}: a part of the experts" if size > 1 else "",
        rows=math.prod(cube.shape),
        assumptions=tuple(text for text in (*assumed, *texts, steps[1], layers[1]) if text),
        steps_are_implicit=implicit,
        # The last axis can hold choices only where it is the axis of experts.
        doubt=doubt_of(head, by_token=True) if axes is None or axes.replace(" ", "").endswith("experts") else "",
    )


def _counts_among(
    arrays: Mapping[str, Array], path: Location, axes: str | None
) -> tuple[str, Array, Array, list[int], list[str]]:
    """The counts among *arrays*, one array or one for each layer: what it is called, its first array, all of it as
    (steps, layers, experts), the numbers of the layers where there is an array for each, and what is assumed.
    """
    key = next((name for name in COUNTS_KEYS if name in arrays), None)
    if key is None and path.name.startswith("mcore_ep_loads_") and "loads" in arrays:
        key = "loads"
    in_names = {name: OF_LAYER.search(name) or re.fullmatch(r"(\d{1,15})", name) for name in arrays}
    by_layer = dict(sorted((int(found[1]), arrays[name]) for name, found in in_names.items() if found))
    if key is None and by_layer and len(by_layer) == len(arrays):
        if axes is not None:
            raise SettingError(f"{path.name} holds an array for each layer, and has no use for --axes")
        each = list(by_layer.values())
        cube, text = _of_layers(each, str(path))
        return "counts", each[0], cube, list(by_layer), [text]
    if key is None and len(arrays) != 1:
        problem = f"holds {shown(arrays) or 'no array'}, and none is the counts"
        way_out = "name it `counts`, or one array for each layer"
        raise TraceError(str(path), problem, f"{way_out}; or {keys_in(arrays)}" if arrays else way_out)
    own = key or next(iter(arrays))
    cube, text = _arranged(arrays[own], _axes_of(arrays, arrays[own].shape, path, axes))
    return own, arrays[own], cube, [], [*([] if key else [f"array {own} is the counts"]), text]


def _refuse_scores(head: NDArray[Any], values: Values, where: str) -> None:
    """Raise `TraceError` where the beginning of an array is the scores that a router gives to experts."""
    if head.dtype.kind != "f" or head.ndim < 2 or (head == np.rint(head)).all():
        return
    way_out = "save the numbers of the k highest scores of each token, and count them with --from routing"
    if (head < 0).any():
        raise TraceError(where, "holds scores of the router, which are no counts", way_out)
    if values.tokens is None and np.allclose(head.sum(axis=-1), 1, atol=1e-2):
        problem = "holds fractions of 1: scores of the router for each token, or shares"
        raise TraceError(where, problem, f"{way_out}; for shares give --tokens-per-step N")


def _numbers(arrays: Mapping[str, Array], ours: str, n: int, where: str) -> tuple[NDArray[np.int64], str] | None:
    """The *n* numbers in the array that we call *ours*, or by another name of `NUMBERS`, and which one that is."""
    shapes = ((n,), ()) if n == 1 else ((n,),)
    simple = {name: simple_name(name).removesuffix("s") for name, array in arrays.items() if array.shape in shapes}
    key = ours if ours in arrays else next((name for name in simple if simple[name] in NUMBERS[ours]), None)
    if key is None:
        return None
    found = np.atleast_1d(arrays[key].whole())
    check_steps(found, n, f"{where}, array {key}")
    return found.astype(np.int64), "" if key == ours else f"array {key} has the numbers of the {ours}"


def _axes_of(arrays: Mapping[str, Array], shape: tuple[int, ...], path: Location, given: str | None) -> tuple[str, ...]:
    """The axes of an array, as given, or by arrays beside it, by the name of the file, or by how many there are."""
    if given is None and len(shape) == 2:
        beside = {simple_name(name).removesuffix("s") for name, array in arrays.items() if array.shape == shape[:1]}
        given = next((f"{ours},experts" for ours, names in NUMBERS.items() if beside & set(names)), None)
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


def _of_layers(arrays: Sequence[Array], where: str) -> tuple[Array, str]:
    """Arrays (steps, experts) or (experts,) of each layer as one (steps, layers, experts)."""
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        each = " and ".join(f"{shape}" for shape in sorted(shapes)[:4])
        raise TraceError(where, f"has arrays of layers of unlike shapes {each}", "save each layer alike")
    (shape,) = shapes
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise TraceError(where, f"has layers of shape {shape}", "give (steps, experts) for each layer")
    axes = "steps, experts" if len(shape) == 2 else "experts"
    text = f"an array for each layer, {axes}: {' x '.join(map(str, shape))}"
    if len(shape) == 1:
        return Array.held(np.stack([array.whole() for array in arrays])[None]), text
    rows = lambda n: (np.stack(parts, axis=1) for parts in zip(*(array.rows(n) for array in arrays)))  # noqa: E731
    return Array((shape[0], len(arrays), shape[1]), arrays[0].dtype, rows), text


def _arranged(array: Array, axes: Sequence[str]) -> tuple[Array, str]:
    """An *array* with these *axes* as one (steps, layers, experts), held whole where its steps do not come first."""
    size = dict(zip(axes, array.shape))
    shape = (size.get("steps", 1), size.get("layers", 1), size["experts"] * size.get("ranks", 1))
    text = f"axes are {', '.join(axes)}: {' x '.join(map(str, array.shape))}"
    text += "" if "layers" in axes else ", one layer" if "steps" in axes else ", one layer and step"
    text += "" if "steps" in axes or "layers" not in axes else ", one step"
    order = [axes.index(axis) for axis in AXES if axis in axes]

    def rows(n: int) -> Iterator[NDArray[Any]]:
        if order == sorted(order) and axes[0] == "steps":
            return (part.reshape(-1, *shape[1:]) for part in array.rows(n))
        return Array.held(np.transpose(array.whole(), order).reshape(shape)).rows(n)

    return Array(shape, array.dtype, rows), text


def dig(value: Any, key: str | None, where: str) -> Any:
    """What lies at *key* in a document, all of it if it is None; raises `TraceError` with the keys that there are.

    A level that is numbered, a list or keys such as ``layer_3``, is not in *key*: each of its parts is looked into.
    """
    if key is None or (isinstance(value, Mapping) and key in value):
        return value if key is None else value[key]
    found = value
    for name in key.split("."):
        try:
            found = _inside(found, name)
        except (KeyError, TypeError):
            raise TraceError(where, f"has nothing at {key}", keys_in(value) or "check --key") from None
    return found


def _inside(value: Any, name: str) -> Any:
    if isinstance(value, Mapping) and name in value:
        return value[name]
    if isinstance(value, Mapping) and all(map(_is_number, value)):
        return {key: _inside(part, name) for key, part in value.items()}
    if not isinstance(value, list | tuple) or not value:
        raise KeyError(name)
    return [_inside(part, name) for part in value]


def _is_number(key: Any) -> bool:
    return isinstance(key, int) or key.isdecimal() or OF_LAYER.search(key) is not None


def keys_in(document: Any) -> str:
    """The way out that names the keys under which *document* holds numbers, with their shapes; empty for none."""
    found = [f"{key} ({' x '.join(map(str, shape))})" for key, shape in _leaves(document, (), ()) if key]
    more = f", ... ({len(found)})" if len(found) > MOST_SHOWN else ""
    return f"say where the numbers are with --key: {', '.join(found[:MOST_SHOWN])}{more}" if found else ""


def _leaves(value: Any, at: tuple[str, ...], shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The key and the shape of what holds numbers, the first part of each level that is numbered looked into."""
    numbered = isinstance(value, Mapping) and len(value) > 0 and all(map(_is_number, value))
    listed = isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], Mapping)
    if len(at) + len(shape) > MOST_LEVELS:
        return
    if numbered or listed:
        yield from _leaves(next(iter(value.values())) if numbered else value[0], at, (*shape, len(value)))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, (*at, str(key)), shape)
    elif hasattr(value, "shape") or isinstance(value, list):
        try:
            here = tuple(value.shape) if hasattr(value, "shape") else np.asarray(value).shape
        except ValueError:
            return
        if here and (hasattr(value, "shape") or np.asarray(value).dtype.kind in "iuf"):
            yield ".".join(at), (*shape, *here)
