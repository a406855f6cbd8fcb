"""How far the load of a layer moves from one window to the next, without noise, and where it changes.

The state rule averages movement over hundreds of steps before it judges, so it is right about what changed and blurs
when. `Changes` looks every few steps at the change from one short window to the next. Its squares are, to first order,
gamma distributed with one mean before a border between two states and another after it; the border is where splitting
them in two is the most likely: the least ``n_1 log mean_1 + n_2 log mean_2``, over the splits on which movement falls
or rises. A load that calms down gradually has no such border.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from moetrace.analysis.variogram import BLOCK, SHARE_FLOOR, STEP_LAG, block_means, weights
from moetrace.trace import LEAST_ROWS, LayerLoad, Shares, Steps

# Values worked on at a time, whole blocks of them: what is computed from them is small beside the load of a layer.
VALUES_AT_A_TIME = 1 << 20
# Steps between two moments that are looked at.
EVERY = 10
# Moments on either side of a split, fewer of which have no mean to speak of.
LEAST_MOMENTS = 3
# A change is sudden where so much of it happens within so many steps on either side: all of a step, a third of a
# ramp as long as what is searched.
SUDDEN, WITHIN = 0.6, 200


def window_blocks(load: LayerLoad, window: int) -> tuple[int, int]:
    """Rows of a block, and blocks of a window, which holds at least `LEAST_ROWS` rows."""
    rows = load.rows(min(BLOCK, window))
    return rows, max(load.rows(window) // rows, -(-min(LEAST_ROWS, window) // rows))


def border_steps(load: LayerLoad, rows: int, k: int) -> Steps:
    """The step after every border of two blocks that has a window of *k* blocks on each side."""
    blocks = len(load.steps) // rows
    start = len(load.steps) - blocks * rows
    at = start + rows * np.arange(k, blocks - k + 1)
    return load.steps[np.minimum(at, len(load.steps) - 1)]


def movement(load: LayerLoad, window: int) -> tuple[Steps, NDArray[np.float64], NDArray[np.float64]]:
    """Squared movement without noise, and that noise, at the border of every two blocks that has a window on each side.

    There are none where the rows are further apart than a window.

    ``sum_e (b - a)^2 / ((a + b) / 2)`` for the means a and b of the windows before and after, less
    twice the scatter of a window's mean. May be below 0 where the load stands still.
    """
    rows, k = window_blocks(load, window)
    means = block_means(load, rows)
    if len(means) < 2 * k or load.stride > window:
        return np.empty(0, np.int64), np.empty(0), np.empty(0)
    windows = sliding_window_view(means, k, axis=0).mean(axis=-1)  # (blocks - k + 1, experts)
    before, after = windows[:-k], windows[k:]
    middle = np.maximum((before + after) / 2, SHARE_FLOOR / load.experts)
    scatter = sliding_window_view(_block_scatter(load, rows), 2 * k, axis=0).mean(axis=-1)  # (moments, experts)
    noise = (2 * scatter / (k * rows) / middle).sum(axis=1)
    squared = (np.square(after - before) / middle).sum(axis=1) - noise
    return border_steps(load, rows, k), squared, noise


def _block_scatter(load: LayerLoad, rows: int) -> Shares:
    """Variance of one step's share around the slowly moving load, by block, shape (blocks, experts)."""
    blocks = len(load.steps) // rows
    shares = load.shares[len(load.steps) - blocks * rows :]
    lag = min(load.rows(STEP_LAG), max(1, rows // 2))
    scatter = np.empty((blocks, load.experts))
    n = max(2, VALUES_AT_A_TIME // (rows * load.experts))
    for a in range(0, blocks, n):
        part = shares[max(0, a * rows - lag) : (a + n) * rows]
        apart = np.square(part[lag:] - part[:-lag]) / 2
        if a == 0:  # the first rows have no partner before them
            apart = np.concatenate([apart[:lag], apart])
        scatter[a : a + n] = apart.reshape(-1, rows, load.experts).mean(axis=1)
    return scatter


def mean_over_hold(load: LayerLoad, values: NDArray[np.float64], hold: int) -> NDArray[np.float64]:
    """The mean of *values* (moments,) over the next *hold* steps, or `LEAST_ROWS`; fewer moments than went in."""
    n = max(min(LEAST_ROWS, hold), hold // (load.rows(BLOCK) * load.stride))
    return sliding_window_view(values, n).mean(axis=1) if len(values) >= n else np.empty(0)


# --- where the load changes -------------------------------------------------------------------


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
        self.near = max(LEAST_MOMENTS, load.rows(WITHIN) // rows)

    def border(self, first: int, last: int, *, falls: bool) -> int | None:
        """The step between *first* and *last* at which movement suddenly *falls*, or rises; None where it does not."""
        inside = (self.steps >= first) & (self.steps <= last)
        squared, steps = self.squared[inside], self.steps[inside]
        if len(squared) < 2 * LEAST_MOMENTS:
            return None
        split = np.arange(LEAST_MOMENTS, len(squared) - LEAST_MOMENTS + 1)
        sums = np.cumsum(squared)
        before, after = sums[split - 1] / split, (sums[-1] - sums[split - 1]) / (len(squared) - split)
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
