"""How wrong a forecast expects to be, told at its cutoff, and the intervals that follow.

The variogram says how far the load of a horizon may be from a good forecast of it (`moetrace.analysis.outlook`).
How far off that was is known of every earlier step whose horizon has passed. So at steps 100 apart the level of
the layer is forecast, and what was found is compared with what was told:

- What is *told* is the geometric mean over the latest looks: from one to the next a variogram tells a third more or
  less of a load that goes on as before.
- The *scale*: the geometric mean of found over told, over the same horizon and shorter ones, which tell of the latest
  past; what these usually told too little or too much is taken off. What one shock can do to it is bounded.
- The *reach* of an interval, in standard deviations: adaptive conformal inference (Gibbs and Candes 2021) in the
  logarithm. An interval that held fewer experts than it should grows by a step, one that held more shrinks by one. It
  counts how often was missed, not by how much, so that one shock cannot spoil what follows, and it keeps its
  promise whatever the distribution of the errors is, heavy tails and a scale that is itself uncertain included.

Both forget by halves, as fast as a load changes its ways: one that is young by half in a tenth of its age.

The load is normally distributed around its level, and the error of a forecast around its difference from the level:
one that follows noise, or a window that is too long, expects to be wrong by as much, whoever made it. The expected
error and the intervals are the mean and the quantiles of the same distribution of |error|, a folded normal one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moetrace.analysis.outlook import Outlook, since_jump, total_error
from moetrace.analysis.variogram import BLOCK, block_means, gain_of, last_level
from moetrace.trace import LayerLoad, Shares, Steps

# The two intervals every forecast carries, and the quantiles of the normal distribution they begin with.
QUANTILES = {80: 1.2816, 95: 1.9600}
# Blocks between two looks back, and before the first one.
EVERY, FIRST = 2, 10
# Blocks that the level is an average of, at the smallest gain: older ones have a weight below 2 %.
LEVEL_BLOCKS = 200
# What lies back by a tenth of the steps so far, or by so many blocks, counts half as much. Half or twice of either
# makes little difference.
OF_AGE, HALF_LIFE = 0.1, 16
# Looks that are remembered, eight half-lives: an older one counts less than 1 in 256.
MOST_LOOKS = 8 * HALF_LIFE // EVERY
# The load calms down while a model is trained: on gpt-moe-8e-a, before anything is known, the variogram tells twice
# of what is found. That weighs as much as one look.
PRIOR, PRIOR_LOOKS = np.log(0.5), 1.0
# The most that one look says: found is told times or over 4.5, and another was told, or another horizon found, twice
# of what this one was: two standard deviations where a load goes on as before.
MOST, MOST_APART = 1.5, 0.7
# Looks that it takes to believe half of what a shorter horizon seems to tell too little or too much.
DOUBT = 10.0
# Horizons that say something of the one asked for: it and its halves, down to a block.
HALVINGS = 3
# How fast a reach follows, and the logarithms of what it is multiplied by in the beginning.
STEP = {80: 0.15, 95: 0.3}
BEGIN = {80: 0.0, 95: 0.25}
# Looks that have to have passed before a look says anything of the reach.
LEARNED = 5
# A deviation that is not told from 0, and how often an interval is halved to find its end.
TINY, HALVED = 1e-12, 20


@dataclass(frozen=True, eq=False)
class Expectation:
    """What is expected of the mean share over a horizon, at its cutoff.

    *level* and *deviation* (experts,) are of the level forecast; *reach* says by percent to how many standard
    deviations an interval of that reaches.
    """

    level: Shares
    deviation: Shares
    reach: dict[int, float]

    def error(self, forecast: Shares) -> float:
        """The expected `error_rate` of a *forecast* (experts,) of the mean share."""
        from scipy.special import erf

        apart, spread = np.abs(forecast - self.level), np.maximum(self.deviation, TINY)
        z = apart / spread / np.sqrt(2)
        return float((spread * np.sqrt(2 / np.pi) * np.exp(-(z**2)) + apart * erf(z)).sum())

    def half_widths(self, forecast: Shares) -> dict[int, Shares]:
        """By percent how far the interval of a *forecast* (experts,) reaches on both sides, shape (experts,)."""
        apart = np.abs(forecast - self.level)
        return {p: _half_width(apart, self.deviation * self.reach[p] / q, p / 100) for p, q in QUANTILES.items()}


def _half_width(apart: Shares, spread: Shares, held: float) -> Shares:
    """How far from 0 the part *held* of a normal distribution around *apart* lies; all (experts,)."""
    from scipy.special import ndtr

    spread = np.maximum(spread, TINY)
    low, high = np.zeros_like(apart), apart + 6 * spread
    for _ in range(HALVED):
        middle = (low + high) / 2
        enough = ndtr((middle - apart) / spread) - ndtr((-middle - apart) / spread) >= held
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high


@dataclass(frozen=True, eq=False)
class _Look:
    """A look back: the last *step* of the history it had, the *level* then (experts,), and the *outlook*."""

    step: int
    level: Shares
    outlook: Outlook


class Experience:
    """What the past of a layer teaches about its expectations; each answer uses nothing after its cutoff."""

    def __init__(self, load: LayerLoad) -> None:
        self.load = load
        block = load.rows(BLOCK)
        self._rows = range(FIRST * block, len(load.steps) + 1, EVERY * block)
        self._steps: Steps = load.steps[np.array(self._rows, dtype=np.int64) - 1]
        self._block = block * load.stride
        self._looks: dict[int, _Look] = {}
        self._logs: dict[tuple[int, int], float] = {}
        self._tolds: dict[tuple[int, int], float] = {}
        self._reaches: dict[tuple[int, int], list[dict[int, float]]] = {}

    def expectation(self, cutoff: int, horizon: int) -> Expectation:
        """Of the mean share over the *horizon* steps after *cutoff*."""
        look = self._look(int(np.searchsorted(self.load.steps, cutoff, "right")))
        deviation = look.outlook.deviation(horizon) * self._scale(cutoff, horizon)
        log = self._reach(cutoff, horizon)
        return Expectation(look.level, deviation, {p: q * float(np.exp(log[p])) for p, q in QUANTILES.items()})

    def _look(self, rows: int) -> _Look:
        """Back at the time when there were so many *rows*."""
        if rows not in self._looks:
            history = self.load.until(int(self.load.steps[rows - 1]))
            present = since_jump(history)
            recent = present.last(LEVEL_BLOCKS * BLOCK)
            means = block_means(recent, min(len(recent.steps), history.rows(BLOCK)))
            level = last_level(means, gain_of(present))
            self._looks[rows] = _Look(int(history.steps[-1]), level, Outlook.of(history))
        return self._looks[rows]

    def _passed(self, cutoff: int, horizon: int) -> int:
        """How many looks there are whose *horizon* has passed at *cutoff*."""
        return int(np.searchsorted(self._steps + horizon, cutoff, "right"))

    def _scale(self, cutoff: int, horizon: int) -> float:
        """What the outlook at *cutoff* is multiplied by."""
        return float(np.exp(self._steadied(cutoff, horizon) + self._found_over_told(cutoff, horizon)))

    def _remembered(self, cutoff: int, horizon: int) -> tuple[range, Shares]:
        """The last looks whose *horizon* has passed at *cutoff*, and how much each counts, shape (looks,)."""
        passed = self._passed(cutoff, horizon)
        looks = range(max(0, passed - MOST_LOOKS), passed)
        half_life = min(OF_AGE * (cutoff - int(self.load.steps[0])), HALF_LIFE * self._block)
        return looks, 0.5 ** ((cutoff - self._steps[looks.start : looks.stop] - horizon) / half_life)

    def _steadied(self, cutoff: int, horizon: int) -> float:
        """Logarithm of what is told on average, by the looks before *cutoff* and by the one there, over the latter."""
        looks, weight = self._remembered(cutoff, 1)
        now = self._told(int(np.searchsorted(self.load.steps, cutoff, "right")), horizon)
        apart = np.clip([self._told(self._rows[i], horizon) - now for i in looks], -MOST_APART, MOST_APART)
        return float(weight @ apart / (1 + weight.sum()))

    def _found_over_told(self, cutoff: int, horizon: int) -> float:
        """Logarithm of the geometric mean of found over told at earlier looks."""
        known, trust = self._remembered(cutoff, horizon)
        own = self._ratios(known, horizon)
        total, sums = PRIOR_LOOKS, PRIOR_LOOKS * PRIOR
        for shorter in _halves(horizon, self._block):
            looks, weight = self._remembered(cutoff, shorter)
            logs = self._ratios(looks, shorter)
            missing = np.clip(own - self._ratios(known, shorter), -MOST_APART, MOST_APART)
            bias = np.where(np.isnan(missing), 0, missing) @ trust / (DOUBT + trust.sum())
            found = ~np.isnan(logs)
            total, sums = total + weight[found].sum(), sums + weight[found] @ (logs[found] + bias)
        return float(sums / total)

    def _ratios(self, looks: range, horizon: int) -> Shares:
        """Logarithms of found over told, shape (looks,)."""
        return np.array([self._ratio(i, horizon) for i in looks])

    def _ratio(self, i: int, horizon: int) -> float:
        """Logarithm of found over told at a look, of sums over experts; NaN where no step of the horizon was logged."""
        if (i, horizon) not in self._logs:
            look = self._look(self._rows[i])
            found = np.log(np.abs(self._error(look, horizon)).sum() + TINY)
            told = self._told(self._rows[i], horizon) + self._steadied(look.step, horizon)
            self._logs[i, horizon] = float(np.clip(found - told, -MOST, MOST))
        return self._logs[i, horizon]

    def _told(self, rows: int, horizon: int) -> float:
        """Logarithm of the error told when there were so many *rows*; what stands still is told and found to be 0."""
        if (rows, horizon) not in self._tolds:
            told = total_error(self._look(rows).outlook.deviation(horizon))
            self._tolds[rows, horizon] = float(np.log(told + TINY))
        return self._tolds[rows, horizon]

    def _error(self, look: _Look, horizon: int) -> Shares:
        after = self.load.after(look.step, horizon)
        error: Shares = look.level - (after.mean_shares if len(after.steps) else np.nan)
        return error

    def _reach(self, cutoff: int, horizon: int) -> dict[int, float]:
        """Logarithms of what the quantiles are multiplied by, after the looks that had passed at *cutoff*."""
        passed = self._passed(cutoff, horizon)
        begin = self._begin(passed, horizon)
        known = self._reaches.setdefault((begin, horizon), [dict(BEGIN)])
        for n in range(begin + len(known) - 1, passed):
            look = self._look(self._rows[n])
            learned = self._passed(look.step, horizon) - begin
            if learned < LEARNED:  # that would judge what was assumed
                known.append(known[-1])
                continue
            in_force = known[learned]  # at the time, not what was learned since
            told = look.outlook.deviation(horizon) * self._scale(look.step, horizon)
            apart = np.abs(self._error(look, horizon))
            missed = {p: (apart > told * q * np.exp(in_force[p])).mean() for p, q in QUANTILES.items()}
            known.append({p: log + STEP[p] * (missed[p] - (1 - p / 100)) for p, log in known[-1].items()})
        return known[passed - begin]

    def _begin(self, passed: int, horizon: int) -> int:
        """The look that a reach begins to learn at: once or twice what is remembered before the last one *passed*.

        What is remembered is counted from where the horizon of the first look has passed. Many cutoffs share a
        beginning, and so what was learned from there on.
        """
        remembered = MOST_LOOKS + horizon // (EVERY * self._block)
        return max(0, passed // remembered - 1) * remembered


def _halves(horizon: int, block: int) -> list[int]:
    """*horizon*, its half and so on, none of them shorter than *block*."""
    halves = [horizon // 2**n for n in range(HALVINGS + 1)]
    return [halves[0], *(half for _, half in pairwise(halves) if half >= block)]


def bounds(predicted: Shares, half_widths: dict[int, Shares]) -> dict[str, Shares]:
    """``low_80``, ``high_80``, ``low_95``, ``high_95`` for means and half widths (experts,), within 0 and 1."""
    ends = {}
    for percent, half in half_widths.items():
        ends[f"low_{percent}"] = np.clip(predicted - half, 0, 1)
        ends[f"high_{percent}"] = np.clip(predicted + half, 0, 1)
    return ends
