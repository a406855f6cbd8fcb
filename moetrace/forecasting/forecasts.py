"""What predictors say of a layer at each cutoff, and of the steps after the end of a trace."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moetrace.errors import SettingError, TooShortError
from moetrace.forecasting import intervals
from moetrace.forecasting.fits import Pooled, Timed, fits_at, has_history, pooled_fits
from moetrace.forecasting.predictors import label
from moetrace.forecasting.predictors.base import Forecast, Predictor
from moetrace.forecasting.windows import Covered
from moetrace.trace import LayerLoad, LoadTrace, Shares

if TYPE_CHECKING:
    import pandas as pd

Progress = Callable[[int, int], None]
"""Called with the pieces of work done, and of all: the fits of a predictor for all layers are one, a layer is one."""


def check_distinct(predictors: Sequence[Predictor]) -> None:
    """Raise `SettingError` for a predictor that is given twice."""
    names = [label(made) for made in predictors]
    if len(set(names)) != len(names):
        raise SettingError(f"predictor {next(n for n in names if names.count(n) > 1)} is given twice")


def ticking(predictors: Sequence[Predictor], layers: int, progress: Progress | None) -> Callable[[], None]:
    """What to call when a piece of the work is done."""
    total = sum(made.pools_layers for made in predictors) + layers
    done = itertools.count(1)
    return lambda: progress(next(done), total) if progress is not None else None


class Coming(NamedTuple):
    """The forecast of the steps after the end of a trace.

    *shares* is (horizon, experts), repaired; *deviation* (experts,) is that of their mean, from which
    `intervals.bounds` makes the intervals.
    """

    predictor: str
    layer: int
    first_step: int
    shares: Shares
    deviation: Shares
    status: str


class Said(NamedTuple):
    """What a predictor said at a *cutoff*: forecasts by horizon, none where the history is too short."""

    cutoff: int
    forecasts: Mapping[int, Forecast]
    fit_seconds: float = 0.0
    forecast_seconds: float = 0.0


def forecasts(load: LayerLoad, made: Predictor, pooled: Pooled, covered: Covered) -> Iterator[Said]:
    """What *made* says of a layer at each cutoff, for the horizons *covered* by the trace there."""
    if made.pools_layers:
        fits: Mapping[int, Timed] = {at: timed for (name, at), timed in pooled.items() if name == label(made)}
    else:
        fits = fits_at(made, int(load.steps[0]), covered, lambda cutoff: [load.until(cutoff)])
    for cutoff, horizons in covered.items():
        history = load.until(cutoff)
        if cutoff not in fits or not has_history(made, int(load.steps[0]), cutoff):
            yield Said(cutoff, {})
            continue
        began = time.perf_counter()
        fitted = fits[cutoff].fitted
        if made.by_horizon:
            said = {horizon: fitted.forecast(history, horizon) for horizon in horizons}
        else:
            longest = fitted.forecast(history, max(horizons))
            said = {horizon: Forecast(longest.shares[:horizon], longest.status) for horizon in horizons}
        yield Said(cutoff, said, fits[cutoff].seconds, time.perf_counter() - began)


def repaired(forecast: Forecast) -> Shares:
    """The shares clipped at 0 and scaled to sum to 1; equal shares where nothing is left."""
    shares = np.clip(np.nan_to_num(forecast.shares), 0, None)
    total = shares.sum(axis=1, keepdims=True)
    return np.where(total > 0, shares / np.where(total > 0, total, 1), 1 / shares.shape[1])


def able_at_end(trace: LoadTrace, predictors: Sequence[Predictor]) -> list[Predictor]:
    """Those of *predictors* that the whole of *trace* is history enough for; raises `TooShortError` if none."""
    start, end = int(trace.steps[0]), int(trace.steps[-1])
    able = [made for made in predictors if has_history(made, start, end)]
    if not able:
        least = min(predictors, key=lambda made: made.needs)
        raise TooShortError(
            f"{trace.name} has {end - start + 1} steps and {least.name} needs {least.needs} to fit: "
            "record more steps, or use --predictor window_mean"
        )
    return able


def forecast_end(
    trace: LoadTrace,
    predictors: Sequence[Predictor],
    horizon: int,
    progress: Progress | None = None,
    *,
    scores: pd.DataFrame | None = None,
    train_on: Sequence[LoadTrace] = (),
) -> Iterator[Coming]:
    """Forecast the *horizon* steps after the end of *trace*, layer by layer.

    A predictor with too little history is left out. Raises `TooShortError` when all would be.
    The intervals are scaled by the misses in *scores*, where given.
    """
    able = able_at_end(trace, predictors)
    end = int(trace.steps[-1])
    tick = ticking(able, len(trace.layers), progress)
    pooled = pooled_fits(trace, able, [end], train_on, tick)
    for load in trace.by_layer():
        deviation = intervals.spread(load, horizon)
        for made in able:
            yield forecast_layer(load, made, pooled, horizon, deviation * _known_scale(scores, load, made, horizon))
        tick()


def forecast_layer(load: LayerLoad, made: Predictor, pooled: Pooled, horizon: int, deviation: Shares) -> Coming:
    """What *made* says of the *horizon* steps after the end of one layer."""
    end = int(load.steps[-1])
    (said,) = forecasts(load, made, pooled, {end: [horizon]})
    forecast = said.forecasts[horizon]
    return Coming(label(made), load.layer, end + 1, repaired(forecast), deviation, forecast.status)


def _known_scale(scores: pd.DataFrame | None, load: LayerLoad, made: Predictor, horizon: int) -> float:
    if scores is None or scores.empty:
        return 1.0
    mine = scores[
        (scores["layer"] == load.layer) & (scores["predictor"] == label(made)) & (scores["horizon"] == horizon)
    ]
    return intervals.scale(mine["squared_miss"].tolist())
