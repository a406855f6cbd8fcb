"""What all commands have in common: their options, and how they show, write and skip."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from moetrace.errors import MoetraceError, SettingError, WorkspaceError, printable

if TYPE_CHECKING:
    import pandas as pd

    from moetrace.trace import LoadTrace
    from moetrace.workspace.traces import Workspace

SCHEMA_VERSION = 1
DONE_WITH_SKIPS = 3
INTERRUPTED = 130
# Columns of a table that does not go to a terminal: wide enough for every table of the project.
FILE_WIDTH = 140

T = TypeVar("T")


class Format(StrEnum):
    """How results are shown."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


@dataclass(frozen=True)
class Table:
    """A frame to show.

    *columns* are those shown on a terminal, None for all of them, the last left out first where it is
    too narrow; *by* splits it into one table for each value of those columns. Of a table that is much
    too long only the *rows* are printed, one bool for each; one that is not *printed* is there for CSV
    alone.
    """

    title: str
    frame: pd.DataFrame
    columns: Sequence[str] | None = None
    by: Sequence[str] = ()
    rows: Sequence[bool] | None = None
    printed: bool = True


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of layers such as 2,4") from None


def steps_of(text: str) -> list[int]:
    """Steps as an option has them, such as 3000,4000."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of steps such as 3000,4000") from None


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

    format: Annotated[Format, typer.Option("--format", help="How to show the result.")] = Format.TABLE
    json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False
    table: Annotated[str | None, typer.Option(help="Which table --format csv prints.", metavar="NAME")] = None
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result to a file.")] = None
    force: Annotated[bool, typer.Option("--force", help="Replace a taken name or an existing file.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress.")] = False
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False
    workspace: Annotated[
        Path,
        typer.Option("--workspace", "-w", envvar="MOETRACE_WORKSPACE", help="Folder of traces and results."),
    ] = Path("moetrace-out")
    layers: Annotated[str | None, typer.Option(help="Only these layers, such as 2,4.", metavar="LAYERS")] = None
    steps: Annotated[str | None, typer.Option(help="Only these steps, such as 1000:9000.", metavar="FIRST:LAST")] = None
    skipped: list[dict[str, str]] = field(default_factory=list, init=False)

    @property
    def wants_json(self) -> bool:
        """Whether the result is to be JSON."""
        return self.json or self.format is Format.JSON

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
        layers = _layers(self.layers) if self.layers else None
        return layers, *(_range(self.steps) if self.steps else (None, None))

    def each_trace(self, traces: Sequence[str] | None, work: Callable[[str, LoadTrace], T]) -> list[T]:
        """What *work* makes of each trace chosen, given as it was named and opened; all there are if none is named."""
        workspace = self.folder()
        given = workspace.chosen(traces or [])
        named = workspace.named_apart(given)
        return self.each(list(given), lambda name: work(name, self.selected(workspace.open(name, named[name]))))

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
            say(text)

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int | None], None]]:
        """A progress bar on stderr while the block runs; only on a terminal."""
        if self.quiet or self.no_progress or not sys.stderr.isatty():
            yield lambda _done, _total: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        rate = TextColumn("{task.fields[rate]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=None, rate="")
            began = time.monotonic()
            yield lambda done, total: bar.update(task, completed=done, total=total, rate=_rate(done, began))

    def emit(self, tables: Mapping[str, Table], document: Mapping[str, Any]) -> None:
        """Show the result: all *tables*, one of them as CSV, or the *document* as JSON."""
        chosen = Format.JSON if self.json else self.format
        if self.table is not None and chosen is not Format.CSV:
            raise typer.BadParameter("--table goes with --format csv")
        if chosen is Format.JSON:
            text = _json({"schema_version": SCHEMA_VERSION, **document, "skipped": self.skipped})
        elif chosen is Format.CSV:
            text = _csv(tables, self.table)
        else:
            text = None
        if self.output is not None and str(self.output) != "-":
            from moetrace.files import write_text

            write_text(self.output, text if text is not None else _plain(tables), force=self.force)
            self.note(f"wrote {self.output}")
        else:
            _to_stdout(tables, text)
        if self.skipped:
            raise typer.Exit(DONE_WITH_SKIPS)


def _to_stdout(tables: Mapping[str, Table], text: str | None) -> None:
    """The *text*, or the *tables* where there is none; whoever stops reading has seen enough."""
    try:
        ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
        if text is None and sys.stdout.isatty():
            _print(tables, ascii_only=ascii_only)
        else:
            sys.stdout.write(_plain(tables, ascii_only=ascii_only) if text is None else text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python must not try to flush the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _rate(done: int, began: float) -> str:
    """How many a second since *began*."""
    rate = done / max(1e-9, time.monotonic() - began)
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"


def say(text: str) -> None:
    """One line on stderr."""
    print(f"moetrace: {printable(text)}", file=sys.stderr)  # noqa: T201 - the one place that prints to stderr


def _json(document: Mapping[str, Any]) -> str:
    import json

    return json.dumps(_plain_values(document), indent=2, allow_nan=False) + "\n"


def _plain_values(value: Any) -> Any:
    """NumPy scalars as numbers, NaN as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain_values(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_values(part) for part in value]
    plain = value.item() if hasattr(value, "item") else value
    return None if isinstance(plain, float) and plain != plain else plain


