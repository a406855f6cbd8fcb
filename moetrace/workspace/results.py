"""Kept results as files: scores, shares, forecasts and fits, each under a name that says what it depends on.

    <root>/<trace>/<predictor>/layer-3/horizon-1000.<key>.<digest>.scores.parquet    the rows of `Score`
                                                                   .shares.parquet    what they were computed from
                                                                   .forecast.parquet  the steps after the end
                               fit.<key>.<digest>.npz, fit.<key>.<digest>.json        one fit, and its seconds

The key is the digest of all that a result depends on, so a result is there or it is not, and is never out of
date. The digest is that of the file itself: a file that is damaged, or lies under another's name, is noticed
before it is used, and made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from moetrace.errors import WorkspaceError, lacks_memory
from moetrace.files import file_name, replacing, sweep
from moetrace.forecasting.evaluation import FORECAST, Kind, Name, SharedFit
from moetrace.forecasting.layers import EndForecast, TimedFit
from moetrace.forecasting.predictors import label
from moetrace.formats.stream.cells import to_lists

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

# How the names of the files of each kind of results end.
ENDINGS = {kind: [f"{kind}.parquet"] for kind in ("scores", "shares", "forecast")} | {"fit": ["npz", "json"]}
FORECAST_KEY = b"moetrace.forecast"
DIGITS = 16
# For files of a few rows, read whole: in a third of the time, and smaller, than with what serves large ones.
PLAIN: dict[str, Any] = {
    "compression": "lz4",
    "use_dictionary": False,
    "write_statistics": False,
    "write_page_checksum": True,
}


@dataclass(frozen=True)
class ResultFolder:
    """Results as files under *root*, atomically written, safe for many processes at a time.

    *report* is called for each damaged file, which is removed and counts as not kept.
    """

    root: Path
    report: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))  # a text will do

    def begin(self, trace: str) -> None:
        """Remove what killed processes left half-written of a trace."""
        for pattern in ("*/", "*/*/"):
            for folder in (self.root / file_name(trace)).glob(pattern):
                sweep(folder)

    def for_parent(self) -> None:
        """Nothing: whoever asked reads the same files."""

    def merge(self, other: object) -> None:
        """Nothing to take in."""

    def has(self, kind: Kind[T], name: Name) -> bool:
        """Whether that result is there and sound: a damaged file is removed, and is none."""
        return all(self._is_sound(name, ending) for ending in ENDINGS[kind.name])

    def put(self, kind: Kind[T], name: Name, value: T) -> None:
        """Cache a result; the seconds of a fit come last, so that they are never there without it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if isinstance(value, TimedFit):
            with self._replacing(name, "npz") as partial:
                value.fitted.save(partial)
            with self._replacing(name, "json") as partial:
                partial.write_text(json.dumps({"seconds": value.seconds}))
            return
        if isinstance(value, EndForecast):
            known = value._asdict()
            table = pa.table({"shares": to_lists(known.pop("shares"))})
            known["half_widths"] = [(percent, half.tolist()) for percent, half in value.half_widths.items()]
            table = table.replace_schema_metadata({FORECAST_KEY: json.dumps(known)})
        else:
            frame = cast("pd.DataFrame", value)
            table = pa.table({str(column): pa.array(own) for column, own in frame.items()})
        with self._replacing(name, *ENDINGS[kind.name]) as partial:
            pq.write_table(table, partial, **PLAIN)

    def get(self, kind: Kind[T], name: Name) -> T:
        """A result that is cached; raises `WorkspaceError` where it was removed or damaged since."""
        import pyarrow.parquet as pq

        paths = [path for ending in ENDINGS[kind.name] for path in list(self._files(name, ending))[:1]]
        if len(paths) < len(ENDINGS[kind.name]):
            folder = _place(name)[0]
            raise WorkspaceError(
                f"{self.root / folder}: kept results were removed while they were used: run the same command again"
            )
        try:
            if isinstance(name, SharedFit):
                weights, seconds = paths
                fit = TimedFit(name.predictor.load(weights), float(json.loads(seconds.read_text())["seconds"]))
                return cast("T", fit)
            with pq.ParquetFile(paths[0], page_checksum_verification=True) as file:
                table = file.read(use_threads=False)
            if kind.name != FORECAST.name:
                return cast("T", table.to_pandas(use_threads=False))  # faster for a few rows
            known = json.loads(table.schema.metadata[FORECAST_KEY])
            flat = table.column("shares").combine_chunks().flatten().to_numpy()
            known["half_widths"] = {percent: np.array(half) for percent, half in known["half_widths"]}
            return cast("T", EndForecast(**known, shares=flat.reshape(len(table), -1)))
        except Exception as error:  # pyarrow raises a dozen types on damaged files
            if lacks_memory(error):
                raise
            again = "run the same command again, which makes it anew"
            raise WorkspaceError(f"{paths[-1]} cannot be read: {again}") from error

    def _files(self, name: Name, ending: str) -> Iterator[Path]:
        """The files of a result, whatever their digest."""
        folder, stem = _place(name)
        with suppress(OSError):  # not there, or not readable: nothing is cached there
            for path in list((self.root / folder).iterdir()):
                if path.name.startswith(f"{stem}.") and path.name.endswith(f".{ending}"):
                    yield path

    def _is_sound(self, name: Name, ending: str) -> bool:
        """Whether there is a file whose content has the digest in its name; a damaged one is removed."""
        for path in self._files(name, ending):
            if path.name == f"{_place(name)[1]}.{_digest(path)}.{ending}":
                return True
            path.unlink(missing_ok=True)
            if self.report is not None:
                self.report(f"{path} was damaged: it is made anew")
        return False

    @contextmanager
    def _replacing(self, name: Name, ending: str) -> Iterator[Path]:
        """A temporary file that takes its place under the name with its digest."""
        folder, stem = _place(name)
        whole = self.root / folder / f"{stem}.{ending}"
        with replacing(whole, lambda partial: whole.with_name(f"{stem}.{_digest(partial)}.{ending}")) as partial:
            yield partial


