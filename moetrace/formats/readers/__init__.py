"""The formats by name: one module for each kind of dump. A new one is a module and a line in `FORMATS`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moetrace.errors import TraceError, shown
from moetrace.formats.errors import readable
from moetrace.formats.location import Location, Query, Uri
from moetrace.formats.plugins import GROUP, claimed, format_of
from moetrace.formats.readers.arrays import NumpyFormat, TensorsFormat
from moetrace.formats.readers.imatrix import ImatrixFormat
from moetrace.formats.readers.logs import LogFormat, PrometheusFormat
from moetrace.formats.readers.megatron import MegatronFormat, MegatronRouterFormat
from moetrace.formats.readers.mindie import MindieFormat
from moetrace.formats.readers.omni import OmniFormat
from moetrace.formats.readers.parquet import ParquetFormat
from moetrace.formats.readers.parts import PartsFormat, is_parts
from moetrace.formats.readers.routing import RoutingFormat
from moetrace.formats.readers.sglang import SglangFormat
from moetrace.formats.readers.sql import SqlFormat
from moetrace.formats.readers.tensorboard import TensorboardFormat
from moetrace.formats.readers.tensorrt import TensorrtFormat
from moetrace.formats.readers.text import CsvFormat, JsonFormat, JsonLinesFormat
from moetrace.formats.stream.cells import Format
from moetrace.formats.stream.text import head_of
from moetrace.settings import installed, unknown, with_settings

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
            yield from (format_of(own, FORMATS) for own in installed(GROUP))
        yield format


def names() -> list[str]:
    """The names of all formats: ours, and those of installed packages."""
    return [*FORMATS, *installed(GROUP)]


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
        if path.is_file() or _format_of(path) is not None:
            return [path]
        children = sorted(path.iterdir())
    if found := [child for child in children if child.is_file() and _format_of(child) is not None]:
        return list(found)
    files = {folder: filter(Path.is_file, folder.glob("*")) for folder in children if folder.is_dir()}
    inside = [folder.name for folder, those in files.items() if _format_of(folder) or any(map(_format_of, those))]
    if inside:
        raise TraceError(where, f"holds no trace files itself; its folders {shown(inside)} do", "give those")
    raise TraceError(where, "holds no trace files", f"known formats: {', '.join(names())}")


def _format_of(path: Path) -> Format | None:
    try:
        return next((format for format in formats() if claimed(format, path)), None)
    except OSError:  # a folder that may not be looked into, a file that is gone by now
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
    found = (FORMATS.get(name) or format_of(name, FORMATS)) if name else _format_of(source)
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
