"""`moetrace list`, `moetrace remove` and `moetrace check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moetrace.cli.options import Command, Shared, Traces, with_options
from moetrace.cli.output import Table
from moetrace.cli.progress import Report

if TYPE_CHECKING:
    import pandas as pd

    from moetrace.trace import LoadTrace


@with_options
def list_(shared: Shared) -> None:
    """List the traces of the workspace.

    \b
    Example: moetrace list --format csv
    """
    from moetrace.analysis.about import traces_frame
    from moetrace.report.screens import listed_sentence, traces_screen
    from moetrace.workspace.traces import described

    names = shared.folder().names()
    opened = shared.each(names, shared.open) if names else []
    frame = traces_frame(opened)
    screen = traces_screen(frame, listed_sentence(frame, str(shared.workspace)), every=True)
    tables = {"traces": Table(f"Traces in {shared.workspace}", frame)}
    then = ["states" if names else "ingest"]
    documents = [described(trace, shared.folder().trace_path(trace.name)) for trace in opened]
    shared.emit(tables, {"traces": documents}, [screen], then=then)


@with_options
def remove(shared: Shared, names: Annotated[list[str], typer.Argument(help="Names of traces.")]) -> None:
    """Remove traces and their results from the workspace.

    The files they were read from stay.

    \b
    Example: moetrace remove gpt-moe-8e-a
    """
    removed = shared.each(list(dict.fromkeys(names)), lambda name: str(shared.folder().remove(name)))
    for path in removed:
        shared.note(f"removed {path}")
    shared.emit({}, {"removed": removed})


@with_options
def check(
    shared: Shared,
    traces: Traces = None,
    fail_on: Annotated[
        str | None, typer.Option(help="Also exit with 1 for these findings, such as collapse,dead.", metavar="FINDINGS")
    ] = None,
) -> None:
    """Check traces for damage, gaps and idle experts.

    Checks damage, order, totals, gaps, idle experts and drift. Exit code 1 if any finding is an
    error that was not accepted at ingest, or is named by --fail-on.

    \b
    Example: moetrace check gpt-moe-8e-a --fail-on collapse,dead,drift
    """
    from moetrace.doctor.catalogue import KINDS
    from moetrace.doctor.checks import examine, failing
    from moetrace.frames import stacked
    from moetrace.report.screens import findings_screen
    from moetrace.report.tables import records
    from moetrace.settings import unknown
    from moetrace.workspace.traces import findings_frame

    named = tuple(fail_on.split(",")) if fail_on else ()
    for name in named:
        if name not in KINDS:
            raise unknown("finding", name, KINDS)

    def one(_given: str, trace: LoadTrace, _progress: Report) -> tuple[pd.DataFrame, bool]:
        findings = examine(trace)
        return findings_frame(trace.name, findings), bool(failing(findings, trace, named))

    done = shared.each_trace(traces, "check of", "traces", one)
    frame = stacked([part for part, _ in done])
    screen = findings_screen(frame, len(done), every=shared.all)
    shared.emit({"findings": Table("Findings", frame)}, {"findings": records(frame)}, [screen])
    if any(fails for _, fails in done):
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("list", cls=Command)(list_)
    app.command(cls=Command)(remove)
    app.command(cls=Command)(check)
