"""`moetrace states`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moetrace.cli.shared import Shared, Table, with_shared

if TYPE_CHECKING:
    import pandas as pd


@with_shared
def states(
    shared: Shared,
    traces: Annotated[list[str] | None, typer.Argument(help="Names or paths; all of the workspace if none.")] = None,
    experts: Annotated[bool, typer.Option("--experts", help="Also the fluctuation of every expert.")] = False,
) -> None:
    """Tell transient from stable windows, and from which step on each layer has settled.

    Movement is the change of the load from one window of 200 steps to the next, sampling noise
    taken off; a layer settles where it stays below 4 %. Variance and range are the paper's.

    \b
    Example: moetrace states gpt-moe-8e-a --layers 2,4
    """
    from moetrace.frames import stacked
    from moetrace.report.tables import records

    found = shared.each(shared.place().chosen(traces or []), lambda trace: _of_trace(shared, trace, experts))
    frames = {name: stacked([part[name] for part in found]) for name in found[0]}
    columns = ["trace", "layer", "settle_step", "state", "movement_before", "movement_after"]
    columns += ["variance_100_before", "variance_100_after", "range_100_before", "range_100_after"]
    tables = {
        "layers": Table("Layers: settle step and fluctuation (before, after settling)", frames["layers"], columns),
        "windows": Table("Windows of one state", frames["windows"]),
    }
    if experts:
        tables["experts"] = Table("Sliding variance and range of each expert, mean over the trace", frames["experts"])
    shared.emit(tables, {name: records(table.frame) for name, table in tables.items()})


def _of_trace(shared: Shared, name: str, experts: bool) -> dict[str, pd.DataFrame]:
    from moetrace.frames import state_frames

    trace = shared.open(name)
    with shared.progress(f"states of {trace.name}") as progress:
        return state_frames(trace, experts=experts, progress=progress)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(states)
