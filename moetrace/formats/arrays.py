"""NumPy arrays of counts, `.npy` or `.npz`, never pickled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.formats.assemble import BLOCK_CELLS
from moetrace.formats.base import Cells, Reading, ReadOptions, dense_cells
from moetrace.formats.canonical import one_line
from moetrace.formats.columns import Values
from moetrace.formats.watch import Watch
from moetrace.trace import check_steps

# Names under which an .npz holds its counts; with a single array in it any name will do.
COUNTS_KEYS = ("counts", "tokens_per_expert", "load")
# Dumps of a Megatron-LM fork, one for each rank: `loads` (layers, forward passes, experts).
MCORE_NAME = "mcore_ep_loads_"


class NumpyFormat:
    """An array of counts (steps, layers, experts), or (steps, experts) for one layer."""

    name = "numpy"
    needs = ".npy (steps, layers, experts); or .npz with counts and, where they are not 1, 2, ..., steps and layers"

    def claims(self, path: Path) -> bool:
        """A file named .npy or .npz."""
        return path.is_file() and path.suffix.lower() in {".npy", ".npz"}

    def read(self, path: Path, options: ReadOptions) -> Reading:
        """Open the array, memory-mapped where it is not packed."""
        where = str(path)
        try:
            arrays = _loaded(path)
            said: tuple[str, ...] = ()
            if path.name.startswith(MCORE_NAME) and "loads" in arrays and arrays["loads"].ndim == 3:
                arrays = {"counts": np.moveaxis(arrays["loads"], 0, 1)}
                said = ("loads are (layers, passes, experts); each forward pass is a step",)
        except MemoryError:
            raise
        except Exception as error:  # NumPy raises half a dozen types on damaged files
            raise TraceError(
                where,
                f"cannot be read as NumPy data: {one_line(error)}",
                "save plain numbers again; nothing is unpickled",
            ) from error
        return _reading(arrays, where, options, said)


def _loaded(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of *path* by name; a lone one is the counts, and stays on disk."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return {"counts": np.load(path, mmap_mode="r", allow_pickle=False)}
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}


def _reading(arrays: dict[str, NDArray[Any]], where: str, options: ReadOptions, before: tuple[str, ...]) -> Reading:
    key = next((name for name in COUNTS_KEYS if name in arrays), next(iter(arrays)) if len(arrays) == 1 else None)
    if key is None:
        raise TraceError(where, f"holds {', '.join(arrays) or 'no array'}, and none is the counts", "name it `counts`")
    said = [*before] if key in COUNTS_KEYS else [f"array {key} is the counts"]
    counts = arrays[key]
    if counts.ndim == 2:
        counts = counts[:, None]
        said.append("two dimensions are steps and experts: one layer, number 0")
    if counts.ndim != 3 or 0 in counts.shape:
        raise TraceError(where, f"counts have the shape {counts.shape}", "give an array (steps, layers, experts)")
    steps = _numbers(arrays, "steps", 1, counts.shape[0], said, where)
    layers = _numbers(arrays, "layers", 0, counts.shape[1], said, where)
    watch = Watch()
    values = Values(options, watch)
    return Reading(
        cells=lambda: _stream(counts, steps, layers, key, values, where),
        rows=counts.size,
        assumptions=tuple(said),
        where=where,
        watch=watch,
    )


def _numbers(
    arrays: dict[str, NDArray[Any]], key: str, start: int, n: int, said: list[str], where: str
) -> NDArray[np.int64]:
    """The numbers of the steps or layers, counted from *start* where there is no such array."""
    if key in arrays:
        check_steps(arrays[key], n, f"{where}, array {key}")
        return arrays[key].astype(np.int64)
    said.append(f"{key} are numbered from {start}")
    return np.arange(start, start + n)


def _stream(
    counts: NDArray[Any], steps: NDArray[np.int64], layers: NDArray[np.int64], key: str, values: Values, where: str
) -> Iterator[Cells]:
    rows = max(1, BLOCK_CELLS // 4 // (counts.shape[1] * counts.shape[2]))
    for start in range(0, len(steps), rows):
        part = values.counts(np.asarray(counts[start : start + rows]), key, start, where)
        yield dense_cells(steps[start : start + rows], layers, part)
