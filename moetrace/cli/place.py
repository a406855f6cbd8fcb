"""`moetrace place`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moetrace.cli.options import Command, Protocol, Shared, bytes_of, steps_of, with_options
from moetrace.cli.output import Table, say
from moetrace.cli.progress import Report
from moetrace.errors import SettingError

if TYPE_CHECKING:
    import pandas as pd

    from moetrace.placement.expert_maps import Deployed
    from moetrace.placement.study import Placement
    from moetrace.report.screens import Screen
    from moetrace.trace import LoadTrace

SUMMARY_COLUMNS = (
    "strategy", "state", "peak_over_mean", "above_oracle", "difference", "difference_low", "difference_high",
    "balance", "moved", "scored", "cutoffs",
)  # fmt: skip

NODE_COLUMNS = ("node_peak_over_mean", "nodes_per_token")

POLICY_COLUMNS = (
    "system", "window", "interval", "threshold", "redundant", "balance", "moved_per_1000", "recommended", "chosen_by",
    "moved_bytes", "peak_over_mean", "dispatch",
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
        typer.Option(
            help="Slots for replicas; of several, such as 0,32,64, those recommended are planned.", metavar="N"
        ),
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
    judge: Annotated[
        Literal["steps", "mean"],
        typer.Option(help="Judge plans on single steps, which wait for their own busiest GPU, or on the mean load."),
    ] = "steps",
    dispatch: Annotated[
        Literal["even", "nearest", "lp"],
        typer.Option(help="How an expert's tokens are split: evenly, to the nearest replica, or anew in each step."),
    ] = "even",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that the GPUs are on.")] = 1,
    groups: Annotated[
        int, typer.Option(min=1, help="Groups of experts in group-limited routing; each stays on one node.")
    ] = 1,
    top_groups: Annotated[
        int | None, typer.Option(min=1, help="Groups that a token takes; half of them if not given.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="The plan that runs today: scored, and changed by few moves.", metavar="FILE"),
    ] = None,
    expert_bytes: Annotated[
        float | None,
        typer.Option(
            parser=bytes_of, help="Size of one expert, such as 44MB: what is moved is told in bytes, too.", metavar="B"
        ),
    ] = None,
    model_layers: Annotated[
        int, typer.Option(min=0, help="Layers of the model: files have a row for those without a plan.")
    ] = 0,
    first_layer: Annotated[
        int | None,
        typer.Option(min=0, help="The model's number, from 0, of the trace's first layer: for files.", metavar="N"),
    ] = None,
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
    from moetrace.placement.expert_maps import Deployed
    from moetrace.placement.running import running_plan
    from moetrace.placement.study import place as place_trace
    from moetrace.report.tables import records

    if gpus is None:
        raise typer.BadParameter("say how many GPUs share the experts: moetrace place gpt-moe-8e-a --gpus 4")
    predictors, settings = protocol.predictors(), protocol.settings(shared)
    every = steps_of(replan) if replan else []
    slots = _redundant(redundant)

    def one(given: str, trace: LoadTrace, progress: Report) -> tuple[str, Placement]:
        cutoffs = protocol.looks(trace, [horizon])
        force = running_plan(plan, trace.layers, trace.experts, gpus, first_layer) if plan is not None else None
        placed = place_trace(
            trace, predictors, gpus, slots[0], horizon, cutoffs, progress,
            least_gain=least_gain, tolerance=tolerance, judge=judge, dispatch=dispatch, nodes=nodes,
            groups=groups, top_groups=top_groups,
            running=force, expert_bytes=expert_bytes,
            policies=slots, replan_every=every, first=protocol.first, seed=protocol.seed, **settings,
        )  # fmt: skip
        shared.note_reused(trace.name, placed.computed, placed.reused)
        return given, placed

    placements = shared.each_trace(traces, "plans of", "layers and results", one)
    done, deployed, figures = [], [], []
    for given, placed in placements:  # where no bar breaks the lines that are to be copied
        own = Deployed(placed.slots, placed.loads, model_layers, dispatch, groups, nodes).numbered(first_layer)
        written = _write_plans(shared, given, placed, own, f"the next {horizon:,} steps")
        deployed += written
        done.append(_launched(shared, placed, written))
        figures += _draw(shared, given, placed, gpus)
        _note_holding(shared, placed, every)
        for left_out in placed.notes:
            shared.note(f"{placed.trace}: {left_out}")
    frames = {name: stacked([placed.frames[name] for placed in done]) for name in done[0].frames}
    tables = _tables(frames, done, gpus, nodes)
    document: dict[str, Any] = {"gpus": gpus, "horizon": horizon, "dispatch": dispatch}
    document |= {"nodes": nodes, "groups": groups}
    document |= {"files": list(dict.fromkeys(own["path"] for own in deployed)), "deploy": deployed, "figures": figures}
    document |= {"trained_on": protocol.trained_on(shared)} | _told(done)
    document |= {name: records(table.frame) for name, table in tables.items()}
    scored = [placed for placed in done if len(placed.frames["summary"])]
    shared.emit(tables, document, [_screen(placed, gpus, shared) for placed in scored])


def _told(done: Sequence[Placement]) -> dict[str, Any]:
    """What came of the traces: one value where it is the same for all, else all of them."""
    told: dict[str, list[Any]] = {
        "redundant": list(dict.fromkeys(placed.redundant for placed in done)),
        "judge": list(dict.fromkeys(placed.judge for placed in done)),
        "verdict": [placed.verdict.as_row() for placed in done if placed.verdict],
    }
    return {name: values[0] if len(values) == 1 else values for name, values in told.items()}


def _tables(frames: dict[str, pd.DataFrame], done: Sequence[Placement], gpus: int, nodes: int) -> dict[str, Table]:
    """The tables behind the answer; of re-planning those of the predictor that is deployed are printed."""
    more = NODE_COLUMNS if nodes > 1 else ()
    summary = (*SUMMARY_COLUMNS, *more)
    tables = {
        "summary": Table(f"Experts on {gpus} GPUs", frames["summary"], summary, by=("trace", "horizon")),
        "plans": Table("Plan for the steps to come", frames["plans"]),
        "scores": Table("Scores", frames["scores"]),
        "policies": Table("Policies", frames["policies"], POLICY_COLUMNS, by=("trace",)),
    }
    if "replanning" in frames:
        printed = list(chain.from_iterable(placed.frames["replanning"]["strategy"] == placed.best for placed in done))
        often = (*REPLANNING_COLUMNS, *more)
        tables["replanning"] = Table(
            "How often to plan", frames["replanning"], often, by=("trace", "strategy"), rows=printed
        )
        tables["stretches"] = Table("Stretches between plans", frames["stretches"])
    return tables


def _redundant(text: str) -> list[int]:
    found = steps_of(text, "numbers of slots such as 0,32,64")
    if min(found) < 0:
        raise typer.BadParameter(f"{text!r}: slots for replicas are 0 or more")
    return list(dict.fromkeys(found))


def _screen(placed: Placement, gpus: int, shared: Shared) -> Screen:
    from moetrace.report.answers import worth
    from moetrace.report.screens import place_screen
    from moetrace.report.verdict import judged as answered
    from moetrace.report.verdict import verdict_notes

    summary, judged = placed.frames["summary"], placed.verdict and placed.verdict.as_row()
    answer = answered(judged, gpus) if judged and judged["system"] else worth(summary, gpus, "")
    notes = verdict_notes(judged, gpus, files=shared.layers is None) if judged else []
    return place_screen(summary, answer.sentence, every=shared.all, notes=notes)


def _write_plans(shared: Shared, given: str, placed: Placement, plan: Deployed, coming: str) -> list[dict[str, str]]:
    """Write the plan to deploy in every format there is; by system the path of its file and the flags it needs."""
    from moetrace.files import write_bytes
    from moetrace.placement.expert_maps import MAPS

    if shared.layers is not None:
        shared.note(f"{placed.trace}: no plan is written, which takes all layers: leave --layers out")
        return []
    if not len(placed.frames["plans"]):
        return []
    stem = shared.folder().result_path("place", given, f"{plan.gpus}-gpus")
    deployed = []
    for kind in MAPS:
        try:
            content = kind.content(plan)
        except SettingError as error:
            say(f"no plan for {', '.join(kind.flags)}: {error}")
            continue
        path = str(write_bytes(stem.with_name(stem.name + kind.ending), content))
        deployed += [{"path": path, "system": name, "flags": flags(plan, path)} for name, flags in kind.flags.items()]
    replicas = f", with {placed.redundant:,} replicas," if placed.redundant else ""
    shared.note(f"wrote the plan by {placed.best}{replicas} for {coming} to {stem.parent}, for")
    for own in deployed:
        shared.note(f"  {own['system']}: {own['flags']}")
    if plan.slots == placed.slots and min(plan.slots):
        shared.note(
            f"  their first layer is {min(plan.slots)}, as in the trace: --first-layer N if it is not the model's"
        )
    return deployed


def _launched(shared: Shared, placed: Placement, written: Sequence[dict[str, str]]) -> Placement:
    """*placed* with what starts the recommended policy: where a system plans by itself that, else a file's flags."""
    if placed.verdict is None:
        return placed
    flags = next((own["flags"] for own in written if own["system"] == "SGLang"), "")
    verdict = placed.verdict.launched(flags)
    for own in (verdict.as_row(), verdict.stock or {"launch": ""}):
        if own["launch"] not in ("", flags):
            shared.note(f"the policy of {own['system']} for {placed.trace}: {own['launch']}")
    return replace(placed, verdict=verdict)


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
        parts.append(("to the end" if holds is None else f"for {holds:,} steps{more}") + f" if made while {state}")
    within = f"its busiest GPU within {100 * ENOUGH:.0f} % of the mean load of planning every {shortest:,} steps"
    shared.note(f"{placed.trace}: a plan by {placed.best} holds {', and '.join(parts)}: that long it keeps {within}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(cls=Command)(place)
