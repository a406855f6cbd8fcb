"""Blocks that wait to be written, as many as memory may hold while the disk takes none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from moetrace.trace import Counts, Steps

# What a recorder may hold while nothing can be written: far less than a training has, and 2,000 steps of a
# small model.
MOST_BLOCKS = 20
MOST_BYTES = 64 << 20


class Block(NamedTuple):
    """Consecutive steps: *steps* (steps,), *counts* (steps, layers, experts).

    *after_restart* marks the first block after the run went back: steps recorded earlier, from its first one on,
    no longer count.
    """

    steps: Steps
    counts: Counts
    after_restart: bool


@dataclass
class Backlog:
    """The *blocks* that wait, in the order of recording, and those *lost* because there were too many."""

    blocks: list[Block] = field(default_factory=list)
    lost: list[Block] = field(default_factory=list)

    def add(self, block: Block) -> None:
        """Hold *block*, the newest, and drop the oldest beyond `MOST_BLOCKS` or `MOST_BYTES`.

        The first step after a restart is kept: without it, the steps of the run before the restart would stand in
        the place of those dropped.
        """
        self.blocks.append(block)
        while len(self.blocks) > MOST_BLOCKS or sum(held.counts.nbytes for held in self.blocks) > MOST_BYTES:
            spare = (i for i, held in enumerate(self.blocks[:-1]) if not held.after_restart or len(held.steps) > 1)
            oldest = next(spare, None)
            if oldest is None:
                return
            dropped = self.blocks.pop(oldest)
            if dropped.after_restart:
                self.blocks.insert(oldest, Block(dropped.steps[:1].copy(), dropped.counts[:1].copy(), True))
                dropped = Block(dropped.steps[1:], dropped.counts[1:], False)
            self.lost.append(dropped._replace(counts=dropped.counts[:0].copy()))  # the steps are enough


def steps_text(blocks: Iterable[Block]) -> str:
    """The steps of *blocks* for a message: ``steps 101 to 200, 301 to 400``; neighbours are one."""
    spans: list[tuple[int, int]] = []
    for block in blocks:
        first, last = int(block.steps[0]), int(block.steps[-1])
        if spans and spans[-1][1] == first - 1:
            first = spans.pop()[0]
        spans.append((first, last))
    texts = [f"{first} to {last}" for first, last in spans[:5]]
    return "steps " + ", ".join(texts) + (f", ... ({len(spans)} spans)" if len(spans) > 5 else "")
