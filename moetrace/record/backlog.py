"""Blocks that wait to be written, as many as memory may hold while the disk takes none."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from moetrace.trace import Counts, Steps

# What a recorder may hold while nothing can be written: far less than a training has, and 2,000 steps of a
# small model.
MOST_BLOCKS = 20
MOST_BYTES = 64 << 20


class Held(NamedTuple):
    """Consecutive steps: *steps* (steps,), *counts* (steps, layers, experts).

    *again* says that it is the first after the run went back: what was recorded from its first step on is given up.
    """

    steps: Steps
    counts: Counts
    again: bool

    @property
    def span(self) -> tuple[int, int]:
        """The first step and the last."""
        return int(self.steps[0]), int(self.steps[-1])


class Backlog:
    """Blocks in the order of recording, the oldest dropped where there are too many; *lost* says which steps were."""

    def __init__(self) -> None:
        self.lost: list[tuple[int, int]] = []
        self._held: list[Held] = []

    def __len__(self) -> int:
        return len(self._held)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first and the last step of each block that waits."""
        return [block.span for block in self._held]

    def add(self, block: Held) -> None:
        """Hold *block*, the newest, and drop the oldest beyond `MOST_BLOCKS` or `MOST_BYTES`."""
        self._held.append(block)
        while self._too_many() and self._drop():
            pass

    def write(self, write: Callable[[Held], None]) -> None:
        """Hand the blocks to *write*, oldest first; those that it has not taken when it raises stay."""
        while self._held:
            write(self._held[0])
            del self._held[0]

    def _too_many(self) -> bool:
        return len(self._held) > MOST_BLOCKS or sum(block.counts.nbytes for block in self._held) > MOST_BYTES

    def _drop(self) -> bool:
        """Drop the oldest block but not the newest; False where there is none to drop.

        Of a block with which the run went back the first step stays: without it, the steps of the run that was given
        up would stand in the place of those dropped.
        """
        oldest = next(
            (i for i, block in enumerate(self._held[:-1]) if not (block.again and len(block.steps) == 1)), None
        )
        if oldest is None:
            return False
        block = self._held.pop(oldest)
        if block.again:
            self._held.insert(oldest, Held(block.steps[:1].copy(), block.counts[:1].copy(), True))
            block = Held(block.steps[1:], block.counts[1:], False)
        self._lose(block.span)
        return True

    def _lose(self, span: tuple[int, int]) -> None:
        if self.lost and self.lost[-1][1] == span[0] - 1:
            span = (self.lost.pop()[0], span[1])
        self.lost.append(span)


def spans_text(spans: list[tuple[int, int]]) -> str:
    """Spans of steps for a message: ``steps 101 to 200, 301 to 400``; neighbours are one."""
    joined: list[tuple[int, int]] = []
    for first, last in spans:
        if joined and joined[-1][1] == first - 1:
            first = joined.pop()[0]
        joined.append((first, last))
    texts = [f"{first} to {last}" for first, last in joined[:5]]
    return "steps " + ", ".join(texts) + (f", ... ({len(joined)} spans)" if len(joined) > 5 else "")
