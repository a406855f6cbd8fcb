"""`moetrace hot`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetrace.cli.options import FirstLayer, ModelLayers, QuickProtocol, Shared, Traces, bytes_of
from moetrace.cli.output import PERCENT, Report, Table

if TYPE_CHECKING:
    from moetrace.residency.study import Residency
    from moetrace.trace import LoadTrace
    from moetrace.workspace.found import Found

SUMMARY_COLUMNS = (
    "method", "allocation", "slots", "state", "hit_rate", "hit_rate_low", "hit_rate_high", "active_hit_rate",
    "active_hit_rate_low", "active_hit_rate_high", "difference", "difference_low", "difference_high", "worst_layer",
    "loads", "ms_per_step", "active", "cutoffs", "scored",
)  # fmt: skip


def bandwidth_of(text: str) -> float:
    """Bytes per second as an option has them, such as 25GB/s."""
    found = bytes_of(text.strip().removesuffix("/s"))
    if not found:
        raise typer.BadParameter(f"a bandwidth must be above 0, got {text!r}")
    return found


def hot(
    protocol: QuickProtocol,
    shared: Shared,
    traces: Traces = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Experts to keep in every layer  [default: as many as get more than the mean load]",
        ),
    ] = None,
    total: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Experts to keep in all layers together, divided over the layers so that they cover the most load.",
            metavar="N",
        ),
    ] = None,
    cover: Annotated[
        float | None,
        typer.Option(
            help="Keep the fewest experts that cover this fraction of token choices, such as 0.9.", metavar="FRACTION"
        ),
    ] = None,
    cold: Annotated[int, typer.Option(min=0, help="Also list the N coldest experts of every layer.")] = 0,
    horizon: Annotated[
        int | None, typer.Option(min=1, help="Steps for which a set stays  [default: 1000, less if the trace is short]")
    ] = None,
    refresh: Annotated[
        int | None,
        typer.Option(min=1, help="Also score a set that is chosen anew every N steps  [default: 100]", metavar="N"),
    ] = None,
    expert_bytes: Annotated[
        float | None, typer.Option(parser=bytes_of, help="Size of one expert, such as 18MB.", metavar="B")
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(parser=bandwidth_of, help="Loading speed, such as 25GB/s, to report milliseconds.", metavar="B/S"),
    ] = None,
    model_layers: ModelLayers = 0,
    first_layer: FirstLayer = None,
) -> None:
    """Choose the experts to keep in fast memory.

    At every cutoff, a set is chosen by the forecast of each predictor and scored on the load that
    followed. A token choice is one of the top-k experts that a token is sent to. The hit rate of
    token choices is the fraction of expert work that the fast device does, if a CPU does the rest. The
    hit rate of active experts is the fraction of the experts used in a step that need no loading. For
    comparison there are LRU and LFU caches, a set that is refreshed, the best set in hindsight, and a
    cache with perfect foresight.

    The sets for the steps after the end of the trace are written as lists and in the formats of
    ExLlamaV3, KTransformers, a fork of llama.cpp, and ESFT.

    \b
    Example: moetrace hot gpt-moe-8e-a --slots 2 --cold 1
    """
    from inspect import unwrap

    from moetrace.forecasting.predictors import QUICK
    from moetrace.frames import stacked
    from moetrace.reporting.tables import records
    from moetrace.workspace.commands import hot as ask

    backtesting = protocol.backtesting(shared)

    def one(given: str, trace: LoadTrace, progress: Report) -> Found[Residency]:
        folder = shared.folder().result_path("hot", given)
        found: Found[Residency] = unwrap(ask)(
            trace, slots, total=total, cover=cover, cold=cold, horizon=horizon, refresh=refresh,
            expert_bytes=expert_bytes, bandwidth=bandwidth, model_layers=model_layers, first_layer=first_layer,
            folder=folder, note=shared.note, progress=progress, selection=shared.choice(), backtesting=backtesting,
        )  # fmt: skip
        return found

    done = shared.each_trace(traces, "Keeping", PERCENT, one)
    for found in done:
        shared.note_reused(found.trace, found.computed, found.reused)
        shared.note_found(found)
    frames = {name: stacked([found.frames[name] for found in done]) for name in done[0].frames}
    tables = {
        "summary": Table("Coverage", frames["summary"], SUMMARY_COLUMNS, by=("trace", "horizon")),
        "sets": Table("Experts to keep", frames["sets"]),
        "scores": Table("Scores", frames["scores"]),
        "curve": Table("Coverage by number of experts per layer", frames["curve"]),
        "ages": Table("Coverage by age of a set", frames["ages"]),
        "cold": Table("Coldest experts", frames["cold"]),
    }
    written = [file for found in done for file in found.deploy]
    document: dict[str, Any] = {"answers": [found.value.answer.as_row() for found in done]}
    document |= {"files": [file["path"] for file in written], "deploy": written}
    document |= {"figures": [path for found in done for path in found.files]}
    document |= {"trained_on": backtesting.trained_on(shared.note, QUICK)}
    document |= {name: records(table.frame) for name, table in tables.items()}
    shared.emit(tables, document, [found.screen(every=shared.all) for found in done])
