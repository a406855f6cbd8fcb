"""How far a command is: a bar on a terminal, a line every half minute elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moetrace.cli.output import note

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
