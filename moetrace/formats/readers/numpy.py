"""NumPy arrays of counts, `.npy` or `.npz`, never pickled, and read a few steps at a time."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.collector import Collector
from moetrace.errors import TraceError, shown
from moetrace.formats.errors import library_errors, require
from moetrace.formats.stream.cells import LAYER_IN_NAME, Cells, Reading, dense_cells
from moetrace.formats.stream.tables import Values
from moetrace.trace import Counts, check_steps

# Names under which an .npz holds its counts; with a single array in it any name will do.
COUNTS_KEYS = ("counts", "tokens_per_expert", "load")
# Dumps of a Megatron-LM fork, one for each rank: `loads` (layers, forward passes, experts).
MCORE_NAME = "mcore_ep_loads_"
# Cells handed on at a time.
BATCH_CELLS = 1 << 18
ZIP_MAGIC = b"PK"
MOST_NAMES = 10_000


# How errors of the libraries are put.
NO_DATA = ("cannot be read as NumPy data", "save plain numbers again; nothing is unpickled")


@dataclass(frozen=True)
class NumpyFormat:
    """An array of counts (steps, layers, experts), or (steps, experts) for one layer.

    *tokens_per_step* turns shares into counts.
    """

    tokens_per_step: int | None = None

    name: ClassVar[str] = "numpy"
    needs: ClassVar[str] = (
        ".npy (steps, layers, experts), or (steps, experts) in layer_<N>.npy; "
        "or .npz with counts and, where they are not 1, 2, ..., steps and layers"
    )

    def claims(self, path: Path) -> bool:
        """A file named .npy or .npz."""
        return path.is_file() and path.suffix.lower() in {".npy", ".npz"}

    def read(self, path: Path) -> Reading:
        """Look at the headers; what is streamed later is read from the file in pieces."""
        with library_errors(str(path), *NO_DATA):
            return _reading(stored_arrays(path), path, self.tokens_per_step)


@dataclass(frozen=True)
class _Log:
    """What an archive holds: *rows* reads the counts from the start, each piece (steps, layers, experts)."""

    rows: Callable[[int], Iterator[NDArray[np.int64]]]
    shape: tuple[int, int, int]
    key: str
    assumptions: tuple[str, ...]


def _reading(arrays: Mapping[str, Stored], path: Path, tokens_per_step: int | None) -> Reading:
    where = str(path)
    log = _log(arrays, path)
    steps, of_steps = _numbers(arrays, "steps", 1, log.shape[0], where)
    layers, of_layers = _numbers(arrays, "layers", 0, log.shape[1], where)
    named = LAYER_IN_NAME.fullmatch(path.stem)
    if named and "layers" not in arrays and len(layers) == 1:
        layers, of_layers = np.array([int(named[1])]), (f"layer {named[1]}, by the name of the file",)
    collector = Collector()
    values = Values(collector, tokens_per_step, log.shape[2])
    return Reading(
        cells=lambda: _stream(log, steps, layers, values, where),
        rows=log.shape[0] * log.shape[1] * log.shape[2],
        assumptions=(*log.assumptions, *of_steps, *of_layers),
        where=where,
        collector=collector,
    )


def _log(arrays: Mapping[str, Stored], path: Path) -> _Log:
    """The array of counts among *arrays*; raises `TraceError` where none is, or it is no array of counts."""
    where = str(path)
    if path.name.startswith(MCORE_NAME) and "loads" in arrays and len(arrays["loads"].shape) == 3:
        return _of_layers(arrays["loads"], where)
    key = next((name for name in COUNTS_KEYS if name in arrays), next(iter(arrays)) if len(arrays) == 1 else None)
    if key is None:
        raise TraceError(where, f"holds {shown(arrays) or 'no array'}, and none is the counts", "name it `counts`")
    assumptions = [] if key in COUNTS_KEYS else [f"array {key} is the counts"]
    counts = arrays[key]
    if len(counts.shape) == 2:
        counts = replace(counts, shape=(counts.shape[0], 1, counts.shape[1]))
        assumptions.append("two dimensions are steps and experts: one layer")
    if len(counts.shape) != 3 or min(counts.shape) < 1:
        raise TraceError(where, f"counts have the shape {counts.shape}", "give an array (steps, layers, experts)")
    steps, layers, experts = counts.shape
    return _Log(lambda rows: counts.rows(rows, where), (steps, layers, experts), key, tuple(assumptions))


def _of_layers(loads: Stored, where: str) -> _Log:
    """Counts that are stored layer by layer (layers, passes, experts), which have to be held whole."""
    layers, passes, experts = loads.shape
    assumption = "loads are (layers, passes, experts); each forward pass is a step"

    def rows(size: int) -> Iterator[NDArray[np.int64]]:
        cube = np.moveaxis(loads.whole(where), 0, 1)
        return (cube[a : a + size] for a in range(0, passes, size))

    return _Log(rows, (passes, layers, experts), "loads", (assumption,))


def _numbers(
    arrays: Mapping[str, Stored], key: str, start: int, n: int, where: str
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The numbers of the steps or layers, counted from *start* where there is no such array, and what is assumed."""
    if key in arrays:
        found = arrays[key].whole(where)
        check_steps(found, n, f"{where}, array {key}")
        return found.astype(np.int64), ()
    return np.arange(start, start + n), (f"{key} are numbered from {start}",)


