"""Formats of installed packages (entry points of `GROUP`): what they claim and read, each fault by their name."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path

import numpy as np

from moetrace.errors import TraceError
from moetrace.formats.errors import library_errors
from moetrace.formats.location import Location
from moetrace.formats.stream.cells import Cells, Format, Merged, Source
from moetrace.settings import installed

GROUP = "moetrace.formats"


def format_of(name: str, taken: Collection[str]) -> Format:
    """The format that an installed package calls *name*; raises what `Plugin.made` does."""

    def fits(own: object) -> bool:
        return is_dataclass(own) and getattr(own, "name", None) == name and isinstance(own, Format)

    found: Format = installed(GROUP)[name].made(f"moetrace.Format called {name}", fits, taken)
    return found


def claimed(format: Format, path: Path) -> bool:
    """Whether *format* claims *path*; raises `TraceError` naming the package of one that cannot be asked."""
    if _is_ours(format):
        return format.claims(path)
    with library_errors(str(path), f"could not be looked at by {_named(format)}", _way_out(format)):
        return format.claims(path)


def source_of(format: Format, path: Location) -> Source:
    """What *format* reads of *path*; raises `TraceError` naming the package where it is no `Cells` of counts."""
    if _is_ours(format):
        return format.read(path)
    where, problem = str(path), f"could not be read by {_named(format)}"
    with library_errors(where, problem, _way_out(format)):
        source = format.read(path)
        if isinstance(source, Merged):
            return source
        opened = source.cells

    def cells() -> Iterator[Cells]:
        with library_errors(where, problem, _way_out(format)):
            for piece in opened():
                if fault := _fault(piece):
                    raise TraceError(where, f"{problem}: {fault}", _way_out(format))
                yield piece

    return replace(source, cells=cells)


def _fault(piece: Cells) -> str:
    """What is wrong with a *piece*, if anything."""
    if not all(isinstance(column, np.ndarray) and column.dtype == np.int64 and column.ndim == 1 for column in piece):
        return "its cells are not four arrays of int64 with one axis"
    if len({len(column) for column in piece}) > 1:
        return "its cells are arrays of different lengths"
    return "a count is negative" if piece.count.min(initial=0) < 0 else ""


def _is_ours(format: Format) -> bool:
    return type(format).__module__.startswith("moetrace.")


def _named(format: Format) -> str:
    """Its name, and that of its package where it is installed."""
    own = installed(GROUP).get(format.name)
    return f"the format {format.name}" + (f" of {own.package}" if own else "")


def _way_out(format: Format) -> str:
    return f"report it to its authors, or name another format than {format.name} with --from"
