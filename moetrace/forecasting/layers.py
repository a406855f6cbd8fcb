"""One layer: what a predictor forecasts at each cutoff, and how that compares with what then happened."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetrace.analysis.cache import cache_block_means
from moetrace.analysis.noise import horizon_noise
from moetrace.analysis.states import state_at
from moetrace.analysis.variogram import BLOCK
from moetrace.forecasting import intervals
from moetrace.forecasting.fitting import TimedFit, has_history, layer_fits
from moetrace.forecasting.predictors import label, predictor
from moetrace.forecasting.predictors.base import Forecast, Predictor, is_constant
from moetrace.forecasting.scoring import Errors, errors, predicted_shares, step_errors
from moetrace.forecasting.windows import Windows
from moetrace.frames import stacked
from moetrace.trace import LayerLoad, Shares
from moetrace.words import BASELINE

if TYPE_CHECKING:
    import pandas as pd

TOO_SHORT = "too_short"

Fits = Mapping[int, TimedFit]
"""The fit that serves at each cutoff."""
Cell = tuple[int, int]
"""A cutoff and a horizon."""


# --- forecasts --------------------------------------------------------------------------------


class CutoffForecasts(NamedTuple):
    """What a predictor forecasts at a *cutoff*, repaired, by horizon; nothing where the history is too short."""

    cutoff: int
    by_horizon: Mapping[int, Forecast]
    fit_seconds: float = 0.0
    forecast_seconds: float = 0.0


class EndForecast(NamedTuple):
    """The forecast of the steps after the end of a trace.

    *shares* is (horizon, experts), repaired; *expected_error* is how wrong it expects to be, the `error_rate`
    told before; *half_widths* (experts,) say by percent how far the intervals of the mean reach.
    """

    trace: str
    predictor: str
    layer: int
    first_step: int
    shares: Shares
    expected_error: float
    half_widths: dict[int, Shares]
    status: str
    first_expert: int = 0


def forecasts(
    load: LayerLoad, by: Predictor, windows: Windows, shared_fits: Fits | None = None
) -> Iterator[CutoffForecasts]:
    """The forecasts of a layer at each cutoff of *windows*, to the horizons given there.

    *shared_fits* are the fits for all layers, of a predictor that has such; any other is fitted here.
    One forecast to the longest horizon is made at a cutoff; the shorter ones are its beginnings, except for
    a predictor that forecasts each horizon by itself.
    """
    fits = layer_fits(by, load, windows) if shared_fits is None else shared_fits
    for cutoff, horizons in windows.items():
        if cutoff not in fits or not has_history(by, load.steps, cutoff):
            yield CutoffForecasts(cutoff, {})
            continue
        began = time.perf_counter()
        history, fitted = load.until(cutoff), fits[cutoff].fitted
        if by.by_horizon:
            found = {horizon: repaired(fitted.forecast(history, horizon)) for horizon in horizons}
        else:
            longest = repaired(fitted.forecast(history, max(horizons)))
            found = {horizon: Forecast(longest.shares[:horizon], longest.status) for horizon in horizons}
        yield CutoffForecasts(cutoff, found, fits[cutoff].seconds, time.perf_counter() - began)


def repaired(forecast: Forecast) -> Forecast:
    """Its shares clipped at 0 and scaled to sum to 1; equal shares where nothing is left."""
    rows = forecast.shares[:1] if is_constant(forecast.shares) else forecast.shares
    shares = np.clip(np.nan_to_num(rows), 0, None)
    total = shares.sum(axis=1, keepdims=True)
    whole = np.where(total > 0, shares / np.where(total > 0, total, 1), 1 / shares.shape[1])
    return Forecast(np.broadcast_to(whole, forecast.shares.shape), forecast.status)


def forecast_end(
    experience: intervals.Experience, by: Predictor, horizon: int, shared_fits: Fits | None = None
) -> EndForecast:
    """The forecast of the *horizon* steps after the end of a layer, from whose *experience* its intervals are."""
    load = experience.load
    end = int(load.steps[-1])
    (found,) = forecasts(load, by, {end: [horizon]}, shared_fits)
    forecast = found.by_horizon[horizon]
    expected, mean = experience.expectation(end, horizon), forecast.shares.mean(axis=0)
    key, known = (load.trace, label(by), load.layer, end + 1), (expected.error(mean), expected.half_widths(mean))
    return EndForecast(*key, forecast.shares, *known, forecast.status, load.first_expert)


# --- scores -----------------------------------------------------------------------------------


class Score(NamedTuple):
    """One forecast of one layer, scored over one horizon; the columns of the scores frame.

    Errors and noise are fractions as `scoring.Errors` and `variogram` define them, NaN where the history
    was too short. *state* is the layer's as it could be told at the cutoff. *skill* is
    ``1 - error_rate / error_rate of window_mean`` at the same cutoff: 0 is no better than what
    serving systems do. *expected_error* is what the forecast said at the cutoff that its error_rate would be.
    *coverage_80* and *coverage_95* are the parts of the experts whose share lay inside their interval. *status*
    is ``ok``, ``too_short`` or the fallback that stood in.
    """

    trace: str
    predictor: str
    layer: int
    horizon: int
    cutoff: int
    state: str
    error_rate: float
    error_noise: float
    step_error_rate: float
    step_noise: float
    mape: float
    idle_experts: int
    abs_points: float
    window_mean_error_rate: float
    skill: float
    expected_error: float
    coverage_80: float
    coverage_95: float
    status: str
    fit_seconds: float
    forecast_seconds: float


SHARE_COLUMNS = (
    "trace", "predictor", "layer", "horizon", "cutoff", "expert", "forecast", "predicted", "actual",
    "low_80", "high_80", "low_95", "high_95",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Reference:
    """What the scores of a layer have in common, whatever the predictor, by cutoff or by `Cell`.

    *after* is the load that was forecast. Nothing is *expected* where forecasts are scored alone.
    """

    load: LayerLoad
    after: Mapping[Cell, LayerLoad]
    states: Mapping[int, str]
    noise: Mapping[Cell, tuple[float, float]]
    expected: Mapping[Cell, intervals.Expectation]
    window_mean: Mapping[Cell, float]

    @classmethod
    def of(cls, experience: intervals.Experience, windows: Windows, expect: bool = True) -> Reference:
        """The reference of a layer at the cutoffs and horizons of *windows*, with what its *experience* expects."""
        load = experience.load
        cache_block_means(load, load.rows(BLOCK))  # for every history that is cut from the layer
        cells = [(cutoff, horizon) for cutoff, horizons in windows.items() for horizon in horizons]
        after = {cell: load.after(*cell) for cell in cells}
        baseline = {at.cutoff: at.by_horizon for at in forecasts(load, predictor(BASELINE), windows)}
        means = {(c, h): _predicted(baseline[c][h].shares, c, after[c, h]) for c, h in cells}
        return cls(
            load,
            after,
            {cutoff: state_at(load, cutoff) for cutoff in windows},
            {cell: horizon_noise(load, *cell) for cell in cells},
            {cell: experience.expectation(*cell) for cell in cells if expect},
            {cell: float(np.abs(means[cell] - after[cell].mean_shares).sum()) for cell in cells},
        )


def score_layer(
    reference: Reference, by: Predictor, windows: Windows, shared_fits: Fits | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The scores of one predictor on one layer, and the shares they were computed from.

    One row per `Score`, and one per `SHARE_COLUMNS`; *windows* are those of *reference*, or fewer.
    """
    import pandas as pd

    load = reference.load
    scores: list[Score] = []
    shares: list[pd.DataFrame] = []
    for at in forecasts(load, by, windows, shared_fits):
        by_step = _step_errors(reference, by, at)
        for horizon in windows[at.cutoff]:
            forecast = at.by_horizon.get(horizon)
            measured, experts = _measured(reference, forecast, (at.cutoff, horizon), by_step.get(horizon))
            key = (load.trace, label(by), load.layer, horizon, at.cutoff)
            seconds: dict[str, Any] = {"fit_seconds": at.fit_seconds, "forecast_seconds": at.forecast_seconds}
            row: dict[str, Any] = dict(zip(Score._fields, (*key, reference.states[at.cutoff]))) | measured | seconds
            scores.append(Score(**row, status=TOO_SHORT if forecast is None else forecast.status))
            if experts is not None:
                shares.append(pd.DataFrame({**dict(zip(SHARE_COLUMNS, key)), **experts}))
    return pd.DataFrame(scores, columns=Score._fields), stacked(shares, SHARE_COLUMNS)


