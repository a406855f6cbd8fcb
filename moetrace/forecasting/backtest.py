"""Cutoffs, fits, forecasts, scores: the one loop that drives every predictor.

At each cutoff a predictor is given the history up to it and nothing else; what it says about the
steps after it is compared with what then happened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetrace.analysis.states import state_at
from moetrace.analysis.tables import stacked
from moetrace.analysis.variogram import horizon_noise
from moetrace.forecasting import intervals
from moetrace.forecasting.fits import Pooled, pooled_fits
from moetrace.forecasting.forecasts import Progress, check_distinct, forecasts, repaired, ticking
from moetrace.forecasting.predictors import BASELINE, label, predictor
from moetrace.forecasting.predictors.base import Forecast, Predictor
from moetrace.forecasting.scoring import Errors, errors
from moetrace.forecasting.windows import Covered, covered_horizons
from moetrace.trace import Counts, LayerLoad, LoadTrace, Shares

if TYPE_CHECKING:
    import pandas as pd

TOO_SHORT = "too_short"


class Score(NamedTuple):
    """One forecast of one layer, scored over one horizon; the columns of the scores frame.

    Errors and noise are fractions as `metrics.Errors` and `noise` define them, NaN where the history
    was too short. *state* is the layer's as it could be told at the cutoff. *skill* is
    ``1 - error_rate / error_rate of window_mean`` at the same cutoff: 0 is no better than what
    serving systems do. *coverage_80* and *coverage_95* are the parts of the experts whose share lay
    inside their interval, *squared_miss* the squared error in the interval's own unit before it was
    scaled. *status* is ``ok``, ``too_short`` or the fallback that stood in.
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
    coverage_80: float
    coverage_95: float
    squared_miss: float
    status: str
    fit_seconds: float
    forecast_seconds: float


