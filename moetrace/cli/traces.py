"""`moetrace list`, `moetrace remove` and `moetrace check`: what the workspace holds, and its health."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moetrace.cli.shared import Shared, Table, with_shared

if TYPE_CHECKING:
    import pandas as pd


@with_shared
def list_(shared: Shared) -> None:
    """List the traces of the workspace.

    \b
    Example: moetrace list --format csv
    """
    from moetrace.frames import traces_frame
    from moetrace.report.tables import records

    names = shared.place().names()
    opened = shared.each(names, shared.open) if names else []
    frame = traces_frame(opened)
    columns = ["trace", "steps", "layers", "experts", "tokens_per_step", "format", "source", "findings"]
    table = Table(f"Traces in {shared.workspace}", frame, columns if len(frame) else None)
    shared.emit({"traces": table}, {"traces": records(frame)})


@with_shared
def remove(shared: Shared, names: Annotated[list[str], typer.Argument(help="Names of traces.")]) -> None:
    """Remove traces from the workspace; the files they were read from stay.

    \b
    Example: moetrace remove gpt-moe-8e-a
    """
    removed = shared.each(names, lambda name: str(shared.place().remove(name)))
    for path in removed:
        shared.note(f"removed {path}")
    shared.emit({}, {"removed": removed})


@with_shared
def check(
    shared: Shared,
    traces: Annotated[list[str] | None, typer.Argument(help="Names or paths; all of the workspace if none.")] = None,
) -> None:
    """Examine traces: damage, gaps, idle experts. Exit code 1 if any finding is an error.

    \b
    Example: moetrace check gpt-moe-8e-a
    """
    from moetrace.frames import stacked
    from moetrace.report.tables import records

    names = shared.place().chosen(traces or [])
    frame = stacked(shared.each(names, lambda name: _findings(shared, name)))
    if frame.empty:
        shared.note("no findings")
    shared.emit({"findings": Table("Findings", frame, printed=not frame.empty)}, {"findings": records(frame)})
    if (frame["severity"] == "error").any():
        raise typer.Exit(1)


def _findings(shared: Shared, name: str) -> pd.DataFrame:
    from moetrace.checks import examine
    from moetrace.frames import findings_frame

    trace = shared.open(name)
    return findings_frame(trace.name, examine(trace))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("list")(list_)
    app.command()(remove)
    app.command()(check)
