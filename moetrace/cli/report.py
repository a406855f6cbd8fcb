"""`moetrace report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetrace.cli.predict import Protocol, score_tables
from moetrace.cli.shared import Shared, steps_of, with_options

if TYPE_CHECKING:
    from moetrace.trace import LoadTrace

HORIZONS = "1000,2000"


@with_options
def report(
    protocol: Protocol,
    shared: Shared,
    traces: Annotated[list[str] | None, typer.Argument(help="Names or paths; all of the workspace if none.")] = None,
    horizons: Annotated[str | None, typer.Option(help="Horizons in steps; 1000,2000 if none.", metavar="STEPS")] = None,
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
    from moetrace.forecasting.study import Study, study
    from moetrace.report.study import write_report
    from moetrace.report.tables import records

    asked, predictors, settings = horizons_of(horizons or HORIZONS), protocol.predictors(), protocol.settings(shared)

    def one(_given: str, trace: LoadTrace) -> Study:
        cutoffs = protocol.looks(trace, asked, explicit=horizons is not None)
        with shared.progress(f"predictions of {trace.name}") as progress:
            found = study(trace, predictors, asked, cutoffs, progress, seed=protocol.seed, **settings)
        shared.note_reused(trace.name, found.computed, found.reused)
        return found

    studies = {found.trace: found.frames for found in shared.each_trace(traces, one)}
    into = folder or shared.folder().root / "report"
    facts = _facts(protocol, asked)
    files = write_report(studies, into, facts)
    shared.note(f"wrote {len(files)} files to {into}: open {files[-1]}")
    summary, scores = (stacked([frames[key] for frames in studies.values()]) for key in ("summary", "scores"))
    document: dict[str, Any] = {"folder": str(into), "page": str(files[-1]), "files": [str(path) for path in files]}
    document |= {"summary": records(summary), "scores": records(scores)}
    shared.emit(score_tables(summary, scores), document)


def horizons_of(text: str) -> list[int]:
    """Horizons as an option has them, such as 1000,2000."""
    found = sorted(set(steps_of(text)))
    if found[0] < 1:
        raise typer.BadParameter(f"{text!r} is not a list of horizons such as 1000,2000")
    return found


def _facts(protocol: Protocol, horizons: list[int]) -> dict[str, str]:
    from importlib.metadata import version

    from moetrace.forecasting.predictors import label

    packages = ("moetrace", "numpy", "statsmodels", "jax", "pyarrow")
    return {
        "predictors": ", ".join(label(predictor) for predictor in protocol.predictors()),
        "horizons": ", ".join(str(horizon) for horizon in horizons),
        "cutoffs": protocol.cutoffs or f"{protocol.first}, then every {protocol.every} steps",
        "seed": str(protocol.seed),
        "versions": ", ".join(f"{package} {version(package)}" for package in packages),
    }


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(report)
