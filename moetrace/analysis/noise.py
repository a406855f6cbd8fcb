"""The noise floor: the error of a forecast that knows the slowly moving load exactly.

What a mean over some rows scatters around the load behind it is measured by how far apart two such means are, so
long a gap between them that neighbouring steps no longer correlate. The load has moved a little over that
distance, too. What movement adds grows with the distance and noise does not, so the same is measured over
twice the distance, and a line through both is followed back to distance 0. Where the load moves so much that the
line says more about movement than about noise, shorter means are measured; where even single rows are so far
apart, the noise is unknown: NaN.
"""

from __future__ import annotations

import numpy as np

from moetrace.analysis.variogram import SHARE_FLOOR, cached_per_layer
from moetrace.trace import Counts, LayerLoad, Shares, rows_of, stride_of

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
# Rows measured together, once for all stretches that they are in, and how many counts of them at a time, whole experts:
# what is computed from them is small beside the counts of a layer.
PART, VALUES_AT_A_TIME = 1 << 10, 1 << 20


@cached_per_layer
def horizon_noise(load: LayerLoad, cutoff: int, horizon: int) -> tuple[float, float]:
    """`step_noise` and `error_noise` of the *horizon* steps after *cutoff*, as fractions; NaN where unknown.

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
    first, last = np.searchsorted(load.steps, [end - length + 1, end + 1]).tolist()
    return _noise(load, first, last, 1), _noise(load, first, last, rows)


def step_noise(load: LayerLoad) -> float:
    """Expected ``sum_e |p[t, e] - load[e]|`` of single steps, a fraction; NaN where unknown."""
    return mean_noise(load, 1)


def mean_noise(load: LayerLoad, rows: int) -> float:
    """The same for the shares of the tokens of *rows* rows together."""
    return _noise(load, 0, len(load.steps), rows)


def _noise(load: LayerLoad, first: int, last: int, rows: int) -> float:
    """The noise of a mean over *rows* rows, measured from the rows *first* up to before *last* of *load*."""
    stride = stride_of(load.steps[first:last])
    length = min(rows, max(LEAST_OF_LONGEST, min(rows_of(LONGEST, stride), (last - first) // MEANS)))
    while length:
        scatter, growth = _scatter(load, first, last, length, rows_of(GAP, stride))
        if growth <= MOST_GROWTH:
            return float(scatter * np.sqrt(2 - growth) * np.sqrt(length / rows))
        length //= 2
    return float("nan")


def _scatter(load: LayerLoad, first: int, last: int, length: int, gap: int) -> tuple[float, float]:
    """``sum_e |difference|`` of two means over *length* rows, *gap* apart, over sqrt(2), and how the squares grow."""
    apart = _spacing(length)
    near = -(-(length - 1 + gap) // apart)  # like all that follows in places, so many rows apart
    begin = -(-first // apart)
    pairs = (last - begin * apart - length) // apart + 1 - near
    if pairs - near < LEAST_PAIRS / apart:
        return float("nan"), float("nan")
    parts = range(begin // PART, -(-(begin + pairs) // PART))
    found = np.concatenate([_distances(load, length, near, part) for part in parts], axis=1)
    found = found[:, begin - parts[0] * PART :]
    # The difference of two equal, independent scatters is sqrt(2) times as wide as one.
    distance, (once, twice) = found[0, :pairs].mean(), found[1:, : pairs - near].sum(axis=1)
    return float(distance / np.sqrt(2)), float(twice / once) if once else 1.0


def _spacing(length: int) -> int:
    """How many rows apart means over *length* rows begin: five or more of them share a row, and more say no more."""
    return next(n for n in range(max(1, length // 5), 0, -1) if length % n == 0)


@cached_per_layer
def _distances(load: LayerLoad, length: int, near: int, part: int) -> Shares:
    """How far means over *length* rows are apart, for the `PART` places at which the first begins, shape (3, places).

    ``sum_e |difference|`` *near* places apart, and the squares of that and of twice the distance relative to the share.
    """
    spacing = _spacing(length)
    rows = slice(part * PART * spacing, ((part + 1) * PART + 2 * near - 1) * spacing + length)
    totals = _pooled(load.totals[rows, None], length, spacing)
    pairs, triples = (max(0, len(totals) - n * near) for n in (1, 2))
    found = np.zeros((3, len(totals)))
    n = max(1, VALUES_AT_A_TIME // (len(totals) * spacing))
    for some in (slice(e, e + n) for e in range(0, load.experts, n)):
        means = _pooled(load.counts[rows, some], length, spacing) / totals
        apart = means[near:] - means[:pairs]
        found[0, :pairs] += np.abs(apart).sum(axis=1)
        # The share is that of all three means: none is like the others only as it is divided by its own scatter.
        share = means[:triples] + means[near : near + triples]  # in place: these are large
        share += means[2 * near :]
        share /= 3
        weight = np.divide(1, np.maximum(share, SHARE_FLOOR / load.experts, out=share), out=share)
        once, twice = apart[:triples], means[2 * near :] - means[:triples]
        found[1, :triples] += np.einsum("te,te,te->t", once, once, weight)
        found[2, :triples] += np.einsum("te,te,te->t", twice, twice, weight)
    # Means that would end after the last row.
    found[0, pairs:] = found[1:, triples:] = np.nan
    return found[:, :PART]


def pooled_shares(counts: Counts, length: int) -> Shares:
    """Shares of the tokens of every *length* consecutive rows together; *counts* and result (rows, experts)."""
    return _pooled(counts, length) / _pooled(counts.sum(axis=1, keepdims=True), length)


def _pooled(counts: Counts, length: int, spacing: int = 1) -> Counts:
    """The tokens of *length* consecutive rows together, from (rows, experts), at every *spacing* rows."""
    blocks = len(counts) // spacing
    sums = counts if spacing == 1 else counts[: blocks * spacing].reshape(blocks, spacing, -1).sum(axis=1)
    return _sums(sums, length // spacing)


def _sums(counts: Counts, n: int) -> Counts:
    """The sums of every *n* consecutive rows: those of two halves, which is quicker than one row at a time."""
    if n == 1:
        return counts
    half = _sums(counts, n // 2)
    both = half[: -(n // 2)] + half[n // 2 :]
    return both[: len(counts) - n + 1] + counts[n - 1 :] if n % 2 else both
