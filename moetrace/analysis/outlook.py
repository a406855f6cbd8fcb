"""How far the load of the steps to come may be from a good forecast of it, from the past alone.

For a local level with noise n and drift d per step (`moetrace.analysis.variogram`), the mean share of expert e over
a horizon of H steps scatters around the estimated level with the variance

    var_e = p_e (1 - p_e) n / (E - 1) / H  +  p_e (f + d H / 3) / E

with f the variance of the estimated level in the steady state of the filter; like n and d it is a sum
over the E experts relative to their shares. The terms are sampling, the error of the estimated level, and
its random walk, whose mean over H steps has a third of the variance of its end.

A load that calms down looks too lively in a long past, and the drift over long distances is not seen in a short one.
So several are asked, and the answer is the geometric mean of theirs. What came before a jump of the load (other texts,
another customer, a restart with another seed) says nothing of what follows, and to a variogram over both it looks like
drift: only the load since the last jump is the present one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moetrace.analysis.variogram import (
    BLOCK,
    FAR_LAGS,
    SHARE_FLOOR,
    NoiseDrift,
    block_means,
    cached_per_layer,
    noise_and_drift,
    weights,
)
from moetrace.trace import LayerLoad, Shares

# Steps that noise and drift are read from: as for the level, as long as the horizon that is mostly asked for, and
# what has just happened. On gpt-moe-8e-a the three together are better than any of them.
MEMORIES = (2500, 1000, 500)
# The share of an expert is that of its last steps.
SHARE_WINDOW = 500
# Blocks after a jump that noise and drift can be read from.
LEAST_BLOCKS = 10
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
LEAST_BORDERS = 20


def since_jump(history: LayerLoad) -> LayerLoad:
    """The part of *history* that comes after its last jump; all of it where there was none.

    >>> import moetrace as mt
    >>> load = mt.synthetic_trace([mt.settling(500, steps=2000)]).layer(0)
    >>> since_jump(load) is load
    True
    """
    left = _rows_left(history)
    return history.between(int(history.steps[-left]), int(history.steps[-1])) if left else history


@cached_per_layer
def _rows_left(history: LayerLoad) -> int:
    """How many of the last rows come after the last jump; 0 where there was none."""
    rows = history.rows(BLOCK)
    means = block_means(history.last(SEARCHED), rows)
    borders = len(means) - 2 * SIDE + 1
    if borders < LEAST_BORDERS:
        return 0
    sides = np.stack([means[i : borders + SIDE + i] for i in range(SIDE)]).mean(axis=0)
    squared = np.square(sides[SIDE:] - sides[:-SIDE]) @ weights(history.last(KNOWN).mean_shares)  # (borders,)
    jumps = np.flatnonzero(squared > max(JUMP**2, UNUSUAL**2 * float(np.median(squared))))
    if not jumps.size:
        return 0
    near = np.arange(max(0, jumps[-1] - 2 * SIDE), jumps[-1] + 1)
    border = int(near[squared[near].argmax()]) + SIDE
    # The block that begins there may hold some of what came before.
    return (len(means) - min(len(means) - 1, border + 1)) * rows


@dataclass(frozen=True, eq=False)
class Outlook:
    """What the history up to some step says of what comes after it.

    *estimates* are those of noise and drift by `MEMORIES`, *share* (experts,) the present shares; *block* is the rows
    of a block, *stride* the steps of a row.
    """

    estimates: tuple[NoiseDrift, ...]
    share: Shares
    block: int
    stride: int

    @classmethod
    def of(cls, history: LayerLoad) -> Outlook:
        """From what came after the last jump of *history*; while that is too little, from all of it."""
        present = since_jump(history)
        known = present if len(present.steps) >= LEAST_BLOCKS * history.rows(BLOCK) else history
        parts = ((known.last(memory), min(FAR_LAGS, memory // BLOCK // 2)) for memory in MEMORIES)
        estimates = tuple(noise_and_drift(part, lags=lags) for part, lags in parts)
        share = np.maximum(present.last(SHARE_WINDOW).mean_shares, SHARE_FLOOR / history.experts)
        return cls(estimates, share, history.rows(BLOCK), history.stride)

    def deviation(self, horizon: int) -> Shares:
        """Standard deviation of the mean share over *horizon* steps around a good forecast of it, shape (experts,)."""
        experts, ahead, variances = len(self.share), max(1, round(horizon / self.stride)), []
        for found in self.estimates:
            level = found.gain(self.block) * found.noise / self.block
            sampling = self.share * (1 - self.share) * found.noise / max(1, experts - 1) / ahead
            variances.append(sampling + self.share * (level + found.drift * ahead / 3) / experts)
        deviation: Shares = np.prod(variances, axis=0) ** (0.5 / len(variances))
        return deviation


def expected_movement(history: LayerLoad, horizon: int) -> float:
    """The error of a good forecast of the mean over the next *horizon* steps, as noise and drift expect it, a fraction.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=4000)])
    >>> early, late = (mt.expected_movement(trace.layer(0).until(step), 1000) for step in (500, 4000))
    >>> early > 0.1, late < 0.04
    (True, True)
    """
    return total_error(Outlook.of(history).deviation(horizon))


def total_error(deviation: Shares) -> float:
    """Expected ``sum_e |error_e|`` of normal errors with standard *deviation* (experts,)."""
    return float(np.sqrt(2 / np.pi) * deviation.sum())
