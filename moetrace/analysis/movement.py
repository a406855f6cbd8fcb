"""How far the load of a layer moves from one window to the next, noise taken off, and how well that is known."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from moetrace.analysis.variogram import BLOCK, SHARE_FLOOR, STEP_LAG, block_means
from moetrace.trace import LEAST_ROWS, LayerLoad, Shares, Steps

# Values worked on at a time, whole blocks of them: what is computed from them is small beside the load of a layer.
VALUES_AT_A_TIME = 1 << 20


def window_blocks(load: LayerLoad, window: int) -> tuple[int, int]:
    """Rows of a block, and blocks of a window, which holds at least `LEAST_ROWS` rows."""
    rows = load.rows(min(BLOCK, window))
    return rows, max(load.rows(window) // rows, -(-min(LEAST_ROWS, window) // rows))


def borders(load: LayerLoad, rows: int, k: int) -> Steps:
    """The step after every border of two blocks that has a window of *k* blocks on each side."""
    blocks = len(load.steps) // rows
    start = len(load.steps) - blocks * rows
    at = start + rows * np.arange(k, blocks - k + 1)
    return load.steps[np.minimum(at, len(load.steps) - 1)]


def movement(load: LayerLoad, window: int) -> tuple[Steps, NDArray[np.float64], NDArray[np.float64]]:
    """Squared movement without noise, and that noise, at the border of every two blocks that has a window on each side.

    None are told where the rows are further apart than a window.

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
    return borders(load, rows, k), squared, noise


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


def ahead(load: LayerLoad, values: NDArray[np.float64], hold: int) -> NDArray[np.float64]:
    """The mean of *values* (moments,) over the next *hold* steps, or `LEAST_ROWS`; fewer moments than went in."""
    n = max(min(LEAST_ROWS, hold), hold // (load.rows(BLOCK) * load.stride))
    return sliding_window_view(values, n).mean(axis=1) if len(values) >= n else np.empty(0)


def uncertainty(load: LayerLoad, window: int, hold: int, noise: NDArray[np.float64]) -> float:
    """Standard error of what is judged, from the *noise* (moments,) that was taken off.

    Squared noise scatters as a chi-square of E - 1 degrees of freedom does; a hold has as many independent
    comparisons as windows fit into it.
    """
    rows, k = window_blocks(load, window)
    independent = max(1.0, hold / (rows * k * load.stride))
    return float(noise.mean() * np.sqrt(2 / max(1, load.experts - 1) / independent))
