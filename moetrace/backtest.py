"""Cutoffs, fits, forecasts, scores: the one loop that drives every predictor.

At each cutoff a predictor is given the history up to it and nothing else; what it says about the
steps after it is compared with what then happened.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moetrace.errors import SettingError, TooShortError
from moetrace.metrics import Errors, errors
from moetrace.noise import horizon_noise
from moetrace.predictors import BASELINE, label, predictor
from moetrace.predictors.base import Fitted, Forecast, Predictor
from moetrace.states import state_at
from moetrace.trace import LayerLoad, LoadTrace, Shares

if TYPE_CHECKING:
    import pandas as pd

TOO_SHORT = "too_short"
# The first look is early, inside the transient state; then the paper's distance of 1,000 steps.
FIRST_CUTOFF = 500
CUTOFF_EVERY = 1000

Progress = Callable[[int, int], None]
"""Called with the pieces of work done, and of all: a fit that serves all layers is one, a layer is one."""


class Score(NamedTuple):
    """One forecast of one layer, scored over one horizon; the columns of the scores frame.

    Errors and noise are fractions as `metrics.Errors` and `noise` define them, NaN where the history
    was too short. *state* is the layer's as it could be told at the cutoff. *skill* is
    ``1 - error_rate / error_rate of window_mean`` at the same cutoff: 0 is no better than what
    serving systems do. *status* is ``ok``, ``too_short`` or the fallback that stood in.
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
    status: str
    fit_seconds: float
    forecast_seconds: float


class HorizonShare(NamedTuple):
    """Predicted and actual share of one expert over one horizon; the columns of the shares frame."""

    trace: str
    predictor: str
    layer: int
    horizon: int
    cutoff: int
    expert: int
    predicted: float
    actual: float


@dataclass(frozen=True, eq=False)
class Backtest:
    """*scores*: one row per `Score`; *shares*: one row per `HorizonShare`."""

    scores: pd.DataFrame
    shares: pd.DataFrame


class Coming(NamedTuple):
    """The forecast of the steps after the end of a trace; *shares* is (horizon, experts), repaired."""

    predictor: str
    layer: int
    first_step: int
    shares: Shares
    status: str