def _place(name: Name) -> tuple[Path, str]:
    """The folder of a result below the root, one for each layer so that few are searched, and how its files begin."""
    if isinstance(name, SharedFit):
        return Path(file_name(name.trace), file_name(label(name.predictor))), f"fit.{name.key}"
    folder = Path(file_name(name.trace), file_name(name.predictor), f"layer-{name.layer}")
    return folder, f"horizon-{name.horizon}.{name.key}"


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]
    except OSError:  # gone by now, or not readable: not the one that was kept
        return ""


# --- the forecast that a user asked for -------------------------------------------------------


def writing_forecast(path: Path, forecasts: Iterable[EndForecast], key: str = "") -> Iterator[EndForecast]:
    """The same *forecasts*, which are written as one Parquet file as they pass; it is there when all have.

    Nothing is written where the file there was written with the same *key*, the digest of what goes into it.

    Columns ``trace, predictor, layer, step, shares: list<double>``, one row for every step of the
    horizon; each forecast is one row group, so that a forecast of any size passes through memory
    one layer at a time.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = {"trace": pa.string(), "predictor": pa.string(), "layer": pa.int32(), "step": pa.int64()}
    schema = pa.schema(names | {"shares": pa.list_(pa.float64())})
    if key and path.exists() and _is_sound(path, key, schema):
        yield from forecasts
        return
    with (
        replacing(path) as partial,
        pq.ParquetWriter(partial, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        writer.add_key_value_metadata({FORECAST_KEY: key.encode()})
        for forecast in forecasts:
            horizon = len(forecast.shares)
            columns: dict[str, Any] = {
                "trace": [forecast.trace] * horizon,
                "predictor": [forecast.predictor] * horizon,
                "layer": pa.array(np.full(horizon, forecast.layer), pa.int32()),
                "step": forecast.first_step + np.arange(horizon),
                "shares": to_lists(forecast.shares),
            }
            writer.write_table(pa.table(columns, schema=schema))
            yield forecast


def _is_sound(path: Path, key: str, schema: Any) -> bool:
    """Whether the forecast file at *path* was written with that *key* and *schema*, and its pages are undamaged."""
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            known = (file.metadata.metadata or {}).get(FORECAST_KEY) == key.encode()
            if not known or not file.schema_arrow.remove_metadata().equals(schema):
                return False
            return all(file.read_row_group(group).num_rows for group in range(file.num_row_groups))
    except Exception as error:  # pyarrow raises a dozen types on damaged files
        if lacks_memory(error):
            raise
        return False
