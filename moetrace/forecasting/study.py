"""Everything about one trace: its states, the errors of forecasts, how well it can be known, its imbalance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetrace.analysis.about import findings_frame, traces_frame
from moetrace.analysis.tables import COURSES, states_tables
from moetrace.forecasting.backtest import Backtest, Progress, Run, check_able, evaluate_all, in_turn
from moetrace.forecasting.evaluation import Evaluation, Results, evaluation
from moetrace.forecasting.predictors import label, predictor
from moetrace.forecasting.predictors.base import Predictor
from moetrace.forecasting.summary import score_frames
from moetrace.forecasting.windows import evaluation_windows
from moetrace.trace import LoadTrace
from moetrace.words import BASELINE, STABLE

if TYPE_CHECKING:
    import pandas as pd

# The paper's horizons.
HORIZONS = (1000, 2000)
# From what a batch is worth to twice the paper's longest.
COMPARED_HORIZONS = (10, 30, 100, 300, 1000, 2000, 4000)
# Lengths of history whose mean is the forecast.
HISTORIES = (100, 200, 500, 1000, 2000, 5000)
MEANS = {history: predictor(f"window_mean:window={history}") for history in HISTORIES}
# The horizon at which histories are compared, if the trace covers it.
HORIZON = 1000
# Forecasts whose errors are laid to the experts, the first of them that was scored.
PREFERRED = ("auto", "level", "sw_avg", BASELINE)
MOST_EXPERTS = 10
MEASURES = ["error_rate", "error_noise", "step_error_rate", "step_noise"]


@dataclass(frozen=True, eq=False)
class Study:
    """The *frames* that a report on the trace of that name is made from; *reused* results were cached."""

    trace: str
    frames: dict[str, pd.DataFrame]
    computed: int
    reused: int


def study(
    trace: LoadTrace,
    predictors: Sequence[Predictor],
    horizons: Sequence[int] = HORIZONS,
    cutoffs: Sequence[int] | None = None,
    progress: Progress | None = None,
    *,
    train_on: Sequence[LoadTrace] = (),
    seed: int = 0,
    results: Results | None = None,
    run: Run = in_turn,
) -> Study:
    """Everything `moetrace.write_report` shows of *trace*; the arguments are those of `evaluate`.

    Raises `TooShortError` when the trace is too short for every predictor.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> found = mt.study(trace, [mt.WindowMean()], horizons=[500])
    >>> found.frames["layers"]["state"].tolist()
    ['stable']
    """
    check_able(trace, predictors)
    asked = evaluation(trace, predictors, horizons, cutoffs, train_on=train_on)
    beyond = predictability_evaluations(trace, cutoffs)
    test, *others = evaluate_all([asked, *beyond], progress, results=results, run=run)
    frames = {"about": traces_frame([trace]), "findings": findings_frame(trace.name, trace.info.findings)}
    frames |= states_tables(trace, COURSES) | score_frames(test, seed) | predictability_frames(test, *others)
    return Study(trace.name, frames, test.computed, test.reused)


def predictability_evaluations(trace: LoadTrace, cutoffs: Sequence[int] | None = None) -> list[Evaluation]:
    """What has to be evaluated: `level` at `COMPARED_HORIZONS`, and the means of the last `HISTORIES` at `HORIZON`.

    Histories are compared at the cutoffs that have the longest of them before them.
    """
    start, windows = int(trace.steps[0]), evaluation_windows(trace, [HORIZON], cutoffs)
    longest = max((h for h in HISTORIES if any(cutoff - start + 1 >= h for cutoff in windows)), default=0)
    means = [MEANS[history] for history in HISTORIES if history <= longest]
    compared = {cutoff: horizons for cutoff, horizons in windows.items() if cutoff - start + 1 >= longest}
    return [
        evaluation(trace, [predictor("level")], COMPARED_HORIZONS, cutoffs, intervals=False),
        evaluation(trace, means, [HORIZON], compared, intervals=False),
    ]


def predictability_frames(test: Backtest, of_horizons: Backtest, of_histories: Backtest) -> dict[str, pd.DataFrame]:
    """The frames ``by_horizon``, ``by_history``, ``by_layer`` and ``worst_experts`` of a trace.

    *test* is its backtest, the others are those of `predictability_evaluations`: `level` at horizons from 10 to 4,000
    steps, and the mean of the last *history* steps at 1,000. ``by_layer`` is over all cutoffs in the stable state, by
    the preferred predictor; *noise_part* is the part of the step-by-step error that no forecast can remove.
    """
    lengths = {label(mean): history for history, mean in MEANS.items()}
    histories = of_histories.scores.assign(history=of_histories.scores["predictor"].map(lengths))
    preferred = _preferred(test.scores)
    stable = preferred[preferred["state"] == STABLE]
    return {
        "by_horizon": _means(of_horizons.scores, ["trace", "horizon", "state"]),
        "by_history": _means(histories, ["trace", "history", "state"]),
        "by_layer": _means(stable, ["trace", "predictor", "horizon", "layer"]),
        "worst_experts": worst_experts_frame(test.shares),
    }


def worst_experts_frame(shares: pd.DataFrame) -> pd.DataFrame:
    """The experts that cause most of the error: their mean share and error, and their part of the layer's error."""
    chosen = _preferred(shares)
    chosen = chosen[chosen["horizon"] == HORIZON] if (chosen["horizon"] == HORIZON).any() else chosen
    keys = ["trace", "predictor", "horizon", "layer"]
    apart = chosen.assign(error=(chosen["predicted"] - chosen["actual"]).abs())
    means = apart.groupby([*keys, "expert"], sort=False)[["actual", "error"]].mean().reset_index()
    means["part_of_error"] = means["error"] / means.groupby(keys)["error"].transform("sum")
    found = means.rename(columns={"actual": "share"})
    return found.nlargest(MOST_EXPERTS, "error") if len(found) else found


def _preferred(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first of `PREFERRED` that is there, or of the first predictor."""
    there = list(frame["predictor"].unique())
    chosen = next((name for name in (*PREFERRED, *there) if name in there), "")
    return frame[frame["predictor"] == chosen]


def _means(scores: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    known = scores.dropna(subset="error_rate")
    # The part that is noise is that of the scores whose noise is known.
    measured = known["step_error_rate"].where(known["step_noise"].notna())
    groups = known.assign(measured=measured).groupby(keys, sort=False)
    means = groups[[*MEASURES, "measured"]].mean().reset_index()
    means = means.assign(noise_part=means["step_noise"] / means["measured"], scored=groups.size().to_numpy())
    return means.drop(columns="measured").sort_values(keys, ignore_index=True, kind="stable")
