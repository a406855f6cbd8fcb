"""`level`: an exponential average, as slow as the noise and the drift of the trace ask for."""

from __future__ import annotations

from dataclasses import dataclass

from moetrace.analysis.outlook import since_jump
from moetrace.analysis.variogram import BLOCK, HISTORY, REMEMBERED, block_means, gain_of, last_level
from moetrace.forecasting.predictors.base import Forecast, Untrained, ramp
from moetrace.trace import LayerLoad, rows_of


@dataclass(frozen=True)
class Level(Untrained):
    """The local level model with one noise-to-drift ratio for all experts of a layer.

    Noise and drift are read from the variogram of the last *history* steps (`moetrace.analysis.variogram`), and
    the weight of the newest block follows from their ratio (Harvey 1989, section 4.1.2), so there is no window
    to choose. The forecast is that of ARIMA (0,1,1), without the fit. *trend* carries on that part of
    the change between the last two 1,000 steps. What came before a jump of the load is forgotten
    (`moetrace.analysis.outlook`).
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

    def forecast(self, history: LayerLoad, horizon: int) -> Forecast:
        """The level, and the damped trend if there is one."""
        present = since_jump(history)
        recent = present.last(REMEMBERED)
        means = block_means(recent, min(len(recent.steps), history.rows(BLOCK)))
        level = last_level(means, gain_of(present, self.history))
        return Forecast(ramp(level, present, self.trend, horizon))
