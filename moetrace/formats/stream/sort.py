"""Streams whose steps go backwards: a run that went back to a checkpoint, or rows in another order.

The latter are sorted by step, in bounded memory (an external sort): cells are collected into runs, each sorted by
step and written to disk column by column in the smallest integers that hold it. Then ranges of steps are taken from
all runs together, each small enough to be sorted in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.files import scratch
from moetrace.formats.stream.blocks import join
from moetrace.formats.stream.cells import Cells, Merged, Reading, Source
from moetrace.trace import Steps

# Times a run may go back to a checkpoint; rows in another order go back far more often.
MOST_RUNS = 64


@dataclass
class Run:
    """A stretch of a stream in which steps never go backwards.

    *cells* is their number, *steps* the number of them in each step.
    """

    cells: int = 0
    steps: dict[int, int] = field(default_factory=dict)
    layers: set[int] = field(default_factory=set)
    experts: set[int] = field(default_factory=set)

    def add(self, piece: Cells) -> None:
        """Go on with *piece*."""
        self.cells += len(piece.step)
        for step, n in zip(*(part.tolist() for part in np.unique(piece.step, return_counts=True))):
            self.steps[step] = self.steps.get(step, 0) + n
        self.layers.update(np.unique(piece.layer).tolist())
        self.experts.update(np.unique(piece.expert).tolist())

    @property
    def first(self) -> int:
        """The first step."""
        return min(self.steps)

    @property
    def last(self) -> int:
        """The last step."""
        return max(self.steps)

    def repeats(self, before: Run) -> bool:
        """Whether this run writes whole steps of *before* again, all from some step on."""
        whole = len(before.layers) * len(before.experts)
        again = {step for step in before.steps if self.first <= step <= self.last}
        mine = {step for step in self.steps if step <= before.last}
        return (
            bool(mine)
            and again == mine
            and (self.layers, self.experts) == (before.layers, before.experts)
            and all(self.steps[step] == whole for step in mine)
            # A run that was killed may have left its last step half written.
            and all(n == whole for step, n in before.steps.items() if step != before.last)
        )


def in_order(source: Source, folder: Path) -> Source:
    """The same source with the steps of every stream in order.

    Where whole steps are written again after steps went back, the last ones count, and a finding says so;
    that streams. Any other order is sorted, through temporary files in *folder* where it is much.
    """
    if isinstance(source, Merged):
        return replace(source, parts=tuple(in_order(part, folder) for part in source.parts))
    runs = runs_of(source.cells())
    if runs is not None and len(runs) == 1:
        return source
    if runs is not None and all(after.repeats(before) for before, after in pairwise(runs)):
        return replace(source, cells=lambda: _resumed(source, runs))
    return replace(source, cells=lambda: sort_by_step(source.cells(), folder))


def runs_of(cells: Iterable[Cells]) -> list[Run] | None:
    """The runs of a stream, None when there are more than `MOST_RUNS`."""
    runs: list[Run] = []
    latest = None
    for piece in cells:
        for part in _forward(piece):
            if latest is None or part.step[0] < latest:
                runs.append(Run())
            runs[-1].add(part)
            latest = part.step[-1]
            if len(runs) > MOST_RUNS:
                return None
    return runs


def _forward(piece: Cells) -> Iterator[Cells]:
    """The parts of a piece in which steps never go backwards; only as many as matter."""
    borders = [0, *(np.flatnonzero(piece.step[1:] < piece.step[:-1]) + 1).tolist()[: MOST_RUNS + 1], len(piece.step)]
    for a, b in pairwise(borders):
        if b > a:
            yield piece.part(a, b)


def _resumed(reading: Reading, runs: list[Run]) -> Iterator[Cells]:
    """The stream without the steps that a later run writes again."""
    starts = [run.first for run in runs]
    for i, (before, after) in enumerate(pairwise(runs), 1):
        reached = max(run.last for run in runs[i:])
        # From its first step again, or ending early, it may as well be another rank or a mistake.
        name = "repeated" if after.first <= runs[0].first or reached < before.last else "restart"
        again = f"steps {after.first} to {min(before.last, reached)} are there again after step {before.last}"
        lost = f"; steps {reached + 1} to {before.last} of the run that was given up are left out"
        reading.collector.note(name, f"step {after.first}", again + (lost if reached < before.last else ""))
    at = done = 0
    for piece in reading.cells():
        start = 0
        while start < len(piece.step):
            while done == runs[at].cells:
                at, done = at + 1, 0
            size = min(len(piece.step) - start, runs[at].cells - done)
            part = piece.part(start, start + size)
            end = min(starts[at + 1 :], default=None)
            keep = size if end is None else int(np.searchsorted(part.step, end, "left"))
            yield part.part(0, keep)
            start, done = start + size, done + size


# --- sorting on disk ---------------------------------------------------------------------------

# Cells sorted at a time: 64 MiB, and twice as much again while they are joined and sorted.
SORT_CELLS = 1 << 20
# Cells handed on at a time.
PIECE_CELLS = 1 << 18


@dataclass(frozen=True)
class Spilled:
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
        runs: list[Spilled] = []
        for chunk in _again(first, second, chunks):
            ordered = _sorted(chunk)
            runs.append(_written(ordered, inside / str(len(runs))))
            known, sizes = _counted(known, sizes, ordered.step)
        yield from _merged_runs(runs, known, sizes)


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


def _written(cells: Cells, path: Path) -> Spilled:
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
    return Spilled(tuple(paths), tuple(types))


def _counted(known: Steps, sizes: NDArray[np.int64], step: Steps) -> tuple[Steps, NDArray[np.int64]]:
    """The steps so far, increasing, and the number of cells of each, with those of *step* (cells,) added."""
    new, n = np.unique(step, return_counts=True)
    every = np.union1d(known, new)
    total = np.zeros(len(every), np.int64)
    total[np.searchsorted(every, known)] += sizes
    total[np.searchsorted(every, new)] += n
    return every, total


def _merged_runs(runs: list[Spilled], steps: Steps, sizes: NDArray[np.int64]) -> Iterator[Cells]:
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
