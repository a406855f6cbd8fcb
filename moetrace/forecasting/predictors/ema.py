"""`ema`: an exponential moving average of the shares, as MindSpeed plans by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moetrace.errors import SettingError
from moetrace.forecasting.predictors.base import Forecast, Untrained, constant
from moetrace.trace import LayerLoad

# Steps that weigh less than this are not looked at.
NOTHING = 1e-18


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
