"""`moetrace predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moetrace.cli.options import Protocol, Shared, Traces
from moetrace.cli.output import Report, Table

if TYPE_CHECKING:
    import pandas as pd

    from moetrace.forecasting.backtest import Backtest
    from moetrace.trace import LoadTrace
    from moetrace.workspace.found import Found

SUMMARY_COLUMNS = (
    "predictor", "state", "error_rate", "error_noise", "expected_error", "difference", "difference_low",
    "difference_high", "step_error_rate", "step_noise", "scored", "cutoffs", "too_short", "fallbacks", "coverage_80",
    "coverage_95",
)  # fmt: skip


def predict(
    protocol: Protocol,
    shared: Shared,
    traces: Traces = None,
    horizon: Annotated[
        int | None, typer.Option(min=1, help="Steps to predict  [default: 1000, or a quarter of a short trace]")
    ] = None,
    list_predictors: Annotated[bool, typer.Option("--list-predictors", help="List the predictors and exit.")] = False,
) -> None:
    """Score forecasts of the load, and forecast the steps to come.

    At several steps of the trace, the cutoffs, each predictor forecasts the next steps (the horizon)
    from the steps up to the cutoff. Then the steps after the end of the trace are forecast. The error
    rate is the sum over experts of |predicted - actual| share of the total load of the horizon. On
    average, no forecast can have less error than the noise floor. Differences are from window_mean,
    the mean of the last 1,000 steps, over the same layers and cutoffs, with a 95% interval.

    Results are cached in the workspace: interrupted runs resume, and existing results are reused.

    \b
    Example: moetrace predict gpt-moe-8e-a --horizon 2000 --predictor sw_avg:window=300
    """
    from inspect import unwrap

    from moetrace.frames import stacked
    from moetrace.reporting.tables import records
    from moetrace.workspace.commands import predict as ask

    if list_predictors:
        _list_predictors(shared)
        return
    backtesting = protocol.backtesting(shared)

    def one(given: str, trace: LoadTrace, progress: Report) -> Found[Backtest]:
        folder = shared.folder().result_path("predict", given)
        found = unwrap(ask)(
            trace, horizon, folder=folder, note=shared.note, progress=progress, selection=shared.choice(),
            backtesting=backtesting,
        )  # fmt: skip
        shared.note_reused(trace.name, found.computed, found.reused)
        return found

    done = shared.each_trace(traces, "forecasts of", "results", one)
    frames = {name: stacked([found.frames[name] for found in done]) for name in done[0].frames}
    document = {
        "horizon": max(found.horizon for found in done),
        "scores": records(frames["scores"]),
        "summary": records(frames["summary"]),
        "forecasts": {found.trace: found.files[0] for found in done},
        "means": {found.trace: found.files[1] for found in done},
        "statuses": records(frames["statuses"]),
        "trained_on": backtesting.trained_on(shared.note),
    }
    if len(done) == 1:
        document["forecast"] = done[0].files[0]
    tables = score_tables(frames["summary"], frames["scores"])
    tables["means"] = Table("Mean of each expert, to come", frames["means"])
    wrote = sorted({str(Path(found.files[0]).parent) for found in done})
    screens = [found.screen(every=shared.all) for found in done]
    shared.emit(tables, document, screens, wrote=wrote, then=["place", *(traces or []), "--gpus", "N"])


def _list_predictors(shared: Shared) -> None:
    from moetrace.forecasting.predictors import GROUP, PREDICTORS, predictor
    from moetrace.settings import installed, setting_types

    rows = []
    for name in [*PREDICTORS, *installed(GROUP)]:
        own = predictor(name)
        what = (type(own).__doc__ or "").strip().partition("\n")[0]
        rows.append({"predictor": name, "settings": ", ".join(setting_types(own)), "forecast": what})
    shared.emit_known("predictors", rows)


def score_tables(summary: pd.DataFrame, scores: pd.DataFrame) -> dict[str, Table]:
    """The tables of a backtest."""
    return {
        "summary": Table("Error rates by predictor and state", summary, SUMMARY_COLUMNS, by=("trace", "horizon")),
        "scores": Table("Scores", scores),
    }
