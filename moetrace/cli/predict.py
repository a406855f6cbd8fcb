"""`moetrace predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moetrace.cli.options import Command, Protocol, Shared, Traces, with_options
from moetrace.cli.output import Table
from moetrace.cli.progress import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from moetrace.forecasting.backtest import Backtest
    from moetrace.forecasting.layers import EndForecast
    from moetrace.trace import LoadTrace

SUMMARY_COLUMNS = (
    "predictor", "state", "error_rate", "error_noise", "expected_error", "difference", "difference_low",
    "difference_high", "step_error_rate", "step_noise", "scored", "cutoffs", "too_short", "fallbacks", "coverage_80",
    "coverage_95",
)  # fmt: skip


STATUS = ("trace", "predictor", "layer", "status", "expected_error")


@with_options
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

    Backtests the predictors at a horizon, and forecasts the steps after the end of the trace. The
    error rate is the sum over experts of |predicted - actual| share of the load of the whole
    horizon; no forecast can remove the noise beside it. Differences are from window_mean,
    over the same layers and cutoffs, with a 95% interval.

    Results are cached in the workspace: interrupted runs resume, and existing results are reused.

    \b
    Example: moetrace predict gpt-moe-8e-a --horizon 2000 --predictor sw_avg:window=300
    """
    import pandas as pd

    from moetrace.analysis.severity import health_frame
    from moetrace.files import write_bytes
    from moetrace.forecasting.backtest import evaluate
    from moetrace.forecasting.keys import key_of
    from moetrace.forecasting.summary import means_frame, summary_frame
    from moetrace.frames import stacked
    from moetrace.report.answers import alarm
    from moetrace.report.screens import Screen, predict_screen
    from moetrace.report.tables import csv, records
    from moetrace.workspace.results import writing_forecast

    if list_predictors:
        _list_predictors(shared)
        return
    predictors, settings = protocol.predictors(), protocol.settings(shared)
    files: dict[str, tuple[str, str]] = {}
    means: list[pd.DataFrame] = []
    balance: dict[str, pd.DataFrame] = {}
    statuses: list[dict[str, object]] = []
    horizons: dict[str, int] = {}

    def one(given: str, trace: LoadTrace, progress: Report) -> Backtest:
        asked, cutoffs = protocol.windows(trace, [horizon] if horizon else None, [1000], shared.note)
        over = horizons[trace.name] = asked[0]
        test = evaluate(trace, predictors, asked, cutoffs, progress, ahead=True, **settings)
        shared.note_reused(trace.name, test.computed, test.reused)
        path = shared.folder().result_path("predict", given, f"forecast-{over}.parquet")
        key = key_of([(result.trace, result.predictor, result.key) for result in test.evaluation.forecast_ahead])

        def noted() -> Iterator[EndForecast]:
            for ahead in writing_forecast(path, test.forecasts(), key):
                statuses.append({name: getattr(ahead, name) for name in STATUS})
                yield ahead

        means.append(means_frame(noted(), over))
        balance[trace.name] = health_frame(trace)
        beside = write_bytes(path.with_name(f"means-{over}.csv"), csv(means[-1]).encode())
        files[trace.name] = str(path), str(beside)
        return test

    done = shared.each_trace(traces, "forecasts of", "results", one)
    scores = stacked([test.scores for test in done])
    summary = summary_frame(scores, protocol.seed)
    known = pd.DataFrame(statuses, columns=list(STATUS))
    document = {
        "horizon": max(horizons.values()),
        "scores": records(scores),
        "summary": records(summary),
        "forecasts": {name: forecast for name, (forecast, _) in files.items()},
        "means": {name: beside for name, (_, beside) in files.items()},
        "statuses": records(known),
        "trained_on": protocol.trained_on(shared),
    }
    if len(files) == 1:
        document["forecast"] = next(iter(files.values()))[0]
    tables = score_tables(summary, scores) | {"means": Table("Mean of each expert, to come", stacked(means))}
    screens = [
        predict_screen(
            part, horizons[str(trace)], known[known["trace"] == trace], balance[str(trace)], every=shared.all
        )
        for trace, part in summary.groupby("trace", sort=False)
    ]
    unscored = [name for name in horizons if name not in set(summary["trace"])]
    screens += [Screen(f"{name}: {alarm(balance[name])}{_unscored(horizons[name])}") for name in unscored]
    wrote = sorted({str(Path(forecast).parent) for forecast, _ in files.values()})
    shared.emit(tables, document, screens, wrote=wrote, then=["place", *(traces or []), "--gpus", "N"])


def _unscored(horizon: int) -> str:
    from moetrace.report.phrases import count_of

    return f"Forecasts of the next {count_of(horizon, 'step')} are saved, but not scored: the trace is too short."


def _list_predictors(shared: Shared) -> None:
    from moetrace.forecasting.predictors import PREDICTORS, predictor
    from moetrace.settings import setting_types

    rows = []
    for name in PREDICTORS:
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


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(cls=Command)(predict)
