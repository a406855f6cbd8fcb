"""`moetrace ingest`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moetrace.cli.shared import Shared, Table, with_shared

if TYPE_CHECKING:
    from moetrace.workspace import Ingested

DEFAULT_SOURCE = Path("sample_traces")


@with_shared
def ingest(
    shared: Shared,
    sources: Annotated[list[Path] | None, typer.Argument(help="Files or folders; ./sample_traces if none.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the trace, for a single source.")] = None,
    from_: Annotated[
        str | None, typer.Option("--from", help="Format of the sources, if it is not to be guessed.")
    ] = None,
    tokens_per_step: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens routed in one layer in one step; turns shares into counts."),
    ] = None,
    list_formats: Annotated[bool, typer.Option("--list-formats", help="List the known formats and exit.")] = False,
) -> None:
    """Read dumps of any known format, check them, and write canonical traces.

    One file is one trace, named by its stem; a folder means every trace file lying in it.
    The same unchanged source again does nothing.

    \b
    Example: moetrace ingest sample_traces/gpt-moe-8e-a.parquet --name mine
    """
    if list_formats:
        _list_formats(shared)
        return
    from moetrace.errors import WorkspaceError
    from moetrace.formats import ReadOptions, sources_in

    found = [source for given in (sources or [DEFAULT_SOURCE]) for source in sources_in(given)]
    if name is not None and len(found) > 1:
        raise WorkspaceError(f"--name goes with one source, and there are {len(found)}")
    place = shared.place()
    options = ReadOptions(tokens_per_step=tokens_per_step)

    def one(source: str) -> Ingested:
        with shared.progress(Path(source).name) as progress:
            return place.ingest(
                Path(source), name=name, options=options, forced=from_, force=shared.force, progress=progress
            )

    done = shared.each([str(source) for source in found], one)
    _show(shared, done)


def _show(shared: Shared, done: list[Ingested]) -> None:
    from moetrace.frames import traces_frame

    for item in done:
        if item.unchanged:
            shared.note(f"{item.trace.name} is there already, from the same unchanged source: nothing to do")
        for assumption in item.trace.info.assumptions:
            shared.note(f"{item.trace.name}: assumed: {assumption}")
        for finding in item.trace.info.findings:
            shared.note(f"{item.trace.name}: {finding.severity}: {finding.name}, {finding.place}: {finding.evidence}")
    columns = ["trace", "steps", "first_step", "last_step", "layers", "experts", "tokens_per_step", "format"]
    frame = traces_frame(item.trace for item in done)
    shared.emit({"traces": Table("Ingested traces", frame, columns)}, {"traces": [_described(item) for item in done]})


def _described(item: Ingested) -> dict[str, object]:
    from dataclasses import asdict

    trace = item.trace
    return {
        "name": trace.name,
        "path": str(item.path),
        "steps": len(trace.steps),
        "layers": len(trace.layers),
        "experts": trace.experts,
        "tokens_per_step": trace.info.tokens_per_step,
        "format": trace.info.format,
        "findings": [asdict(finding) for finding in trace.info.findings],
        "assumptions": list(trace.info.assumptions),
        "source": trace.info.source,
        "fingerprint": trace.info.fingerprint,
        "unchanged": item.unchanged,
    }


def _list_formats(shared: Shared) -> None:
    import pandas as pd

    from moetrace.formats import FORMATS

    frame = pd.DataFrame([{"format": name, "needs": format.needs} for name, format in FORMATS.items()])
    shared.emit({"formats": Table("Known formats", frame)}, {"formats": frame.to_dict("records")})


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(ingest)
