"""`level`: a level that wanders, seen through noise, smoothed as much as the trace's own noise asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moetrace.noise import BLOCK, FAR_LAGS, Motion, block_means, motion
from moetrace.predictors.base import Fitted, Forecast, Predictor, ramp
from moetrace.trace import LayerLoad, Shares

# The smallest gain: means of the last 100 blocks, 5,000 steps, on average.
LEAST_GAIN = 0.02
# Blocks that weigh less than this are left out of the average.
LEAST_WEIGHT = 1e-5


@dataclass(frozen=True)
class LocalLevel(Predictor, Fitted):
    """The local level model with one noise-to-drift ratio for all experts of a layer.

    Noise and drift are read from the variogram of the last *history* steps (`moetrace.noise`), and from
    their ratio follows how fast the average has to forget (Harvey 1989, section 4.1.2): no window to
    choose. It is what (0,1,1) of ARIMA forecasts, without the fit. *trend* carries on that part of
    the change between the last two 1,000 steps.
    """

    name = "level"
    trend: float = 0.0
    history: int = 2500

    @property
    def needs(self) -> int:
        """Four blocks, so that there are distances to compare."""
        return 4 * BLOCK

    def fit(self, histories: Sequence[LayerLoad]) -> Fitted:  # noqa: ARG002 - estimated when it forecasts
        """Nothing to learn."""
        return self

    def forecast(self, history: LayerLoad, horizon: int) -> Forecast:
        """The level, and the damped trend if there is one."""
        recent = history.last(self.history)
        level = smoothed(history, gain(motion(recent, lags=FAR_LAGS), recent.rows(BLOCK)))
        return Forecast(ramp(level, history, self.trend, horizon))


def gain(moved: Motion, rows: int) -> float:
    """The weight of the newest block of *rows* rows in the steady state of the filter."""
    noise, drift = moved.noise / rows, moved.drift * rows
    if noise + drift == 0:
        return LEAST_GAIN
    predicted = (drift + np.sqrt(drift**2 + 4 * drift * noise)) / 2
    return float(np.clip(predicted / (predicted + noise), LEAST_GAIN, 1))


def smoothed(history: LayerLoad, weight: float) -> Shares:
    """The exponential average of the block means, the newest weighing *weight*, shape (experts,)."""
    means = block_means(history, history.rows(BLOCK))
    age = np.arange(len(means))[::-1]
    weights = np.where(age == 0, 1.0, (1 - weight) ** age)
    kept = weights > LEAST_WEIGHT
    level: Shares = weights[kept] @ means[kept] / weights[kept].sum()
    return level
