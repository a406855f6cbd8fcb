"""`moetrace predict`, and what it shares with `report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import typer

from moetrace.cli.shared import Shared, Table, with_options
from moetrace.forecasting.predictors import PREDICTORS

if TYPE_CHECKING:
    import pandas as pd

    from moetrace.forecasting.predictors.base import Predictor
    from moetrace.trace import LoadTrace
    from moetrace.workspace.work import Results, Source, Work

SUMMARY_COLUMNS = (
    "predictor", "state", "error_rate", "error_noise", "difference", "difference_low", "difference_high",
    "step_error_rate", "step_noise", "scored", "cutoffs", "too_short", "fallbacks", "coverage_80", "coverage_95",
)  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """How to backtest, and who does it: options of `predict` and `report`. Field by field, what the help says."""

    predictor: Annotated[
        list[str] | None,
        typer.Option(
            help=f"NAME or NAME:setting=value, repeatable; {', '.join(PREDICTORS)} if none.",
            metavar="SPEC",
        ),
    ] = None
    cutoffs: Annotated[str | None, typer.Option(help="Score at these cutoffs, such as 3000,4000.", metavar="STEPS")] = (
        None
    )
    first: Annotated[int, typer.Option(min=1, help="First cutoff.")] = 500
    every: Annotated[int, typer.Option(min=1, help="Distance of the cutoffs after it.")] = 1000
    train_on: Annotated[
        list[str] | None, typer.Option(metavar="TRACE", help="Another run for lstm to learn from; repeatable.")
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of predictors and of the bootstrap.")] = 0
    jobs: Annotated[int, typer.Option(min=1, help="Processes to share the layers among.")] = 1
    dask: Annotated[
        str | None,
        typer.Option(help="Spread the layers over the Dask cluster there, such as tcp://host:8786.", metavar="ADDRESS"),
    ] = None

    def predictors(self) -> list[Predictor]:
        """Those asked for, all of them if none are; a seeded one gets the seed."""
        from moetrace.forecasting.predictors import predictor

        return [predictor(spec, self.seed) for spec in (self.predictor or PREDICTORS)]

    def others(self, shared: Shared) -> list[Source]:
        """The runs to train on."""
        return [shared.source(name, whole=True) for name in self.train_on or []]

    def note_training(self, shared: Shared) -> None:
        """Say which runs were trained on, where a predictor did."""
        others = ", ".join(other.path.stem for other in self.others(shared))
        trained = [made.name for made in self.predictors() if made.pools_layers]
        if others and trained:
            shared.note(f"{', '.join(trained)} was trained on {others} and on nothing else")

    def looks(self, trace: LoadTrace) -> list[int]:
        """The cutoffs."""
        from moetrace.forecasting.windows import default_cutoffs

        return steps_of(self.cutoffs) if self.cutoffs else default_cutoffs(trace, self.first, self.every)


@with_options
def predict(
    protocol: Protocol,
    shared: Shared,
    traces: Annotated[list[str] | None, typer.Argument(help="Names or paths; all of the workspace if none.")] = None,
    horizon: Annotated[int, typer.Option(min=1, help="Steps to predict.")] = 1000,
) -> None:
    """Backtest the predictors at a horizon, and forecast the steps after the end of the trace.

    The error rate is the sum over experts of |predicted - actual| share of the load of the whole
    horizon; the noise beside it is what no forecast can remove. Differences are from window_mean,
    over the same layers and cutoffs, with a 95 % interval.

    Results are kept in the workspace as they are made: a run that was stopped goes on where it was,
    and what is there already is not computed again.

    \b
    Example: moetrace predict gpt-moe-8e-a --horizon 2000 --predictor sw_avg:window=300
    """
    from moetrace.analysis.tables import stacked
    from moetrace.forecasting.summary import means_frame, summary_frame
    from moetrace.report.tables import csv, records
    from moetrace.workspace.results import key_of, write_forecast
    from moetrace.workspace.traces import write_bytes

    others = protocol.others(shared)
    names = shared.place().chosen(traces or [])
    done = shared.each(names, lambda name: tested(shared, name, protocol, [horizon], ahead=True))
    path = shared.place().result_path("predict", f"forecast-{horizon}.parquet")
    key = key_of([(result.trace, result.predictor, result.key) for results in done for result in results.ahead()])
    write_forecast(path, chain.from_iterable(results.forecasts() for results in done), key)
    scores = stacked([results.scores for results in done])
    summary = summary_frame(scores, protocol.seed)
    means = means_frame(chain.from_iterable(results.forecasts() for results in done), horizon)
    beside = write_bytes(path.with_name(f"means-{horizon}.csv"), csv(means).encode())
    document = {"horizon": horizon, "scores": records(scores), "summary": records(summary), "forecast": str(path)}
    document |= {"means": str(beside), "trained_on": [other.path.stem for other in others]}
    shared.note(f"wrote {path}, and the mean of each expert with its intervals to {beside.name}")
    protocol.note_training(shared)
    said = [row for results in done for row in results.statuses()]
    tables = score_tables(summary, scores) | {"means": Table("Means", means, printed=False)}
    shared.emit(tables, document | {"forecasts": said})


def tested(shared: Shared, name: str, protocol: Protocol, horizons: list[int], *, ahead: bool) -> Results:
    """The results of one trace, computed or found; a note says which horizon could not be scored, and why."""
    from moetrace.forecasting.forecasts import able_at_end
    from moetrace.forecasting.windows import covered_horizons
    from moetrace.workspace.work import Work

    source, predictors = shared.source(name), protocol.predictors()
    trace = source.open()
    able_at_end(trace, predictors)
    cutoffs = protocol.looks(trace)
    _note_unscorable(shared, trace, horizons, cutoffs or [protocol.first])
    covered = covered_horizons(trace, horizons, cutoffs)
    return computed(shared, Work(source, predictors, horizons, covered, ahead, protocol.others(shared)), protocol)


def computed(shared: Shared, work: Work, protocol: Protocol) -> Results:
    """The results of some work, computed or found, under a progress bar."""
    from moetrace.workspace.tasks import compute

    name = work.trace.name
    with shared.progress(f"predictions of {name}") as progress:
        results = compute(work, shared.place().store, progress, jobs=protocol.jobs, dask=protocol.dask)
    if results.found:
        which = f"all {results.found}" if not results.made else f"{results.found} of {results.found + results.made}"
        shared.note(f"{name}: {which} results are there already")
    return results


def _note_unscorable(shared: Shared, trace: LoadTrace, horizons: Sequence[int], cutoffs: Sequence[int]) -> None:
    from moetrace.forecasting.windows import longest_scorable, scorable

    for horizon in horizons:
        if not scorable(trace, cutoffs, horizon):
            start = int(trace.steps[0])
            first = min((cutoff for cutoff in cutoffs if cutoff >= start), default=start)
            longest = longest_scorable(trace, first - start + 1)
            way_out = f"the longest that can be is {longest}" if longest else "it has too few steps for any"
            shared.note(f"{trace.name}: a horizon of {horizon} cannot be scored at these cutoffs; {way_out}")


def steps_of(text: str) -> list[int]:
    """Steps as an option has them, such as 3000,4000."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of steps such as 3000,4000") from None


def score_tables(summary: pd.DataFrame, scores: pd.DataFrame) -> dict[str, Table]:
    """The tables of a backtest."""
    return {
        "summary": Table("Error rates by predictor and state", summary, SUMMARY_COLUMNS, by=("trace", "horizon")),
        "scores": Table("Scores", scores, printed=False),
    }


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(predict)
