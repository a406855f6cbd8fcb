"""What a command prints: the answer on a terminal, tables as CSV, one document as JSON; progress and notes on stderr.

Nothing else prints.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import typer

from moetrace.errors import WorkspaceError, printable
from moetrace.words import SCHEMA_VERSION

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from moetrace.reporting.screens import Screen

# Columns of what does not go to a terminal: an answer fits it, and so does every table of `--show`.
FILE_WIDTH = 140


class Format(StrEnum):
    """How results are shown."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


@dataclass(frozen=True)
class Table:
    """A frame behind the answer: printed by ``--show``, and as CSV.

    *columns* are those shown on a terminal, None for all of them, the last left out first where it is too
    narrow; *by* splits it into one table for each value of those columns; *rows*, one bool for each, are those printed.
    """

    title: str
    frame: pd.DataFrame
    columns: Sequence[str] | None = None
    by: Sequence[str] = ()
    rows: Sequence[bool] | None = None


def say(text: str) -> None:
    """One line on stderr that must be read: an error, a warning, what was skipped."""
    note(f"moetrace: {text}")


def note(text: str) -> None:
    """One line on stderr."""
    print(printable(text), file=sys.stderr)  # noqa: T201 - the one place that prints to stderr


def json_text(document: Mapping[str, Any]) -> str:
    """The *document* as JSON, with the version of its schema."""
    import json

    return json.dumps(_plain({"schema_version": SCHEMA_VERSION, **document}), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """NumPy scalars as numbers, NaN as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    plain = value.item() if hasattr(value, "item") else value
    return None if isinstance(plain, float) and plain != plain else plain


def csv_text(tables: Mapping[str, Table], name: str | None) -> str:
    """The table of that *name*, or the first, as CSV."""
    from moetrace.reporting.tables import csv

    return csv(named(tables, name or next(iter(tables))).frame)


def named(tables: Mapping[str, Table], name: str) -> Table:
    """The table of that *name*; a usage error with all names if it does not exist."""
    if name not in tables:
        raise typer.BadParameter(f"there is no table {name!r}; there are {', '.join(tables)}")
    return tables[name]


def shown_text(screens: Sequence[Screen], tables: Mapping[str, Table], show: Sequence[str]) -> str:
    """What a file or a pipe gets: the *screens*, or the tables named by *show*."""
    import io

    from rich.console import Console

    text = io.StringIO()
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() and int(columns) else FILE_WIDTH
    _print(Console(file=text, width=width, no_color=True, highlight=False), screens, tables, show)
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def to_stdout(text: str | None, screens: Sequence[Screen], tables: Mapping[str, Table], show: Sequence[str]) -> None:
    """The *text*, or the answer where there is none; whoever stops reading has seen enough."""
    with while_read():
        if text is None and sys.stdout.isatty():
            from rich.console import Console

            _print(Console(highlight=False), screens, tables, show)
        else:
            sys.stdout.write(shown_text(screens, tables, show) if text is None else text)


@contextmanager
def while_read() -> Iterator[None]:
    """Write to stdout in the block, which ends where nobody reads any more.

    Raises `WorkspaceError` if stdout cannot be written.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        # Python must not try to flush the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            reason = error.strerror or error
            raise WorkspaceError(f"the standard output cannot be written: {reason}; choose a file with -o") from error


def _print(console: Console, screens: Sequence[Screen], tables: Mapping[str, Table], show: Sequence[str]) -> None:
    """The *screens*, or the tables named by *show*, each without the last columns where it is too wide."""
    from moetrace.reporting.screens import rendered
    from moetrace.reporting.tables import fitting, terminal

    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    for screen in () if show else screens:
        console.print(*rendered(screen, ascii_only=ascii_only), sep="\n")
    for table in (named(tables, name) for name in show):
        for title, frame in _parts(table):
            whole = frame if table.columns is None else frame[list(table.columns)]
            fit = fitting(whole, console.width)
            console.print(terminal(fit, title, ascii_only=ascii_only))
            if left_out := [name for name in whole.columns if name not in fit.columns]:
                console.print(f"Too wide for here: {', '.join(left_out)}; --format csv has all.\n", style="dim")


def _parts(table: Table) -> Iterator[tuple[str, pd.DataFrame]]:
    frame = table.frame if table.rows is None else table.frame[list(table.rows)]
    if not table.by:
        yield table.title, frame
        return
    for key, part in frame.groupby(list(table.by), sort=False):
        named = ", ".join(
            f"{name} {value:,}" if isinstance(value, int) else str(value) for name, value in zip(table.by, key)
        )
        yield f"{table.title}: {named}", part


# --- how far a command is: a bar on a terminal, a line every half minute elsewhere, on stderr -------------------------

# Seconds between two lines where there is no terminal.
PATIENCE = 30.0
# The unit of what has several stages, whose tasks are not counted.
PERCENT = "%"

Report = Callable[[int, "int | None"], None]
"""Called with how many of how many are done; None where the number of all is not known."""


@contextmanager
def progress(title: str, unit: str) -> Iterator[Report]:
    """Progress of what *title* says, counted in *unit*, while the block runs."""
    if not sys.stderr.isatty():
        yield _lines(title, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    said = TextColumn("{task.fields[said]}")  # nothing before it is known how many there are
    columns = (TextColumn("{task.description}"), BarColumn(), said, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, said="")
        began = time.monotonic()

        def report(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total, said=_said(done, total, unit, began))

        yield report


def silent(_done: int, _total: int | None) -> None:
    """Progress of which nothing is said."""


def _lines(title: str, unit: str) -> Report:
    """A line whenever `PATIENCE` has passed since the last one, or since the start."""
    began = last = time.monotonic()

    def report(done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= PATIENCE:
            last = time.monotonic()
            note(f"{title}: {_said(done, total, unit, began)}")

    return report


def _said(done: int, total: int | None, unit: str, began: float) -> str:
    """How far it is, and how many a second since *began*."""
    if unit == PERCENT:
        return f"{done}%"
    rate = done / max(1e-9, time.monotonic() - began)
    return f"{done:,}{f' of {total:,}' if total else ''} {unit}, {rate:,.{0 if rate >= 10 else 1}f}/s"
