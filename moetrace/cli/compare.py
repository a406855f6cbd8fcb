"""`moetrace compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from moetrace.cli.options import Hardware, Shared
from moetrace.cli.output import Table

SIDE = "Name or path; NAME:FIRST-LAST for some of its steps."


def compare(
    shared: Shared,
    device: Hardware,
    a: Annotated[str, typer.Argument(metavar="A", help=SIDE)],
    b: Annotated[str, typer.Argument(metavar="B", help=SIDE)],
    gpus: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="Score a plan from A on B, for N GPUs that share the experts of a layer."
        ),
    ] = None,
    redundant: Annotated[int, typer.Option(min=0, help="Redundant experts, with --gpus.")] = 0,
    slots: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Score a resident set from A on B, with N experts of every layer."),
    ] = None,
) -> None:
    """Compare the loads of two traces: does a plan transfer?

    A token choice is one of the top-k experts that a token is sent to. The distance of a layer is the
    fraction of token choices that A and B send to different experts, on loads averaged over all steps.
    The noise floor is the distance that sampling alone would cause if A and B had the same load.

    With --gpus, a plan is made from the last steps of A; with --slots, a resident set (the experts to
    keep in fast memory). Each is scored on the second half of B, and compared with a plan or set from the
    first half of B.

    \b
    Example: moetrace compare gpt-moe-8e-a:0-5999 gpt-moe-8e-a:6000-11999 --gpus 4
    """
    from inspect import unwrap

    from moetrace.placement.planning import usual_gpus
    from moetrace.reporting.tables import records
    from moetrace.workspace.commands import compare as ask

    one, other = shared.folder().parts([a, b])
    with shared.progress(f"comparing {one.name} with {other.name}", "layers") as progress:
        found = unwrap(ask)(
            one, other, gpus=gpus, redundant=redundant, slots=slots, progress=progress, selection=shared.choice(),
            device=device.device(),
        )  # fmt: skip
    shared.note_found(found)
    layers = found.frames["layers"]
    document = {**found.as_row(), "transfer": found.transfer, "layers": records(layers)}
    then = () if found.transfer else ("compare", a, b, "--gpus", str(usual_gpus(one.experts)))
    shared.emit(
        {"layers": Table("Distance of each layer", layers)}, document, [found.screen(every=shared.all)], then=then
    )
