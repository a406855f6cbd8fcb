"""Noise and drift of a layer, its level, noise floor and outlook: one estimate, used by all that need any of them.

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

The noise floor is the error of a forecast that knows the slowly moving load exactly. What a mean over some rows
scatters around the load behind it is measured by how far apart two such means are, so long a gap between them that
neighbouring steps no longer correlate. The load has moved a little over that distance, too. What movement adds grows
with the distance and noise does not, so the same is measured over twice the distance, and a line through both is
followed back to distance 0. Where the load moves so much that the line says more about movement than about noise,
shorter means are measured; where even single rows are so far apart, the noise is unknown: NaN.

The outlook is how far the load of the steps to come may be from a good forecast of it, from the past alone. For a local
level with noise n and drift d per step, the mean share of expert e over a horizon of H steps scatters around the
estimated level with the variance

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

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np

from moetrace.trace import Counts, LayerLoad, Shares, rows_of, stride_of

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


# --- the noise floor --------------------------------------------------------------------------


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


def mean_noise(load: LayerLoad, rows: int) -> float:
    """Expected ``sum_e |p[t, e] - load[e]|`` of the shares of *rows* rows together, a fraction; NaN where unknown."""
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


# --- the outlook ------------------------------------------------------------------------------


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
