"""NumPy arrays of counts, `.npy` or `.npz`, never pickled, and read a few steps at a time."""

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

from moetrace.doctor.collector import Collector
from moetrace.errors import TraceError
from moetrace.formats.errors import library_errors, require
from moetrace.formats.stream.arrays import Array, Arrays
from moetrace.formats.stream.cells import Cells, Reading
from moetrace.formats.stream.values import Values

ZIP_MAGIC = b"PK"
MOST_NAMES = 10_000


# How errors of the libraries are put.
NO_DATA = ("cannot be read as NumPy data", "save plain numbers again; nothing is unpickled")


@dataclass(frozen=True)
class NumpyFormat:
    """An array of counts (steps, layers, experts), or (steps, experts) for one layer, or one for each layer.

    *tokens_per_step* turns shares into counts, *axes* says what the axes are, such as ``layers,steps,experts``.
    """

    tokens_per_step: int | None = None
    axes: str | None = None

    name: ClassVar[str] = "numpy"
    needs: ClassVar[str] = (
        ".npy (steps, layers, experts), or (steps, experts) in layer_<N>.npy; or .npz with counts and, where they are "
        "not 1, 2, ..., steps and layers, or an array for each layer; --axes says which axis is what"
    )

    def claims(self, path: Path) -> bool:
        """A file named .npy or .npz."""
        return path.is_file() and path.suffix.lower() in {".npy", ".npz"}

    def read(self, path: Path) -> Reading:
        """Look at the headers; what is streamed later is read from the file in pieces."""
        with library_errors(str(path), *NO_DATA):
            arrays = Arrays(stored_arrays(path), path, self.axes, Values(Collector(), self.tokens_per_step))
            reading = arrays.reading()

        def cells() -> Iterator[Cells]:
            with library_errors(reading.where, *NO_DATA):
                yield from reading.cells()

        return replace(reading, cells=cells)


# --- arrays in files ---------------------------------------------------------------------------
# Known by their headers and read a few rows at a time: NumPy itself would hold an array of an archive whole, and
# take the memory its header asks for before it looks at what is there.


def stored_arrays(path: Path) -> dict[str, Array]:
    """The arrays of *path* by name; a lone one is the counts.

    Raises `TraceError` for objects, and for an array that is longer than its file.
    """
    with path.open("rb") as file:
        if file.read(2) != ZIP_MAGIC:
            file.seek(0)
            return {"counts": _described(file, path, None, path.stat().st_size)}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MOST_NAMES:
            raise TraceError(str(path), f"holds {len(members):,} members", "a trace needs counts, steps and layers")
        arrays = {}
        for member in members:
            with archive.open(member) as packed:
                name = member.filename.removesuffix(".npy")
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
        raise TraceError(
            where,
            f"says that its shape is {shape} of {dtype}, but has no such {size:,} bytes",
            "it is cut or damaged: save it again",
        )

    def whole() -> NDArray[Any]:
        way_out = "save it with steps first, in C order"
        require(4 * size, str(path), "the array, which has to be held whole,", way_out)
        (data,) = _pieces(path, member, start, [size])
        return np.frombuffer(data, dtype).reshape(shape, order="F" if columns_first else "C")

    def rows(n: int) -> Iterator[NDArray[Any]]:
        if columns_first or not shape:
            yield from Array.held(whole()).rows(n)
            return
        row = math.prod(shape[1:]) * dtype.itemsize
        require(row * 8, str(path), "one step of it", "log steps that fit")
        for data in _pieces(path, member, start, [row * min(n, shape[0] - a) for a in range(0, shape[0], n)]):
            yield np.frombuffer(data, dtype).reshape(-1, *shape[1:])

    return Array(shape, rows, whole)


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
                problem = f"ends {size - len(data):,} bytes early"
                raise TraceError(str(path), problem, "it is cut or damaged: save it again")
            yield data
        file.read(1)  # only at its end is the checksum of a member compared
