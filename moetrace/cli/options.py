"""Options that commands share: on traces and output (`Shared`), and on the backtest (`Protocol`)."""

from __future__ import annotations

import functools
import inspect
import os
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_args

import typer
from typer.core import TyperCommand

from moetrace.cli.completion import predictor_names, trace_names
from moetrace.cli.output import (
    Format,
    Report,
    Table,
    csv_text,
    json_text,
    named,
    note,
    progress,
    say,
    shown_text,
    silent,
    to_stdout,
)  # fmt: skip
from moetrace.errors import MoetraceError, SettingError, WorkspaceError, lacks_memory
from moetrace.files import check_output
from moetrace.forecasting.predictors import PREDICTORS, QUICK
from moetrace.words import DEFAULT_WORKSPACE, WORKSPACE

if TYPE_CHECKING:
    from moetrace.reporting.screens import Screen
    from moetrace.trace import LoadTrace
    from moetrace.workspace.found import Found
    from moetrace.workspace.options import Backtesting, Device, Selection
    from moetrace.workspace.traces import Workspace

SELECTION, OUTPUT, PROTOCOL, HARDWARE = "Selection", "Output", "Protocol", "Hardware"
DONE_WITH_SKIPS = 3
# Characters of a terminal that the closing line fits; longer, each of its parts has a line of its own.
CLOSING_WIDTH = 90
# The output format by the ending of -o, unless --format is given.
BY_ENDING = {"": Format.TABLE, ".txt": Format.TABLE, ".md": Format.TABLE, ".csv": Format.CSV, ".json": Format.JSON}
# What a value is called in help where an option does not name it.
METAVARS = {"int": "N", "float": "X", "path": "PATH", "str": "TEXT"}
SIZE = re.compile(r"(\d+\.?\d*(?:e\d{1,2})?) ?(?:([kmgt])(i?))?b?", re.IGNORECASE)

T = TypeVar("T")
FirstLayer = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Index in the model, from 0, of the trace's first layer, if the trace numbers layers differently. Changes "
        "only the written files.",
        metavar="N",
    ),
]
ModelLayers = Annotated[
    int,
    typer.Option(
        min=0,
        help="Layers of the whole model. The files that are written then have a row for each.",
    ),
]
Traces = Annotated[
    list[str] | None, typer.Argument(help="Names or paths.  [default: all traces]", autocompletion=trace_names)
]


class Command(TyperCommand):
    """A command with the options in groups in its help: its own, then those of `Protocol` and `Shared`.

    Typer shows groups only through rich, whose import makes `--help` take three times as long as `import typer`.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                own = "Arguments" if parameter.param_type_name == "argument" else "Options"
                usage = re.sub(r"<(int|float|path|str)[^>]*>", lambda kind: METAVARS[kind[1]], record[0])
                usage = usage.replace(" <list[str]>", "")
                group = getattr(parameter, "rich_help_panel", None) or own
                groups.setdefault(group, []).append((usage, record[1]))
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def with_options(command: Callable[..., None], without: Sequence[str] = ()) -> Callable[..., None]:
    """The command, with the options of `Shared` and of every other dataclass that it takes instead of those.

    It is not offered those *without* which it does all that it can do.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    groups = {p.name: p.annotation for p in own if isinstance(p.annotation, type) and is_dataclass(p.annotation)}
    spread = {name: inspect.signature(group, eval_str=True).parameters for name, group in groups.items()}
    every = [shared for p in own for shared in (spread[p.name].values() if p.name in groups else [p])]
    options = [p.replace(kind=p.KEYWORD_ONLY) for p in every if p.name not in without]
    options.sort(key=lambda p: getattr(get_args(p.annotation)[-1], "rich_help_panel", None) is not None)

    @functools.wraps(command)
    def run(**values: Any) -> None:
        from moetrace.workspace.memory import keep_freed_memory

        keep_freed_memory()
        made = {
            name: groups[name](**{key: values.pop(key) for key in spread[name] if key in values}) for name in groups
        }
        command(**made, **values)

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in options}
    return run


