"""Transient or stable: how much the load of a layer fluctuates, and from which step on it has settled.

Two things are computed. `fluctuation` is what the paper looks at: the sliding variance and range of
each expert's share. `classify` is a rule with numbers: it compares the mean load of one window with
that of the next, takes off what sampling noise alone would make of it, and calls the layer stable
from where that *movement* stays small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from moetrace.noise import BLOCK, SHARE_FLOOR, STEP_LAG, block_means
from moetrace.trace import LayerLoad, Shares, Steps

TRANSIENT = "transient"
STABLE = "stable"

# The paper's windows (arXiv 2404.16914, figures of sliding variance and range).
WINDOWS = (10, 100, 200)
# The largest of them is the window of the rule: the longest that the paper judged by eye.
WINDOW = 200
# Movement is averaged over this many steps before it is judged, so that one lucky comparison of two
# windows neither settles a layer nor unsettles it.
HOLD = 500
# A layer settles where its load moves by less than 4 % (root mean square over the load) from one
# window of 200 steps to the next, and is transient again above 6 %. On the sample trace movement
# falls from 10 % to 2 % in the layers that look settled to the eye, and 4 % is four times what is
# left of the noise; between the two thresholds the state stays what it was.
SETTLE_BELOW = 0.04
UNSETTLE_ABOVE = 0.06


class Run(NamedTuple):
    """Steps from *from_step* to *to_step*, both included, in one *state*."""

    from_step: int
    to_step: int
    state: str


@dataclass(frozen=True, eq=False)
class LayerStates:
    """The states of one layer.

    *settle_step* is the first step from which the layer stays stable, None if it never settles;
    *runs* follow each other without a gap. *steps* and *movement*, both of shape (moments,), are the
    course that was judged: the relative movement from the window before each step to the one after,
    noise taken off.
    """

    trace: str
    layer: int
    settle_step: int | None
    runs: tuple[Run, ...]
    steps: Steps
    movement: NDArray[np.float64]

    @property
    def state(self) -> str:
        """The state at the end."""
        return self.runs[-1].state

    def movement_in(self, first: int, last: int) -> float:
        """Root mean square movement between two steps; NaN where nothing was judged."""
        inside = self.movement[(self.steps >= first) & (self.steps <= last)]
        return float(np.sqrt(np.mean(np.square(inside)))) if inside.size else float("nan")


def classify(load: LayerLoad) -> LayerStates:
    """The states of a layer by the movement of its load.

    A layer too short to judge, less than twice `WINDOW` and `HOLD` together, is transient: stable is
    what has been shown to be. Nothing beyond the last step of *load* is needed, so the state at a
    cutoff is ``classify(load.until(cutoff)).state``.
    """
    first, last = int(load.steps[0]), int(load.steps[-1])
    steps, squared = _movement(load)
    hold = max(1, HOLD // (load.rows(BLOCK) * load.stride))
    if len(squared) < hold:
        return LayerStates(load.trace, load.layer, None, (Run(first, last, TRANSIENT),), steps, _root(squared))
    ahead = sliding_window_view(squared, hold).mean(axis=1)  # (moments - hold + 1,)
    stable = _hysteresis(ahead, SETTLE_BELOW**2, UNSETTLE_ABOVE**2)
    runs = _runs(stable, steps, first, last)
    settled = runs[-1].from_step if runs[-1].state == STABLE else None
    return LayerStates(load.trace, load.layer, settled, runs, steps, _root(squared))


def state_at(load: LayerLoad, cutoff: int) -> str:
    """The state of a layer as it could be told at the *cutoff*, from nothing after it."""
    return classify(load.until(cutoff)).state


def _root(squared: NDArray[np.float64]) -> NDArray[np.float64]:
    root: NDArray[np.float64] = np.sqrt(np.maximum(squared, 0))
    return root


def _movement(load: LayerLoad) -> tuple[Steps, NDArray[np.float64]]:
    """Squared movement without noise, at the border of every two blocks that has a window on each side.

    ``sum_e (b - a)^2 / ((a + b) / 2)`` for the means a and b of the windows before and after, less
    twice the scatter of a window's mean. May be below 0 where the load stands still.
    """
    rows = load.rows(BLOCK)
    means = block_means(load, rows)
    k = max(1, load.rows(WINDOW) // rows)
    if len(means) < 2 * k:
        return np.empty(0, np.int64), np.empty(0)
    windows = sliding_window_view(means, k, axis=0).mean(axis=-1)  # (blocks - k + 1, experts)
    before, after = windows[:-k], windows[k:]
    middle = np.maximum((before + after) / 2, SHARE_FLOOR / load.experts)
    scatter = sliding_window_view(_block_scatter(load, rows), 2 * k, axis=0).mean(axis=-1)  # (moments, experts)
    squared = ((np.square(after - before) - 2 * scatter / (k * rows)) / middle).sum(axis=1)
    start = len(load.steps) - len(means) * rows
    at = start + rows * np.arange(k, len(means) - k + 1)
    return load.steps[np.minimum(at, len(load.steps) - 1)], squared


def _block_scatter(load: LayerLoad, rows: int) -> Shares:
    """Variance of one step's share around the slowly moving load, by block, shape (blocks, experts)."""
    blocks = len(load.steps) // rows
    shares = load.shares[len(load.steps) - blocks * rows :]
    lag = min(STEP_LAG, max(1, rows // 2))
    apart = np.square(shares[lag:] - shares[:-lag]) / 2
    whole = np.concatenate([apart[:lag], apart])  # the first rows have no partner before them
    scatter: Shares = whole.reshape(blocks, rows, load.experts).mean(axis=1)
    return scatter


def _hysteresis(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.bool_]:
    """True from where *values* fall below *low* until they rise above *high*, shape of *values*."""
    decided = np.where(values < low, 1, np.where(values > high, 0, -1))
    last_decided = np.maximum.accumulate(np.where(decided >= 0, np.arange(len(values)), -1))
    stable: NDArray[np.bool_] = (last_decided >= 0) & (decided[last_decided] == 1)
    return stable


def _runs(stable: NDArray[np.bool_], steps: Steps, first: int, last: int) -> tuple[Run, ...]:
    """Runs of one state from *first* to *last*; each begins at the moment its state does."""
    starts = np.flatnonzero(np.diff(stable, prepend=~stable[:1]))
    begins = [first, *(int(steps[i]) for i in starts[1:])]
    ends = [*(begin - 1 for begin in begins[1:]), last]
    states = [STABLE if stable[i] else TRANSIENT for i in starts]
    return tuple(Run(a, b, state) for a, b, state in zip(begins, ends, states))


# --- the paper's measures ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fluctuation:
    """Sliding variance and range of the shares over one *window* of steps.

    *steps* (moments,) is the last step of each window; *variance* and *range* (moments, experts).
    """

    window: int
    steps: Steps
    variance: Shares
    range: Shares


def fluctuation(load: LayerLoad, windows: Sequence[int] = WINDOWS) -> list[Fluctuation]:
    """Sliding variance and range for each of *windows*, sampled at every block of their common divisor.

    For the paper's windows that is every 10 steps. Each block is reduced once, to its mean, squared
    deviation, minimum and maximum; windows are put together from blocks by Chan's update, which
    unlike a cumulative sum loses nothing to a spike that has long left the window.
    """
    unit = int(np.gcd.reduce([load.rows(window) for window in windows]))
    blocks = len(load.steps) // unit
    if blocks == 0:
        return []
    shares = load.shares[: blocks * unit].reshape(blocks, unit, load.experts)
    mean = shares.mean(axis=1)  # (blocks, experts)
    deviation = np.square(shares - mean[:, None]).sum(axis=1)
    low, high = shares.min(axis=1), shares.max(axis=1)
    ends = load.steps[: blocks * unit].reshape(blocks, unit)[:, -1]
    found = []
    for window in windows:
        k = load.rows(window) // unit
        if k > blocks:
            continue
        means = sliding_window_view(mean, k, axis=0)  # (moments, experts, k)
        between = unit * np.square(means - means.mean(axis=-1, keepdims=True)).sum(axis=-1)
        within = sliding_window_view(deviation, k, axis=0).sum(axis=-1)
        reach = sliding_window_view(high, k, axis=0).max(axis=-1) - sliding_window_view(low, k, axis=0).min(axis=-1)
        found.append(Fluctuation(window, ends[k - 1 :], (within + between) / (k * unit), reach))
    return found
