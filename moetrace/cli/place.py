"""`moetrace place`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moetrace.cli.options import FirstLayer, Hardware, ModelLayers, QuickProtocol, Shared, Traces, steps_of
from moetrace.cli.output import PERCENT, Report, Table

if TYPE_CHECKING:
    from moetrace.placement.study import Placement
    from moetrace.trace import LoadTrace
    from moetrace.workspace.found import Found

SUMMARY_COLUMNS = (
    "strategy", "state", "peak_over_mean", "above_oracle", "difference", "difference_low", "difference_high",
    "balance", "moved", "scored", "cutoffs",
)  # fmt: skip
NODE_COLUMNS = ("node_peak_over_mean", "nodes_per_token")
POLICY_COLUMNS = (
    "system", "window", "interval", "threshold", "redundant", "balance", "moved_per_1000", "recommended", "chosen_by",
    "moved_bytes", "peak_over_mean", "dispatch",
)  # fmt: skip


def place(
    protocol: QuickProtocol,
    shared: Shared,
    device: Hardware,
    gpus: Annotated[
        int | None, typer.Option(min=2, envvar="MOETRACE_GPUS", help="GPUs that share the experts of a layer.")
    ] = None,
    traces: Traces = None,
    redundant: Annotated[
        str,
        typer.Option(
            help="Redundant experts of each layer. Give several (0,32,64) to compare; the plan uses the best number.",
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
            help="Replan only if the predicted peak falls by at least this fraction of the mean GPU load. "
            "Values below half of --tolerance have no effect.",
            metavar="FRACTION",
        ),
    ] = 0.0,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0,
            help="Accept a predicted peak above the lowest possible by up to this fraction of the mean GPU load, to "
            "move fewer experts.",
            metavar="FRACTION",
        ),
    ] = 0.01,
    dispatch: Annotated[
        Literal["even", "nearest", "lp", "fewest"],
        typer.Option(
            help="How the tokens of an expert are split among its replicas: equally (even), to the nearest (nearest), "
            "to minimise the tokens of the busiest GPU in each step (lp), or to as few replicas as possible (fewest)."
        ),
    ] = "even",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that hold the GPUs.")] = 1,
    groups: Annotated[
        int, typer.Option(min=1, help="Groups of experts in group-limited routing; each stays on one node.")
    ] = 1,
    top_groups: Annotated[
        int | None, typer.Option(min=1, help="Groups that a token uses.  [default: half of them]")
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
            help="Only the policies, files and flags of this system, such as sglang (repeatable).",
            metavar="NAME",
        ),
    ] = None,
    model_layers: ModelLayers = 0,
    first_layer: FirstLayer = None,
) -> None:
    """Decide whether balancing is worth it, and place experts.

    At every cutoff, a plan is made from the forecast of each predictor and scored on the load that
    followed. The references are the default placement, window_mean (the last 1,000 steps, from which
    vLLM and SGLang plan) and oracle (the load that followed). The table has the load of the busiest
    GPU over the whole horizon, divided by the mean GPU load: 1 is even. With --hardware, it is time
    instead of load. The verdict above the table comes from a replay of the rebalancing policies of
    serving systems, step by step.

    The plan for the steps after the end of the trace uses the predictor with the best plans. It is
    written in the formats of vllm-ascend, MindIE, SGLang and TensorRT-LLM.

    \b
    Example: moetrace place gpt-moe-8e-a --gpus 4 --predictor auto --predictor sw_avg
    """
    from inspect import unwrap

    from moetrace.forecasting.predictors import QUICK
    from moetrace.frames import stacked
    from moetrace.reporting.tables import records
    from moetrace.workspace.commands import place as ask

    if gpus is None:
        raise typer.BadParameter(
            "missing option --gpus N: the number of GPUs that share a layer's experts. "
            "Example: moetrace place gpt-moe-8e-a --gpus 4"
        )
    redundants = steps_of(redundant, "numbers of redundant experts such as 0,32,64")
    backtesting = protocol.backtesting(shared)

    def one(given: str, trace: LoadTrace, progress: Report) -> Found[Placement]:
        folder = shared.folder().result_path("place", given)
        found: Found[Placement] = unwrap(ask)(
            trace, gpus, redundant=redundants, horizon=horizon, least_gain=least_gain, tolerance=tolerance,
            dispatch=dispatch, nodes=nodes, groups=groups, top_groups=top_groups, plan=plan, system=system or (),
            model_layers=model_layers, first_layer=first_layer, folder=folder, note=shared.note, progress=progress,
            selection=shared.choice(), backtesting=backtesting, device=device.device(),
        )  # fmt: skip
        return found

    done = shared.each_trace(traces, "Planning", PERCENT, one)
    for found in done:  # lines to copy, after the progress bar
        shared.note_reused(found.trace, found.computed, found.reused)
        shared.note_found(found)
    frames = {name: stacked([found.frames[name] for found in done]) for name in done[0].frames}
    summary = (*SUMMARY_COLUMNS, *(NODE_COLUMNS if nodes > 1 else ()))
    tables = {
        "summary": Table(f"Experts on {gpus} GPUs", frames["summary"], summary, by=("trace", "horizon")),
        "plans": Table("Plan for the steps to come", frames["plans"]),
        "scores": Table("Scores", frames["scores"]),
        "knee": Table("Saving by tokens per expert over the ridge", frames["knee"]),
        "policies": Table("Policies", frames["policies"], POLICY_COLUMNS, by=("trace",)),
    }
    written = [file for found in done for file in found.deploy]
    document: dict[str, Any] = {"gpus": gpus, "horizon": max(found.horizon for found in done), "dispatch": dispatch}
    document |= {"nodes": nodes, "groups": groups, "files": list(dict.fromkeys(file["path"] for file in written))}
    document |= {"deploy": written, "figures": [path for found in done for path in found.files]}
    document |= {"trained_on": backtesting.trained_on(shared.note, QUICK)}
    document |= {
        name: values[0] if len(values) == 1 else values
        for name, values in (
            ("redundant", list(dict.fromkeys(found.value.redundant for found in done))),
            ("verdict", [found.verdict.as_row() for found in done]),
        )
    }
    document |= {name: records(table.frame) for name, table in tables.items()}
    shared.emit(tables, document, [found.screen(every=shared.all) for found in done])