def _csv(tables: Mapping[str, Table], name: str | None) -> str:
    from moetrace.report.tables import csv

    wanted = name or next(iter(tables))
    if wanted not in tables:
        raise typer.BadParameter(f"there is no table {wanted!r}; there are {', '.join(tables)}")
    return csv(tables[wanted].frame)


def _plain(tables: Mapping[str, Table], *, ascii_only: bool = False) -> str:
    import io

    from rich.console import Console

    text = io.StringIO()
    # A file or a pipe is as wide as the variable says, where that makes sense.
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and int(columns) else FILE_WIDTH
    _print(tables, Console(file=text, width=width, no_color=True), ascii_only=ascii_only)
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def _print(tables: Mapping[str, Table], console: Any = None, *, ascii_only: bool = False) -> None:
    from rich.console import Console

    from moetrace.report.tables import fitting, terminal

    console = console or Console()
    for table in tables.values():
        for title, frame in _parts(table):
            whole = frame if table.columns is None else frame[list(table.columns)]
            fit = fitting(whole, console.width)
            console.print(terminal(fit, title, ascii_only=ascii_only))
            left_out = [name for name in whole.columns if name not in fit.columns]
            if left_out:
                console.print(f"Too wide for here: {', '.join(left_out)}; --format csv has all.\n", style="dim")


def _parts(table: Table) -> Iterator[tuple[str, pd.DataFrame]]:
    if not table.printed:
        return
    frame = table.frame if table.rows is None else table.frame[list(table.rows)]
    if not table.by:
        yield table.title, frame
        return
    for key, part in frame.groupby(list(table.by), sort=False):
        named = ", ".join(
            f"{name} {value:,}" if isinstance(value, int) else str(value) for name, value in zip(table.by, key)
        )
        yield f"{table.title}: {named}", part


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with the options of `Shared` and of every other dataclass that it takes instead of those."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    groups = {p.name: p.annotation for p in own if isinstance(p.annotation, type) and is_dataclass(p.annotation)}
    spread = {name: inspect.signature(group, eval_str=True).parameters for name, group in groups.items()}
    options = [*(p for p in own if p.name not in groups), *(p for group in spread.values() for p in group.values())]
    options = [p.replace(kind=p.KEYWORD_ONLY) for p in options]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        made = {name: groups[name](**{key: values.pop(key) for key in spread[name]}) for name in groups}
        command(**made, **values)

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in options}
    return run
