"""Where the results of a backtest are kept: the protocol, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from moetrace.forecasting.evaluation import Result, SharedFit
from moetrace.forecasting.fitting import TimedFit
from moetrace.forecasting.layers import EndForecast
from moetrace.forecasting.predictors.base import Predictor
from moetrace.frames import stacked

if TYPE_CHECKING:
    import pandas as pd


class Results(Protocol):
    """Where results are kept: the scores, shares and forecast of each `Result`, and each `SharedFit`."""

    def has_scores(self, result: Result) -> bool:
        """Whether its scores and shares are kept."""

    def has_forecast(self, result: Result) -> bool:
        """Whether its forecast of the steps after the end of the trace is kept."""

    def has_fit(self, fit: SharedFit) -> bool:
        """Whether the fit is kept."""

    def put_scores(self, result: Result, scores: pd.DataFrame, shares: pd.DataFrame) -> None:
        """Keep scores and shares."""

    def put_forecast(self, result: Result, forecast: EndForecast) -> None:
        """Keep the forecast of the steps after the end."""

    def put_fit(self, fit: SharedFit, learned: TimedFit) -> None:
        """Keep a fit."""

    def scores(self, results: Sequence[Result]) -> pd.DataFrame:
        """The scores of all *results*, one row per cutoff of each."""

    def shares(self, results: Sequence[Result]) -> pd.DataFrame:
        """Their shares, one row per cutoff and expert of each."""

    def forecast(self, result: Result) -> EndForecast:
        """The forecast of the steps after the end."""

    def fit(self, fit: SharedFit, predictor: Predictor) -> TimedFit:
        """What *predictor* learned."""

    def begin(self, trace: str) -> None:
        """Get ready to keep results of the trace of that name."""

    def handed_over(self) -> Results | None:
        """What a worker hands to the process that asked it, None where that reads the same place."""

    def merge(self, other: Results | None) -> None:
        """Take in what a worker handed over."""


@dataclass(frozen=True)
class InMemory:
    """Results kept in dictionaries."""

    scored: dict[Result, tuple[pd.DataFrame, pd.DataFrame]] = field(default_factory=dict)
    forecasts: dict[Result, EndForecast] = field(default_factory=dict)
    fits: dict[SharedFit, TimedFit] = field(default_factory=dict)

    def has_scores(self, result: Result) -> bool:
        """Whether its scores and shares are kept."""
        return result in self.scored

    def has_forecast(self, result: Result) -> bool:
        """Whether its forecast is kept."""
        return result in self.forecasts

    def has_fit(self, fit: SharedFit) -> bool:
        """Whether the fit is kept."""
        return fit in self.fits

    def put_scores(self, result: Result, scores: pd.DataFrame, shares: pd.DataFrame) -> None:
        """Keep scores and shares."""
        self.scored[result] = scores.reset_index(drop=True), shares.reset_index(drop=True)

    def put_forecast(self, result: Result, forecast: EndForecast) -> None:
        """Keep the forecast."""
        self.forecasts[result] = forecast

    def put_fit(self, fit: SharedFit, learned: TimedFit) -> None:
        """Keep a fit."""
        self.fits[fit] = learned

    def scores(self, results: Sequence[Result]) -> pd.DataFrame:
        """The scores of all *results*."""
        return stacked([self.scored[result][0] for result in results])

    def shares(self, results: Sequence[Result]) -> pd.DataFrame:
        """Their shares."""
        return stacked([self.scored[result][1] for result in results])

    def forecast(self, result: Result) -> EndForecast:
        """The forecast of the steps after the end."""
        return self.forecasts[result]

    def fit(self, fit: SharedFit, predictor: Predictor) -> TimedFit:  # noqa: ARG002 - kept as it is
        """What was learned."""
        return self.fits[fit]

    def begin(self, trace: str) -> None:
        """Nothing to do."""

    def handed_over(self) -> InMemory:
        """Itself."""
        return self

    def merge(self, other: Results | None) -> None:
        """Take in what a worker kept in its own memory."""
        if isinstance(other, InMemory) and other is not self:
            self.scored.update(other.scored)
            self.forecasts.update(other.forecasts)
            self.fits.update(other.fits)
