"""Where between two states the load changed: the change point of its movement.

The state rule averages movement over hundreds of steps before it judges, so it is right about what changed and
blurs when. Here the change from one short window to the next is looked at every few steps. Its squares are, to
first order, gamma distributed with one mean before the border and another after it; the border is where splitting
them in two is the most likely: the least ``n_1 log mean_1 + n_2 log mean_2``, over the splits on which movement
falls (a layer settles) or rises (it does not any more). A load that calms down gradually has no such border: the
difference between the two sides is not that between the last steps before it and the first ones after it.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from moetrace.analysis.variogram import BLOCK, block_means, weights
from moetrace.trace import LayerLoad, Steps

# Steps between two moments that are looked at.
EVERY = 10
# Moments on either side of a split, fewer of which have no mean to speak of.
LEAST = 3
# A change is sudden where so much of it happens within so many steps on either side: all of a step, a third of a
# ramp as long as what is searched.
SUDDEN, WITHIN = 0.6, 200


class Changes:
    """Squared change of a layer's load from one window of `BLOCK` steps to the next, at *steps* (moments,)."""

    def __init__(self, load: LayerLoad) -> None:
        rows = load.rows(EVERY)
        means = block_means(load, rows)
        k = max(1, load.rows(BLOCK) // rows)
        windows = sliding_window_view(means, k, axis=0).mean(axis=-1) if len(means) >= k else means[:0]
        self.squared = np.square(windows[k:] - windows[:-k]) @ weights(load.mean_shares)
        at = len(load.steps) - len(means) * rows + rows * (k + np.arange(len(self.squared)))
        self.steps: Steps = load.steps[np.minimum(at, len(load.steps) - 1)]
        self.near = max(LEAST, load.rows(WITHIN) // rows)

    def border(self, first: int, last: int, *, falls: bool) -> int | None:
        """The step between *first* and *last* at which movement suddenly *falls*, or rises; None where it does not."""
        inside = (self.steps >= first) & (self.steps <= last)
        squared, steps = self.squared[inside], self.steps[inside]
        if len(squared) < 2 * LEAST:
            return None
        before, after, split = _means(squared)
        # What is 0 throughout has no logarithm; a floor far below any movement stands in.
        floor = 1e-12 + 1e-9 * squared.max()
        cost = split * np.log(before + floor) + (len(squared) - split) * np.log(after + floor)
        fitting = (before > after) == falls
        if not fitting.any():
            return None
        best = np.flatnonzero(fitting)[cost[fitting].argmin()]
        at, near = split[best], self.near
        if not near <= at <= len(squared) - near:  # it goes on changing beyond what was looked at
            return None
        local = squared[at - near : at].mean() - squared[at : at + near].mean()
        return int(steps[at]) if local / (before[best] - after[best]) >= SUDDEN else None


def level_shift(load: LayerLoad) -> int:
    """The first step of the part of *load* whose mean load differs most from that of the part before it.

    The split with the largest ``n_1 n_2 / n |mean_1 - mean_2|^2``, which is where one jump of the level is the most
    likely, to the row. There has to be more than one row.
    """
    shares = load.shares * np.sqrt(weights(load.mean_shares))
    rows = np.arange(1, len(shares))[:, None]
    sums = np.cumsum(shares, axis=0)
    before, after = sums[:-1] / rows, (sums[-1] - sums[:-1]) / (len(shares) - rows)
    gain = (rows * (len(shares) - rows))[:, 0] * np.square(before - after).sum(axis=1)
    return int(load.steps[1 + gain.argmax()])


def _means(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """The means before and from each place where *values* (moments,) can be split, and those places."""
    split = np.arange(LEAST, len(values) - LEAST + 1)
    sums = np.cumsum(values)
    before = sums[split - 1] / split
    return before, (sums[-1] - sums[split - 1]) / (len(values) - split), split
