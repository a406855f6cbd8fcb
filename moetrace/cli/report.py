"""`moetrace report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moetrace.cli.predict import Protocol, score_tables, tested
from moetrace.cli.shared import Shared, with_options

if TYPE_CHECKING:
    import pandas as pd

HORIZONS = "1000,2000"


@with_options
def report(
    protocol: Protocol,
    shared: Shared,
    traces: Annotated[list[str] | None, typer.Argument(help="Names or paths; all of the workspace if none.")] = None,
    horizons: Annotated[str, typer.Option(help="Horizons in steps.", metavar="STEPS")] = HORIZONS,
    folder: Annotated[
        Path | None, typer.Option(help="Where the report goes; `report` in the workspace if not given.")
    ] = None,
) -> None:
    """Write everything about traces into one folder: states, error rates, imbalance, figures.

    report.html is one file that needs nothing beside it; report.md, CSV, JSON and PNG files hold
    the same tables and figures.

    \b
    Example: moetrace report gpt-moe-8e-a --predictor sw_avg --predictor arima
    """
    from moetrace.analysis.tables import stacked
    from moetrace.report.study import files_of
    from moetrace.report.tables import records
    from moetrace.workspace.traces import write_bytes

    asked = _horizons(horizons)
    names = shared.place().chosen(traces or [])
    studies = dict(shared.each(names, lambda name: _study(shared, name, protocol, asked)))
    into = folder or shared.place().result_path("report")
    files = [write_bytes(into / name, content) for name, content in files_of(studies, _facts(protocol, asked))]
    shared.note(f"wrote {len(files)} files to {into}")
    summary, scores = (stacked([frames[key] for frames in studies.values()]) for key in ("summary", "scores"))
    document = {"folder": str(into), "files": [str(path) for path in files], "summary": records(summary)}
    shared.emit(score_tables(summary, scores), document | {"scores": records(scores)})


def _horizons(text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise typer.BadParameter(f"{text!r} is not a list of horizons such as 1000,2000")
    return found


def _study(shared: Shared, name: str, protocol: Protocol, horizons: list[int]) -> tuple[str, dict[str, pd.DataFrame]]:
    from moetrace.analysis.tables import course_frames, state_frames
    from moetrace.forecasting.predictability import predictability_frames
    from moetrace.forecasting.summary import score_frames

    results = tested(shared, name, protocol, horizons, ahead=False)
    trace, test = results.work.trace, results.backtest
    states = state_frames(trace)
    with shared.progress(f"what can be predicted of {trace.name}"):
        known = predictability_frames(trace, states["layers"], test)
    return trace.name, states | course_frames(trace) | score_frames(test, protocol.seed) | known


def _facts(protocol: Protocol, horizons: list[int]) -> dict[str, str]:
    from importlib.metadata import version

    from moetrace.forecasting.predictors import label

    packages = ("moetrace", "numpy", "statsmodels", "jax", "pyarrow")
    return {
        "predictors": ", ".join(label(made) for made in protocol.predictors()),
        "horizons": ", ".join(str(horizon) for horizon in horizons),
        "cutoffs": protocol.cutoffs or f"{protocol.first}, then every {protocol.every} steps",
        "seed": str(protocol.seed),
        "versions": ", ".join(f"{package} {version(package)}" for package in packages),
    }


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(report)
