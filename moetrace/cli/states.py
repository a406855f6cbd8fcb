"""`moetrace states`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetrace.cli.options import Shared, Traces
from moetrace.cli.output import Format, Report, Table, say

if TYPE_CHECKING:
    import pandas as pd

    from moetrace.trace import LoadTrace
    from moetrace.workspace.found import Found

NOT_SETTLED = 4
COLLAPSED = 5
LAYERS = (
    "layer", "settle_step", "settle_step_low", "settle_step_high", "state", "movement_before", "movement_after",
    "outcome", "rank_settle_step", "detectors", "unsettled_step",
)  # fmt: skip
FLUCTUATION = (
    "trace", "layer", "variance_100_before", "variance_100_after", "range_100_before", "range_100_after", "step_noise",
)  # fmt: skip
SHAPE = (
    "layer", "best_fit", "best_fit_error", "exponent", "sigma", "concentration", "entropy", "distinct",
    "correlation_time",
)  # fmt: skip
TABLES: dict[str, Callable[[pd.DataFrame], Table]] = {
    "layers": lambda frame: Table("Layers", frame, LAYERS, by=("trace",)),
    "windows": lambda frame: Table("Ranges of steps in one state", frame),
    "depth": lambda frame: Table("By depth, means over layers", frame),
    # The paper's measures are columns of the layers, too many for one table on a terminal.
    "paper": lambda frame: Table("Sliding variance and range, windows of 100 steps", frame, FLUCTUATION),
    "shape": lambda frame: Table("Shape of the load: power law, log-normal, Dirichlet", frame, SHAPE, by=("trace",)),
    "distinct": lambda frame: Table("Experts that a batch of tokens has", frame),
    "experts": lambda frame: Table("Each expert: sliding variance and range, and its own state", frame),
    "sensitivity": lambda frame: Table("Settle step by window and threshold", frame),
    "imbalance": lambda frame: Table("Definitions of imbalance, over the last 1,000 steps", frame),
    "load": lambda frame: Table("Course of the load: mean shares of blocks of steps", frame),
    "movement": lambda frame: Table("Course of the movement, and the thresholds of the rule", frame),
    "fluctuation": lambda frame: Table("Course of the sliding variance and range, means over experts", frame),
    "peaks": lambda frame: Table("Course of the hottest expert over the mean", frame),
    "hottest": lambda frame: Table("Course of the hottest experts, and quantiles of the others", frame),
}
# Those of every JSON document; `--format csv --table NAME` has the others, too, which are long.
DOCUMENT = ("layers", "windows", "depth", "shape", "distinct")


def states(
    shared: Shared,
    traces: Traces = None,
    experts: Annotated[bool, typer.Option("--experts", help="Add each single expert to the JSON document.")] = False,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity", help="Repeat the analysis with other windows and thresholds, in the JSON document."
        ),
    ] = False,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Watch one trace that is still being recorded; print a line for each change."),
    ] = False,
    poll: Annotated[float, typer.Option(min=0.01, help="Polling interval in seconds (with --follow).")] = 5.0,
    until_settled: Annotated[
        bool, typer.Option("--until-settled", help="Exit once every layer is stable (with --follow).")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Exit after this many seconds without a new step (with --follow).", metavar="SECONDS"),
    ] = None,
) -> None:
    """Show when the load of each layer became stable.

    Finds in which steps each layer is transient or stable, and the step where it settles. Movement is
    the change of the load from one window of 200 steps to the next, minus sampling noise. A layer
    settles when the root mean square of its movement over 500 steps stays below 4%, and is transient
    again above 6%. A second test uses only the order of the experts. `--show paper` prints the
    sliding variance and range of arXiv 2404.16914.

    With --follow, give one path: the file that the recorder is writing. The exit code is then 0 if
    every layer is stable at the end, 4 if one is not, and 5 if the router of a layer has collapsed.

    \b
    Example: moetrace states gpt-moe-8e-a --layers 2,4
    """
    from functools import partial
    from inspect import unwrap

    from moetrace.frames import Later, stacked
    from moetrace.reporting.tables import records
    from moetrace.workspace.commands import states as ask

    if follow:
        _follow(shared, traces or [], poll, until_settled, timeout)
        return

    def one(_given: str, trace: LoadTrace, progress: Report) -> Found[LoadTrace]:
        found: Found[LoadTrace] = unwrap(ask)(trace, progress=progress, selection=shared.choice())
        return found

    def table(name: str) -> Table:
        of = "layers" if name == "paper" else name
        return TABLES[name](stacked([own.frames[of] for own in done]))

    def record(name: str) -> list[dict[str, Any]]:
        return records(tables[name].frame)

    done = shared.each_trace(traces, "states of", "layers", one)
    tables = Later({name: partial(table, name) for name in TABLES})
    added = [name for name, wanted in (("experts", experts), ("sensitivity", sensitivity)) if wanted]
    document = Later({name: partial(record, name) for name in (*DOCUMENT, *added)})
    screens = [own.screen(every=shared.all) for own in done]
    shared.emit(tables, document, screens, then=["predict", *(traces or [])])


def _follow(shared: Shared, traces: list[str], poll: float, until_settled: bool, timeout: float | None) -> None:
    """Print each change, one line or one JSON object a line; exit with the code of the last state."""
    import json
    import time

    from moetrace.record.follow import USUALLY_NOTICED, follow
    from moetrace.words import STABLE

    if len(traces) != 1:
        raise typer.BadParameter("--follow watches one trace: give its path")
    usual, most = USUALLY_NOTICED
    shared.note(f"A change is usually noticed {usual} steps after it begins, and within {most} steps in 9 of 10 cases.")
    path, last, since = Path(traces[0]), None, time.monotonic()
    if not (path.exists() or path.with_name(f"{path.name}.parts").exists()):
        shared.note(f"Waiting for {path}, which does not exist yet, or its folder {path.name}.parts.")

    def pause() -> None:
        if timeout is not None and time.monotonic() - since > timeout:
            say(f"nothing new in {path} for {timeout:g} seconds")
            raise typer.Exit(NOT_SETTLED)
        time.sleep(poll)

    for last in follow(path, pause):
        since = time.monotonic()
        for change in last.changes:
            line = f"step {change.step:,}: layer {change.layer} {change.what} at step {change.since:,}"
            sys.stdout.write(f"{json.dumps(change._asdict()) if shared.shown_as is Format.JSON else line}\n")
            sys.stdout.flush()
        if until_settled and all(status.state == STABLE for status in last.layers.values()):
            break
    states = last.layers.values() if last else ()
    if any(status.collapsed for status in states):
        raise typer.Exit(COLLAPSED)
    if not all(status.state == STABLE for status in states):
        raise typer.Exit(NOT_SETTLED)