def default_cutoffs(trace: LoadTrace, first: int = FIRST_CUTOFF, every: int = CUTOFF_EVERY) -> list[int]:
    """*first*, then every multiple of *every* after it, up to the end of the trace.

    Counted from the last multiple of *every* at or before the first step, so that a trace that
    begins at step 100,000 is treated as one that begins at 0.
    """
    start, end = int(trace.steps[0]), int(trace.steps[-1])
    origin = start - start % every
    later = range(origin + every * (first // every + 1), end + 1, every)
    return [cutoff for cutoff in [origin + first, *later] if start <= cutoff <= end]


def scorable(trace: LoadTrace, cutoffs: Sequence[int], horizon: int) -> list[int]:
    """The *cutoffs* inside the trace after which *horizon* steps were recorded."""
    end = int(trace.steps[-1]) + trace.stride - 1
    return [cutoff for cutoff in cutoffs if trace.steps[0] <= cutoff and cutoff + horizon <= end]


def longest_scorable(trace: LoadTrace, first: int = FIRST_CUTOFF) -> int:
    """The longest horizon for which there is a cutoff with *first* steps of history before it."""
    return max(0, int(trace.steps[-1] - trace.steps[0]) + 1 - first)


# --- forecasts --------------------------------------------------------------------------------


def repaired(forecast: Forecast) -> Shares:
    """The shares clipped at 0 and scaled to sum to 1; equal shares where nothing is left."""
    shares = np.clip(np.nan_to_num(forecast.shares), 0, None)
    total = shares.sum(axis=1, keepdims=True)
    return np.where(total > 0, shares / np.where(total > 0, total, 1), 1 / shares.shape[1])


def has_history(made: Predictor, start: int, cutoff: int) -> bool:
    """Whether the steps from *start* to *cutoff* are as many as the predictor needs."""
    return cutoff - start + 1 >= made.needs


class _Fits:
    """What one predictor learned at each cutoff, fitted anew only when its history has grown enough."""

    def __init__(self, made: Predictor, start: int) -> None:
        self._made = made
        self._start = start
        self._at: int | None = None
        self._fitted: Fitted | None = None

    def at(self, cutoff: int, histories: Callable[[], Sequence[LayerLoad]]) -> tuple[Fitted, float]:
        """What to forecast with at *cutoff* (later than all before), and the seconds it took."""
        began = time.perf_counter()
        if self._fitted is None or self._grown(cutoff):
            self._fitted, self._at = self._made.fit(histories()), cutoff
        return self._fitted, time.perf_counter() - began

    def _grown(self, cutoff: int) -> bool:
        assert self._at is not None
        return cutoff - self._start + 1 >= self._made.refit_growth * (self._at - self._start + 1)


Pooled = Mapping[tuple[str, int], tuple[Fitted, float]]


def _ticking(
    trace: LoadTrace, predictors: Sequence[Predictor], cutoffs: Sequence[int], progress: Progress | None
) -> Callable[[], None]:
    """What to call when a piece of the work on *trace* is done."""
    total = len(cutoffs) * sum(made.pools_layers for made in predictors) + len(trace.layers)
    done = itertools.count(1)
    return lambda: progress(next(done), total) if progress is not None else None


def _pooled_fits(
    trace: LoadTrace, predictors: Sequence[Predictor], cutoffs: Sequence[int], tick: Callable[[], None]
) -> Pooled:
    """The fits that serve all layers, by predictor and cutoff."""
    start = int(trace.steps[0])
    fits = {}
    for made in (made for made in predictors if made.pools_layers):
        own = _Fits(made, start)
        for cutoff in cutoffs:
            if has_history(made, start, cutoff):
                fitted, seconds = own.at(cutoff, lambda c=cutoff: [load.until(c) for load in trace.by_layer()])  # type: ignore[misc]
                fits[label(made), cutoff] = fitted, seconds / len(trace.layers)
            tick()
    return fits


class _Said(NamedTuple):
    """What a predictor said at a *cutoff*: forecasts by horizon, none where the history is too short."""

    cutoff: int
    forecasts: Mapping[int, Forecast]
    fit_seconds: float = 0.0
    forecast_seconds: float = 0.0


def _forecasts(
    load: LayerLoad, made: Predictor, pooled: Pooled, covered: Mapping[int, Sequence[int]]
) -> Iterator[_Said]:
    """What *made* says of a layer at each cutoff, for the horizons *covered* by the trace there."""
    start = int(load.steps[0])
    own = _Fits(made, start)
    for cutoff, horizons in covered.items():
        if not has_history(made, start, cutoff):
            yield _Said(cutoff, {})
            continue
        history = load.until(cutoff)
        fitted, fit_seconds = (
            pooled[label(made), cutoff] if made.pools_layers else own.at(cutoff, lambda h=history: [h])  # type: ignore[misc]
        )
        began = time.perf_counter()
        if made.by_horizon:
            said = {horizon: fitted.forecast(history, horizon) for horizon in horizons}
        else:
            longest = fitted.forecast(history, max(horizons))
            said = {horizon: Forecast(longest.shares[:horizon], longest.status) for horizon in horizons}
        yield _Said(cutoff, said, fit_seconds, time.perf_counter() - began)


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
    trace: LoadTrace, predictors: Sequence[Predictor], horizon: int, progress: Progress | None = None
) -> Iterator[Coming]:
    """Forecast the *horizon* steps after the end of *trace*, layer by layer.

    A predictor with too little history is left out. Raises `TooShortError` when all would be.
    """
    able = able_at_end(trace, predictors)
    end = int(trace.steps[-1])
    tick = _ticking(trace, able, [end], progress)
    pooled = _pooled_fits(trace, able, [end], tick)
    for load in trace.by_layer():
        for made in able:
            for said in _forecasts(load, made, pooled, {end: [horizon]}):
                forecast = said.forecasts[horizon]
                yield Coming(label(made), load.layer, end + 1, repaired(forecast), forecast.status)
        tick()


# --- scores -----------------------------------------------------------------------------------


def evaluate(
    trace: LoadTrace,
    predictors: Sequence[Predictor],
    horizons: Sequence[int],
    cutoffs: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Backtest:
    """Score *predictors* at every one of *cutoffs* and *horizons* that the trace covers.

    One forecast to the longest horizon is made at a cutoff; the shorter ones are its beginnings,
    except for a predictor that forecasts each horizon by itself.
    Both frames are empty where the trace is too short for every horizon.
    Raises `SettingError` for a horizon that is not positive or a predictor given twice.
    """
    import pandas as pd

    names = [label(made) for made in predictors]
    if len(set(names)) != len(names):
        raise SettingError(f"predictor {next(n for n in names if names.count(n) > 1)} is given twice")
    if not horizons or min(horizons) < 1:
        raise SettingError("a horizon is a whole number of steps above 0")
    wanted = sorted(set(default_cutoffs(trace) if cutoffs is None else cutoffs))
    scored = {horizon: scorable(trace, wanted, horizon) for horizon in sorted(set(horizons))}
    at = sorted(set().union(*scored.values()))
    covered = {cutoff: [horizon for horizon, known in scored.items() if cutoff in known] for cutoff in at}
    tick = _ticking(trace, predictors, at, progress)
    pooled = _pooled_fits(trace, predictors, at, tick)
    scores: list[Score] = []
    shares: list[HorizonShare] = []
    for load in trace.by_layer():
        for part in _score_layer(load, predictors, pooled, covered):
            scores.append(part[0])
            shares.extend(part[1])
        tick()
    return Backtest(pd.DataFrame(scores, columns=Score._fields), pd.DataFrame(shares, columns=HorizonShare._fields))


def _score_layer(
    load: LayerLoad,
    predictors: Sequence[Predictor],
    pooled: Pooled,
    covered: Mapping[int, Sequence[int]],
) -> Iterator[tuple[Score, list[HorizonShare]]]:
    """Every score of one layer, and the shares it was computed from."""
    if not covered:
        return
    states = {cutoff: state_at(load, cutoff) for cutoff in covered}
    cells = [(cutoff, horizon) for cutoff, horizons in covered.items() for horizon in horizons]
    noise = {(cutoff, horizon): horizon_noise(load, cutoff, horizon) for cutoff, horizon in cells}
    baseline = {cell: _errors(load, forecast, *cell) for cell, forecast in _baseline(load, cells).items()}
    for made in predictors:
        for cutoff, said, fit_seconds, seconds in _forecasts(load, made, pooled, covered):
            for horizon in covered[cutoff]:
                forecast = said.get(horizon)
                shares = None if forecast is None else repaired(forecast)
                found = _NOTHING if shares is None else _errors(load, shares, cutoff, horizon)
                step_noise, error_noise = noise[cutoff, horizon]
                reference = baseline[cutoff, horizon].error_rate
                score = Score(
                    trace=load.trace,
                    predictor=label(made),
                    layer=load.layer,
                    horizon=horizon,
                    cutoff=cutoff,
                    state=states[cutoff],
                    error_noise=error_noise,
                    step_noise=step_noise,
                    window_mean_error_rate=reference,
                    skill=1 - found.error_rate / reference if reference > 0 else float("nan"),
                    status=TOO_SHORT if forecast is None else forecast.status,
                    fit_seconds=fit_seconds,
                    forecast_seconds=seconds,
                    **found._asdict(),
                )
                yield score, [] if shares is None else _horizon_shares(load, score, shares)


_NOTHING = Errors(float("nan"), float("nan"), float("nan"), 0, float("nan"))


def _baseline(load: LayerLoad, cells: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Shares]:
    made = predictor(BASELINE)
    longest = max(horizon for _, horizon in cells)
    at = {
        cutoff: repaired(made.fit([]).forecast(load.until(cutoff), longest))
        for cutoff in {cutoff for cutoff, _ in cells}
    }
    return {cell: at[cell[0]] for cell in cells}


def _matched(load: LayerLoad, shares: Shares, cutoff: int, horizon: int) -> tuple[Shares, Any]:
    """Forecast and counts of the steps that were logged, both (rows, experts)."""
    actual = load.after(cutoff, horizon)
    return shares[actual.steps - cutoff - 1], actual.counts


def _errors(load: LayerLoad, shares: Shares, cutoff: int, horizon: int) -> Errors:
    return errors(*_matched(load, shares, cutoff, horizon))


def _horizon_shares(load: LayerLoad, score: Score, shares: Shares) -> list[HorizonShare]:
    forecast, counts = _matched(load, shares, score.cutoff, score.horizon)
    totals = counts.sum(axis=1)
    predicted = totals @ forecast / totals.sum()
    actual = counts.sum(axis=0) / totals.sum()
    key = (score.trace, score.predictor, score.layer, score.horizon, score.cutoff)
    return [HorizonShare(*key, e, float(q), float(p)) for e, (q, p) in enumerate(zip(predicted, actual))]
