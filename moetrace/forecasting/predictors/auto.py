"""`auto`: weighs a few cheap forecasts of a layer by how wrong each was at earlier cutoffs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.analysis.variogram import FAR_LAGS, motion
from moetrace.forecasting.predictors.base import Fitted, Forecast, Predictor
from moetrace.forecasting.predictors.level import Level
from moetrace.forecasting.predictors.window_mean import WindowMean
from moetrace.trace import LayerLoad

# Unlike each other on purpose: a level that follows quickly, the same with a trend, and what serving
# systems do with a trend. More candidates with other windows made it worse on gpt-moe-8e-a.
CANDIDATES: tuple[Predictor, ...] = (Level(), Level(trend=0.2), WindowMean(trend=0.3))
# What is believed of their log errors before there is any evidence: a trend over 2,000 steps is
# useless to a load that has just begun to move. As much belief as a twentieth of a cutoff.
PRIOR = (-0.3, 0.0, 0.3)
PRIOR_WEIGHT = 0.05
# Earlier cutoffs are looked at this far apart, and half as heavily for every 1,000 steps they lie back.
EVERY = 250
HALF_LIFE = 1000
# Ten percent less error is 1.8 times the weight.
SHARPNESS = 6.0


@dataclass(frozen=True)
class Auto(Predictor, Fitted):
    """A weighted mean of three forecasts, weighed anew for each layer, cutoff and horizon.

    Evidence are their errors over the same horizon at earlier cutoffs that lie whole in the history:
    nothing after the cutoff is used. A cutoff counts less the longer ago it is, and the more the
    liveliness of the load, its drift, has changed since: a wild phase says little about a calm one.
    The numbers were chosen on gpt-moe-8e-a.
    """

    name = "auto"
    by_horizon = True

    @property
    def needs(self) -> int:
        """What the candidates need."""
        return max(made.needs for made in CANDIDATES)

    def fit(self, histories: Sequence[LayerLoad]) -> Fitted:  # noqa: ARG002 - weighed when it forecasts
        """Nothing to learn."""
        return self

    def forecast(self, history: LayerLoad, horizon: int) -> Forecast:
        """The candidates' forecasts, weighed."""
        said = np.stack([_forecast(made, history, horizon) for made in CANDIDATES])  # (candidates, horizon, experts)
        return Forecast(np.tensordot(weights(history, horizon), said, axes=1))


def weights(history: LayerLoad, horizon: int) -> NDArray[np.float64]:
    """How much each candidate counts, shape (candidates,), summing to 1."""
    first, last = int(history.steps[0]), int(history.steps[-1])
    # Counted back from the end, so that every step of the last horizon is used.
    earlier = list(range(last - horizon, first + EVERY + Auto().needs, -EVERY))
    total, believed = PRIOR_WEIGHT, PRIOR_WEIGHT * np.array(PRIOR)
    now = _drift(history)
    for cutoff in earlier:
        past = history.until(cutoff)
        wrong = _log_errors(past, history.after(cutoff, horizon))
        alike = np.exp(-abs(np.log(now / _drift(past))))
        weight = alike * 0.5 ** ((last - cutoff) / HALF_LIFE)
        total, believed = total + weight, believed + weight * wrong
    heights = np.exp(-SHARPNESS * believed / total)
    scaled: NDArray[np.float64] = heights / heights.sum()
    return scaled


def _log_errors(past: LayerLoad, actual: LayerLoad) -> NDArray[np.float64]:
    """Log of each candidate's error over what then happened, relative to their mean, shape (candidates,)."""
    horizon = int(actual.steps[-1] - past.steps[-1])
    wrong = [np.abs(_forecast(made, past, horizon).mean(axis=0) - actual.mean_shares).sum() for made in CANDIDATES]
    # A load that stands still is forecast without error by all.
    errors = np.maximum(wrong, 1e-12)
    logs: NDArray[np.float64] = np.log(errors / errors.mean())
    return logs


def _forecast(made: Predictor, history: LayerLoad, horizon: int) -> Any:
    return made.fit([]).forecast(history, horizon).shares


def _drift(history: LayerLoad) -> float:
    return max(motion(history.last(Level().history), lags=FAR_LAGS).drift, 1e-9)
