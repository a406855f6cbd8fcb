"""`moetrace place`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetrace.cli.predict import Protocol, tested
from moetrace.cli.shared import Shared, Table, with_options

if TYPE_CHECKING:
    import pandas as pd

SUMMARY_COLUMNS = (
    "strategy", "state", "peak_over_mean", "above_oracle", "difference", "difference_low", "difference_high",
    "balance", "moved", "scored", "cutoffs",
)  # fmt: skip


@with_options
def place(
    protocol: Protocol,
    shared: Shared,
    gpus: Annotated[int, typer.Option(min=2, help="GPUs that share the experts of a layer.")],
    traces: Annotated[list[str] | None, typer.Argument(help="Names or paths; all of the workspace if none.")] = None,
    redundant: Annotated[int, typer.Option(min=0, help="Slots for second and further copies of experts.")] = 0,
    horizon: Annotated[int, typer.Option(min=1, help="Steps that a plan is made for.")] = 1000,
) -> None:
    """Put experts on GPUs by the forecast, and score the plans on the load that then came.

    At every cutoff each predictor's forecast becomes a plan, and so do the load of the last 1,000
    steps, which serving systems plan by (window_mean), and the load that came (oracle). Scored is the
    busiest GPU: its load over that of the mean one, over the whole horizon (peak_over_mean; 1 is
    even), and the mean over the busiest where every step waits for its own (balance).

    The plan for the steps after the end is written for the predictor whose plans were best.

    \b
    Example: moetrace place gpt-moe-8e-a --gpus 4 --predictor auto --predictor sw_avg
    """
    from moetrace.backtest import stacked
    from moetrace.errors import WorkspaceError
    from moetrace.frames import best_strategy, means_frame, placement_frame, placement_summary, plans_frame
    from moetrace.placement import slots_of
    from moetrace.predictors import label
    from moetrace.report.tables import records
    from moetrace.store import safe
    from moetrace.workspace import write_bytes

    files: list[str] = []

    def one(name: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        slots_of(shared.open(name).experts, gpus, redundant)
        results = tested(shared, name, protocol, [horizon], ahead=True)
        trace = results.work.trace
        with shared.progress(f"plans of {trace.name}"):
            scores = placement_frame(trace, results.backtest, gpus, redundant)
            summary = placement_summary(scores, protocol.seed)
            means = means_frame(results.forecasts(), horizon)
            able = list(dict.fromkeys(means["predictor"])) if len(means) else [label(protocol.predictors()[0])]
            plans = plans_frame(trace, means, best_strategy(scores, able), gpus, redundant)
        path = shared.place().result_path("place", f"{safe(trace.name)}-{gpus}-gpus.json")
        if str(path) in files:
            raise WorkspaceError(f"{path} holds the plan of another trace of this name: place them one by one")
        if shared.layers is not None:
            shared.note(f"{trace.name}: no plan is written, which takes all layers: leave --layers out")
        elif len(plans):
            files.append(str(write_bytes(path, json.dumps(_expert_map(plans), indent=1).encode())))
            shared.note(f"wrote the plan by {plans['predictor'].iloc[0]} for the next {horizon:,} steps to {path}")
        return scores, summary, plans

    done = shared.each(shared.place().chosen(traces or []), one)
    scores, summary, plans = (stacked(frames) for frames in zip(*done))
    protocol.note_training(shared)
    tables = {
        "summary": Table(f"Experts on {gpus} GPUs", summary, SUMMARY_COLUMNS, by=("trace", "horizon")),
        "plans": Table("Plan for the steps to come", plans, printed=False),
        "scores": Table("Scores", scores, printed=False),
    }
    document: dict[str, Any] = {"gpus": gpus, "redundant": redundant, "horizon": horizon, "files": files}
    document["trained_on"] = [other.path.stem for other in protocol.others(shared)]
    shared.emit(tables, document | {name: records(table.frame) for name, table in tables.items()})


def _expert_map(plans: pd.DataFrame) -> dict[str, Any]:
    """The plan of a trace as vllm-ascend and MindIE read it; layers are numbered from 0 there."""
    layers = [
        {
            "layer_id": i,
            "device_count": len(own),
            "device_list": [
                {"device_id": int(gpu), "device_expert": experts} for gpu, experts in zip(own["gpu"], own["experts"])
            ],
        }
        for i, (_, own) in enumerate(plans.groupby("layer", sort=True))
    ]
    return {"moe_layer_count": len(layers), "layer_list": layers}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(place)
