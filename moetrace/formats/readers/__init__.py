"""The formats by name: one module for each kind of dump. A new one is a module and a line in `FORMATS`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moetrace.errors import TraceError, shown
from moetrace.formats.errors import readable
from moetrace.formats.readers.documents import JsonFormat
from moetrace.formats.readers.megatron import MegatronFormat, MegatronRouterFormat
from moetrace.formats.readers.mindie import MindieFormat
from moetrace.formats.readers.mlflow import MlflowFormat
from moetrace.formats.readers.numpy import NumpyFormat
from moetrace.formats.readers.omni import OmniFormat
from moetrace.formats.readers.parquet import Location, ParquetFormat, Uri
from moetrace.formats.readers.parts import PartsFormat
from moetrace.formats.readers.routing import RoutingFormat
from moetrace.formats.readers.sglang import SglangFormat
from moetrace.formats.readers.tensorboard import TensorboardFormat
from moetrace.formats.readers.tensorrt import TensorrtFormat
from moetrace.formats.readers.tensors import TensorsFormat
from moetrace.formats.readers.text import CsvFormat, JsonLinesFormat, head_of
from moetrace.formats.stream.cells import Format
from moetrace.settings import unknown, with_settings

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        # Formats with a mark of their own come first: a table is only what none of them claims.
        PartsFormat(),
        MegatronFormat(),
        MegatronRouterFormat(),
        SglangFormat(),
        TensorsFormat(),
        TensorrtFormat(),
        TensorboardFormat(),
        MlflowFormat(),
        OmniFormat(),
        MindieFormat(),
        RoutingFormat(),
        ParquetFormat(),
        CsvFormat(),
        JsonLinesFormat(),
        JsonFormat(),
        NumpyFormat(),
    )
}


def sources_in(path: Location) -> list[Location]:
    """The sources that *path* stands for: itself, or every trace file lying in the folder.

    Raises `TraceError` when there is none.
    """
    if isinstance(path, Uri):
        return [path]
    with readable(str(path)):
        if not path.exists():
            raise TraceError(str(path), "does not exist", "check the path")
        if not path.is_file() and not path.is_dir():
            raise TraceError(str(path), "is neither a file nor a folder", "give a file that was written to a disk")
    if path.is_file() or _format_of(path) is not None:
        return [path]
    try:
        children = sorted(path.iterdir())
    except OSError as error:
        raise TraceError(str(path), f"cannot be read: {error.strerror}", "check its permissions") from error
    found: list[Location] = [child for child in children if child.is_file() and _format_of(child) is not None]
    if not found:
        raise _without_traces(path, [child for child in children if child.is_dir()])
    return found


def _without_traces(path: Path, folders: Sequence[Path]) -> TraceError:
    """That no trace file lies in *path* itself, and which of the *folders* in it have some."""
    inside = [folder.name for folder in folders if _format_of(folder) or _any_in(folder)]
    if inside:
        return TraceError(str(path), f"holds no trace files itself; its folders {shown(inside)} do", "give those")
    return TraceError(str(path), "holds no trace files", f"known formats: {', '.join(FORMATS)}")


def _any_in(folder: Path) -> bool:
    """Whether a trace file lies in *folder*."""
    try:
        return any(child.is_file() and _format_of(child) for child in folder.iterdir())
    except OSError:
        return False


def _format_of(path: Path) -> Format | None:
    try:
        return next((format for format in FORMATS.values() if format.claims(path)), None)
    except OSError:  # a folder that may not be looked into, a file that is gone by now
        return None


def chosen_format(source: Location, spec: str | None = None) -> Format:
    """The format that *spec*, ``name:setting=value``, names, or the first that claims *source*, with its settings.

    Without a name, ``:setting=value`` is a setting of the one that claims it.
    Raises `SettingError` for a format or a setting that there is not, `TraceError` if none claims *source*.
    """
    name, _, settings = (spec or "").partition(":")
    if name and name not in FORMATS:
        raise unknown("format", name, FORMATS)
    if isinstance(source, Uri):
        return with_settings(_by_uri(source, name), settings)
    refuse_lookalikes(source)
    found = FORMATS[name] if name else _format_of(source)
    if found is None:
        raise _unread(source)
    return with_settings(found, settings)


def _unread(path: Path) -> TraceError:
    if path.suffix.lower() in NOT_READ:
        problem = f"is a {path.suffix} file, which is not read" + (", as it may run code" * (path.suffix in PICKLES))
        return TraceError(str(path), problem, "write it as Parquet (to_parquet of pandas), CSV or .npz")
    return TraceError(str(path), "is in no known format", f"known formats: {', '.join(FORMATS)}; --from forces one")


def _by_uri(uri: Uri, name: str) -> Format:
    if name not in ("", ParquetFormat.name):
        raise TraceError(str(uri), f"cannot be read as {name}", "by URI there is Parquet; copy other dumps to a disk")
    return FORMATS[ParquetFormat.name]


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


def refuse_lookalikes(path: Path) -> None:
    """Raise `TraceError` for a dump that no format can make counts of."""
    head = head_of(path) if path.is_file() else ""
    for mark, problem, way_out in REASONS:
        if mark in head:
            raise TraceError(str(path), problem, way_out)
