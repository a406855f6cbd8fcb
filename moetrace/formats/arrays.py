"""NumPy arrays of counts, `.npy` or `.npz`, never pickled, and read a few steps at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.formats.base import LAYER_IN_NAME, Cells, Reading, ReadOptions, dense_cells
from moetrace.formats.canonical import one_line
from moetrace.formats.columns import Values
from moetrace.formats.stored import Stored, stored_arrays
from moetrace.formats.watch import Watch
from moetrace.trace import Counts, check_steps

# Names under which an .npz holds its counts; with a single array in it any name will do.
COUNTS_KEYS = ("counts", "tokens_per_expert", "load")
# Dumps of a Megatron-LM fork, one for each rank: `loads` (layers, forward passes, experts).
MCORE_NAME = "mcore_ep_loads_"
# Cells handed on at a time.
BATCH_CELLS = 1 << 18


class NumpyFormat:
    """An array of counts (steps, layers, experts), or (steps, experts) for one layer."""

    name = "numpy"
    needs = (
        ".npy (steps, layers, experts), or (steps, experts) in layer_<N>.npy; "
        "or .npz with counts and, where they are not 1, 2, ..., steps and layers"
    )

    def claims(self, path: Path) -> bool:
        """A file named .npy or .npz."""
        return path.is_file() and path.suffix.lower() in {".npy", ".npz"}

    def read(self, path: Path, options: ReadOptions) -> Reading:
        """Look at the headers; what is streamed later is read from the file in pieces."""
        try:
            arrays = stored_arrays(path)
            return _reading(arrays, path, options)
        except (TraceError, MemoryError):
            raise
        except Exception as error:  # zipfile and NumPy raise half a dozen types on damaged files
            raise _unreadable(str(path), error) from error


def _unreadable(where: str, error: Exception) -> TraceError:
    problem = f"cannot be read as NumPy data: {one_line(error)}"
    return TraceError(where, problem, "save plain numbers again; nothing is unpickled")


@dataclass(frozen=True)
class _Log:
    """What an archive holds: *rows* starts the counts anew, each piece (steps, layers, experts)."""

    rows: Callable[[int], Iterator[NDArray[np.int64]]]
    shape: tuple[int, int, int]
    key: str
    said: tuple[str, ...]


def _reading(arrays: Mapping[str, Stored], path: Path, options: ReadOptions) -> Reading:
    where = str(path)
    log = _log(arrays, path)
    steps, told = _numbers(arrays, "steps", 1, log.shape[0], where)
    layers, also = _numbers(arrays, "layers", 0, log.shape[1], where)
    named = LAYER_IN_NAME.fullmatch(path.stem)
    if named and "layers" not in arrays and len(layers) == 1:
        layers, also = np.array([int(named[1])]), (f"layer {named[1]}, by the name of the file",)
    watch = Watch()
    values = Values(options, watch)
    return Reading(
        cells=lambda: _stream(log, steps, layers, values, where),
        rows=log.shape[0] * log.shape[1] * log.shape[2],
        assumptions=(*log.said, *told, *also),
        where=where,
        watch=watch,
    )


def _log(arrays: Mapping[str, Stored], path: Path) -> _Log:
    """The array of counts among *arrays*; raises `TraceError` where none is, or it is no array of counts."""
    where = str(path)
    if path.name.startswith(MCORE_NAME) and "loads" in arrays and len(arrays["loads"].shape) == 3:
        return _of_layers(arrays["loads"], where)
    key = next((name for name in COUNTS_KEYS if name in arrays), next(iter(arrays)) if len(arrays) == 1 else None)
    if key is None:
        raise TraceError(where, f"holds {_shown(arrays)}, and none is the counts", "name it `counts`")
    said = [] if key in COUNTS_KEYS else [f"array {key} is the counts"]
    counts = arrays[key]
    if len(counts.shape) == 2:
        counts = replace(counts, shape=(counts.shape[0], 1, counts.shape[1]))
        said.append("two dimensions are steps and experts: one layer")
    if len(counts.shape) != 3 or min(counts.shape) < 1:
        raise TraceError(where, f"counts have the shape {counts.shape}", "give an array (steps, layers, experts)")
    steps, layers, experts = counts.shape
    return _Log(lambda rows: counts.rows(rows, where), (steps, layers, experts), key, tuple(said))


def _of_layers(loads: Stored, where: str) -> _Log:
    """Counts that are stored layer by layer (layers, passes, experts), which have to be held whole."""
    layers, passes, experts = loads.shape
    said = "loads are (layers, passes, experts); each forward pass is a step"

    def rows(size: int) -> Iterator[NDArray[np.int64]]:
        cube = np.moveaxis(loads.whole(where), 0, 1)
        return (cube[a : a + size] for a in range(0, passes, size))

    return _Log(rows, (passes, layers, experts), "loads", (said,))


def _shown(arrays: Mapping[str, Stored]) -> str:
    names = list(arrays)
    return ", ".join(names[:8]) + (f", ... ({len(names)} arrays)" if len(names) > 8 else "") or "no array"


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
    try:
        for part in log.rows(size):
            counts: Counts = values.counts(part, log.key, start, where)
            yield dense_cells(steps[start : start + len(part)], layers, counts)
            start += len(part)
    except (TraceError, MemoryError, GeneratorExit):
        raise
    except Exception as error:  # zipfile raises half a dozen types on damaged files
        raise _unreadable(where, error) from error
