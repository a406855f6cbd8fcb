"""Arrays in files: `.npy` and `.npz`, read a few steps at a time, and tensors of `torch.save`."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError, shown
from moetrace.formats.errors import library_errors, require
from moetrace.formats.readers.tensors import ZIP_MAGIC, is_torch, loaded, tensor_array
from moetrace.formats.stream import text
from moetrace.formats.stream.arrays import Array, array_reading, dig, keys_in
from moetrace.formats.stream.cells import Cells, Format, Reading
from moetrace.formats.stream.columns import ValueFormat, Values

MOST_NAMES = 10_000
# How errors of the libraries are put.
NO_DATA = ("cannot be read as NumPy data", "save plain numbers again; nothing is unpickled")
DAMAGED = "it is cut or damaged: save it again"


@dataclass(frozen=True)
class NumpyFormat(Format):
    """.npy (steps, layers, experts), or (steps, experts) in layer_<N>.npy; or .npz with counts and, where they are not
    1, 2, ..., steps and layers, or an array for each layer; --axes says which axis is what.

    *tokens_per_step* turns shares into counts, *axes* says what the axes are, such as ``layers,steps,experts``.
    """

    tokens_per_step: int | None = None
    axes: str | None = None
    key: str | None = None

    name: ClassVar[str] = "numpy"

    def claims(self, path: Path) -> bool:
        return path.is_file() and path.suffix.lower() in {".npy", ".npz"}

    def read(self, path: Path) -> Reading:
        """Look at the headers; what is streamed later is read from the file in pieces."""
        with library_errors(str(path), *NO_DATA):
            arrays = arrays_in(path, self.key)
            reading = array_reading(arrays, path, self.axes, Values(self.tokens_per_step))

        def cells() -> Iterator[Cells]:
            with library_errors(reading.where, *NO_DATA):
                yield from reading.cells()

        return replace(reading, cells=cells)


@dataclass(frozen=True)
class TensorsFormat(ValueFormat):
    """A .pt file with a tensor (steps, layers, experts), a dict with counts and steps, or tensors by layer; --axes
    says which axis is what.

    *axes* says what the axes are, such as ``layers,steps,experts``; *tokens_per_step* turns shares into counts.
    """

    axes: str | None = None
    key: str | None = None

    name: ClassVar[str] = "torch"

    def claims(self, path: Path) -> bool:
        return is_torch(path)

    def read(self, path: Path) -> Reading:
        """Take the tensor that is the counts, or those of all layers."""
        arrays = arrays_in(path, self.key)
        axes = self.axes
        if {"counts", "total_tokens"} <= set(arrays) and axes is None and len(arrays["counts"].shape) == 2:
            axes = "layers,experts"  # LMDeploy's
        return array_reading(arrays, path, axes, self.values())


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
