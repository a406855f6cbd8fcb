"""NumPy arrays of counts, `.npy` or `.npz`, never pickled, and read a few steps at a time."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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


@dataclass(frozen=True)
class Stored:
    """An array of *shape* in the file *path*, in the member *member* of it if that is an archive.

    *start* is where its numbers begin; *columns_first* is Fortran's order.
    """

    path: Path
    member: str | None
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    columns_first: bool
    start: int

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, size: int) -> Iterator[NDArray[Any]]:
        """The array in pieces of *size* along its first axis; raises `TraceError` where it ends early."""
        where = str(self.path)
        if self.columns_first or not self.shape:
            yield from Array.held(self.whole()).rows(size)
            return
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        require(row * 8, where, "one step of it", "log steps that fit")
        with self._opened() as file:
            for a in range(0, self.shape[0], size):
                n = min(size, self.shape[0] - a)
                yield np.frombuffer(_exactly(file, n * row, where), self.dtype).reshape(n, *self.shape[1:])
            file.read(1)  # only at its end is the checksum of a member compared

    def whole(self) -> NDArray[Any]:
        """The array, held in memory; raises `TraceError` when it does not fit."""
        where = str(self.path)
        require(4 * self.size, where, "the array, which has to be held whole,", "save it with steps first, in C order")
        with self._opened() as file:
            flat = np.frombuffer(_exactly(file, self.size, where), self.dtype)
            file.read(1)
        return flat.reshape(self.shape, order="F" if self.columns_first else "C")

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        """The file, or its member, from where the numbers begin."""
        with ExitStack() as stack:
            if self.member is None:
                file: IO[bytes] = stack.enter_context(self.path.open("rb"))
            else:
                file = stack.enter_context(stack.enter_context(zipfile.ZipFile(self.path)).open(self.member))
            left = self.start
            while left > 0 and (got := len(file.read(left))):
                left -= got
            yield file


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
    found = Stored(path, member, shape, dtype, columns_first, file.tell())
    if min(shape, default=0) < 0 or found.start + found.size > length:
        raise TraceError(
            where,
            f"says that its shape is {shape} of {dtype}, but has no such {found.size:,} bytes",
            "it is cut or damaged: save it again",
        )
    return Array(shape, found.rows, found.whole)


def _exactly(file: IO[bytes], n: int, where: str) -> bytes:
    """The next *n* bytes; raises `TraceError` when there are fewer."""
    data = file.read(n)
    if len(data) < n:
        raise TraceError(where, f"ends {n - len(data):,} bytes early", "it is cut or damaged: save it again")
    return data
