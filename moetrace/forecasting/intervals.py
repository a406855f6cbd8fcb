"""The error that a forecast expects at its cutoff, and the intervals that follow.

The variogram says how far the load of a horizon may be from a good forecast of it (`moetrace.analysis.variogram`). How
far off that was is known of every earlier step whose horizon has passed. So at steps 100 apart, the *looks*, the level
of the layer is forecast, and the observed error is compared with the expected one:

- The *predicted error* is the geometric mean over the latest looks: from one to the next a variogram predicts a third
  more or less of a load that goes on as before.
- The *scale*: the geometric mean of the calibration ratio, observed over expected error, over the same horizon and
  shorter ones, which know the latest past; their usual difference is taken off. What one shock can do to it is bounded.
- The *reach* of an interval, in standard deviations: adaptive conformal inference (Gibbs and Candes 2021) in the
  logarithm. An interval that held fewer experts than it should grows by a step, one that held more shrinks by one. It
  counts how often was missed, not by how much: it keeps its promise whatever the distribution of the errors is.

Both forget by halves, as fast as a load changes its ways: one that is young by half in a tenth of its age.

The load is normally distributed around its level, and the error of a forecast around its difference from the level.
The expected error and the intervals are the mean and the quantiles of the same distribution of |error|, a folded normal
one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moetrace.analysis.variogram import BLOCK, Outlook, block_means, gain_of, last_level, since_jump, total_error
from moetrace.trace import LayerLoad, Shares, Steps

# The two intervals every forecast carries, and the quantiles of the normal distribution they begin with.
QUANTILES = {80: 1.2816, 95: 1.9600}
# Blocks between two looks back, and before the first one.
EVERY, FIRST = 2, 10
# Blocks that the level is an average of, at the smallest gain: older ones have a weight below 2 %.
LEVEL_BLOCKS = 200
# What lies back by a tenth of the steps so far, or by so many blocks, counts half as much. Half or twice of either
# makes little difference.
HALF_LIFE_FRACTION, HALF_LIFE = 0.1, 16
# Looks that are remembered, eight half-lives: an older one counts less than 1 in 256.
MAX_LOOKS = 8 * HALF_LIFE // EVERY
# The load calms down while a model is trained: on gpt-moe-8e-a, before anything is known, the variogram predicts twice
# the observed error. That weighs as much as one look.
PRIOR, PRIOR_LOOKS = np.log(0.5), 1.0
# The most that one look says, as logarithms: a ratio of 4.5 either way, and twice the error that another look predicted
# or another horizon observed: two standard deviations where a load goes on as before.
MAX_LOG_RATIO, MAX_LOG_DIFFERENCE = 1.5, 0.7
# Looks that it takes to believe half of the difference that a shorter horizon seems to have.
DOUBT = 10.0
# Horizons that say something of the one asked for: it and its halves, down to a block.
HALVINGS = 3
# How fast a reach follows, and the logarithms of what it is multiplied by in the beginning.
STEP = {80: 0.15, 95: 0.3}
INITIAL_LOG_REACH = {80: 0.0, 95: 0.25}
# Looks that have to have passed before a look says anything of the reach.
LEARNED = 5
# A deviation that is as good as 0, and how many of them from 0 a normal distribution does not reach the other side.
TINY, FAR = 1e-12, 8.0


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
        """By percent how far the interval of a *forecast* (experts,) reaches on both sides, shape (experts,).

        The square of a normal variable around a mean is noncentral chi-square distributed, with one degree of freedom.
        """
        from scipy.special import chndtrix

        apart, widths = np.abs(forecast - self.level), {}
        for percent, quantile in QUANTILES.items():
            spread = np.maximum(self.deviation * self.reach[percent] / quantile, TINY)
            near = np.minimum(apart / spread, FAR)
            widths[percent] = apart + spread * (np.sqrt(chndtrix(percent / 100, 1, near**2)) - near)
        return widths


@dataclass(frozen=True, eq=False)
class _Look:
    """A look back: the last *step* of the history it had, the *level* then (experts,), and the *outlook*."""

    step: int
    level: Shares
    outlook: Outlook


class ErrorCalibration:
    """What the past of a layer says of its expectations; each answer uses nothing after its cutoff."""

    def __init__(self, load: LayerLoad) -> None:
        self.load = load
        block = load.rows(BLOCK)
        self._rows = range(FIRST * block, len(load.steps) + 1, EVERY * block)
        self._steps: Steps = load.steps[np.array(self._rows, dtype=np.int64) - 1]
        self._block = block * load.stride
        self._expectations: dict[tuple[int, int], Expectation] = {}
        self._looks: dict[int, _Look] = {}
        self._log_ratios: dict[int, Shares] = {}
        self._log_errors: dict[int, Shares] = {}
        self._reaches: dict[tuple[int, int], list[dict[int, float]]] = {}

    def expectation(self, cutoff: int, horizon: int) -> Expectation:
        """Of the mean share over the *horizon* steps after *cutoff*."""
        if (cutoff, horizon) not in self._expectations:
            look = self._look(int(np.searchsorted(self.load.steps, cutoff, "right")))
            deviation = look.outlook.deviation(horizon) * self._scale(cutoff, horizon)
            log = self._log_reach(cutoff, horizon)
            reach = {percent: q * float(np.exp(log[percent])) for percent, q in QUANTILES.items()}
            self._expectations[cutoff, horizon] = Expectation(look.level, deviation, reach)
        return self._expectations[cutoff, horizon]

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

    def _remembered(self, cutoff: int, horizon: int) -> tuple[range, Shares]:
        """The last looks whose *horizon* has passed at *cutoff*, and how much each counts, shape (looks,)."""
        passed = self._passed(cutoff, horizon)
        looks = range(max(0, passed - MAX_LOOKS), passed)
        half_life = min(HALF_LIFE_FRACTION * (cutoff - int(self.load.steps[0])), HALF_LIFE * self._block)
        return looks, 0.5 ** ((cutoff - self._steps[looks.start : looks.stop] - horizon) / half_life)

    def _scale(self, cutoff: int, horizon: int) -> float:
        """What the outlook at *cutoff* is multiplied by: smoothed, and by the geometric mean of the ratios so far."""
        known, trust = self._remembered(cutoff, horizon)
        own = self._log_calibration_ratios(known, horizon)
        total, sums = PRIOR_LOOKS, PRIOR_LOOKS * PRIOR
        for shorter in _halves(horizon, self._block):
            looks, weight = self._remembered(cutoff, shorter)
            logs = self._log_calibration_ratios(looks, shorter)
            # What the shorter horizon said too little or too much where the one asked for is known, too.
            same = self._log_calibration_ratios(known, shorter)
            missing = np.clip(own - same, -MAX_LOG_DIFFERENCE, MAX_LOG_DIFFERENCE)
            bias = np.where(np.isnan(missing), 0, missing) @ trust / (DOUBT + trust.sum())
            found = ~np.isnan(logs)
            total, sums = total + weight[found].sum(), sums + weight[found] @ (logs[found] + bias)
        now = self._log_predicted_error(int(np.searchsorted(self.load.steps, cutoff, "right")), horizon)
        return float(np.exp(self._log_smoothing(cutoff, horizon, now) + float(sums / total)))

    def _log_smoothing(self, cutoff: int, horizon: int, now: float) -> float:
        """The predicted error of the looks before *cutoff* and that of *now*, on average, over the latter."""
        looks, weight = self._remembered(cutoff, 1)
        apart = self._log_predicted_errors(looks, horizon) - now
        return float(weight @ np.clip(apart, -MAX_LOG_DIFFERENCE, MAX_LOG_DIFFERENCE) / (1 + weight.sum()))

    def _log_calibration_ratios(self, looks: range, horizon: int) -> Shares:
        """Observed over expected error at *looks*, of sums over experts; NaN where no step of the horizon was logged.

        Shape (looks,), as that of `_log_predicted_errors`.
        """

        def ratio(i: int) -> float:
            look = self._look(self._rows[i])
            observed = np.log(np.abs(self._error(look, horizon)).sum() + TINY)
            predicted = float(self._log_predicted_errors(range(i, i + 1), horizon)[0])
            expected = predicted + self._log_smoothing(look.step, horizon, predicted)
            return min(max(float(observed) - expected, -MAX_LOG_RATIO), MAX_LOG_RATIO)

        return self._filled(self._log_ratios, looks, horizon, ratio)

    def _log_predicted_errors(self, looks: range, horizon: int) -> Shares:
        """What the outlook said at *looks*, see `_log_predicted_error`."""
        rows = self._rows
        return self._filled(self._log_errors, looks, horizon, lambda i: self._log_predicted_error(rows[i], horizon))

    def _filled(self, known: dict[int, Shares], looks: range, horizon: int, value: Callable[[int], float]) -> Shares:
        """The values of *looks* by what is *known* for a horizon, infinite where it is not; those are computed."""
        every = known.setdefault(horizon, np.full(len(self._rows), np.inf))
        some = every[looks.start : looks.stop]
        for at in np.flatnonzero(np.isposinf(some)):
            some[at] = value(looks[int(at)])
        return some

    def _log_predicted_error(self, rows: int, horizon: int) -> float:
        """What the outlook said when there were so many *rows*; of a load that stands still nearly nothing."""
        return float(np.log(total_error(self._look(rows).outlook.deviation(horizon)) + TINY))

    def _error(self, look: _Look, horizon: int) -> Shares:
        """How far the load that followed was from the level, shape (experts,); NaN where none was logged."""
        after = self.load.after(look.step, horizon)
        error: Shares = look.level - (after.mean_shares if len(after.steps) else np.nan)
        return error

    def _log_reach(self, cutoff: int, horizon: int) -> dict[int, float]:
        """Logarithms of what the quantiles are multiplied by, after the looks that had passed at *cutoff*."""
        passed = self._passed(cutoff, horizon)
        # It begins to learn once or twice what is remembered before the last look that passed, counted from where the
        # horizon of the first look has passed: many cutoffs share a beginning, and so what was learned from there on.
        remembered = MAX_LOOKS + horizon // (EVERY * self._block)
        begin = max(0, passed // remembered - 1) * remembered
        known = self._reaches.setdefault((begin, horizon), [dict(INITIAL_LOG_REACH)])
        for n in range(begin + len(known) - 1, passed):
            look = self._look(self._rows[n])
            learned = self._passed(look.step, horizon) - begin
            if learned < LEARNED:  # that would judge what was assumed
                known.append(known[-1])
                continue
            in_force = known[learned]  # at the time, not what was learned since
            expected = look.outlook.deviation(horizon) * self._scale(look.step, horizon)
            apart = np.abs(self._error(look, horizon))
            missed = {p: (apart > expected * q * np.exp(in_force[p])).mean() for p, q in QUANTILES.items()}
            known.append({p: log + STEP[p] * (missed[p] - (1 - p / 100)) for p, log in known[-1].items()})
        return known[passed - begin]


def _halves(horizon: int, block: int) -> list[int]:
    """*horizon*, its half and so on, none of these shorter than *block*."""
    return [horizon, *(half for n in range(HALVINGS) if (half := horizon // 2 ** (n + 1)) >= block)]


def bounds(predicted: Shares, half_widths: dict[int, Shares]) -> dict[str, Shares]:
    """``low_80``, ``high_80``, ``low_95``, ``high_95`` for means and half widths (experts,), within 0 and 1."""
    ends = {}
    for percent, half in half_widths.items():
        ends[f"low_{percent}"] = np.clip(predicted - half, 0, 1)
        ends[f"high_{percent}"] = np.clip(predicted + half, 0, 1)
    return ends
