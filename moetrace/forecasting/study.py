"""Everything about one trace: its states, the errors of forecasts, how well it can be known, its imbalance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetrace.analysis.about import findings_frame, traces_frame
from moetrace.analysis.tables import COURSES, states_tables
from moetrace.forecasting.backtest import Progress, Run, check_able, evaluate_all, in_turn
from moetrace.forecasting.evaluation import evaluation
from moetrace.forecasting.predictability import predictability_evaluations, predictability_frames
from moetrace.forecasting.predictors.base import Predictor
from moetrace.forecasting.results import Results
from moetrace.forecasting.summary import score_frames
from moetrace.trace import LoadTrace

if TYPE_CHECKING:
    import pandas as pd

# The paper's horizons.
HORIZONS = (1000, 2000)


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
    known = predictability_frames(test, *others)
    about = {"about": traces_frame([trace]), "findings": findings_frame(trace.name, trace.info.findings)}
    frames = about | states_tables(trace, COURSES)
    frames |= score_frames(test, seed) | known
    return Study(trace.name, frames, test.computed, test.reused)
