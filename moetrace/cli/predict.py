"""`moetrace predict`, and what it shares with `report`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from moetrace.cli.shared import Shared, Table, with_shared
from moetrace.predictors import PREDICTORS

if TYPE_CHECKING:
    import pandas as pd

    from moetrace.backtest import Backtest
    from moetrace.forecasts import Coming
    from moetrace.predictors.base import Predictor
    from moetrace.trace import LoadTrace

Predictors = Annotated[
    list[str] | None,
    typer.Option(
        "--predictor",
        help=f"NAME or NAME:setting=value, repeatable; {', '.join(PREDICTORS)} if none.",
        metavar="SPEC",
    ),
]
Cutoffs = Annotated[str | None, typer.Option(help="Score at these cutoffs, such as 3000,4000.", metavar="STEPS")]
First = Annotated[int, typer.Option(min=1, help="First cutoff.")]
Every = Annotated[int, typer.Option(min=1, help="Distance of the cutoffs after it.")]
TrainOn = Annotated[
    list[str] | None,
    typer.Option("--train-on", metavar="TRACE", help="Another run for lstm to learn from; repeatable."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of predictors and of the bootstrap.")]

SUMMARY_COLUMNS = (
    "predictor", "state", "error_rate", "error_noise", "difference", "difference_low", "difference_high",
    "step_error_rate", "step_noise", "scored", "cutoffs", "too_short", "fallbacks", "coverage_80", "coverage_95",
)  # fmt: skip


class Protocol(NamedTuple):
    """How to backtest, as asked for on the command line."""

    predictors: list[Predictor]
    horizons: list[int]
    cutoffs: str | None
    first: int
    every: int
    train_on: list[LoadTrace]


class Tested(NamedTuple):
    """A trace and its scores."""

    trace: LoadTrace
    test: Backtest


@with_shared
def predict(
    shared: Shared,
    traces: Annotated[list[str] | None, typer.Argument(help="Names or paths; all of the workspace if none.")] = None,
    horizon: Annotated[int, typer.Option(min=1, help="Steps to predict.")] = 1000,
    predictor: Predictors = None,
    cutoffs: Cutoffs = None,
    first: First = 500,
    every: Every = 1000,
    train_on: TrainOn = None,
    seed: Seed = 0,
) -> None:
    """Backtest the predictors at a horizon, and forecast the steps after the end of the trace.

    The error rate is the sum over experts of |predicted - actual| share of the load of the whole
    horizon; the noise beside it is what no forecast can remove. Differences are from window_mean,
    over the same layers and cutoffs, with a 95 % interval.

    \b
    Example: moetrace predict gpt-moe-8e-a --horizon 2000 --predictor sw_avg:window=300
    """
    from moetrace.frames import stacked, summary_frame
    from moetrace.report.tables import records
    from moetrace.workspace import write_forecast

    others = [shared.place().open(name) for name in train_on or []]
    protocol = Protocol(chosen_predictors(predictor, seed), [horizon], cutoffs, first, every, others)
    done = shared.each(shared.place().chosen(traces or []), lambda name: tested(shared, name, protocol))
    path = shared.place().result_path("predict", f"forecast-{horizon}.parquet")
    forecasts: list[dict[str, object]] = []
    write_forecast(path, _forecasts(shared, done, protocol, forecasts))
    scores = stacked([item.test.scores for item in done])
    summary = summary_frame(scores, seed)
    document = {"horizon": horizon, "scores": records(scores), "summary": records(summary), "forecast": str(path)}
    shared.note(f"wrote {path}")
    shared.emit(score_tables(summary, scores), document | {"forecasts": forecasts})


def chosen_predictors(specs: Sequence[str] | None, seed: int) -> list[Predictor]:
    """The predictors named by *specs*, all of them if none are; a seeded one gets *seed*."""
    from moetrace.predictors import predictor

    return [predictor(spec, seed) for spec in (specs or PREDICTORS)]


def tested(shared: Shared, name: str, protocol: Protocol) -> Tested:
    """The backtest of one trace; a note says which horizon could not be scored, and why."""
    from moetrace.backtest import evaluate
    from moetrace.cutoffs import default_cutoffs, longest_scorable, scorable
    from moetrace.forecasts import able_at_end

    trace = shared.open(name)
    able_at_end(trace, protocol.predictors)
    at = _cutoffs(protocol.cutoffs) or default_cutoffs(trace, protocol.first, protocol.every)
    for horizon in protocol.horizons:
        if not scorable(trace, at, horizon):
            longest = longest_scorable(trace, at[0] if at else protocol.first)
            way_out = f"the longest that can be is {longest}" if longest else "it has too few steps for any"
            shared.note(f"{trace.name}: a horizon of {horizon} cannot be scored at these cutoffs; {way_out}")
    with shared.progress(f"backtest of {trace.name}") as progress:
        made, others = protocol.predictors, protocol.train_on
        return Tested(trace, evaluate(trace, made, protocol.horizons, at, progress, train_on=others))


def _cutoffs(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of steps such as 3000,4000") from None


def _forecasts(
    shared: Shared, done: Sequence[Tested], protocol: Protocol, made: list[dict[str, object]]
) -> Iterator[tuple[str, Coming]]:
    """The forecasts of all traces one by one; what is said of each goes to *made*."""
    from moetrace.forecasts import forecast_end

    for trace, test in done:
        with shared.progress(f"forecast of {trace.name}") as progress:
            predictors, others = protocol.predictors, protocol.train_on
            ahead = forecast_end(trace, predictors, protocol.horizons[0], progress, scores=test.scores, train_on=others)
            for coming in ahead:
                said = {"predictor": coming.predictor, "layer": coming.layer, "status": coming.status}
                made.append({"trace": trace.name, **said})
                yield trace.name, coming


def score_tables(summary: pd.DataFrame, scores: pd.DataFrame) -> dict[str, Table]:
    """The tables of a backtest."""
    return {
        "summary": Table("Error rates by predictor and state", summary, SUMMARY_COLUMNS, by=("trace", "horizon")),
        "scores": Table("Scores", scores, printed=False),
    }


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(predict)
