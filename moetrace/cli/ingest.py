"""`moetrace ingest`."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moetrace.cli.completion import finding_names, format_names
from moetrace.cli.options import Shared
from moetrace.cli.output import Format, Table, say
from moetrace.words import Merge, Phase

if TYPE_CHECKING:
    from moetrace.workspace.traces import Ingested


@dataclass(frozen=True)
class Dumps:
    """What dumps hold and how they become traces: the options of `moetrace.workspace.contents.Dumps`."""

    name: Annotated[str | None, typer.Option(help="Name of the trace, for a single source.")] = None
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="FORMAT", autocompletion=format_names,
            help="Format of the sources, NAME or NAME:setting=value  [default: recognised from the files]",
        ),
    ] = None  # fmt: skip
    sql: Annotated[
        str | None,
        typer.Option(
            metavar="QUERY", help="DuckDB query instead of sources: SELECT step, layer, expert, tokens FROM ..."
        ),
    ] = None
    merge: Annotated[
        Merge | None,
        typer.Option(
            help="Combine all files into one trace: add counts (sum), or join along experts, layers or steps."
        ),
    ] = None
    bin_: Annotated[int | None, typer.Option("--bin", min=1, metavar="N", help="Sum every N passes into one step.")] = (
        None
    )
    phase: Annotated[
        Phase | None, typer.Option(help="Only the passes or tokens of this phase, if the dump distinguishes them.")
    ] = None
    tokens_per_step: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Routed tokens (tokens times top-k) per layer and step, to convert shares of the load into counts.",
        ),
    ] = None
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a step, before top-k, to split token-level dumps into steps.")
    ] = None
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts that each token is sent to.")] = None
    experts: Annotated[int | None, typer.Option(min=1, help="Experts per layer, if the dump does not show it.")] = None
    stages: Annotated[int | None, typer.Option(min=1, help="Pipeline stages of the run (Megatron-LM ranks).")] = None
    pattern: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Regular expression for tags, with (?P<layer>) and (?P<expert>)."),
    ] = None
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=NAME", help="Meaning of a column, such as tokens=routed (repeatable)."),
    ] = None
    axes: Annotated[
        str | None,
        typer.Option(
            metavar="AXES", help="Axes of an array, such as layers,steps,experts or steps,layers,ranks,experts."
        ),
    ] = None
    key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Key of the counts or choices in a document, such as stats.counts."),
    ] = None
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=VALUE", help="Only rows with this value, such as phase=decode (repeatable)."),
    ] = None
    sum_over: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Sum counts over the values of a column, such as rank.")
    ] = None
    idle_experts: Annotated[bool, typer.Option("--idle-experts", help="An expert without a row got no tokens.")] = False
    first_expert: Annotated[int | None, typer.Option(min=0, help="Number of the first expert.")] = None
    ignore: Annotated[
        int | None, typer.Option(min=0, metavar="ID", help="Expert number to ignore, such as padding.")
    ] = None
    difference: Annotated[
        bool, typer.Option("--difference", help="Values are cumulative counters: use the increase per step.")
    ] = False
    accept: Annotated[
        list[str] | None,
        typer.Option(metavar="FINDING", autocompletion=finding_names, help="Import despite this finding (repeatable)."),
    ] = None


def ingest(
    shared: Shared,
    dumps: Dumps,
    sources: Annotated[
        list[str] | None, typer.Argument(help="Files, folders, or URIs of Parquet files.  [default: ./sample_traces]")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before --force replaces a trace.")] = False,
    list_formats: Annotated[bool, typer.Option("--list-formats", help="List the known formats and exit.")] = False,
) -> None:
    """Read dumps and logs into traces, and check them.

    One file becomes one trace, named after the file. Each trace file in a folder becomes one trace.
    Files of the ranks of one run become one trace together. To read standard input, give - as the
    source and set --from. Importing an unchanged source again has no effect.

    \b
    Example: moetrace ingest sample_traces/gpt-moe-8e-a.parquet --name mine
    """
    if list_formats:
        from moetrace.formats.readers import formats
        from moetrace.settings import setting_types

        rows = [
            {"format": format.name, "settings": ", ".join(setting_types(format)), "needs": format.needs}
            for format in formats()
        ]
        shared.emit_known("formats", rows)
        return
    from moetrace.workspace import contents

    given = _with_standard_input(sources or [], dumps.from_)
    asked = contents.Dumps(**vars(dumps)).reading(given, shared.choice(), shared.note)
    taken = sorted({*asked.names.values()} & {*shared.folder().names()}) if shared.force else []
    if taken and not yes and sys.stdin is not None and sys.stdin.isatty():
        typer.confirm(f"Replace {', '.join(taken)} in {shared.workspace}?", abort=True, err=True)

    def one(key: str) -> Ingested:
        with shared.progress(key, "rows") as progress:
            return asked.into(shared.folder(), key, force=shared.force, progress=progress)

    _show(shared, shared.each(list(asked.groups), one))


def _with_standard_input(sources: list[str], format: str | None) -> list[str]:
    """The *sources*, of which ``-`` becomes a file named stdin that is gone when the command ends."""
    if "-" not in sources:
        return sources
    if format is None:
        raise typer.BadParameter("- is the standard input: name its format, such as --from csv")
    folder = tempfile.mkdtemp(prefix="moetrace-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder) / "stdin"
    with path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return [str(path) if source == "-" else source for source in sources]


def _show(shared: Shared, done: list[Ingested]) -> None:
    from moetrace.doctor import NOTE
    from moetrace.workspace.traces import described, described_frame

    for item in done:
        for assumption in item.trace.info.assumptions:
            shared.note(f"{item.trace.name}: assumed: {assumption}")
        for finding in item.trace.info.findings:
            tell = shared.note if finding.severity == NOTE else say  # being quiet hides no warning and no error
            tell(f"{item.trace.name}: {finding.severity}: {finding.name}, {finding.place}: {finding.evidence}")

    document = {"traces": [described(item.trace, item.path) | {"unchanged": item.unchanged} for item in done]}
    if shared.shown_as is Format.JSON:  # for which pandas is not loaded at all
        shared.emit({}, document)
        return
    from moetrace.reporting.screens import ingested_sentence, traces_screen

    frame = described_frame(document["traces"])
    sentence = ingested_sentence(frame, sum(item.unchanged for item in done))
    screen = traces_screen(frame, sentence, every=shared.all)
    wrote = sorted({f"{item.path.parent}/" for item in done if not item.unchanged})
    shared.emit({"traces": Table("Traces", frame)}, document, [screen], wrote=wrote, then=["states"])
