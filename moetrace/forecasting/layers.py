"""One layer: how a predictor is fitted, what it forecasts at each cutoff, and how that compares with what followed.

In the errors p[t, e] is the share of expert e in step t after the cutoff, n[t] the tokens of that step, q[t, e] the
predicted share; each definition has its own name.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moetrace.analysis.states import state_at
from moetrace.analysis.variogram import cached_per_layer, horizon_noise
from moetrace.forecasting import intervals
from moetrace.forecasting.predictors import label, predictor
from moetrace.forecasting.predictors.base import Fitted, Forecast, Predictor, is_constant
from moetrace.forecasting.windows import Windows
from moetrace.frames import stacked
from moetrace.trace import Counts, LayerLoad, Shares, Steps, stride_of
from moetrace.words import BASELINE

if TYPE_CHECKING:
    import pandas as pd

TOO_SHORT = "too_short"


# --- fits -------------------------------------------------------------------------------------


class TimedFit(NamedTuple):
    """What was fitted, and the seconds it took; 0 where it is an earlier fit moved forward."""

    fitted: Fitted
    seconds: float


Fits = Mapping[int, TimedFit]
"""The fit that serves at each cutoff."""


def fit(predictor: Predictor, histories: Iterable[LayerLoad]) -> TimedFit:
    """What *predictor* learns from *histories*."""
    began = time.perf_counter()
    return TimedFit(predictor.fit(histories), time.perf_counter() - began)


def has_history(predictor: Predictor, steps: Steps, cutoff: int) -> bool:
    """Whether the logged *steps* (steps,) up to *cutoff* are as many as the predictor needs."""
    rows = int(np.searchsorted(steps, cutoff, "right"))
    if not rows or cutoff - int(steps[0]) + 1 < predictor.needs:
        return False
    return rows >= predictor.least_rows(stride_of(steps[:rows]))


def refits(predictor: Predictor, steps: Steps, cutoffs: Iterable[int]) -> dict[int, int]:
    """The cutoff whose fit serves at each of *cutoffs* (increasing) where the history in *steps* is long enough.

    A predictor is fitted anew only when its history has grown by its `refit_growth`, and moved forward in between.
    """
    before_first = int(steps[0]) - 1
    serving: dict[int, int] = {}
    latest: int | None = None
    for cutoff in cutoffs:
        if has_history(predictor, steps, cutoff):
            if latest is None or cutoff - before_first >= predictor.refit_growth * (latest - before_first):
                latest = cutoff
            serving[cutoff] = latest
    return serving


# --- forecasts --------------------------------------------------------------------------------


class EndForecast(NamedTuple):
    """The forecast of the steps after the end of a trace.

    *shares* is (horizon, experts), repaired; *expected_error* is the `error_rate` that it expects; *half_widths*
    (experts,) are by percent how far the intervals of the mean reach.
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
) -> Iterator[tuple[int, dict[int, Forecast], float, float]]:
    """At each cutoff of *windows* the forecast for each horizon there, repaired; none where the history is too short.

    With them come the seconds of the fit and of the forecast. *shared_fits* are the fits for all layers, of a predictor
    that has such; any other is fitted here. One forecast to the longest horizon is made at a cutoff; the shorter ones
    are its beginnings, except for a predictor that forecasts each horizon by itself.
    """
    fitted_at, fits = refits(by, load.steps, windows), dict(shared_fits or {})
    for cutoff, horizons in windows.items():
        if cutoff not in fitted_at or not (shared_fits is None or cutoff in fits):
            yield cutoff, {}, 0.0, 0.0
            continue
        history = load.until(cutoff)
        if shared_fits is None:
            new = fitted_at[cutoff] == cutoff
            fits[cutoff] = fit(by, [history]) if new else TimedFit(fits[fitted_at[cutoff]].fitted, 0.0)
        served = fits[cutoff]
        began = time.perf_counter()
        if by.by_horizon:
            found = {horizon: repaired(served.fitted.forecast(history, horizon)) for horizon in horizons}
        else:
            longest = repaired(served.fitted.forecast(history, max(horizons)))
            found = {horizon: Forecast(longest.shares[:horizon], longest.status) for horizon in horizons}
        yield cutoff, found, served.seconds, time.perf_counter() - began


