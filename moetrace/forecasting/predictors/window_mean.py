"""`window_mean`: the load of the last steps goes on, as SGLang and vLLM assume."""

from __future__ import annotations

from dataclasses import dataclass

from moetrace.forecasting.predictors.base import Forecast, Untrained, ramp
from moetrace.trace import LayerLoad


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