SHARE_COLUMNS = (
    "trace", "predictor", "layer", "horizon", "cutoff", "expert", "forecast", "predicted", "actual",
    "low_80", "high_80", "low_95", "high_95",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Backtest:
    """*scores*: one row per `Score`; *shares*: predicted and actual share of each expert over each horizon.

    The columns of *shares* are `SHARE_COLUMNS`; the intervals are those of the predicted share.
    """

    scores: pd.DataFrame
    shares: pd.DataFrame


def evaluate(
    trace: LoadTrace,
    predictors: Sequence[Predictor],
    horizons: Sequence[int],
    cutoffs: Sequence[int] | None = None,
    progress: Progress | None = None,
    *,
    train_on: Sequence[LoadTrace] = (),
) -> Backtest:
    """Score *predictors* at every one of *cutoffs* and *horizons* that the trace covers.

    One forecast to the longest horizon is made at a cutoff; the shorter ones are its beginnings,
    except for a predictor that forecasts each horizon by itself. Both frames are empty where the
    trace is too short for every horizon. Predictors with one fit for all layers learn from the runs
    *train_on* instead of from the history, where given.
    Raises `SettingError` for a horizon that is not positive or a predictor given twice.
    """
    covered = covered_horizons(trace, horizons, cutoffs)
    check_distinct(predictors)
    tick = ticking(predictors, len(trace.layers), progress)
    pooled = pooled_fits(trace, predictors, list(covered), train_on, tick)
    parts = []
    for load in trace.by_layer():
        facts = Facts.of(load, covered)
        parts += [score_layer(facts, made, pooled) for made in predictors]
        tick()
    return joined(parts)


def joined(parts: Sequence[Backtest]) -> Backtest:
    """The scores and shares of many layers and predictors as one."""
    return Backtest(
        stacked([part.scores for part in parts], Score._fields), stacked([part.shares for part in parts], SHARE_COLUMNS)
    )


# --- one layer --------------------------------------------------------------------------------

Cell = tuple[int, int]
"""A cutoff and a horizon."""


@dataclass(frozen=True, eq=False)
class Facts:
    """What the scores of a layer have in common, whatever the predictor, by cutoff or by `Cell`."""

    load: LayerLoad
    covered: Covered
    states: Mapping[int, str]
    noise: Mapping[Cell, tuple[float, float]]
    spread: Mapping[Cell, Shares]
    window_mean: Mapping[Cell, float]

    @classmethod
    def of(cls, load: LayerLoad, covered: Covered) -> Facts:
        """The facts of a layer at the cutoffs and horizons that are *covered*."""
        _once = load.shares  # for every history that is cut from the layer
        cells = [(cutoff, horizon) for cutoff, horizons in covered.items() for horizon in horizons]
        baseline = {cutoff: said for cutoff, said, *_ in forecasts(load, predictor(BASELINE), {}, covered)}
        return cls(
            load,
            covered,
            {cutoff: state_at(load, cutoff) for cutoff in covered},
            {cell: horizon_noise(load, *cell) for cell in cells},
            {(cutoff, horizon): intervals.spread(load.until(cutoff), horizon) for cutoff, horizon in cells},
            {(c, h): errors(*matched(load, repaired(baseline[c][h]), c, h)).error_rate for c, h in cells},
        )


def score_layer(facts: Facts, made: Predictor, pooled: Pooled) -> Backtest:
    """Every score of one predictor on one layer, and the shares it was computed from."""
    import pandas as pd

    scores: list[Score] = []
    shares: list[pd.DataFrame] = []
    misses: dict[Cell, float] = {}
    for said in forecasts(facts.load, made, pooled, facts.covered):
        cutoff = said.cutoff
        for horizon in facts.covered[cutoff]:
            forecast = said.forecasts.get(horizon)
            earlier = [miss for (c, h), miss in misses.items() if h == horizon and c + h <= cutoff]
            found, experts = _scored(facts, forecast, (cutoff, horizon), intervals.scale(earlier))
            misses[cutoff, horizon] = found["squared_miss"]
            status = TOO_SHORT if forecast is None else forecast.status
            key = (facts.load.trace, label(made), facts.load.layer, horizon, cutoff)
            values: dict[str, Any] = dict(zip(Score._fields, (*key, facts.states[cutoff]))) | found
            seconds: dict[str, Any] = {"fit_seconds": said.fit_seconds, "forecast_seconds": said.forecast_seconds}
            scores.append(Score(**values, **seconds, status=status))
            if experts is not None:
                shares.append(pd.DataFrame({**dict(zip(SHARE_COLUMNS, key)), **experts}))
    return Backtest(pd.DataFrame(scores, columns=Score._fields), stacked(shares, SHARE_COLUMNS))


def _scored(
    facts: Facts, forecast: Forecast | None, cell: Cell, scale: float
) -> tuple[dict[str, Any], dict[str, Shares] | None]:
    """The measured fields of a `Score`, and the shares of the experts, None where there is no forecast."""
    step_noise, error_noise = facts.noise[cell]
    reference = facts.window_mean[cell]
    known = {"error_noise": error_noise, "step_noise": step_noise, "window_mean_error_rate": reference}
    if forecast is None:
        return known | _NOTHING._asdict() | dict.fromkeys(("skill", "squared_miss", *COVERAGE), float("nan")), None
    predicted, counts = matched(facts.load, repaired(forecast), *cell)
    found = errors(predicted, counts)
    experts = _shares(predicted, counts, facts.spread[cell] * scale)
    held = {name: float(_inside(experts, name.removeprefix("coverage_")).mean()) for name in COVERAGE}
    miss = intervals.squared_miss(experts["predicted"], experts["actual"], facts.spread[cell])
    skill = 1 - found.error_rate / reference if reference > 0 else float("nan")
    return known | found._asdict() | held | {"skill": skill, "squared_miss": miss}, experts


COVERAGE = ("coverage_80", "coverage_95")
_NOTHING = Errors(float("nan"), float("nan"), float("nan"), 0, float("nan"))


def _shares(forecast: Shares, counts: Counts, deviation: Shares) -> dict[str, Shares]:
    """Predicted and actual share of the load of the horizon, with intervals, each of shape (experts,).

    *forecast* is the mean over the steps, which is known at the cutoff; *predicted* weighs each step by
    the tokens that then came, as *actual* does.
    """
    totals = counts.sum(axis=1)
    predicted, actual = totals @ forecast / totals.sum(), counts.sum(axis=0) / totals.sum()
    ends = intervals.bounds(predicted, deviation)
    known = {"expert": np.arange(len(actual)), "forecast": forecast.mean(axis=0)}
    return known | {"predicted": predicted, "actual": actual, **ends}


def _inside(experts: Mapping[str, Shares], percent: str) -> NDArray[np.bool_]:
    return (experts[f"low_{percent}"] <= experts["actual"]) & (experts["actual"] <= experts[f"high_{percent}"])


def matched(load: LayerLoad, shares: Shares, cutoff: int, horizon: int) -> tuple[Shares, Counts]:
    """Forecast and counts of the steps that were logged, both (rows, experts)."""
    actual = load.after(cutoff, horizon)
    return shares[actual.steps - cutoff - 1], actual.counts
