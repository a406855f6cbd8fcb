"""The noise floor: how wrong a forecast is that knows the slowly moving load exactly.

What a mean over some rows scatters around the load behind it is told from how far apart two such means are, so
long a gap between them that neighbouring steps no longer correlate. The load has moved a little over that
distance, too. What movement adds grows with the distance and noise does not, so the same is measured over
twice the distance, and a line through both is followed back to distance 0. Where the load moves so much that the
line says more about movement than about noise, shorter means are measured; where even single rows are so far
apart, the trace cannot tell, and the answer is NaN.
"""

from __future__ import annotations

import numpy as np

from moetrace.analysis.variogram import weights
from moetrace.trace import Counts, LayerLoad, Shares

# Steps between two means. Batches that follow each other correlate over about 5 steps on the sample traces; a
# correlation that falls by 1/e in 5 steps has 2 % left after 20.
GAP = 20
# The longest mean that is measured, in steps and in rows: longer ones scatter less by the square root of their
# length, but the load moves between them. Rows of unequal totals average out within ten.
LONGEST, LEAST_OF_LONGEST = 100, 10
# So many such means, side by side, fit into what is looked at.
MEANS = 10
# Squared distances that grow by more than this from one distance to twice as far are movement above all: a load
# that stands still has 1, a random walk 2.
MOST_GROWTH = 1.3
# Pairs of means, fewer of which say nothing.
LEAST_PAIRS = 10
# A short horizon borrows from the steps before it, so that this many are looked at, or rows where they are far
# apart: enough for the noise of a step.
LEAST_STEPS, LEAST_SEEN = 200, 60
# Counts worked on at a time, whole experts of them: what is computed from them is small beside the counts of a layer.
VALUES_AT_A_TIME = 1 << 22


def horizon_noise(load: LayerLoad, cutoff: int, horizon: int) -> tuple[float, float]:
    """`step_noise` and `error_noise` of the *horizon* steps after *cutoff*, as fractions; NaN where it cannot be told.

    Estimated from what happened in the horizon; a short one borrows from the steps before it. Used for scores
    only: no predictor sees it.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> step_noise, error_noise = mt.horizon_noise(trace.layer(0), cutoff=1000, horizon=500)
    >>> step_noise > 10 * error_noise
    True
    """
    rows = len(load.after(cutoff, horizon).steps)
    end = cutoff + horizon
    length = max(horizon, MEANS * min(horizon, LONGEST), LEAST_STEPS, LEAST_SEEN * load.stride)
    seen = load.between(end - length + 1, end)
    return step_noise(seen), mean_noise(seen, rows)


def step_noise(load: LayerLoad) -> float:
    """Expected ``sum_e |p[t, e] - load[e]|`` of single steps, a fraction; NaN where *load* cannot tell."""
    return mean_noise(load, 1)


def mean_noise(load: LayerLoad, rows: int) -> float:
    """The same for the shares of the tokens of *rows* rows together."""
    length = min(rows, max(LEAST_OF_LONGEST, min(load.rows(LONGEST), len(load.steps) // MEANS)))
    while length:
        scatter, growth = _scatter(load, length)
        if growth <= MOST_GROWTH:
            return float(scatter * np.sqrt(2 - growth) * np.sqrt(length / rows))
        length //= 2
    return float("nan")


def _scatter(load: LayerLoad, length: int) -> tuple[float, float]:
    """``sum_e |difference|`` of two means of *length* rows, over sqrt(2), and how the squares grow with the distance.

    The difference of two equal, independent scatters is sqrt(2) times as wide as one.
    """
    near = length - 1 + load.rows(GAP)
    if len(load.steps) < length + 2 * near + LEAST_PAIRS - 1:
        return float("nan"), float("nan")
    totals, weight = _pooled(load.totals[:, None], length), weights(load.mean_shares)
    distance = once = more = 0.0
    n = max(1, VALUES_AT_A_TIME // len(load.steps))
    for some in (slice(e, e + n) for e in range(0, load.experts, n)):
        means = _pooled(load.counts[:, some], length) / totals
        apart, twice = means[near:] - means[:-near], means[2 * near :] - means[: -2 * near]
        distance += np.abs(apart).sum(axis=1).mean()
        once += (np.square(apart).mean(axis=0) * weight[some]).sum()
        more += (np.square(twice).mean(axis=0) * weight[some]).sum()
    return float(distance / np.sqrt(2)), float(more / once) if once else 1.0


def pooled_shares(counts: Counts, length: int) -> Shares:
    """Shares of the tokens of every *length* consecutive rows together; *counts* and result (rows, experts)."""
    return _pooled(counts, length) / _pooled(counts.sum(axis=1, keepdims=True), length)


def _pooled(counts: Counts, length: int) -> Counts:
    """The tokens of every *length* consecutive rows together, from (rows, experts)."""
    total = np.concatenate([np.zeros_like(counts[:1]), np.cumsum(counts, axis=0)])
    pooled: Counts = total[length:] - total[:-length]
    return pooled
