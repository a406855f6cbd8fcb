"""What all commands have in common: their options, and how they go through the traces and end."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from moetrace.cli.options import OUTPUT, SELECTION
from moetrace.cli.output import Format, Table, csv_text, json_text, named, note, say, shown_text, to_stdout
from moetrace.cli.progress import Report, progress, silent
from moetrace.errors import MoetraceError, SettingError, WorkspaceError
from moetrace.files import check_output

if TYPE_CHECKING:
    from moetrace.report.screens import Screen
    from moetrace.trace import LoadTrace
    from moetrace.workspace.traces import Workspace

WORKSPACE, DEFAULT_WORKSPACE = "MOETRACE_WORKSPACE", Path("moetrace-out")
DONE_WITH_SKIPS = 3
INTERRUPTED = 130
# Characters of a terminal that the closing line fits; longer, each of its parts has a line of its own.
CLOSING_WIDTH = 90

# What a file is, unless it is said.
BY_ENDING = {".csv": Format.CSV, ".json": Format.JSON}

SIZE = re.compile(r"(\d+\.?\d*(?:e\d{1,2})?) ?(?:([kmgt])(i?))?b?", re.IGNORECASE)

T = TypeVar("T")


def steps_of(text: str, what: str = "steps such as 3000,4000") -> list[int]:
    """Steps, or *what* else has numbers, as an option has them."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of {what}") from None


def bytes_of(text: str) -> float:
    """Bytes as an option has them, such as 44e6, 44MB or 42MiB."""
    match = SIZE.fullmatch(text.strip())
    if not match:
        raise typer.BadParameter(f"{text!r} is not a number of bytes such as 44e6, 44MB or 42MiB")
    number, unit, binary = match.groups()
    power = "kmgt".index(unit.lower()) + 1 if unit else 0
    return float(number) * float(1024 if binary else 1000) ** power


def _range(text: str) -> tuple[int | None, int | None]:
    first, colon, last = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return (int(first) if first else None), (int(last) if last else None)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a range of steps such as 1000:9000") from None