def steps_of(text: str, what: str = "steps such as 3000,4000") -> list[int]:
    """Steps, or *what* else has numbers, as an option has them."""
    try:
        spans = [part.partition("-") if part[:1] != "-" else (part, "", "") for part in text.split(",")]
        return [n for first, dash, last in spans for n in range(int(first), int(last if dash else first) + 1)]
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


@dataclass(frozen=True)
class Shared:
    """The options every command has, and what commands do with them."""

    endings: ClassVar[Collection[str] | None] = BY_ENDING

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
    ] = Path(DEFAULT_WORKSPACE)  # fmt: skip
    all: Annotated[bool, typer.Option("--all", help="Show all rows.", rich_help_panel=OUTPUT)] = False
    show: Annotated[
        str | None,
        typer.Option(
            help="Print these detail tables, or `all`, instead of the summary.",
            metavar="TABLES",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="Output format  [default: from the extension of -o, otherwise table]",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    json: Annotated[bool, typer.Option("--json", help="Short for --format json.", rich_help_panel=OUTPUT)] = False
    table: Annotated[
        str | None, typer.Option(help="Table that --format csv prints.", metavar="NAME", rich_help_panel=OUTPUT)
    ] = None
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the result to a file.", rich_help_panel=OUTPUT)
    ] = None
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing trace or file.", rich_help_panel=OUTPUT)
    ] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Suppress notes and progress.", rich_help_panel=OUTPUT)
    ] = False
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Suppress progress.", rich_help_panel=OUTPUT)] = (
        False
    )
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
            regular = check_output(self.output, force=self.force)
            ending, asked = self.output.suffix.lower(), self.json or self.format is not None
            if regular and self.endings is not None and not asked and ending not in self.endings:
                raise typer.BadParameter(
                    f"-o {self.output}: {self.output.suffix} is no format (choose .csv, .json, .txt, or give --format)"
                )

    @property
    def shown_as(self) -> Format:
        """The output format: as asked for, else by the ending of the output file, else a table."""
        ending = "" if self.output is None else self.output.suffix.lower()
        return Format.JSON if self.json else self.format or BY_ENDING.get(ending, Format.TABLE)

    def folder(self) -> Workspace:
        """The workspace."""
        from moetrace.workspace.traces import Workspace

        return Workspace(self.workspace)

    def choice(self) -> Selection:
        """Layers, steps and workspace as functions take them."""
        from moetrace.workspace.options import Selection

        layers, first, last = self.selection()
        return Selection(layers, (first, last) if self.steps else None, self.workspace)

    def open(self, trace: str) -> LoadTrace:
        """The trace of that name or path, reduced to the layers and steps asked for."""
        return self.selected(self.folder().open(trace))

    def selected(self, trace: LoadTrace) -> LoadTrace:
        """*trace*, reduced to the layers and steps asked for."""
        return trace.select(*self.selection())

    def selection(self) -> tuple[list[int] | None, int | None, int | None]:
        """The layers, the first and the last step asked for; None where nothing was."""
        layers = steps_of(self.layers, "layers such as 2,4") if self.layers else None
        if not self.steps:
            return layers, None, None
        first, colon, last = self.steps.partition(":")
        try:
            if not colon:
                raise ValueError
            return layers, int(first) if first else None, int(last) if last else None
        except ValueError:
            raise typer.BadParameter(f"{self.steps!r} is not a range of steps such as 1000:9000") from None

    def each_trace(
        self, traces: Sequence[str] | None, doing: str, unit: str, work: Callable[[str, LoadTrace, Report], T]
    ) -> list[T]:
        """The results of *work* on each of *traces*, all of them if none is named, with the name as given.

        *doing* names the work and *unit* what its progress counts.
        """
        workspace = self.folder()
        given = workspace.chosen(traces or [])
        names = workspace.unique_names(given)

        def one(name: str) -> T:
            trace = self.selected(workspace.open(name, names[name]))
            which = f" ({given.index(name) + 1} of {len(given)})" if len(given) > 1 else ""
            with self.progress(f"{doing} {trace.name}{which}", unit) as progress:
                return work(name, trace, progress)

        return self.each(given, one)

    def each(self, names: Sequence[str], work: Callable[[str], T]) -> list[T]:
        """The results of *work* on each of *names*; one that fails is skipped, unless all do."""
        results: list[T] = []
        mistakes: list[SettingError] = []
        for name in names:
            try:
                results.append(work(name))
            except MoetraceError as error:
                if len(names) == 1 or lacks_memory(error):
                    raise
                self.skipped.append({"name": name, "error": str(error)})
                if isinstance(error, SettingError):
                    mistakes.append(error)
                else:
                    say(f"skipped {name}: {error}")
        if mistakes and not results and len(mistakes) == len(self.skipped):
            raise mistakes[0]  # a usage error is reported once
        for mistake in mistakes:
            say(f"skipped: {mistake}")
        if not results:
            raise WorkspaceError(f"nothing could be done: all {len(names)} failed")
        return results

    def note_reused(self, trace: str, computed: int, reused: int) -> None:
        """A line on stderr with how many results were cached, if any were."""
        from moetrace.workspace.options import reused_line

        if line := reused_line(trace, computed, reused):
            self.note(line)

    def note_found(self, found: Found[Any]) -> None:
        """Lines on stderr with what a command wrote, or could not, and what else there is to know."""
        for sentence in found.facts.get("failed", ()):
            say(sentence)
        for text in found.notes:
            self.note(text)

    def note(self, text: str) -> None:
        """A line on stderr, unless quiet."""
        if not self.quiet:
            note(text)

    @contextmanager
    def progress(self, title: str, unit: str) -> Iterator[Report]:
        """Progress on stderr while the block runs, unless it was switched off."""
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
        show = list(tables) if self.show == "all" else self.show.split(",") if self.show else []
        for name in show:
            named(tables, name)  # a usage error if there is no such table
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
            self._close(wrote, tables, then, answered=chosen is Format.TABLE and not show)
        if self.skipped:
            raise typer.Exit(DONE_WITH_SKIPS)

    def emit_known(self, what: str, rows: Sequence[dict[str, str]]) -> None:
        """Show what is known of a registry, such as *what* ``formats``: a row for each, in words."""
        import pandas as pd

        from moetrace.reporting.screens import Screen

        frame = pd.DataFrame(rows)
        columns = [(str(name), frame[name].tolist()) for name in frame]
        screen = Screen(f"{len(rows)} {what} are known.", columns, words=list(rows[0])[1:])
        self.emit({what: Table(f"Known {what}", frame)}, {what: list(rows)}, [screen])

    def _close(
        self, wrote: Sequence[Path | str], tables: Mapping[str, Table], then: Sequence[str], *, answered: bool
    ) -> None:
        """The last line on stderr: what was written, which tables there are, and the command that comes next."""
        parts = [f"Wrote {', '.join(map(str, wrote))}"] if wrote else []
        if answered and tables:
            parts.append(f"More: --show {','.join(tables)}")
        if answered and then:
            usual = os.environ.get(WORKSPACE, DEFAULT_WORKSPACE)
            where = [] if str(self.workspace) == usual else ["-w", str(self.workspace)]
            parts.append(f"Next: {shlex.join(['moetrace', *then, *where])}")
        lines = parts if sum(map(len, parts)) > CLOSING_WIDTH else ["     ".join(parts)] if parts else []
        for line in lines:
            note(line)


