"""Sorting by step on disk: cells in any order, in bounded memory.

Cells are collected into runs, each sorted by step and written down column by column in the smallest
integers that hold it. Then ranges of steps are taken from all runs together, each small enough to be
sorted in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.atomic import scratch
from moetrace.formats.assemble import join
from moetrace.formats.base import Cells
from moetrace.trace import Steps

# Cells sorted at a time: 64 MiB, and twice as much again while they are joined and sorted.
SORT_CELLS = 1 << 20
# Cells handed on at a time.
PIECE_CELLS = 1 << 18


@dataclass(frozen=True)
class Run:
    """Cells on disk in the order of their steps, a file for each column of `Cells`."""

    paths: tuple[Path, ...]
    types: tuple[np.dtype[Any], ...]

    def positions(self, steps: Steps) -> NDArray[np.intp]:
        """Where each of *steps*, increasing, begins, or would; and at last where the run ends."""
        mine = np.fromfile(self.paths[0], self.types[0]).astype(np.int64)
        return np.append(np.searchsorted(mine, steps), len(mine))

    def between(self, start: int, end: int) -> Cells:
        """The cells from *start* to before *end*."""
        return Cells(
            *(
                np.fromfile(path, kind, end - start, offset=start * kind.itemsize).astype(np.int64)
                for path, kind in zip(self.paths, self.types)
            )
        )


def sort_by_step(cells: Iterable[Cells], folder: Path) -> Iterator[Cells]:
    """The same cells in the order of their steps; those of one step stay in the order they came in.

    More than `SORT_CELLS` of them pass through temporary files in *folder*, which are gone afterwards.
    """
    chunks = _chunks(cells)
    first, second = next(chunks, None), next(chunks, None)
    if first is None:
        return
    if second is None:
        yield _sorted(first)
        return
    with scratch(folder) as inside:
        known: Steps = np.empty(0, np.int64)
        sizes: NDArray[np.int64] = np.empty(0, np.int64)
        runs: list[Run] = []
        for chunk in _again(first, second, chunks):
            ordered = _sorted(chunk)
            runs.append(_written(ordered, inside / str(len(runs))))
            known, sizes = _counted(known, sizes, ordered.step)
        yield from _merged(runs, known, sizes)


def _chunks(cells: Iterable[Cells]) -> Iterator[Cells]:
    """The stream in pieces of about `SORT_CELLS` cells."""
    held: list[Cells] = []
    n = 0
    for piece in cells:
        held.append(piece)
        n += len(piece.step)
        if n >= SORT_CELLS:
            yield join(held)
            held, n = [], 0
    if n:
        yield join(held)


def _again(first: Cells, second: Cells, rest: Iterator[Cells]) -> Iterator[Cells]:
    yield first
    yield second
    yield from rest


def _sorted(cells: Cells) -> Cells:
    order = np.argsort(cells.step, kind="stable")
    return Cells(*(column[order] for column in cells))


def _pieces(cells: Cells) -> Iterator[Cells]:
    for start in range(0, len(cells.step), PIECE_CELLS):
        yield cells.part(start, start + PIECE_CELLS)


def _written(cells: Cells, path: Path) -> Run:
    """*cells* on disk, in files whose names begin with *path*."""
    paths, types = [], []
    for name, column in zip(Cells._fields, cells):
        kind = np.result_type(np.min_scalar_type(column.min()), np.min_scalar_type(column.max()))
        if kind.kind == "f":  # of a negative number and one beyond 63 bits
            kind = np.dtype(np.int64)
        paths.append(path.with_suffix(f".{name}"))
        types.append(kind)
        # Not by `tofile`, which says of a full disk only that something is missing.
        paths[-1].write_bytes(column.astype(kind).data)
    return Run(tuple(paths), tuple(types))


def _counted(known: Steps, sizes: NDArray[np.int64], step: Steps) -> tuple[Steps, NDArray[np.int64]]:
    """The steps so far, increasing, and the number of cells of each, with those of *step* (cells,) added."""
    new, n = np.unique(step, return_counts=True)
    every = np.union1d(known, new)
    total = np.zeros(len(every), np.int64)
    total[np.searchsorted(every, known)] += sizes
    total[np.searchsorted(every, new)] += n
    return every, total


def _merged(runs: list[Run], steps: Steps, sizes: NDArray[np.int64]) -> Iterator[Cells]:
    """The cells of all runs in the order of *steps* (steps,), each of which has *sizes* cells."""
    borders = _borders(sizes)
    at = np.stack([run.positions(steps[borders[:-1]]) for run in runs])  # (runs, ranges + 1)
    for i, (a, b) in enumerate(pairwise(borders)):
        parts = (run.between(int(x), int(y)) for run, x, y in zip(runs, at[:, i], at[:, i + 1]) if y > x)
        if b - a == 1:  # one step, of any size: nothing to sort
            yield from parts
        else:
            yield from _pieces(_sorted(join(list(parts))))


def _borders(sizes: NDArray[np.int64]) -> list[int]:
    """Where to cut the steps into ranges of at most `SORT_CELLS` cells, or of a single step."""
    ends = np.cumsum(sizes)
    borders = [0]
    while borders[-1] < len(sizes):
        done = ends[borders[-1] - 1] if borders[-1] else 0
        borders.append(max(borders[-1] + 1, int(np.searchsorted(ends, done + SORT_CELLS, "right"))))
    return borders
