"""Streams whose steps go backwards: a run that went back to a checkpoint, or rows in another order.

The latter are sorted by step in memory, as long as there are not too many of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from moetrace.errors import TraceError
from moetrace.formats.errors import require
from moetrace.formats.stream.cells import Cells, Merged, Reading, Source, joined

# Times a run may go back to a checkpoint; rows in another order go back far more often.
MOST_RUNS = 64
# Rows sorted in memory, which take 2 GiB of it, and twice as much again while they are sorted.
MOST_SORTED = 1 << 26
# Cells handed on at a time.
PIECE_CELLS = 1 << 18


@dataclass
class Run:
    """A stretch of a stream in which steps never go backwards.

    *cells* is their number, *steps* the number of them in each step.
    """

    first: int
    last: int
    cells: int = 0
    steps: dict[int, int] = field(default_factory=dict)
    layers: set[int] = field(default_factory=set)
    experts: set[int] = field(default_factory=set)

    def add(self, piece: Cells) -> None:
        self.cells, self.last = self.cells + len(piece.step), int(piece.step[-1])
        for step, n in zip(*(part.tolist() for part in np.unique(piece.step, return_counts=True))):
            self.steps[step] = self.steps.get(step, 0) + n
        self.layers.update(np.unique(piece.layer).tolist())
        self.experts.update(np.unique(piece.expert).tolist())

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


def in_order(source: Source) -> Source:
    """The same source with the steps of every stream in order.

    Where whole steps are written again after steps went back, the last ones count, and a finding says so;
    that streams. Any other order is sorted; raises `TraceError` while it is read where there are too many rows.
    """
    if isinstance(source, Merged):
        return replace(source, parts=tuple(in_order(part) for part in source.parts))
    runs = _runs_of(source.cells())
    if runs is not None and len(runs) == 1:
        return source
    if runs is not None and all(after.repeats(before) for before, after in pairwise(runs)):
        return replace(source, cells=lambda: _resumed(source, runs))
    return replace(source, cells=lambda: _sorted(source))


def _runs_of(cells: Iterable[Cells]) -> list[Run] | None:
    """The runs of a stream, None when there are more than `MOST_RUNS`."""
    runs: list[Run] = []
    latest = None
    for piece in cells:
        # Only as many borders as matter.
        back = (np.flatnonzero(piece.step[1:] < piece.step[:-1]) + 1).tolist()[: MOST_RUNS + 1]
        for a, b in pairwise([0, *back, len(piece.step)]):
            if a == b:
                continue
            part = piece.part(a, b)
            if latest is None or part.step[0] < latest:
                runs.append(Run(int(part.step[0]), int(part.step[0])))
            runs[-1].add(part)
            latest = part.step[-1]
            if len(runs) > MOST_RUNS:
                return None
    return runs


def _sorted(reading: Reading) -> Iterator[Cells]:
    """The cells in the order of their steps; those of one step stay in the order they came in."""
    query = "sort them while they are read, as with --sql 'SELECT step, layer, expert, tokens FROM ... ORDER BY step'"
    held: list[Cells] = []
    n = 0
    for piece in reading.cells():
        held.append(piece)
        n += len(piece.step)
        if n > MOST_SORTED:
            problem = f"its rows are not in the order of their steps, and over {MOST_SORTED:,} are too many to sort"
            raise TraceError(reading.where, problem, query)
        require(n * 96, reading.where, f"sorting over {n:,} rows by step", query)
    whole = joined(held)
    held.clear()
    order = np.argsort(whole.step, kind="stable")
    for start in range(0, len(order), PIECE_CELLS):
        rows = order[start : start + PIECE_CELLS]
        yield Cells(*(column[rows] for column in whole))


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
