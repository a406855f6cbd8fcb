"""`moetrace list`, `moetrace remove` and `moetrace check`: what the workspace holds, and its health."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moetrace.cli.shared import Shared, Table, with_options

if TYPE_CHECKING:
    import pandas as pd

    from moetrace.trace import LoadTrace


@with_options
def list_(shared: Shared) -> None:
    """List the traces of the workspace.

    \b
    Example: moetrace list --format csv
    """
    from moetrace.report.tables import records
    from moetrace.workspace.traces import traces_frame

    names = shared.folder().names()
    opened = shared.each(names, shared.open) if names else []
    frame = traces_frame(opened)
    columns = ["trace", "steps", "layers", "experts", "tokens_per_step", "format", "source", "findings"]
    table = Table(f"Traces in {shared.workspace}", frame, columns if len(frame) else None)
    shared.emit({"traces": table}, {"traces": records(frame)})


@with_options
def remove(shared: Shared, names: Annotated[list[str], typer.Argument(help="Names of traces.")]) -> None:
    """Remove traces from the workspace; the files they were read from stay.

    \b
    Example: moetrace remove gpt-moe-8e-a
    """
    removed = shared.each(names, lambda name: str(shared.folder().remove(name)))
    for path in removed:
        shared.note(f"removed {path}")
    shared.emit({}, {"removed": removed})


@with_options
def check(
    shared: Shared,
    traces: Annotated[list[str] | None, typer.Argument(help="Names or paths; all of the workspace if none.")] = None,
    fail_on: Annotated[
        str | None, typer.Option(help="Also exit with 1 for these findings, such as collapse,dead.", metavar="FINDINGS")
    ] = None,
) -> None:
    """Examine traces: damage, order, totals, gaps, idle experts, drift.

    Exit code 1 if any finding is an error that was not accepted at ingest, or is named by --fail-on.

    \b
    Example: moetrace check gpt-moe-8e-a --fail-on collapse,dead,drift
    """
    from moetrace.analysis.tables import stacked
    from moetrace.report.tables import records

    named = _findings_named(fail_on)
    done = shared.each_trace(traces, lambda _given, trace: _checked(trace, named))
    frame = stacked([part for part, _ in done])
    if frame.empty:
        shared.note("no findings")
    shared.emit({"findings": Table("Findings", frame, printed=not frame.empty)}, {"findings": records(frame)})
    if any(fails for _, fails in done):
        raise typer.Exit(1)


def _findings_named(text: str | None) -> tuple[str, ...]:
    from moetrace.doctor.catalogue import KINDS
    from moetrace.settings import unknown

    names = tuple(text.split(",")) if text else ()
    strange = [name for name in names if name not in KINDS]
    if strange:
        raise unknown("finding", strange[0], KINDS)
    return names


def _checked(trace: LoadTrace, fail_on: tuple[str, ...]) -> tuple[pd.DataFrame, bool]:
    """The findings of a trace, and whether any of them fails the check."""
    from moetrace.doctor.checks import examine, failing
    from moetrace.workspace.traces import findings_frame

    findings = examine(trace)
    return findings_frame(trace.name, findings), bool(failing(findings, trace, fail_on))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("list")(list_)
    app.command()(remove)
    app.command()(check)
