"""`moetrace place`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moetrace.cli.options import Command, FirstLayer, Hardware, QuickProtocol, Shared, steps_of, with_options
from moetrace.cli.output import Table, say
from moetrace.cli.progress import Report

if TYPE_CHECKING:
    from moetrace.placement.study import Placement
    from moetrace.placement.systems.base import System
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


@with_options
def place(
    protocol: QuickProtocol,
    shared: Shared,
    device: Hardware,
    gpus: Annotated[
        int | None, typer.Option(min=2, envvar="MOETRACE_GPUS", help="GPUs that share the experts of a layer.")
    ] = None,
    traces: Annotated[list[str] | None, typer.Argument(help="Names or paths. [default: all traces]")] = None,
    redundant: Annotated[
        str,
        typer.Option(
            help="Redundant experts. Give several (0,32,64) to compare them; the plan uses the recommended number.",
            metavar="N",
        ),
    ] = "0",
    horizon: Annotated[
        int | None,
        typer.Option(min=1, help="Steps that a plan is made for  [default: 1000, or a quarter of a short trace]"),
    ] = None,
    least_gain: Annotated[
        float,
        typer.Option(
            min=0,
            help="Replan only if the peak falls by more than this fraction of the mean GPU load.",
            metavar="FRACTION",
        ),
    ] = 0.0,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="Keep a plan whose predicted peak is this close to the lowest.", metavar="FRACTION"),
    ] = 0.01,
    dispatch: Annotated[
        Literal["even", "nearest", "lp", "fewest"],
        typer.Option(
            help="How an expert's tokens are split: evenly, to the nearest replica, or anew in each step so that GPUs "
            "are even in tokens (lp) or wake few replicas (fewest)."
        ),
    ] = "even",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that the GPUs are on.")] = 1,
    groups: Annotated[
        int, typer.Option(min=1, help="Groups of experts in group-limited routing; each stays on one node.")
    ] = 1,
    top_groups: Annotated[
        int | None, typer.Option(min=1, help="Groups that a token takes. [default: half of them]")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="The plan deployed today. It is scored, and the new plan moves as few experts as possible.",
            metavar="FILE",
        ),
    ] = None,
    system: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MOETRACE_SYSTEM",
            help="Serving system, such as sglang, whose policies, files and flags count; repeatable.",
            metavar="NAME",
        ),
    ] = None,
    model_layers: Annotated[
        int, typer.Option(min=0, help="Layers of the model: files have a row for those without a plan.")
    ] = 0,
    first_layer: FirstLayer = None,
) -> None:
    """Decide whether balancing is worth it, and place experts.

    Places experts on GPUs using the forecast, and scores each plan on the load that followed. At every
    cutoff each predictor's forecast becomes a plan, and so do the load of the last 1,000 steps, which
    serving systems plan by (window_mean), and the load that followed (oracle). The score is the load of
    the busiest GPU divided by the mean GPU load over the whole horizon (peak_over_mean; 1 is even), and
    the mean over the busiest where every step waits for its own (balance). The verdict compares the
    rebalancing policies of serving systems, replayed step by step.

    The plan for the steps after the end uses the predictor whose plans were best. It is written in the
    formats of vllm-ascend, MindIE, SGLang and TensorRT-LLM.

    \b
    Example: moetrace place gpt-moe-8e-a --gpus 4 --predictor auto --predictor sw_avg
    """
    from moetrace.frames import stacked
    from moetrace.placement.deploy import read_plan
    from moetrace.placement.planning import Planning
    from moetrace.placement.study import place as place_trace
    from moetrace.placement.systems import systems_named
    from moetrace.placement.verdict import at_most
    from moetrace.report.tables import records
    from moetrace.report.verdict import first_answer

    if gpus is None:
        raise typer.BadParameter(
            "missing option --gpus N: the number of GPUs that share a layer's experts. "
            "Example: moetrace place gpt-moe-8e-a --gpus 4"
        )
    redundants = list(dict.fromkeys(steps_of(redundant, "numbers of redundant experts such as 0,32,64")))
    if min(redundants) < 0:
        raise typer.BadParameter(f"redundant experts must be 0 or more, got {redundant!r}")
    systems = systems_named(system or [])
    planning = Planning(gpus, redundants[0], least_gain, tolerance, dispatch, nodes, groups, top_groups, device.time())
    predictors, settings = protocol.predictors(), protocol.settings(shared)
    written: list[dict[str, str]] = []
    figures: list[str] = []
    horizons: dict[str, int] = {}

    def one(given: str, trace: LoadTrace, progress: Report) -> tuple[str, Placement]:
        asked, cutoffs = protocol.windows(trace, [horizon] if horizon else None, [1000], shared.note)
        horizons[trace.name] = asked[0]
        for number in redundants:
            planning.with_redundant(number).check(trace.experts)
        shared.note(first_answer(trace.name, at_most(trace, planning)))
        deployed = None if plan is None else read_plan(plan, trace.layers, trace.experts, gpus, first_layer)
        placed = place_trace(
            trace, predictors, planning, asked[0], cutoffs, progress, redundants=redundants, deployed=deployed,
            expert_bytes=device.expert_bytes, systems=[own.name for own in systems] if system else (),
            first=protocol.first, seed=protocol.seed, **settings,
        )  # fmt: skip
        return given, placed

    done = []
    for given, placed in shared.each_trace(traces, "Planning", "tasks", one):  # lines to copy, after the progress bar
        shared.note_reused(placed.trace, placed.computed, placed.reused)
        files = _write_plans(shared, given, placed, systems, model_layers, first_layer, horizons[placed.trace])
        written += files
        flags = next((file["flags"] for file in files if file["system"] == "SGLang"), "")
        verdict = placed.verdict.launched(flags)
        for policy in (verdict.as_row(), verdict.stock or {"launch": ""}):
            if policy["launch"] not in ("", flags):
                shared.note(f"Policy of {policy['system']} for {placed.trace}: {policy['launch']}")
        figures += _draw(shared, given, placed)
        for left_out in placed.notes:
            shared.note(f"{placed.trace}: {left_out}")
        done.append(replace(placed, verdict=verdict))

    frames = {name: stacked([placed.frames[name] for placed in done]) for name in done[0].frames}
    summary = (*SUMMARY_COLUMNS, *(NODE_COLUMNS if nodes > 1 else ()))
    tables = {
        "summary": Table(f"Experts on {gpus} GPUs", frames["summary"], summary, by=("trace", "horizon")),
        "plans": Table("Plan for the steps to come", frames["plans"]),
        "scores": Table("Scores", frames["scores"]),
        "knee": Table("Saving by tokens per expert over the ridge", frames["knee"]),
        "policies": Table("Policies", frames["policies"], POLICY_COLUMNS, by=("trace",)),
    }
    document: dict[str, Any] = {"gpus": gpus, "horizon": max(horizons.values()), "dispatch": dispatch}
    document |= {"nodes": nodes, "groups": groups}
    document |= {"files": list(dict.fromkeys(file["path"] for file in written)), "deploy": written, "figures": figures}
    document |= {"trained_on": protocol.trained_on(shared)}
    document |= {
        name: values[0] if len(values) == 1 else values
        for name, values in (
            ("redundant", list(dict.fromkeys(placed.redundant for placed in done))),
            ("verdict", [placed.verdict.as_row() for placed in done]),
        )
    }
    document |= {name: records(table.frame) for name, table in tables.items()}
    shared.emit(tables, document, [_screen(placed, shared) for placed in done])


def _screen(placed: Placement, shared: Shared) -> Screen:
    """The verdict on one trace, and the table of plans."""
    from moetrace.report.answers import alarm
    from moetrace.report.screens import place_screen
    from moetrace.report.verdict import verdict_notes, worth

    verdict = placed.verdict.as_row() | {"gpus": placed.planning.gpus}
    of = "Load" if placed.planning.time.linear else "Expert time"
    notes = verdict_notes(verdict, files=shared.layers is None)
    sentence = f"{alarm(placed.frames['balance'])}{worth(verdict).sentence}"
    return place_screen(placed.frames["summary"], sentence, every=shared.all, notes=notes, of=of)


def _write_plans(
    shared: Shared,
    given: str,
    placed: Placement,
    systems: Sequence[System],
    model_layers: int,
    first_layer: int | None,
    horizon: int,
) -> list[dict[str, str]]:
    """Write the plan to deploy in every format; by system the path of its file and the flags it needs."""
    from moetrace.placement.deploy import write_plans

    if shared.layers is not None:
        shared.note(f"{placed.trace}: no plan is written, which needs all layers: leave out --layers")
        return []
    if not len(placed.frames["plans"]):
        return []
    plan = placed.deployment(model_layers, first_layer)
    stem = shared.folder().result_path("place", given, f"{plan.gpus}-gpus")
    written, failed = write_plans(plan, stem, systems)
    for sentence in failed:
        say(sentence)
    replicas = f", {placed.redundant:,} redundant experts" if placed.redundant else ""
    shared.note(f"Saved the plan for the next {horizon:,} steps (forecast: {placed.best}{replicas}) to {stem.parent}:")
    for file in written:
        shared.note(f"  {file['system']}: {file['flags']}")
    if plan.slots == placed.slots and min(plan.slots):
        shared.note(
            f"  Layers are numbered from {min(plan.slots)}, as in the trace. If your model numbers them differently, "
            "add --first-layer N."
        )
    return written


def _draw(shared: Shared, given: str, placed: Placement) -> list[str]:
    """Draw the scores of plans, and the saving by tokens per expert, where there are any; the files."""
    from moetrace.files import write_bytes
    from moetrace.report.figures import knee, plan_course
    from moetrace.report.style import picture, styled

    gpus, drawn = placed.planning.gpus, {}
    with styled():
        if len(placed.frames["scores"]):
            drawn["png"] = plan_course(placed.frames["scores"], placed.best)
        if len(placed.frames["knee"]):
            drawn["knee.png"] = knee(placed.frames["knee"], placed.verdict.as_row())
        paths = []
        for ending, figure in drawn.items():
            path = shared.folder().result_path("place", given, f"{gpus}-gpus.{ending}")
            write_bytes(path, picture(figure, "png", f"{placed.trace}: {gpus} GPUs"))
            paths.append(str(path))
    if paths:
        shared.note(f"Saved the charts to {' and '.join(paths)}")
    return paths


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(cls=Command)(place)