def repaired(forecast: Forecast) -> Forecast:
    """Its shares clipped at 0 and scaled to sum to 1; equal shares where nothing is left."""
    rows = forecast.shares[:1] if is_constant(forecast.shares) else forecast.shares
    shares = np.clip(np.nan_to_num(rows), 0, None)
    total = shares.sum(axis=1, keepdims=True)
    whole = np.where(total > 0, shares / np.where(total > 0, total, 1), 1 / shares.shape[1])
    return Forecast(np.broadcast_to(whole, forecast.shares.shape), forecast.status)


def forecast_end(
    calibration: intervals.ErrorCalibration, by: Predictor, horizon: int, shared_fits: Fits | None = None
) -> EndForecast:
    """The forecast of the *horizon* steps after the end of the layer of *calibration*."""
    load = calibration.load
    end = int(load.steps[-1])
    ((_, found, _, _),) = forecasts(load, by, {end: [horizon]}, shared_fits)
    shares, status = found[horizon].shares, found[horizon].status
    expected, mean = calibration.expectation(end, horizon), shares.mean(axis=0)
    known = (shares, expected.error(mean), expected.half_widths(mean), status, load.first_expert)
    return EndForecast(load.trace, label(by), load.layer, end + 1, *known)


# --- scores -----------------------------------------------------------------------------------


class Errors(NamedTuple):
    """The errors of one forecast of one layer, as fractions.

    *error_rate* is ``sum_e |Q[e] - P[e]|``, with the shares of the load over the whole horizon
    ``P[e] = sum_t c[t, e] / sum_t n[t]`` and ``Q[e] = sum_t n[t] q[t, e] / sum_t n[t]``: as shares sum to 1, the
    load-weighted relative error (WAPE). *step_error_rate* is ``mean_t sum_e |q[t, e] - p[t, e]|``. *mape* is
    ``mean_e |Q[e] - P[e]| / P[e]`` over the experts with any load; *idle_experts* counts the others. *abs_points* is
    ``mean_e |Q[e] - P[e]|``.
    """

    error_rate: float
    step_error_rate: float
    mape: float
    idle_experts: int
    abs_points: float


class Score(NamedTuple):
    """One forecast of one layer, scored over one horizon; the columns of the scores frame.

    Errors and noise are fractions as `Errors` and `variogram` define them, NaN where the history was too short.
    *state* is the layer's as it was known at the cutoff. *skill* is ``1 - error_rate / error_rate of window_mean`` at
    the same cutoff: 0 is no better than what serving systems do. *expected_error* is the error_rate that was expected
    at the cutoff. *coverage_80* and *coverage_95* are the parts of the experts whose share lay inside their interval.
    *status* is ``ok``, ``too_short`` or the fallback that stood in.
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


def score_layer(
    calibration: intervals.ErrorCalibration,
    by: Predictor,
    windows: Windows,
    shared_fits: Fits | None = None,
    *,
    expect: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The scores of one predictor on the layer of *calibration*, and the shares they were computed from.

    One row per `Score`, and one per `SHARE_COLUMNS`; unless asked to *expect* there are no intervals and no shares.
    """
    import pandas as pd

    load = calibration.load
    scores: list[Score] = []
    shares: list[pd.DataFrame] = []
    for cutoff, found, fit_seconds, forecast_seconds in forecasts(load, by, windows, shared_fits):
        by_step = _step_errors(load, by, cutoff, found)
        for horizon in windows[cutoff]:
            key = (load.trace, label(by), load.layer, horizon, cutoff)
            step_noise, error_noise = horizon_noise(load, cutoff, horizon)
            baseline = _window_mean_error(load, cutoff, horizon)
            # What stays NaN is not known where the history was too short, or nothing is expected.
            row: dict[str, Any] = dict.fromkeys(Score._fields, float("nan")) | dict(zip(Score._fields, key))
            row |= {"state": state_at(load, cutoff), "idle_experts": 0, "status": TOO_SHORT}
            row |= {"error_noise": error_noise, "step_noise": step_noise, "window_mean_error_rate": baseline}
            row |= {"fit_seconds": fit_seconds, "forecast_seconds": forecast_seconds}
            if horizon in found:
                forecast, actual = found[horizon], _actual_shares(load, cutoff, horizon)
                after = load.after(cutoff, horizon)
                of_logged = matched(forecast.shares, cutoff, after)
                predicted = predicted_shares(of_logged, after.totals)
                own = errors(predicted, actual, by_step[horizon])
                row |= own._asdict() | {"status": forecast.status}
                row["skill"] = 1 - own.error_rate / baseline if baseline > 0 else float("nan")
            if horizon in found and expect:
                expected, mean = calibration.expectation(cutoff, horizon), forecast.shares.mean(axis=0)
                ends = intervals.bounds(predicted, expected.half_widths(mean))
                row["expected_error"] = expected.error(mean)
                for percent in intervals.QUANTILES:
                    inside = (ends[f"low_{percent}"] <= actual) & (actual <= ends[f"high_{percent}"])
                    row[f"coverage_{percent}"] = float(inside.mean())
                # The forecast is the mean over the steps, known at the cutoff; in what was predicted, as in what
                # followed, each step is weighted by its tokens.
                known = {"expert": load.expert_numbers, "forecast": of_logged.mean(axis=0), "predicted": predicted}
                shares.append(pd.DataFrame(dict(zip(SHARE_COLUMNS, key)) | known | {"actual": actual} | ends))
            scores.append(Score(**row))
    return pd.DataFrame(scores, columns=Score._fields), stacked(shares, SHARE_COLUMNS)


