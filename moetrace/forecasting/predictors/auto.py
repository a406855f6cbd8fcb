"""`auto`: weighs a few cheap forecasts of a layer by the error of each at earlier cutoffs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetrace.analysis.variogram import since_jump
from moetrace.forecasting.predictors.averages import Level, WindowMean
from moetrace.forecasting.predictors.base import Forecast, Untrained
from moetrace.trace import LayerLoad

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