@dataclass(frozen=True)
class Shared:
    """The options every command has. Field by field, what the help says."""

    layers: Annotated[
        str | None, typer.Option(help="Only these layers, such as 2,4.", metavar="LAYERS", rich_help_panel=SELECTION)
    ] = None
    steps: Annotated[
        str | None,
        typer.Option(help="Only these steps, such as 1000:9000.", metavar="FIRST:LAST", rich_help_panel=SELECTION),
    ] = None
    workspace: Annotated[
        Path,
        typer.Option(
            "--workspace", "-w", envvar=WORKSPACE, help="Folder of traces and results.",
            rich_help_panel=SELECTION,
        ),
    ] = DEFAULT_WORKSPACE  # fmt: skip
    all: Annotated[bool, typer.Option("--all", help="Every row of the answer.", rich_help_panel=OUTPUT)] = False
    show: Annotated[
        str | None,
        typer.Option(help="The tables behind the answer instead, or `all`.", metavar="TABLES", rich_help_panel=OUTPUT),
    ] = None
    format: Annotated[
        Format | None,
        typer.Option(
            "--format", help="How to show the result; as the ending of -o says, else table.", rich_help_panel=OUTPUT
        ),
    ] = None
    json: Annotated[bool, typer.Option("--json", help="Short for --format json.", rich_help_panel=OUTPUT)] = False
    table: Annotated[
        str | None, typer.Option(help="Which table --format csv prints.", metavar="NAME", rich_help_panel=OUTPUT)
    ] = None
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the result to a file.", rich_help_panel=OUTPUT)
    ] = None
    force: Annotated[
        bool, typer.Option("--force", help="Replace a taken name or an existing file.", rich_help_panel=OUTPUT)
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress.", rich_help_panel=OUTPUT)] = (
        False
    )
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress.", rich_help_panel=OUTPUT)] = False
    skipped: list[dict[str, str]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, and a file that is there, before anything is computed."""
        if self.json and self.format not in (None, Format.JSON):
            raise typer.BadParameter(f"--json and --format {self.format} exclude each other: give one of them")
        if self.table is not None and self.shown_as is not Format.CSV:
            raise typer.BadParameter("--table goes with --format csv")
        if self.show is not None and self.shown_as is not Format.TABLE:
            raise typer.BadParameter("--show goes with --format table; --format csv takes --table")
        if self.output is not None and str(self.output) != "-":
            check_output(self.output, force=self.force)

    @property
    def shown_as(self) -> Format:
        """How the result is shown: as was said, else as the ending of its file says, else as a table."""
        ending = "" if self.output is None else self.output.suffix.lower()
        return Format.JSON if self.json else self.format or BY_ENDING.get(ending, Format.TABLE)

    def folder(self) -> Workspace:
        """The workspace."""
        from moetrace.workspace.traces import Workspace

        return Workspace(self.workspace)

    def open(self, trace: str) -> LoadTrace:
        """The trace of that name or path, reduced to the layers and steps asked for."""
        return self.selected(self.folder().open(trace))

    def selected(self, trace: LoadTrace) -> LoadTrace:
        """*trace*, reduced to the layers and steps asked for."""
        return trace.select(*self.selection())

    def selection(self) -> tuple[list[int] | None, int | None, int | None]:
        """The layers, the first and the last step asked for; None where nothing was."""
        layers = steps_of(self.layers, "layers such as 2,4") if self.layers else None
        return layers, *(_range(self.steps) if self.steps else (None, None))

    def each_trace(
        self, traces: Sequence[str] | None, doing: str, unit: str, work: Callable[[str, LoadTrace, Report], T]
    ) -> list[T]:
        """What *work* makes of each trace chosen, given as it was named and opened; all there are if none is named.

        *doing* names the work and *unit* what its progress counts.
        """
        workspace = self.folder()
        given = workspace.chosen(traces or [])
        named = workspace.unique_names(given)

        def one(name: str) -> T:
            trace = self.selected(workspace.open(name, named[name]))
            which = f" ({given.index(name) + 1} of {len(given)})" if len(given) > 1 else ""
            with self.progress(f"{doing} {trace.name}{which}", unit) as progress:
                return work(name, trace, progress)

        return self.each(given, one)

    def each(self, names: Sequence[str], work: Callable[[str], T]) -> list[T]:
        """What *work* makes of each of *names*; one that fails is skipped, unless all do."""
        results: list[T] = []
        mistakes: list[SettingError] = []
        for name in names:
            try:
                results.append(work(name))
            except MoetraceError as error:
                if len(names) == 1:
                    raise
                self.skipped.append({"name": name, "error": str(error)})
                if isinstance(error, SettingError):
                    mistakes.append(error)
                else:
                    say(f"skipped {name}: {error}")
        if mistakes and not results and len(mistakes) == len(self.skipped):
            raise mistakes[0]  # a mistake in how the command was called is said once
        for mistake in mistakes:
            say(f"skipped: {mistake}")
        if not results:
            raise WorkspaceError(f"nothing could be done: all {len(names)} failed")
        return results

    def note_reused(self, trace: str, computed: int, reused: int) -> None:
        """Say how many results were there already, if any were."""
        if reused:
            which = f"all {reused}" if not computed else f"{reused} of {reused + computed}"
            self.note(f"{trace}: {which} results are there already")

    def note(self, text: str) -> None:
        """A line on stderr, unless quiet."""
        if not self.quiet:
            note(text)

    @contextmanager
    def progress(self, title: str, unit: str) -> Iterator[Report]:
        """Progress on stderr while the block runs, unless it is not wanted."""
        if self.quiet or self.no_progress:
            yield silent
            return
        with progress(title, unit) as report:
            yield report

    def emit(
        self,
        tables: Mapping[str, Table],
        document: Mapping[str, Any],
        screens: Sequence[Screen] = (),
        *,
        wrote: Sequence[Path | str] = (),
        then: Sequence[str] = (),
    ) -> None:
        """Show the result: the *screens*, or of *tables* those asked for, or the *document* as JSON.

        *wrote* are the files or folders that the command left behind, *then* are the words of
        the command that comes next.
        """
        chosen = self.shown_as
        show = _shown(self.show, tables) if self.show else []
        text: str | None
        if chosen is Format.JSON:
            text = json_text({**document, "skipped": self.skipped})
        else:
            text = csv_text(tables, self.table) if chosen is Format.CSV else None
        if self.output is not None and str(self.output) != "-":
            from moetrace.files import write_text

            write_text(self.output, shown_text(screens, tables, show) if text is None else text, force=self.force)
            wrote = [*wrote, self.output]
        else:
            to_stdout(text, screens, tables, show)
        if not self.quiet:
            answered = chosen is Format.TABLE and not show
            _closing(wrote, tables if answered else (), self._command(then) if answered and then else None)
        if self.skipped:
            raise typer.Exit(DONE_WITH_SKIPS)

    def _command(self, words: Sequence[str]) -> str:
        """The command of these *words* as a shell takes it, in this workspace."""
        usual = os.environ.get(WORKSPACE, str(DEFAULT_WORKSPACE))
        where = [] if str(self.workspace) == usual else ["-w", str(self.workspace)]
        return shlex.join(["moetrace", *words, *where])


def _shown(text: str, tables: Mapping[str, Table]) -> list[str]:
    names = list(tables) if text == "all" else text.split(",")
    for name in names:
        named(tables, name)
    return names


def _closing(wrote: Sequence[Path | str], tables: Iterable[str], then: str | None) -> None:
    """The last line on stderr: what was written, what more there is to see, and the command that comes next."""
    parts = [f"Wrote {', '.join(map(str, wrote))}"] if wrote else []
    more = ",".join(tables)
    parts += [f"More: --show {more}"] if more else []
    parts += [f"Next: {then}"] if then else []
    if sum(map(len, parts)) > CLOSING_WIDTH:
        for part in parts:
            note(part)
    elif parts:
        note("     ".join(parts))
