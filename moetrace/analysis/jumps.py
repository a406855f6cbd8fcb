"""What a history says of the present load: that which came after its last jump.

A load that moves a little every step is one thing, and a load that was exchanged for another from one step to the next
(other texts, another customer, a restart with another seed) a different one. What came before says nothing of what
follows, and to a variogram over both it looks like drift.
"""

from __future__ import annotations

import numpy as np

from moetrace.analysis.kept import once
from moetrace.analysis.variogram import BLOCK, block_means, weights
from moetrace.trace import LayerLoad

# Steps that are searched: what lies further back has no weight to speak of.
SEARCHED = 5000
# Steps whose mean shares say how much each expert counts.
KNOWN = 20_000
# Blocks compared on each side of a border: few, so that a jump is soon seen.
SIDE = 2
# A jump changes the load by so much, root mean square and relative, ...
JUMP = 0.15
# ... and by so many times as much as the load usually changes: while a layer is transient, large changes are usual.
UNUSUAL = 5.0
# Borders that say what is usual.
LEAST = 20


def since_jump(history: LayerLoad) -> LayerLoad:
    """The part of *history* that comes after its last jump; all of it where there was none.

    >>> import moetrace as mt
    >>> load = mt.synthetic_trace([mt.settling(500, steps=2000)]).layer(0)
    >>> since_jump(load) is load
    True
    """
    left = _rows_left(history)
    return history.between(int(history.steps[-left]), int(history.steps[-1])) if left else history


@once
def _rows_left(history: LayerLoad) -> int:
    """How many of the last rows come after the last jump; 0 where there was none."""
    rows = history.rows(BLOCK)
    means = block_means(history.last(SEARCHED), rows)
    borders = len(means) - 2 * SIDE + 1
    if borders < LEAST:
        return 0
    sides = np.stack([means[i : borders + SIDE + i] for i in range(SIDE)]).mean(axis=0)
    squared = np.square(sides[SIDE:] - sides[:-SIDE]) @ weights(history.last(KNOWN).mean_shares)  # (borders,)
    jumps = np.flatnonzero(squared > max(JUMP**2, UNUSUAL**2 * float(np.median(squared))))
    if not jumps.size:
        return 0
    near = np.arange(max(0, jumps[-1] - 2 * SIDE), jumps[-1] + 1)
    border = near[squared[near].argmax()] + SIDE
    # The block that begins there may hold some of what came before.
    left = min(len(means) - 1, int(border) + 1)
    return (len(means) - left) * rows
