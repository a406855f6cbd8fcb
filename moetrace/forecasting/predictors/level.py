"""`level`: an exponential average, as slow as the noise and the drift of the trace ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moetrace.analysis.variogram import BLOCK, FAR_LAGS, block_means, motion
from moetrace.forecasting.predictors.base import Fitted, Forecast, Predictor, ramp
from moetrace.trace import LayerLoad, Shares, rows_of

# The smallest gain: means of the last 100 blocks, 5,000 steps, on average.
LEAST_GAIN = 0.02
# Steps that noise and drift are read from: long enough for 30 pairs of blocks 1,000 steps apart, short
# enough to belong to the present. 1,500 and 4,000 err more on gpt-moe-8e-a.
HISTORY = 2500


@dataclass(frozen=True)
class Level(Predictor, Fitted):
    """The local level model with one noise-to-drift ratio for all experts of a layer.

    Noise and drift are read from the variogram of the last *history* steps (`moetrace.analysis.variogram`), and
    the weight of the newest block follows from their ratio (Harvey 1989, section 4.1.2), so there is no window
    to choose. The forecast is that of ARIMA (0,1,1), without the fit. *trend* carries on that part of
    the change between the last two 1,000 steps.
    """

    name = "level"
    trend: float = 0.0
    history: int = HISTORY

    @property
    def needs(self) -> int:
        """Four blocks, so that there are distances to compare."""
        return 4 * BLOCK

    def least_rows(self, stride: int) -> int:
        """Four blocks of logged steps."""
        return 4 * rows_of(BLOCK, stride)

    def fit(self, histories: Sequence[LayerLoad]) -> Fitted:  # noqa: ARG002 - estimated when it forecasts
        """Nothing to learn."""
        return self

    def forecast(self, history: LayerLoad, horizon: int) -> Forecast:
        """The level, and the damped trend if there is one."""
        means = block_means(history, history.rows(BLOCK))
        level = last_level(means, gain_of(history, self.history))
        return Forecast(ramp(level, history, self.trend, horizon))


def gain_of(history: LayerLoad, last: int = HISTORY) -> float:
    """The weight of the newest block of `BLOCK` steps, from noise and drift of the *last* steps."""
    recent = history.last(last)
    gain = motion(recent, lags=FAR_LAGS).gain(recent.rows(BLOCK))
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