def predictor_option(default: Iterable[str]) -> Any:
    """The option for predictors, which are the *default* ones where it is not given."""
    return typer.Option(
        help=f"NAME or NAME:setting=value (repeatable)  [default: {', '.join(default)}]",
        metavar="SPEC",
        autocompletion=predictor_names,
        rich_help_panel=PROTOCOL,
    )


@dataclass(frozen=True)
class Protocol:
    """How to backtest, and where it runs: options of every command that forecasts."""

    predictor: Annotated[list[str] | None, predictor_option(PREDICTORS)] = None
    cutoffs: Annotated[
        str | None,
        typer.Option(help="Score at these cutoffs, such as 3000,4000.", metavar="STEPS", rich_help_panel=PROTOCOL),
    ] = None
    first: Annotated[
        int | None,
        typer.Option(
            min=1, help="First cutoff  [default: 500, or a quarter of a short trace]", rich_help_panel=PROTOCOL
        ),
    ] = None
    every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Then score at every multiple of N  [default: 1,000, or more to stay within 50 cutoffs]",
            rich_help_panel=PROTOCOL,
        ),
    ] = None
    train_on: Annotated[
        list[str] | None,
        typer.Option(metavar="TRACE", help="Train lstm on another run (repeatable).", rich_help_panel=PROTOCOL),
    ] = None
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of predictors and of the bootstrap.", rich_help_panel=PROTOCOL)
    ] = 0
    jobs: Annotated[int, typer.Option(min=1, help="Number of worker processes.", rich_help_panel=PROTOCOL)] = 1
    dask: Annotated[
        str | None,
        typer.Option(
            help="Use the Dask cluster at this address, such as tcp://host:8786.",
            metavar="ADDRESS",
            rich_help_panel=PROTOCOL,
        ),
    ] = None

    def backtesting(self, shared: Shared) -> Backtesting:
        """The same as functions take it."""
        from moetrace.workspace.options import Backtesting

        cutoffs = steps_of(self.cutoffs) if self.cutoffs else None
        return Backtesting(
            self.predictor, cutoffs, self.first, self.every, self.train_on or (), self.seed, self.jobs, self.dask,
            shared.workspace,
        )  # fmt: skip


