"""`moetrace place`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetrace.cli.options import Command, with_options
from moetrace.cli.output import Table, say
from moetrace.cli.predict import Protocol
from moetrace.cli.progress import Report
from moetrace.cli.shared import Shared, steps_of
from moetrace.errors import SettingError

if TYPE_CHECKING:
    import pandas as pd

    from moetrace.placement.study import Placement
    from moetrace.report.screens import Screen
    from moetrace.trace import LoadTrace

SUMMARY_COLUMNS = (
    "strategy", "state", "peak_over_mean", "above_oracle", "difference", "difference_low", "difference_high",
    "balance", "moved", "scored", "cutoffs",
)  # fmt: skip

POLICY_COLUMNS = (
    "system", "window", "interval", "redundant", "balance", "peak_over_mean", "moved_per_1000", "chosen_by",
    "recommended", "dispatch",
)  # fmt: skip

REPLANNING_COLUMNS = (
    "state", "replan_every", "peak_over_mean", "difference", "difference_low", "difference_high",
    "balance", "moved", "moved_per_1000", "scored", "cutoffs",
)  # fmt: skip


@with_options
def place(
    protocol: Protocol,
    shared: Shared,
    gpus: Annotated[int | None, typer.Option(min=2, help="GPUs that share the experts of a layer.")] = None,
    traces: Annotated[list[str] | None, typer.Argument(help="Names or paths; all of the workspace if none.")] = None,
    redundant: Annotated[
        str,
        typer.Option(help="Slots for replicas; of several, such as 0,32,64, the first is planned.", metavar="N"),
    ] = "0",
    horizon: Annotated[int, typer.Option(min=1, help="Steps that a plan is made for.")] = 1000,
    least_gain: Annotated[
        float,
        typer.Option(min=0, help="Keep a plan that no new one betters by this part of the mean load.", metavar="PART"),
    ] = 0.0,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="Keep a plan whose predicted peak is this near to the lowest.", metavar="PART"),
    ] = 0.01,
    plan: Annotated[
        Path | None,
        typer.Option(help="The plan that runs today: scored, and changed by few moves.", metavar="FILE"),
    ] = None,
    expert_bytes: Annotated[
        float | None, typer.Option(min=0, help="Bytes of one expert: what is moved is told in bytes, too.")
    ] = None,
    model_layers: Annotated[
        int, typer.Option(min=0, help="Layers of the model: files have a row for those without a plan.")
    ] = 0,
    replan: Annotated[
        str | None,
        typer.Option(help="Compare plans made every so many steps, such as 500,1000,4000.", metavar="STEPS"),
    ] = None,
) -> None:
    """Say whether balancing pays, and plan experts on GPUs.

    Puts experts on GPUs by the forecast, and scores the plans on the load that then came. At every
    cutoff each predictor's forecast becomes a plan, and so do the load of the last 1,000 steps,
    which serving systems plan by (window_mean), and the load that came (oracle). Scored is the
    busiest GPU: its load over that of the mean one, over the whole horizon (peak_over_mean; 1 is
    even), and the mean over the busiest where every step waits for its own (balance).

    The plan for the steps after the end is written for the predictor whose plans were best, as
    vllm-ascend, MindIE, SGLang and TensorRT-LLM read it.

    \b
    Example: moetrace place gpt-moe-8e-a --gpus 4 --predictor auto --predictor sw_avg
    """
    from moetrace.analysis.tables import stacked
    from moetrace.placement.running import running_plan
    from moetrace.placement.study import place as place_trace
    from moetrace.report.tables import records

    if gpus is None:
        raise typer.BadParameter("say how many GPUs share the experts: moetrace place gpt-moe-8e-a --gpus 4")
    predictors, settings = protocol.predictors(), protocol.settings(shared)
    every = steps_of(replan) if replan else []
    slots = _redundant(redundant)
    deployed: list[dict[str, str]] = []
    figures: list[str] = []

    def one(given: str, trace: LoadTrace, progress: Report) -> Placement:
        cutoffs = protocol.looks(trace, [horizon])
        force = running_plan(plan, trace.layers, trace.experts, gpus) if plan is not None else None
        placed = place_trace(
            trace, predictors, gpus, slots[0], horizon, cutoffs, progress,
            least_gain=least_gain, tolerance=tolerance, running=force, expert_bytes=expert_bytes,
            policies=slots, replan_every=every, first=protocol.first, seed=protocol.seed, **settings,
        )  # fmt: skip
        shared.note_reused(trace.name, placed.computed, placed.reused)
        deployed.extend(_write_plans(shared, given, placed, f"the next {horizon:,} steps", model_layers))
        figures.extend(_draw(shared, given, placed, gpus))
        _note_holding(shared, placed, every)
        return placed

    done = shared.each_trace(traces, "plans of", "results", one)
    frames = {name: stacked([placed.frames[name] for placed in done]) for name in done[0].frames}
    tables = _tables(frames, done, gpus)
    document: dict[str, Any] = {"gpus": gpus, "redundant": slots[0], "horizon": horizon}
    document |= {"files": [own["path"] for own in deployed], "deploy": deployed}
    document |= {"figures": figures, "trained_on": protocol.trained_on(shared)}
    document |= {name: records(table.frame) for name, table in tables.items()}
    judged = {placed.trace: placed.verdict.as_row() for placed in done if placed.verdict}
    document["verdict"] = next(iter(judged.values())) if len(judged) == 1 else [*judged.values()]
    screens = [
        _screen(part, judged.get(str(trace)), gpus, shared)
        for trace, part in frames["summary"].groupby("trace", sort=False)
    ]
    shared.emit(tables, document, screens)


def _tables(frames: dict[str, pd.DataFrame], done: Sequence[Placement], gpus: int) -> dict[str, Table]:
    """The tables behind the answer; of re-planning those of the predictor that is deployed are printed."""
    tables = {
        "summary": Table(f"Experts on {gpus} GPUs", frames["summary"], SUMMARY_COLUMNS, by=("trace", "horizon")),
        "plans": Table("Plan for the steps to come", frames["plans"]),
        "scores": Table("Scores", frames["scores"]),
        "policies": Table("Policies", frames["policies"], POLICY_COLUMNS, by=("trace",)),
    }
    if "replanning" in frames:
        printed = list(chain.from_iterable(placed.frames["replanning"]["strategy"] == placed.best for placed in done))
        tables["replanning"] = Table(
            "How often to plan", frames["replanning"], REPLANNING_COLUMNS, by=("trace", "strategy"), rows=printed
        )
        tables["stretches"] = Table("Stretches between plans", frames["stretches"])
    return tables


def _redundant(text: str) -> list[int]:
    found = steps_of(text)
    if min(found) < 0:
        raise typer.BadParameter(f"{text!r}: slots for replicas are 0 or more")
    return list(dict.fromkeys(found))


def _screen(summary: pd.DataFrame, judged: dict[str, Any] | None, gpus: int, shared: Shared) -> Screen:
    from moetrace.report.answers import verdict_notes, worth
    from moetrace.report.screens import place_screen

    notes = verdict_notes(judged) if judged else []
    return place_screen(summary, worth(summary, gpus, "").sentence, every=shared.all, notes=notes)


def _write_plans(shared: Shared, given: str, placed: Placement, coming: str, model_layers: int) -> list[dict[str, str]]:
    """Write the plan to deploy in every format there is; of each file its path, its system and the flags it needs."""
    from moetrace.files import write_bytes
    from moetrace.placement.expert_maps import MAPS

    if shared.layers is not None:
        shared.note(f"{placed.trace}: no plan is written, which takes all layers: leave --layers out")
        return []
    if not len(placed.frames["plans"]):
        return []
    stem = shared.folder().result_path("place", given, f"{len(placed.slots[min(placed.slots)])}-gpus")
    shared.note(f"wrote the plan by {placed.best} for {coming} to {stem.parent}, in it:")
    deployed = []
    for kind in MAPS:
        try:
            text = kind.text(placed.slots, model_layers)
        except SettingError as error:
            say(f"no plan for {kind.readers}: {error}")
            continue
        path = write_bytes(stem.with_name(stem.name + kind.ending), text.encode())
        deployed.append({"path": str(path), "system": kind.readers, "flags": kind.flags(placed.slots, str(path))})
        shared.note(f"  {path.name} for {kind.readers}: {kind.flags(placed.slots, path.name)}")
    return deployed


def _draw(shared: Shared, given: str, placed: Placement, gpus: int) -> list[str]:
    """Draw the scores, and how often to plan; the file, none where nothing was scored."""
    from moetrace.files import write_bytes
    from moetrace.report.placement import plans
    from moetrace.report.style import picture, styled

    if not len(placed.frames["scores"]):
        return []
    replanning = placed.frames.get("replanning")
    own = None if replanning is None or replanning.empty else replanning[replanning["strategy"] == placed.best]
    path = shared.folder().result_path("place", given, f"{gpus}-gpus.png")
    with styled():
        drawn = picture(plans(placed.frames["scores"], own, placed.best), "png", f"{placed.trace}: {gpus} GPUs")
    write_bytes(path, drawn)
    shared.note(f"drew the scores to {path}")
    return [str(path)]


def _note_holding(shared: Shared, placed: Placement, every: Sequence[int]) -> None:
    """Say for how long a plan holds."""
    from moetrace.placement.replanning import ENOUGH

    if not placed.holds:
        return
    shortest, longest = min(every), max(every)
    parts = []
    for state, holds in placed.holds.items():
        more = {shortest: " or less", longest: " or more"}.get(holds or 0, "") if shortest < longest else ""
        parts.append(f"one made while {state} " + ("to the end" if holds is None else f"{holds:,} steps{more}"))
    within = f"the busiest GPU within {ENOUGH:.0%} of the mean load of planning every {shortest:,}"
    shared.note(f"{placed.trace}: how long a plan by {placed.best} holds, {within}: {'; '.join(parts)}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(cls=Command)(place)