def _stream(
    log: _Log, steps: NDArray[np.int64], layers: NDArray[np.int64], values: Values, where: str
) -> Iterator[Cells]:
    size = max(1, BATCH_CELLS // (log.shape[1] * log.shape[2]))
    start = 0
    with library_errors(where, *NO_DATA):
        for part in log.rows(size):
            counts: Counts = values.counts(part, log.key, start, where)
            yield dense_cells(steps[start : start + len(part)], layers, counts)
            start += len(part)


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

    def rows(self, size: int, where: str) -> Iterator[NDArray[Any]]:
        """The array in pieces of *size* along its first axis; raises `TraceError` where it ends early."""
        if self.columns_first:
            whole = self.whole(where)
            yield from (whole[a : a + size] for a in range(0, self.shape[0], size))
            return
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        require(row * 8, where, "one step of it", "log steps that fit")
        with _opened(self.path, self.member) as file:
            _skip(file, self.start)
            for a in range(0, self.shape[0], size):
                n = min(size, self.shape[0] - a)
                yield np.frombuffer(_exactly(file, n * row, where), self.dtype).reshape(n, *self.shape[1:])
            file.read(1)  # only at its end is the checksum of a member compared

    def whole(self, where: str) -> NDArray[Any]:
        """The array, held in memory; raises `TraceError` when that has no room for it."""
        require(4 * self.size, where, "the array, which has to be held whole,", "save it with steps first, in C order")
        with _opened(self.path, self.member) as file:
            _skip(file, self.start)
            flat = np.frombuffer(_exactly(file, self.size, where), self.dtype)
            file.read(1)
        return flat.reshape(self.shape, order="F" if self.columns_first else "C")


def stored_arrays(path: Path) -> dict[str, Stored]:
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


def _described(file: IO[bytes], path: Path, member: str | None, length: int) -> Stored:
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
    return found


@contextmanager
def _opened(path: Path, member: str | None) -> Iterator[IO[bytes]]:
    if member is None:
        with path.open("rb") as file:
            yield file
    else:
        with zipfile.ZipFile(path) as archive, archive.open(member) as packed:
            yield packed


def _skip(file: IO[bytes], n: int) -> None:
    while n > 0:
        got = len(file.read(n))
        if not got:
            return
        n -= got


def _exactly(file: IO[bytes], n: int, where: str) -> bytes:
    """The next *n* bytes; raises `TraceError` when there are fewer."""
    data = file.read(n)
    if len(data) < n:
        raise TraceError(where, f"ends {n - len(data):,} bytes early", "it is cut or damaged: save it again")
    return data