def _step_errors(load: LayerLoad, by: Predictor, cutoff: int, found: Mapping[int, Forecast]) -> dict[int, Shares]:
    """By horizon the error of each of its steps, shape (steps,); what begins a longer forecast is measured with it."""
    measured: dict[int, Shares] = {}
    for horizon in sorted(found, reverse=True):
        after = load.after(cutoff, horizon)
        if by.by_horizon or not measured:
            longest = step_errors(matched(found[horizon].shares, cutoff, after), after.shares)
        measured[horizon] = longest[: len(after.steps)]
    return measured


@cached_per_layer
def _actual_shares(load: LayerLoad, cutoff: int, horizon: int) -> Shares:
    """The shares of the load that followed, shape (experts,)."""
    return load.after(cutoff, horizon).mean_shares


@cached_per_layer
def _window_mean_error(load: LayerLoad, cutoff: int, horizon: int) -> float:
    """The `error_rate` of `window_mean`, which skill is measured against."""
    forecast, after = predictor(BASELINE).fit([]).forecast(load.until(cutoff), horizon), load.after(cutoff, horizon)
    predicted = predicted_shares(matched(repaired(forecast).shares, cutoff, after), after.totals)
    return float(np.abs(predicted - _actual_shares(load, cutoff, horizon)).sum())


def matched(shares: Shares, cutoff: int, after: LayerLoad) -> Shares:
    """The rows of a forecast *shares* (horizon, experts) of the steps that were logged *after* the cutoff."""
    return shares[slice(len(after.steps)) if is_constant(shares) else after.steps - cutoff - 1]


def predicted_shares(forecast: Shares, totals: Counts) -> Shares:
    """Share of the load that *forecast* (steps, experts) predicts, each step weighed by *totals*, shape (experts,)."""
    predicted: Shares = forecast[0] if is_constant(forecast) else totals @ forecast / totals.sum()
    return predicted


def step_errors(forecast: Shares, shares: Shares) -> Shares:
    """``sum_e |q[t, e] - p[t, e]|`` of each step, shape (steps,); *forecast* and *shares* are (steps, experts)."""
    apart = forecast - shares
    total: Shares = np.abs(apart, out=apart).sum(axis=1)
    return total


def errors(predicted: Shares, actual: Shares, by_step: Shares) -> Errors:
    """The errors of *predicted* against *actual* shares, both (experts,); *by_step* (steps,) are the `step_errors`."""
    apart, loaded = np.abs(predicted - actual), actual > 0
    mape = float((apart[loaded] / actual[loaded]).mean())
    return Errors(float(apart.sum()), float(by_step.mean()), mape, int((~loaded).sum()), float(apart.mean()))
