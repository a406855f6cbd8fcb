"""Streams whose steps go backwards: a run that went back to a checkpoint, or rows in another order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from moetrace.formats.base import Cells, Merged, Reading, Source
from moetrace.formats.spill import sort_by_step

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

    Where whole steps are written again after steps went back, the last ones count, and the watch hears
    of it; that streams. Any other order is sorted, through temporary files in *folder* where it is much.
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
        # Begun anew from its first step, or ending early, it can as well be another rank or a slip.
        name = "repeated" if after.first <= runs[0].first or reached < before.last else "restart"
        again = f"steps {after.first} to {min(before.last, reached)} are there again after step {before.last}"
        lost = f"; steps {reached + 1} to {before.last} of the run that was given up are left out"
        reading.watch.say(name, f"step {after.first}", again + (lost if reached < before.last else ""))
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
