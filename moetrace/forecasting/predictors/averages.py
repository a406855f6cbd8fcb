"""Averages of the past: `window_mean`, `ema`, `sw_avg` and `level`, and `auto`, which weighs them by their errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetrace.analysis.variogram import BLOCK, HISTORY, REMEMBERED, block_means, gain_of, last_level, since_jump
from moetrace.errors import SettingError
from moetrace.forecasting.predictors.base import Forecast, Untrained, constant, hold, ramp
from moetrace.trace import LayerLoad, Shares, rows_of

# Steps that weigh less than this are not looked at.
NOTHING = 1e-18


@dataclass(frozen=True)
class WindowMean(Untrained):
    """The share of the load over the last *window* steps, for every step to come.

    1,000 steps are what SGLang (`--eplb-rebalance-num-iterations`) and vLLM (`window_size`) sum over.
    *trend*, 0 there as here, carries on that part of the change between the last two 1,000 steps.
    """

    name = "window_mean"
    window: int = 1000
    trend: float = 0.0

    def forecast(self, history: LayerLoad, horizon: int) -> Forecast:
        """Constant shares, unless there is a trend."""
        return Forecast(ramp(history.last(self.window).mean_shares, history, self.trend, horizon))


@dataclass(frozen=True)
class Ema(Untrained):
    """Each logged step moves the average by ``1 - decay``; 0.9 is MindSpeed's default."""

    name = "ema"
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise SettingError(f"ema:decay is between 0 and 1, not {self.decay:g}")

    def forecast(self, history: LayerLoad, horizon: int) -> Forecast:
        """Constant shares."""
        rows = min(len(history.steps), int(np.log(NOTHING) / np.log(self.decay)) + 1)
        weight = self.decay ** np.arange(rows)[::-1]
        recent = history.counts[-rows:] / history.totals[-rows:, None]
        return Forecast(constant(weight @ recent / weight.sum(), horizon))


