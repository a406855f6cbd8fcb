"""The formats by name: a class for each kind of dump, by family. A new one is a class and a line in `FORMATS`.

Those of installed packages (entry points of `GROUP`) are asked and read with each fault by their name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from moetrace.errors import TraceError, shown
from moetrace.formats.readers.arrays import NumpyFormat, TensorsFormat
from moetrace.formats.readers.arrow import ParquetFormat, SqlFormat
from moetrace.formats.readers.imatrix import ImatrixFormat
from moetrace.formats.readers.megatron import MegatronFormat, MegatronRouterFormat
from moetrace.formats.readers.mindie import MindieFormat
from moetrace.formats.readers.omni import OmniFormat
from moetrace.formats.readers.parts import PartsFormat, is_parts
from moetrace.formats.readers.routing import RoutingFormat
from moetrace.formats.readers.sglang import SglangFormat
from moetrace.formats.readers.tensorboard import TensorboardFormat
from moetrace.formats.readers.tensorrt import TensorrtFormat
from moetrace.formats.readers.text import CsvFormat, JsonFormat, JsonLinesFormat, LogFormat, PrometheusFormat
from moetrace.formats.sources import Location, Query, Uri, library_errors, readable
from moetrace.formats.stream.cells import Cells, Format, Merged, Source
from moetrace.formats.stream.text import head_of
from moetrace.settings import installed, unknown, with_settings

GROUP = "moetrace.formats"
FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        # Formats with a mark of their own come first: a table is only what none of them claims.
        PartsFormat(),
        MegatronFormat(),
        MegatronRouterFormat(),
        SglangFormat(),
        TensorrtFormat(),
        ImatrixFormat(),
        TensorboardFormat(),
        OmniFormat(),
        MindieFormat(),
        RoutingFormat(),
        TensorsFormat(),
        ParquetFormat(),
        CsvFormat(),
        JsonLinesFormat(),
        JsonFormat(),
        NumpyFormat(),
        PrometheusFormat(),
        LogFormat(),
    )
}


def formats() -> Iterator[Format]:
    """The formats in the order in which they are asked: those of installed packages, loaded then, before tables."""
    for name, format in FORMATS.items():
        if name == ParquetFormat.name:
            yield from map(_installed, installed(GROUP))
        yield format


def names() -> list[str]:
    """The names of all formats: ours, and those of installed packages."""
    return [*FORMATS, *installed(GROUP)]


def _installed(name: str) -> Format:
    """The format that an installed package calls *name*; raises what `Plugin.made` does."""

    def fits(own: object) -> bool:
        return is_dataclass(own) and getattr(own, "name", None) == name and isinstance(own, Format)

    found: Format = installed(GROUP)[name].made(f"moetrace.Format called {name}", fits, FORMATS)
    return found


# Endings of what people keep tables in, and no format here reads.
PICKLES = (".pkl", ".pickle", ".joblib")
NOT_READ = (*PICKLES, ".feather", ".arrow", ".ipc", ".orc", ".xlsx", ".xls", ".h5", ".hdf5", ".db", ".sqlite", ".mat")

# A mark in the head of the text, what the dump is, and what to do instead.
REASONS = (
    (
        '"window_expert_load"',
        "holds sums over windows that overlap from row to row (window-sums), of physical experts",
        "record the counts of single passes: `expert_load_pass`, added up by physical_to_logical_map",
    ),
    (
        "[expert load statistics",
        "is a log of --print-expert-load: the smoothed load of devices, not of experts",
        "log num_tokens_per_expert of each layer and step instead",
    ),
)


def sources_in(path: Location) -> list[Location]:
    """The sources that *path* stands for: itself, its parts until it is closed, or every trace file in the folder.

    Raises `TraceError` if no format claims it.
    """
    if not isinstance(path, Path):
        return [path]
    if not path.exists() and is_parts(parts := path.with_suffix(".parts")):
        return [parts]
    where = str(path)
    with readable(where):
        if not path.exists():
            raise TraceError(where, "does not exist", "check the path")
        if not path.is_file() and not path.is_dir():
            raise TraceError(where, "is neither a file nor a folder", "give a file that was written to a disk")
        if path.is_file() or _claiming(path) is not None:
            return [path]
        children = sorted(path.iterdir())
    if found := [child for child in children if child.is_file() and _claiming(child) is not None]:
        return list(found)
    files = {folder: filter(Path.is_file, folder.glob("*")) for folder in children if folder.is_dir()}
    inside = [folder.name for folder, those in files.items() if _claiming(folder) or any(map(_claiming, those))]
    if inside:
        raise TraceError(where, f"holds no trace files itself; its folders {shown(inside)} do", "give those")
    raise TraceError(where, "holds no trace files", f"known formats: {', '.join(names())}")


def _claiming(path: Path) -> Format | None:
    """The first format that claims *path*; raises `TraceError` naming the package of one that cannot be asked."""
    try:
        for format in formats():
            with _faults(format, str(path), "could not be looked at"):
                if format.claims(path):
                    return format
    except OSError:  # a folder that may not be looked into, a file that is gone by now
        pass
    return None


def chosen_format(source: Location, spec: str | None = None) -> Format:
    """The format that *spec*, ``name:setting=value``, names, or the first that claims *source*, with its settings.

    Raises `SettingError` for an unknown format or setting, `TraceError` if none claims *source*, or none makes counts
    of it.
    """
    name, _, settings = (spec or "").partition(":")
    if name and name not in names():
        raise unknown("format", name, names())
    if isinstance(source, Uri):
        if name not in ("", ParquetFormat.name):
            way_out = "by URI there is Parquet; copy other dumps to a disk"
            raise TraceError(str(source), f"cannot be read as {name}", way_out)
        return with_settings(FORMATS[ParquetFormat.name], settings)
    if isinstance(source, Query):
        return with_settings(SqlFormat(), settings)
    head = head_of(source) if source.is_file() else ""
    for mark, problem, way_out in REASONS:
        if mark in head:
            raise TraceError(str(source), problem, way_out)
    found = (FORMATS.get(name) or _installed(name)) if name else _claiming(source)
    if found is not None:
        return with_settings(found, settings)
    ending = source.suffix.lower()
    if ending in NOT_READ:
        problem = f"is a {source.suffix} file, which is not read" + (", as it may run code" * (ending in PICKLES))
        way_out = "write it as Parquet (to_parquet of pandas), CSV or .npz, or give its rows to moetrace.from_frame"
        raise TraceError(str(source), problem, way_out)
    way_out = f"known formats: {', '.join(names())}; --from forces one, such as --from log for lines of "
    way_out += "text with a --pattern, and docs/recipes.md has ways for any other"
    raise TraceError(str(source), "unrecognised format", way_out)


def source_of(format: Format, path: Location) -> Source:
    """What *format* reads of *path*; raises `TraceError` naming the package where it is no `Cells` of counts."""
    faults = partial(_faults, format, str(path), "could not be read")
    with faults():
        source = format.read(path)
        if isinstance(source, Merged) or _is_ours(format):
            return source
        opened = source.cells

    def cells() -> Iterator[Cells]:
        with faults():
            for piece in opened():
                if any(type(part) is not np.ndarray or part.dtype != np.int64 or part.ndim != 1 for part in piece):
                    raise ValueError("its cells are not four arrays of int64 with one axis")
                if len({len(column) for column in piece}) > 1:
                    raise ValueError("its cells are arrays of different lengths")
                if piece.count.min(initial=0) < 0:
                    raise ValueError("a count is negative")
                yield piece

    return replace(source, cells=cells)


def _is_ours(format: Format) -> bool:
    return type(format).__module__.startswith("moetrace.")


def _faults(format: Format, where: str, problem: str) -> AbstractContextManager[None]:
    """Whatever an installed *format* raises in the block becomes a `TraceError` that names it and its package."""
    if _is_ours(format):
        return nullcontext()
    own = installed(GROUP).get(format.name)
    by = f"by the format {format.name}" + (f" of {own.package}" if own else "")
    way_out = f"report it to its authors, or name another format than {format.name} with --from"
    return library_errors(where, f"{problem} {by}", way_out)
