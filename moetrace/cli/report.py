"""`moetrace report`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetrace.cli.options import Hardware, Protocol, Shared, Traces, steps_of
from moetrace.cli.output import PERCENT, Report, Table
from moetrace.cli.predict import score_tables

if TYPE_CHECKING:
    import pandas as pd

    from moetrace.trace import LoadTrace

HORIZONS = (1000, 2000)
# The tables of the JSON document; `--format csv --table NAME` has the others, which are long.
DOCUMENT = ("summary", "scores", "comparisons")


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
            help="GPUs that share the experts of a layer; 1 omits placement  [default: 8, or 4 or 2 for few experts]",
        ),
    ] = None,
    redundant: Annotated[int, typer.Option(min=0, help="Redundant experts, with --gpus.")] = 0,
    figures: Annotated[
        str, typer.Option(help="Formats of the figure files: png, svg, pdf; or none.", metavar="KINDS")
    ] = "png",
    figure_width: Annotated[
        str | None, typer.Option(help="Width of the figure files, such as 3.3in or 84mm.", metavar="WIDTH")
    ] = None,
    figure_titles: Annotated[
        bool, typer.Option("--figure-titles", help="Write the message of each figure above it.")
    ] = False,
    style: Annotated[
        str | None, typer.Option(help="Matplotlib style of the figure files, by name or file.", metavar="STYLE")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of the report  [default: report in the workspace]")
    ] = None,
) -> None:
    """Generate an HTML report with figures and data.

    report.html is self-contained. Its figures and data are also files, in the folders figures and data.

    \b
    Example: moetrace report gpt-moe-8e-a --predictor sw_avg --predictor arima
    """
    from functools import partial

    from moetrace.frames import Later
    from moetrace.reporting.screens import report_screen
    from moetrace.reporting.style import Look
    from moetrace.reporting.tables import records
    from moetrace.workspace.pages import check_kinds, report_facts, studied, written

    asked = horizons_of(horizons) if horizons else None
    opened: list[LoadTrace] = []
    backtesting, time = protocol.backtesting(shared), device.device()

    def one(_given: str, trace: LoadTrace, progress: Report) -> tuple[str, dict[str, pd.DataFrame]]:
        opened.append(trace)
        return trace.name, studied(trace, asked, gpus, redundant, shared.note, progress, backtesting, time)

    kinds = [] if figures == "none" else figures.split(",")
    check_kinds(kinds)
    look = Look.of(figure_width, style, titles=figure_titles)
    studies = dict(shared.each_trace(traces, "report on", PERCENT, one))
    into = folder or shared.folder().root / "report"
    command = {"command": " ".join(["moetrace", *map(shlex.quote, sys.argv[1:])])}
    found = written(opened, studies, into, kinds, report_facts(backtesting, asked or HORIZONS) | command, look)
    document: dict[str, Any] = {"folder": str(into), "page": found.files[-1], "files": list(found.files)}
    document |= {name: records(found.frames[name]) for name in DOCUMENT}
    screens = [report_screen(trace, frames) for trace, frames in studies.items()]
    wrote = [f"{found.files[-1]} and {len(found.files) - 1} files"]

    main = score_tables(found.frames["summary"], found.frames["scores"])

    def table(name: str) -> Table:
        return main.get(name) or Table(f"Rows of {name}", found.frames[name])

    shared.emit(Later({name: partial(table, name) for name in found.frames}), document, screens, wrote=wrote)


def horizons_of(text: str) -> list[int]:
    """Horizons as an option has them, such as 1000,2000."""
    found = sorted(set(steps_of(text, "horizons such as 1000,2000")))
    if found[0] < 1:
        raise typer.BadParameter(f"{text!r} is not a list of horizons such as 1000,2000")
    return found
