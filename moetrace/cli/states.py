"""`moetrace states`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from moetrace.cli.shared import Shared, Table, with_shared

if TYPE_CHECKING:
    import pandas as pd

LAYERS = (
    "trace", "layer", "settle_step", "settle_step_low", "settle_step_high", "state", "outcome", "unsettled_step",
    "rank_settle_step", "detectors", "movement_before", "movement_after",
)  # fmt: skip
FLUCTUATION = (
    "trace", "layer", "variance_100_before", "variance_100_after", "range_100_before", "range_100_after", "step_noise",
)  # fmt: skip
TABLES: dict[str, Callable[[pd.DataFrame], Table]] = {
    "layers": lambda frame: Table("Layers: settle step, and movement before and after it", frame, LAYERS),
    "windows": lambda frame: Table("Windows of one state", frame),
    "depth": lambda frame: Table("By depth, means over layers", frame),
    "experts": lambda frame: Table("Each expert: sliding variance and range, and its own state", frame),
    "sensitivity": lambda frame: Table("Settle step by window and threshold", frame),
}


@with_shared
def states(
    shared: Shared,
    traces: Annotated[list[str] | None, typer.Argument(help="Names or paths; all of the workspace if none.")] = None,
    experts: Annotated[bool, typer.Option("--experts", help="Also the state and fluctuation of every expert.")] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also the settle step for other windows and thresholds.")
    ] = False,
) -> None:
    """Tell transient from stable windows, and from which step on each layer has settled.

    Movement is the change of the load from one window of 200 steps to the next, sampling noise
    taken off. A layer settles where its mean over 500 steps stays below 4 %, and is transient again
    above 6 %. A second detector looks at the order of the experts alone. Variance and range are
    the paper's.

    \b
    Example: moetrace states gpt-moe-8e-a --layers 2,4
    """
    from moetrace.frames import stacked, state_frames
    from moetrace.report.tables import records

    def one(name: str) -> dict[str, pd.DataFrame]:
        trace = shared.open(name)
        with shared.progress(f"states of {trace.name}") as progress:
            return state_frames(trace, experts=experts, sensitivity=sensitivity, progress=progress)

    found = shared.each(shared.place().chosen(traces or []), one)
    frames = {name: stacked([part[name] for part in found]) for name in found[0]}
    tables = {name: table(frames[name]) for name, table in TABLES.items() if name in frames}
    # The paper's measures are columns of the same frame, too many for one table on a terminal.
    shown = {"fluctuation": Table("Sliding variance and range, windows of 100 steps", frames["layers"], FLUCTUATION)}
    shared.emit(tables | shown, {name: records(table.frame) for name, table in tables.items()})


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(states)
