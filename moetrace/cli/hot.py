"""`moetrace hot`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetrace.cli.options import Command, FirstLayer, QuickProtocol, Shared, Traces, bytes_of, with_options
from moetrace.cli.output import Table, say
from moetrace.cli.progress import Report

if TYPE_CHECKING:
    from moetrace.residency.study import Residency
    from moetrace.trace import LoadTrace

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


@with_options
def hot(
    protocol: QuickProtocol,
    shared: Shared,
    traces: Traces = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Experts to keep in every layer.  [default: the knee of the curve]")
    ] = None,
    total: Annotated[
        int | None, typer.Option(min=1, help="Experts to keep in all layers together, divided by load.", metavar="N")
    ] = None,
    cover: Annotated[
        float | None,
        typer.Option(help="Keep as few experts as cover this part of token choices, such as 0.9.", metavar="FRACTION"),
    ] = None,
    cold: Annotated[int, typer.Option(min=0, help="Also name the N coldest experts of every layer.")] = 0,
    horizon: Annotated[
        int | None, typer.Option(min=1, help="Steps that a set stays.  [default: 1000, less if the trace is short]")
    ] = None,
    refresh: Annotated[
        int | None, typer.Option(min=1, help="Steps between two choices of a refreshed set.  [default: 100]")
    ] = None,
    expert_bytes: Annotated[
        float | None, typer.Option(parser=bytes_of, help="Size of one expert, such as 18MB.", metavar="B")
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(parser=bandwidth_of, help="Loading speed, such as 25GB/s, for milliseconds.", metavar="B/S"),
    ] = None,
    model_layers: Annotated[
        int, typer.Option(min=0, help="Layers of the model: files have a row for those without a set.")
    ] = 0,
    first_layer: FirstLayer = None,
) -> None:
    """Choose the experts to keep in fast memory.

    At every cutoff, a set by each predictor's forecast is scored on the load that followed: the hit rate of
    token choices, which is work that stays on the fast device, and of the experts active in a step, the
    rest of which have to be loaded. LRU and LFU caches, a set that is chosen anew, the best set in
    hindsight and a cache with perfect foresight (Belady's) show what else is possible.

    The sets for the steps after the end are written as lists and in the formats of ExLlamaV3,
    KTransformers, a fork of llama.cpp, and ESFT.

    \b
    Example: moetrace hot gpt-moe-8e-a --slots 2 --cold 1
    """
    from moetrace.frames import stacked
    from moetrace.report.screens import kept_screen
    from moetrace.report.tables import records
    from moetrace.residency.study import HORIZON, default_horizon
    from moetrace.residency.study import hot as keep

    if (expert_bytes is None) != (bandwidth is None):
        raise typer.BadParameter("--expert-bytes and --bandwidth go together: give both for milliseconds")
    predictors, settings = protocol.predictors(), protocol.settings(shared)
    transfer = None if expert_bytes is None or bandwidth is None else expert_bytes / bandwidth
    chosen = protocol.cutoffs is not None or protocol.every is not None or protocol.first is not None

    def one(given: str, trace: LoadTrace, progress: Report) -> tuple[str, Residency]:
        over = [horizon or default_horizon(trace)]
        cutoffs = protocol.windows(trace, over, over, shared.note)[1] if chosen else None
        found = keep(
            trace, predictors, slots=slots, total=total, cover=cover, cold=cold, horizon=horizon, cutoffs=cutoffs,
            refresh=refresh, transfer=transfer, progress=progress, seed=protocol.seed, **settings,
        )  # fmt: skip
        if horizon is None and 0 < found.answer.horizon < HORIZON:
            few = f"{trace.name}: {len(trace.steps):,} steps are too few for sets that stay {HORIZON:,}"
            shared.note(f"{few}: they are scored over {found.answer.horizon:,} (--horizon sets it)")
        return given, found

    written: list[dict[str, str]] = []
    figures: list[str] = []
    done = []
    for given, found in shared.each_trace(traces, "Keeping", "tasks", one):
        shared.note_reused(found.trace, found.computed, found.reused)
        written += _write_sets(shared, given, found, model_layers, first_layer)
        figures += _draw(shared, given, found)
        done.append(found)

    frames = {name: stacked([found.frames[name] for found in done]) for name in done[0].frames}
    tables = {
        "summary": Table("Coverage", frames["summary"], SUMMARY_COLUMNS, by=("trace", "horizon")),
        "sets": Table("Experts to keep", frames["sets"]),
        "scores": Table("Scores", frames["scores"]),
        "curve": Table("Coverage by number of experts per layer", frames["curve"]),
        "ages": Table("Coverage by age of a set", frames["ages"]),
        "cold": Table("Coldest experts", frames["cold"]),
    }
    document: dict[str, Any] = {"answers": [found.answer.as_row() for found in done]}
    document |= {"files": [file["path"] for file in written], "deploy": written, "figures": figures}
    document |= {"trained_on": protocol.trained_on(shared)}
    document |= {name: records(table.frame) for name, table in tables.items()}
    shared.emit(tables, document, [kept_screen(found.answer.as_row(), found.frames) for found in done])


def _write_sets(
    shared: Shared, given: str, found: Residency, model_layers: int, first_layer: int | None
) -> list[dict[str, str]]:
    """Write the sets for every runtime; by system the path of its file and the flags it needs."""
    from moetrace.residency.systems import write_sets
    from moetrace.residency.systems.base import ResidentSets

    stem = shared.folder().result_path("hot", given, "experts")
    sets = ResidentSets(found.sets, found.shares, model_layers).with_first_layer(first_layer)
    written, failed = write_sets(sets, stem)
    for sentence in failed:
        say(sentence)
    shared.note(f"Saved the experts to keep for the steps after the end (forecast: {found.best}) to {stem.parent}:")
    for file in written:
        shared.note(f"  {file['system']}: {file['flags']}")
    if first_layer is None and min(sets.sets):
        shared.note(
            f"  Layers are numbered from {min(sets.sets)}, as in the trace. If your model numbers them differently, "
            "add --first-layer N."
        )
    return written


def _draw(shared: Shared, given: str, found: Residency) -> list[str]:
    """Draw coverage by the number of experts and by the age of a set; the files."""
    from moetrace.files import write_bytes
    from moetrace.report.residency import ages, coverage
    from moetrace.report.style import picture, styled

    slots, written = found.answer.slots, []
    with styled():
        figures = {
            "curve": (coverage(found.frames["curve"], slots), f"coverage by resident experts, {slots:,.4g} per layer"),
            "ages": (ages(found.frames["ages"], found.best), "coverage by the age of a set"),
        }
        for name, (figure, title) in figures.items():
            path = shared.folder().result_path("hot", given, f"{name}.png")
            write_bytes(path, picture(figure, "png", f"{found.trace}: {title}"))
            written.append(str(path))
    shared.note(f"Saved the charts to {', '.join(written)}")
    return written


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(cls=Command)(hot)