def _step_errors(reference: Reference, by: Predictor, at: CutoffForecasts) -> dict[int, Shares]:
    """By horizon how wrong each of its steps was, shape (steps,); what begins a longer forecast is measured with it."""
    measured: dict[int, Shares] = {}
    for horizon in sorted(at.by_horizon, reverse=True):
        after = reference.after[at.cutoff, horizon]
        if by.by_horizon or not measured:
            longest = step_errors(matched(at.by_horizon[horizon].shares, at.cutoff, after), after.shares)
        measured[horizon] = longest[: len(after.steps)]
    return measured


def _measured(
    reference: Reference, forecast: Forecast | None, cell: Cell, by_step: Shares | None
) -> tuple[dict[str, Any], dict[str, Shares] | None]:
    """The measured fields of a `Score`, and the shares of the experts, None where none were forecast or expected.

    Of these *forecast* is the mean over the steps, which is known at the cutoff; *predicted* weights each step by its
    tokens, as *actual* does.
    """
    step_noise, error_noise = reference.noise[cell]
    baseline = reference.window_mean[cell]
    known = {"error_noise": error_noise, "step_noise": step_noise, "window_mean_error_rate": baseline}
    if forecast is None or by_step is None:
        return known | _NOTHING._asdict() | dict.fromkeys(("skill", *EXPECTED), float("nan")), None
    after, expected = reference.after[cell], reference.expected.get(cell)
    predicted = _predicted(forecast.shares, cell[0], after)
    found = errors(predicted, after.mean_shares, by_step)
    skill = 1 - found.error_rate / baseline if baseline > 0 else float("nan")
    if expected is None:
        return known | found._asdict() | {"skill": skill} | dict.fromkeys(EXPECTED, float("nan")), None
    mean = forecast.shares.mean(axis=0)
    of_logged = matched(forecast.shares, cell[0], after).mean(axis=0)
    experts = {
        "expert": after.expert_numbers,
        "forecast": of_logged,
        "predicted": predicted,
        "actual": after.mean_shares,
    }
    experts |= intervals.bounds(predicted, expected.half_widths(mean))
    held = {name: float(_inside(experts, name.removeprefix("coverage_")).mean()) for name in COVERAGE}
    return known | found._asdict() | held | {"skill": skill, "expected_error": expected.error(mean)}, experts


COVERAGE = ("coverage_80", "coverage_95")
EXPECTED = ("expected_error", *COVERAGE)
_NOTHING = Errors(float("nan"), float("nan"), float("nan"), 0, float("nan"))


def _inside(experts: Mapping[str, Shares], percent: str) -> NDArray[np.bool_]:
    return (experts[f"low_{percent}"] <= experts["actual"]) & (experts["actual"] <= experts[f"high_{percent}"])


def matched(shares: Shares, cutoff: int, after: LayerLoad) -> Shares:
    """The rows of a forecast *shares* (horizon, experts) of the steps that were logged *after* the cutoff."""
    return shares[slice(len(after.steps)) if is_constant(shares) else after.steps - cutoff - 1]


def _predicted(shares: Shares, cutoff: int, after: LayerLoad) -> Shares:
    return predicted_shares(matched(shares, cutoff, after), after.totals)