@dataclass(frozen=True)
class QuickProtocol(Protocol):
    """The same with few predictors by default, where what is done with a forecast matters more than which it is."""

    predictor: Annotated[list[str] | None, predictor_option(QUICK)] = None


@dataclass(frozen=True)
class Hardware:
    """How long a GPU takes for an expert: options of `place` and `report`."""

    hardware: Annotated[
        str | None,
        typer.Option(
            envvar="MOETRACE_HARDWARE",
            help="GPU that the model runs on, such as h200 (a wrong name lists all).",
            metavar="NAME",
            rich_help_panel=HARDWARE,
        ),
    ] = None
    ridge: Annotated[
        float | None,
        typer.Option(
            min=0, help="Tokens per expert below which a GPU is memory-bound; 0: never.", metavar="TOKENS",
            rich_help_panel=HARDWARE,
        ),
    ] = None  # fmt: skip
    expert_time: Annotated[
        Path | None,
        typer.Option(
            help="Measured time of an expert: a CSV file with tokens,microseconds.",
            metavar="FILE",
            rich_help_panel=HARDWARE,
        ),
    ] = None
    passes_per_step: Annotated[
        int, typer.Option(min=1, help="Forward passes in a step of the trace.", metavar="N", rich_help_panel=HARDWARE)
    ] = 1
    expert_bytes: Annotated[
        float | None,
        typer.Option(
            parser=bytes_of, help="Size of one expert, such as 44MB, to report moves in bytes and savings in µs.",
            metavar="B", rich_help_panel=HARDWARE,
        ),
    ] = None  # fmt: skip

    def device(self) -> Device:
        """The same as functions take it."""
        from moetrace.workspace.options import Device

        return Device(self.hardware, self.ridge, self.expert_time, self.passes_per_step, self.expert_bytes)
