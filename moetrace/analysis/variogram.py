"""Noise and drift of a layer, and its level: one estimate, used by everything that needs any of them.

How far apart is the load of a layer at two moments, as a function of their distance? With block
means x[i, e] of *block* steps, the variogram

    v(k) = sum_e mean_i (x[i+k, e] - x[i, e])^2 / share_e

is to first order a straight line in k. Its value at distance 0 (the nugget) is noise: it would be there
if the load stood still. Its slope is drift. For a random walk seen through block means the line is
``v(k) = 2 noise + drift (k - 1/3)``: a third of a block's drift is averaged out within the blocks.

Dividing by the share makes the sum a chi-square distance, that is, the mean squared relative change
weighted by load. For multinomial sampling of n tokens it is (experts - 1) / n whatever the shares,
so one number serves the hot and the cold experts of a layer.

The level is an exponential average of the load, as slow as its noise and drift ask for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np

from moetrace.trace import LayerLoad, Shares

P = ParamSpec("P")
T = TypeVar("T")

# Steps averaged into one block. Batches of neighbouring steps hardly correlate beyond 20 steps on
# the sample traces, and 50 steps leave 20 blocks in a horizon of 1,000.
BLOCK = 50
# Distances of blocks the line is fitted to: up to 250 steps, over which the load moves little.
LAGS = 5
# Distances for a forecast: up to 1,000 steps. What goes up and down again within fewer steps is noise to
# a forecast, and over short distances the variogram grows more slowly than the distance.
FAR_LAGS = 20
# Steps apart at which the scatter of single steps is measured: on the sample traces the differences grow
# from 1 to 10 steps, because neighbouring steps are correlated, and hardly beyond.
STEP_LAG = 10
# Shares below this fraction of the mean share are weighted as if they were that large: the
# relative change of an expert that is all but dead means nothing.
SHARE_FLOOR = 0.01
# The smallest gain: means of the last 100 blocks, 5,000 steps, on average.
LEAST_GAIN = 0.02
# Steps that a level is an average of: at the least gain, older blocks have a weight below 1e-17.
REMEMBERED = 100_000
# Steps that noise and drift are read from: long enough for 30 pairs of blocks 1,000 steps apart, short
# enough to belong to the present. 1,500 and 4,000 err more on gpt-moe-8e-a.
HISTORY = 2500


# --- what is computed once --------------------------------------------------------------------


def cached_per_layer(ask: Callable[Concatenate[LayerLoad, P], T]) -> Callable[Concatenate[LayerLoad, P], T]:
    """*ask*, whose answer is cached for the same rows of a layer. It must hold no load, and nobody changes it.

    A forecast at a cutoff looks back at a hundred earlier cutoffs, and the next one at nearly the same histories.
    """

    @wraps(ask)
    def cached(load: LayerLoad, /, *args: P.args, **settings: P.kwargs) -> T:
        answers = load.cache.answers
        key = (ask, load.cache.first_row, len(load.steps), args, tuple(settings.items()))
        if key not in answers:
            answers[key] = ask(load, *args, **settings)
        answer: T = answers[key]
        return answer

    return cached


def cache_block_means(load: LayerLoad, rows: int) -> None:
    """Cache the means of the shares over all blocks of *rows* rows, from the first row of *load* on."""
    if rows not in load.cache.block_means:
        blocks = len(load.steps) // rows
        load.cache.block_means[rows] = load.shares[: blocks * rows].reshape(blocks, rows, load.experts).mean(axis=1)


def block_means(load: LayerLoad, rows: int) -> Shares:
    """Means of the shares over consecutive blocks of *rows* rows, shape (blocks, experts).

    The last block ends with the last row; rows before the first whole block are left out. Where a block that is cached
    ends with the last row, they are those that are cached.
    """
    blocks, cached = len(load.steps) // rows, load.cache.block_means.get(rows)
    end, left = divmod(load.cache.first_row + len(load.steps), rows)
    if cached is not None and not left:
        return cached[end - blocks : end]
    tail = load.shares[len(load.steps) - blocks * rows :]
    means: Shares = tail.reshape(blocks, rows, load.experts).mean(axis=1)
    return means


# --- noise and drift --------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseDrift:
    """The line through the variogram of a layer, as sums over experts of squared change per share.

    *noise* is the scatter of the mean over one row, autocorrelation included, so that the mean over
    n rows scatters by ``noise / n``; *drift* is the growth per row of the squared distance.
    """

    noise: float
    drift: float

    def gain(self, rows: int) -> float:
        """The weight of the newest block of *rows* rows in the steady state of a local level filter; 0 without drift.

        Harvey 1989, section 4.1.2. The level is known to ``gain * noise / rows`` once that block is seen.
        """
        noise, drift = self.noise / rows, self.drift * rows
        predicted = (drift + np.sqrt(drift**2 + 4 * drift * noise)) / 2
        return float(predicted / (predicted + noise)) if predicted + noise > 0 else 0.0


def weights(shares: Shares) -> Shares:
    """One over the share of each expert, floored, shape (experts,)."""
    return 1 / np.maximum(shares, SHARE_FLOOR / len(shares))


def variogram(values: Shares, weight: Shares, lags: int) -> Shares:
    """The chi-square distance of rows of *values* (rows, experts) 1 ... *lags* apart, shape (lags,)."""
    return np.array([(np.square(values[k:] - values[:-k]).mean(axis=0) * weight).sum() for k in range(1, lags + 1)])


@cached_per_layer
def noise_and_drift(load: LayerLoad, block: int = BLOCK, lags: int = LAGS) -> NoiseDrift:
    """Noise and drift of *load*, from a line through its variogram at distances up to *lags* blocks.

    A short load has smaller blocks, so that there are four of them; with fewer than three rows both are
    unknown, and 0.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> early, late = (mt.noise_and_drift(trace.layer(0).between(*steps)) for steps in ((1, 499), (1000, 2000)))
    >>> early.drift > 10 * late.drift
    True
    """
    rows = min(load.rows(block), max(1, len(load.steps) // 4))
    means = block_means(load, rows)
    weight = weights(load.mean_shares)
    lags = min(lags, len(means) - 2)
    if lags < 1:
        return NoiseDrift(0.0, 0.0)
    distance = variogram(means, weight, lags)
    if lags == 1:
        return NoiseDrift(float(distance[0]) / 2 * rows, 0.0)
    slope, intercept = np.polyfit(np.arange(1, lags + 1) - 1 / 3, distance, 1)
    if slope < 0:
        slope, intercept = 0.0, distance.mean()
    return NoiseDrift(max(float(intercept), 0.0) / 2 * rows, float(slope) / rows)


def step_scatter(load: LayerLoad) -> Shares:
    """Variance of one step's share around the slowly moving load, shape (experts,); 0 for a single step."""
    lag = min(load.rows(STEP_LAG), len(load.steps) - 1)
    if lag < 1:
        return np.zeros(load.experts)
    scatter: Shares = np.square(load.shares[lag:] - load.shares[:-lag]).mean(axis=0) / 2
    return scatter


# --- the level --------------------------------------------------------------------------------


def gain_of(history: LayerLoad, last: int = HISTORY) -> float:
    """The weight of the newest block of `BLOCK` steps, from noise and drift of the *last* steps."""
    recent = history.last(last)
    gain = noise_and_drift(recent, lags=FAR_LAGS).gain(recent.rows(BLOCK))
    return float(np.clip(gain, LEAST_GAIN, 1))


def last_level(means: Shares, weight: float) -> Shares:
    """The last of `levels`, shape (experts,), without the others."""
    each = (1 - weight) ** np.arange(len(means))[::-1]
    level: Shares = each @ means / each.sum()
    return level


def levels(means: Shares, weight: float) -> Shares:
    """The level after each of *means*, both (blocks, experts): their exponential average, the newest weighing *weight*.

    The weights are scaled to sum to 1 from the first block on.
    """
    import pandas as pd

    return pd.DataFrame(means).ewm(alpha=weight).mean().to_numpy()
