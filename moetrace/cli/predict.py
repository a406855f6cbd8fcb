"""`moetrace predict`, and the options it shares with `report` and `place`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetrace.cli.options import PROTOCOL, Command, with_options
from moetrace.cli.output import Table
from moetrace.cli.progress import Report
from moetrace.cli.shared import Shared, steps_of
from moetrace.errors import SettingError
from moetrace.forecasting.predictors import PREDICTORS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import pandas as pd

    from moetrace.forecasting.backtest import Backtest
    from moetrace.forecasting.layers import EndForecast
    from moetrace.forecasting.predictors.base import Predictor
    from moetrace.trace import LoadTrace

SUMMARY_COLUMNS = (
    "predictor", "state", "error_rate", "error_noise", "expected_error", "difference", "difference_low",
    "difference_high", "step_error_rate", "step_noise", "scored", "cutoffs", "too_short", "fallbacks", "coverage_80",
    "coverage_95",
)  # fmt: skip


STATUS = ("trace", "predictor", "layer", "status", "expected_error")


@dataclass(frozen=True)
class Protocol:
    """How to backtest, and who does it: options of `predict` and `report`. Field by field, what the help says."""

    predictor: Annotated[
        list[str] | None,
        typer.Option(
            help=f"NAME or NAME:setting=value, repeatable; {', '.join(PREDICTORS)} if none.",
            metavar="SPEC",
            rich_help_panel=PROTOCOL,
        ),
    ] = None
    cutoffs: Annotated[
        str | None,
        typer.Option(help="Score at these cutoffs, such as 3000,4000.", metavar="STEPS", rich_help_panel=PROTOCOL),
    ] = None
    first: Annotated[int, typer.Option(min=1, help="First cutoff.", rich_help_panel=PROTOCOL)] = 500
    every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps between cutoffs after it; if not given 1,000, or more where that would be over 50 cutoffs.",
            rich_help_panel=PROTOCOL,
        ),
    ] = None
    train_on: Annotated[
        list[str] | None,
        typer.Option(metavar="TRACE", help="Another run for lstm to learn from, repeatable.", rich_help_panel=PROTOCOL),
    ] = None
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of predictors and of the bootstrap.", rich_help_panel=PROTOCOL)
    ] = 0
    jobs: Annotated[int, typer.Option(min=1, help="Processes to share the layers among.", rich_help_panel=PROTOCOL)] = 1
    dask: Annotated[
        str | None,
        typer.Option(
            help="Use the Dask cluster there, such as tcp://host:8786.", metavar="ADDRESS", rich_help_panel=PROTOCOL
        ),
    ] = None

    def predictors(self) -> list[Predictor]:
        """Those asked for, all of them if none are; a seeded one gets the seed."""
        from moetrace.forecasting.predictors import predictor

        return [predictor(spec, self.seed) for spec in (self.predictor or PREDICTORS)]

    def looks(
        self,
        trace: LoadTrace,
        horizons: Sequence[int],
        note: Callable[[str], None] | None = None,
        *,
        explicit: bool = True,
    ) -> list[int]:
        """The cutoffs; raises `SettingError` where an *explicit* horizon or cutoff cannot be scored.

        *note* is told where they are further apart than usual, and where none of *horizons* can be scored.
        """
        from moetrace.forecasting.windows import checked_cutoffs, cutoffs_apart, default_cutoffs, thinned

        asked = steps_of(self.cutoffs) if self.cutoffs else None
        default = default_cutoffs(trace, self.first, self.every) or [self.first]
        found = asked or default
        try:
            checked_cutoffs(trace, horizons, found, explicit=asked is not None)
        except SettingError as error:
            if asked is not None or explicit or note is None:
                raise
            note(f"{error} (--horizons)")
        if note is not None and not (asked or self.every) and thinned(trace):
            note(f"{trace.name}: cutoffs {cutoffs_apart(trace):,} steps apart, for its length (--every sets it)")
        return found

    def settings(self, shared: Shared) -> dict[str, Any]:
        """What `evaluate` and everything built on it wants to know besides trace, predictors, horizons and cutoffs."""
        from moetrace.workspace.tasks import runner

        workspace = shared.folder()
        return {
            "train_on": [workspace.open(name) for name in self.train_on or []],
            "results": workspace.results(shared.note),
            "run": runner(self.jobs, self.dask),
        }

    def trained_on(self, shared: Shared) -> list[str]:
        """The names of the runs to train on; a note says which predictors were."""
        others = [shared.folder().path_of(name).stem for name in self.train_on or []]
        trained = [predictor.name for predictor in self.predictors() if predictor.pools_layers]
        if others and trained:
            shared.note(f"{', '.join(trained)} was trained on {', '.join(others)} and on nothing else")
        return others


@with_options
def predict(
    protocol: Protocol,
    shared: Shared,
    traces: Annotated[list[str] | None, typer.Argument(help="Names or paths; all of the workspace if none.")] = None,
    horizon: Annotated[int, typer.Option(min=1, help="Steps to predict.")] = 1000,
) -> None:
    """Score forecasts of the load, and forecast what comes next.

    Backtests the predictors at a horizon, and forecasts the steps after the end of the trace. The
    error rate is the sum over experts of |predicted - actual| share of the load of the whole
    horizon; the noise beside it is what no forecast can remove. Differences are from window_mean,
    over the same layers and cutoffs, with a 95% interval.

    Results are kept in the workspace as they are made: a run that was stopped goes on where it was,
    and what is there already is not computed again.

    \b
    Example: moetrace predict gpt-moe-8e-a --horizon 2000 --predictor sw_avg:window=300
    """
    import pandas as pd

    from moetrace.files import write_bytes
    from moetrace.forecasting.backtest import evaluate
    from moetrace.forecasting.summary import means_frame, summary_frame
    from moetrace.frames import stacked
    from moetrace.report.screens import predict_screen
    from moetrace.report.tables import csv, records

    predictors, settings = protocol.predictors(), protocol.settings(shared)
    files: dict[str, tuple[str, str]] = {}
    means: list[pd.DataFrame] = []
    statuses: list[dict[str, object]] = []

    def one(given: str, trace: LoadTrace, progress: Report) -> Backtest:
        cutoffs = protocol.looks(trace, [horizon], shared.note)
        test = evaluate(trace, predictors, [horizon], cutoffs, progress, ahead=True, **settings)
        shared.note_reused(trace.name, test.computed, test.reused)
        path, forecasts = _written(shared, given, test, horizon)
        means.append(means_frame(_noted(forecasts, statuses), horizon))
        beside = write_bytes(path.with_name(f"means-{horizon}.csv"), csv(means[-1]).encode())
        files[trace.name] = str(path), str(beside)
        return test

    done = shared.each_trace(traces, "forecasts of", "results", one)
    scores = stacked([test.scores for test in done])
    summary = summary_frame(scores, protocol.seed)
    told = pd.DataFrame(statuses, columns=list(STATUS))
    document = {
        "horizon": horizon,
        "scores": records(scores),
        "summary": records(summary),
        "forecasts": {name: forecast for name, (forecast, _) in files.items()},
        "means": {name: beside for name, (_, beside) in files.items()},
        "statuses": records(told),
        "trained_on": protocol.trained_on(shared),
    }
    if len(files) == 1:
        document["forecast"] = next(iter(files.values()))[0]
    tables = score_tables(summary, scores) | {"means": Table("Mean of each expert, to come", stacked(means))}
    screens = [
        predict_screen(part, horizon, told[told["trace"] == trace], every=shared.all)
        for trace, part in summary.groupby("trace", sort=False)
    ]
    wrote = sorted({str(Path(forecast).parent) for forecast, _ in files.values()})
    shared.emit(tables, document, screens, wrote=wrote, then=["place", *(traces or []), "--gpus", "N"])


def _written(shared: Shared, given: str, test: Backtest, horizon: int) -> tuple[Path, Iterator[EndForecast]]:
    """The forecasts of the steps after the end, and the file that they are written to as they pass."""
    from moetrace.forecasting.keys import key_of
    from moetrace.workspace.results import writing_forecast

    path = shared.folder().result_path("predict", given, f"forecast-{horizon}.parquet")
    key = key_of([(result.trace, result.predictor, result.key) for result in test.evaluation.forecast_ahead])
    return path, writing_forecast(path, test.forecasts(), key)


def _noted(forecasts: Iterable[EndForecast], statuses: list[dict[str, object]]) -> Iterator[EndForecast]:
    """The same *forecasts*; what is said of each goes to *statuses* as they pass."""
    for ahead in forecasts:
        statuses.append({name: getattr(ahead, name) for name in STATUS})
        yield ahead


def score_tables(summary: pd.DataFrame, scores: pd.DataFrame) -> dict[str, Table]:
    """The tables of a backtest."""
    return {
        "summary": Table("Error rates by predictor and state", summary, SUMMARY_COLUMNS, by=("trace", "horizon")),
        "scores": Table("Scores", scores),
    }


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(cls=Command)(predict)
