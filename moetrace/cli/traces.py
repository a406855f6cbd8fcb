"""`moetrace list`, `moetrace remove`, `moetrace check` and `moetrace export`."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from moetrace.cli.completion import trace_names
from moetrace.cli.options import Shared, Traces
from moetrace.cli.output import Report, Table, say, while_read
from moetrace.words import EXPORTED

if TYPE_CHECKING:
    from moetrace.trace import Finding, LoadTrace
    from moetrace.workspace.found import Found


def list_(shared: Shared) -> None:
    """List the traces of the workspace.

    \b
    Example: moetrace list --format csv
    """
    from moetrace.reporting.screens import listed_sentence, traces_screen
    from moetrace.workspace.traces import described, described_frame

    names = shared.folder().names()
    opened = shared.each(names, shared.open) if names else []
    documents = [described(trace, shared.folder().trace_path(trace.name)) for trace in opened]
    frame = described_frame(documents)
    screen = traces_screen(frame, listed_sentence(frame, str(shared.workspace)), every=True)
    tables = {"traces": Table(f"Traces in {shared.workspace}", frame)}
    then = ["states" if names else "ingest"]
    shared.emit(tables, {"traces": documents}, [screen], then=then)


def remove(
    shared: Shared,
    names: Annotated[list[str], typer.Argument(help="Names of traces.", autocompletion=trace_names)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
) -> None:
    """Remove traces and their results from the workspace.

    The source files stay. On a terminal, moetrace asks first.

    \b
    Example: moetrace remove gpt-moe-8e-a --yes
    """
    if dry_run or (not yes and sys.stdin is not None and sys.stdin.isatty()):
        paths = shared.each(list(dict.fromkeys(names)), lambda name: str(shared.folder().path_of(name)))
        for path in paths:
            say(f"would remove {path} and its results")
        if dry_run:
            shared.emit({}, {"removed": []})
            return
        typer.confirm("Remove?", abort=True, err=True)
    removed = shared.each(list(dict.fromkeys(names)), lambda name: str(shared.folder().remove(name)))
    for path in removed:
        shared.note(f"removed {path}")
    shared.emit({}, {"removed": removed})


def check(
    shared: Shared,
    traces: Traces = None,
    fail_on: Annotated[
        str | None, typer.Option(help="Also exit with 1 for these findings, such as collapse,dead.", metavar="FINDINGS")
    ] = None,
) -> None:
    """Check traces for damage, gaps and idle experts.

    Looks for damaged files, missing steps, smoothed or cumulative counts, unexpected numbers of tokens,
    idle experts, imbalance and drift. The exit code is 1 if a finding is an error that was not accepted
    at ingest, or if --fail-on names it.

    \b
    Example: moetrace check gpt-moe-8e-a --fail-on collapse,dead,drift
    """
    from inspect import unwrap

    from moetrace.frames import stacked
    from moetrace.reporting.screens import findings_screen
    from moetrace.reporting.tables import records
    from moetrace.workspace.commands import check as ask

    named = fail_on.split(",") if fail_on else ()

    def one(_given: str, trace: LoadTrace, _progress: Report) -> Found[list[Finding]]:
        found: Found[list[Finding]] = unwrap(ask)(trace, fail_on=named, selection=shared.choice())
        return found

    done = shared.each_trace(traces, "check of", "traces", one)
    frame = stacked([found.frame() for found in done])
    screen = findings_screen(frame, len(done), every=shared.all)
    shared.emit({"findings": Table("Findings", frame)}, {"findings": records(frame)}, [screen])
    if any(found.failing for found in done):
        raise typer.Exit(1)


class Kind(StrEnum):
    """The layout of an exported trace."""

    LONG = "long"
    WIDE = "wide"
    NESTED = "nested"
    CSV = "csv"
    NPZ = "npz"
    FORECASTING = "forecasting"


class Exported(Shared):
    """The shared options; a layout may have any ending."""

    endings = None


def export(
    shared: Exported,
    trace: Annotated[str, typer.Argument(help="Name or path of a trace.")],
    to: Annotated[
        Kind | None, typer.Option("--to", help="Layout  [default: from the extension of -o, otherwise long]")
    ] = None,
) -> None:
    """Export a trace to another format.

    Layouts in Parquet: long has step, layer, expert, tokens; wide has step, layer, expert_0, ...;
    nested has step, layer, counts. `forecasting` has the columns unique_id, ds and y: one
    sorted series for each expert. `csv` is `long` as a CSV file. npz contains NumPy arrays.

    \b
    Example: moetrace export gpt-moe-8e-a --to long -o a.parquet
    """
    from moetrace.files import output, temporary
    from moetrace.formats.conversion import export_trace

    if shared.output is None:
        raise typer.BadParameter("missing -o PATH: the file to write, or -o - for the standard output")
    layout = str(to or EXPORTED.get(shared.output.suffix.lower(), Kind.LONG))
    opened = shared.open(trace)
    if str(shared.output) == "-":
        with temporary() as held:
            export_trace(opened, held, layout)
            with held.open("rb") as content, while_read():
                shutil.copyfileobj(content, sys.stdout.buffer)
        return
    with output(shared.output, force=shared.force) as held:
        export_trace(opened, held, layout)
    document = {"trace": opened.name, "to": layout, "path": str(shared.output)}
    replace(shared, output=None).emit({}, document, wrote=[str(shared.output)])
