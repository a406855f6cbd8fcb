"""`moetrace report`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetrace.cli.options import QUICK, Command, Hardware, Protocol, Shared, Traces, steps_of, with_options
from moetrace.cli.predict import score_tables
from moetrace.cli.progress import Report

if TYPE_CHECKING:
    import pandas as pd

    from moetrace.trace import LoadTrace

HORIZONS = (1000, 2000)


@with_options
def report(
    protocol: Protocol,
    shared: Shared,
    device: Hardware,
    traces: Traces = None,
    horizons: Annotated[
        str | None, typer.Option(help="Horizons in steps  [default: 1000,2000]", metavar="STEPS")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1,
            envvar="MOETRACE_GPUS",
            metavar="N",
            help="GPUs that share the experts of a layer; 1 leaves placement out  [default: 8, or what divides them]",
        ),
    ] = None,
    redundant: Annotated[int, typer.Option(min=0, help="Redundant experts, with --gpus.")] = 0,
    figures: Annotated[
        str, typer.Option(help="Formats of the figures: png, svg, pdf; or none.", metavar="KINDS")
    ] = "png",
    folder: Annotated[
        Path | None, typer.Option(help="Folder of the report  [default: report in the workspace]")
    ] = None,
) -> None:
    """Generate an HTML report with figures and data.

    report.html is self-contained; the folders figures and data hold its figures and data as files.

    \b
    Example: moetrace report gpt-moe-8e-a --predictor sw_avg --predictor arima
    """
    from moetrace.comparison.study import pairs_frame
    from moetrace.forecasting.predictors import predictor
    from moetrace.frames import stacked
    from moetrace.report.screens import report_screen
    from moetrace.report.study import write_report
    from moetrace.report.tables import records

    asked, kinds = horizons_of(horizons) if horizons else None, _kinds(figures)
    predictors, settings, time = protocol.predictors(), protocol.settings(shared), device.time()

    opened: list[LoadTrace] = []

    def one(_given: str, trace: LoadTrace, progress: Report) -> tuple[str, dict[str, pd.DataFrame]]:
        from moetrace.forecasting.study import study
        from moetrace.placement.planning import Planning, usual_gpus
        from moetrace.placement.study import place, placement_frames
        from moetrace.residency.study import hot, residency_frames

        opened.append(trace)
        notes: list[str] = []
        over, cutoffs = protocol.windows(trace, asked, HORIZONS, notes.append, "--horizons")
        found = study(trace, predictors, over, cutoffs, progress, seed=protocol.seed, **settings)
        for text in notes:  # not of a trace that is too short for anything, which is a line of its own
            shared.note(text)
        shared.note_reused(trace.name, found.computed, found.reused)
        kept = hot(trace, [predictor(name) for name in QUICK], progress=progress, seed=protocol.seed, **settings)
        frames = found.frames | residency_frames(kept)
        number = gpus or usual_gpus(trace.experts)
        if number == 1:
            return trace.name, frames
        if gpus is None:
            shared.note(f"{trace.name}: placement is evaluated on {number} GPUs (--gpus sets it)")
        placed = place(
            trace, predictors, Planning(number, redundant, time=time), over[0], cutoffs, progress,
            expert_bytes=device.expert_bytes, first=protocol.first, seed=protocol.seed, **settings,
        )  # fmt: skip
        return trace.name, frames | placement_frames(placed)

    studies = dict(shared.each_trace(traces, "report on", "results", one))
    into = folder or shared.folder().root / "report"
    pairs = pairs_frame([trace for trace in opened if trace.name in studies])
    files = write_report(studies, into, _facts(protocol, asked or HORIZONS), kinds, pairs)
    summary, scores = (stacked([frames[key] for frames in studies.values()]) for key in ("summary", "scores"))
    document: dict[str, Any] = {"folder": str(into), "page": str(files[-1]), "files": [str(path) for path in files]}
    document |= {"summary": records(summary), "scores": records(scores), "comparisons": records(pairs)}
    screens = [report_screen(trace, frames) for trace, frames in studies.items()]
    shared.emit(score_tables(summary, scores), document, screens, wrote=[f"{files[-1]} and {len(files) - 1} files"])


def _kinds(text: str) -> list[str]:
    """The kinds of figures as an option has them, such as svg,pdf."""
    kinds = [] if text == "none" else text.split(",")
    for kind in kinds:
        if kind not in ("png", "svg", "pdf"):
            raise typer.BadParameter(f"unknown figure format {kind!r} (choose png, svg, pdf, or none)")
    return kinds


def horizons_of(text: str) -> list[int]:
    """Horizons as an option has them, such as 1000,2000."""
    found = sorted(set(steps_of(text, "horizons such as 1000,2000")))
    if found[0] < 1:
        raise typer.BadParameter(f"{text!r} is not a list of horizons such as 1000,2000")
    return found


def _facts(protocol: Protocol, horizons: Sequence[int]) -> dict[str, str]:
    from importlib.metadata import version

    from moetrace.forecasting.predictors import label

    packages = ("moetrace", "numpy", "statsmodels", "jax", "pyarrow")
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {
        "made": f"{when}, moetrace {version('moetrace')}",
        "command": " ".join(["moetrace", *map(shlex.quote, sys.argv[1:])]),
        "predictors": ", ".join(label(predictor) for predictor in protocol.predictors()),
        "horizons": ", ".join(str(horizon) for horizon in horizons),
        "cutoffs": protocol.cutoffs or f"{protocol.first or 500}, then every {protocol.every or '1000 or more'} steps",
        "seed": str(protocol.seed),
        "versions": ", ".join(f"{package} {version(package)}" for package in packages),
    }


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(cls=Command)(report)