@dataclass(frozen=True)
class SwAvg(Untrained):
    """The mean of the last *window* steps becomes the next value, and the window slides over it.

    This is the paper's SW_Avg (arXiv 2404.16914). Not a constant: the oldest steps leave the window first, so over a
    long horizon recent steps weigh up to twice as much as the average one. The paper does not state its window; 500
    has the lowest error on the sample trace gpt-moe-8e-a (1.73% at 1,000 steps; 300: 1.83%, 700: 1.75%).
    """

    name = "sw_avg"
    window: int = 500

    def forecast(self, history: LayerLoad, horizon: int) -> Forecast:
        """The recursion, one logged row at a time."""
        window = history.shares[-history.rows(self.window) :]
        return Forecast(hold(slide(window, -(-horizon // history.stride)), history.stride, horizon))


def slide(window: Shares, n: int) -> Shares:
    """*n* further rows, each the mean of the len(*window*) rows before it, shape (n, experts)."""
    w = len(window)
    values = np.concatenate([window, np.empty((n, window.shape[1]))])  # (w + n, experts)
    total = window.sum(axis=0)
    for i in range(w, w + n):
        values[i] = total / w
        total += values[i] - values[i - w]
    return values[w:]


@dataclass(frozen=True)
class Level(Untrained):
    """A local level model: an exponential average with one noise-to-drift ratio for all experts of a layer.

    Noise and drift are read from the
    variogram of the last *history* steps (`moetrace.analysis.variogram`), and the weight of the newest block follows
    from their ratio (Harvey 1989, section 4.1.2), so there is no window to choose. The forecast is that of ARIMA
    (0,1,1), without the fit. *trend* carries on that part of the change between the last two 1,000 steps. What came
    before a jump of the load is forgotten (`moetrace.analysis.variogram`).
    """

    name = "level"
    trend: float = 0.0
    history: int = HISTORY

    def least_rows(self, stride: int) -> int:
        """Four blocks of logged steps, so that there are distances to compare."""
        return 4 * rows_of(BLOCK, stride)

    def forecast(self, history: LayerLoad, horizon: int) -> Forecast:
        """The level, and the damped trend if there is one."""
        present = since_jump(history)
        recent = present.last(REMEMBERED)
        means = block_means(recent, min(len(recent.steps), history.rows(BLOCK)))
        level = last_level(means, gain_of(present, self.history))
        return Forecast(ramp(level, present, self.trend, horizon))


# --- several, weighed by the error of each at earlier cutoffs ---------------------------------

# Unlike each other on purpose: a level that follows quickly, the same with a trend, and what serving systems do.
# More candidates with other windows made it worse on gpt-moe-8e-a, and so did errors over shorter horizons, which speak
# for those that follow.
CANDIDATES: tuple[Untrained, ...] = (Level(), Level(trend=0.2), WindowMean())
# The log errors of the candidates that are assumed, and how many looks back that weighs: without evidence the level is
# the best, and a trend or a long window has to have been better by far, or for long, to be taken.
PRIOR = (0.0, 0.3, 0.3)
PRIOR_WEIGHT = 3.0
# Earlier cutoffs are this many steps apart, and one counts half as much for every 1,000 steps since its horizon passed.
EVERY = 250
HALF_LIFE = 1000
# What is older than so many of them has no weight left, and is not looked at.
MOST_HALF_LIVES = 20
# Ten percent less error is four times the weight.
SHARPNESS = 14.0


@dataclass(frozen=True)
class Auto(Untrained):
    """A weighted mean of three forecasts, with weights of its own for each layer, cutoff and horizon.

    The weights follow from the errors that the three made over the same horizon at earlier cutoffs, as far as
    that horizon lies in the history: nothing after the cutoff is used. An earlier cutoff counts less the longer
    ago it is, and not at all if the load has jumped since. The numbers were chosen so that it is safe: nowhere much
    worse than the best of the predictors that one could have chosen instead (`benchmarks/accuracy.py`).
    """

    name = "auto"
    by_horizon = True

    def least_rows(self, stride: int) -> int:
        """What the candidates need."""
        return max(candidate.least_rows(stride) for candidate in CANDIDATES)

    def forecast(self, history: LayerLoad, horizon: int) -> Forecast:
        """The weighted mean of the candidates' forecasts."""
        present = since_jump(history)
        forecasts = np.stack([candidate.forecast(present, horizon).shares for candidate in CANDIDATES])
        return Forecast(np.tensordot(weights(present, horizon), forecasts, axes=1))


def weights(history: LayerLoad, horizon: int) -> NDArray[np.float64]:
    """The weight of each candidate, shape (candidates,), summing to 1."""
    first, last = int(history.steps[0]), int(history.steps[-1])
    # Counted back from the end, so that every step of the last horizon is used.
    every = max(EVERY, history.stride)
    oldest = max(first + EVERY + Auto().needs, last - horizon - MOST_HALF_LIVES * max(HALF_LIFE, history.stride))
    total, log_errors = PRIOR_WEIGHT, PRIOR_WEIGHT * np.array(PRIOR)
    for cutoff in range(last - horizon, oldest, -every):
        past, actual = history.until(cutoff), history.after(cutoff, horizon)
        if not len(actual.steps) or len(past.steps) < Auto().least_rows(past.stride):
            continue
        ahead = int(actual.steps[-1] - past.steps[-1])
        forecasts = [candidate.forecast(past, ahead).shares.mean(axis=0) for candidate in CANDIDATES]
        # A load that stands still is forecast without error by all.
        errors = np.maximum([np.abs(forecast - actual.mean_shares).sum() for forecast in forecasts], 1e-12)
        weight = 0.5 ** ((last - cutoff - horizon) / HALF_LIFE)
        log_errors = log_errors + weight * np.log(errors / errors.mean())
        total += weight
    scores = np.exp(-SHARPNESS * log_errors / total)
    scaled: NDArray[np.float64] = scores / scores.sum()
    return scaled
