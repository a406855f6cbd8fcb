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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.errors import WorkspaceError
from moetrace.files import file_name, replacing, sweep
from moetrace.forecasting.evaluation import Result, SharedFit
from moetrace.forecasting.fitting import TimedFit
from moetrace.forecasting.layers import EndForecast
from moetrace.forecasting.predictors.base import Predictor
from moetrace.formats.arrow import to_lists

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

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

    *report* is told of each damaged file, which is removed and counts as not kept.
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

    def handed_over(self) -> None:
        """Nothing: whoever asked reads the same files."""

    def merge(self, other: object) -> None:
        """Nothing to take in."""

    # --- scores and shares ---

    def has_scores(self, result: Result) -> bool:
        """Whether its scores, and its shares if it has some, are there and sound."""
        return self._sound(result, "scores") and (not result.intervals or self._sound(result, "shares"))

    def put_scores(self, result: Result, scores: pd.DataFrame, shares: pd.DataFrame) -> None:
        """Keep the rows of one result; the scores come last, so that they are never there without their shares."""
        import pyarrow as pa

        for kind, frame in (("shares", shares), ("scores", scores))[not result.intervals :]:
            self._write_table(result, kind, pa.table({str(name): pa.array(own) for name, own in frame.items()}))

    def scores(self, results: Sequence[Result]) -> pd.DataFrame:
        """The scores of all *results*, one row per cutoff of each."""
        return self._read_frame(results, "scores")

    def shares(self, results: Sequence[Result]) -> pd.DataFrame:
        """Their shares, one row per cutoff and expert of each; no rows where every history was too short."""
        return self._read_frame([result for result in results if result.intervals], "shares")

    # --- forecasts of the steps after the end ---

    def has_forecast(self, result: Result) -> bool:
        """Whether its forecast is there and sound."""
        return self._sound(result, "forecast")

    def put_forecast(self, result: Result, forecast: EndForecast) -> None:
        """Keep the forecast of the steps after the end of the trace."""
        import pyarrow as pa

        known = {
            "trace": forecast.trace,
            "predictor": forecast.predictor,
            "layer": forecast.layer,
            "first_step": forecast.first_step,
            "first_expert": forecast.first_expert,
        }
        known |= {"status": forecast.status, "expected_error": forecast.expected_error}
        known |= {"half_widths": [(percent, half.tolist()) for percent, half in forecast.half_widths.items()]}
        table = pa.table({"shares": to_lists(forecast.shares)})
        self._write_table(result, "forecast", table.replace_schema_metadata({FORECAST_KEY: json.dumps(known)}))

    def forecast(self, result: Result) -> EndForecast:
        """The forecast of the steps after the end of the trace."""
        table = self._read(result, "forecast")
        known = json.loads(table.schema.metadata[FORECAST_KEY])
        flat = table.column("shares").combine_chunks().flatten().to_numpy()
        half_widths = {percent: np.array(half) for percent, half in known.pop("half_widths")}
        return EndForecast(**known, half_widths=half_widths, shares=flat.reshape(len(table), -1))

    # --- fits for all layers ---

    def has_fit(self, fit: SharedFit) -> bool:
        """Whether it is there and sound."""
        return all(self._found(self._folder(fit), f"fit.{fit.key}", kind) is not None for kind in ("json", "npz"))

    def put_fit(self, fit: SharedFit, learned: TimedFit) -> None:
        """Keep a fit; its seconds come last, so that they are never there without it."""
        for kind, write in (
            ("npz", learned.fitted.save),
            ("json", lambda path: path.write_text(json.dumps({"seconds": learned.seconds}))),
        ):
            with _kept(self._folder(fit), f"fit.{fit.key}", kind) as partial:
                write(partial)

    def fit(self, fit: SharedFit, predictor: Predictor) -> TimedFit:
        """What *predictor* learned."""
        weights, seconds = (self._found(self._folder(fit), f"fit.{fit.key}", kind) for kind in ("npz", "json"))
        if weights is None or seconds is None:
            raise _gone(self._folder(fit))
        with _damage_named(seconds):
            return TimedFit(predictor.load(weights), float(json.loads(seconds.read_text())["seconds"]))

    # --- files ---

    def _folder(self, of: Result | SharedFit) -> Path:
        """One for each layer, so that what is searched for a result does not grow with the layers."""
        folder = self.root / file_name(of.trace) / file_name(of.predictor)
        return folder / f"layer-{of.layer}" if isinstance(of, Result) else folder

    def _sound(self, result: Result, kind: str) -> bool:
        return self._found(self._folder(result), _stem(result), f"{kind}.parquet") is not None

    def _found(self, folder: Path, stem: str, kind: str) -> Path | None:
        """The file of that name whose content has the digest in its name; a damaged one is removed."""
        for path in _files_of(folder, stem, kind):
            if path.name == f"{stem}.{_digest(path)}.{kind}":
                return path
            path.unlink(missing_ok=True)
            if self.report is not None:
                self.report(f"{path} was damaged: it is made anew")
        return None

    def _write_table(self, result: Result, kind: str, table: pa.Table) -> None:
        import pyarrow.parquet as pq

        with _kept(self._folder(result), _stem(result), f"{kind}.parquet") as partial:
            pq.write_table(table, partial, **PLAIN)

    def _read_frame(self, results: Sequence[Result], kind: str) -> pd.DataFrame:
        import pandas as pd
        import pyarrow as pa

        # Those without rows do not know the types of their columns.
        tables = [table for result in results if (table := self._read(result, kind)).num_rows]
        frame: pd.DataFrame = pa.concat_tables(tables).to_pandas() if tables else pd.DataFrame()
        return frame

    def _read(self, result: Result, kind: str) -> pa.Table:
        import pyarrow.parquet as pq

        path = next(_files_of(self._folder(result), _stem(result), f"{kind}.parquet"), None)
        if path is None:
            raise _gone(self._folder(result))
        with _damage_named(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(use_threads=False)


def _stem(result: Result) -> str:
    return f"horizon-{result.horizon}.{result.key}"


def _files_of(folder: Path, stem: str, kind: str) -> Iterator[Path]:
    """The files in *folder* with the name that *stem* begins and *kind* ends, whatever their digest."""
    with suppress(OSError):  # not there, or not readable: nothing is kept there
        for path in list(folder.iterdir()):
            if path.name.startswith(f"{stem}.") and path.name.endswith(f".{kind}"):
                yield path


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]
    except OSError:  # gone by now, or not readable: not the one that was kept
        return ""


@contextmanager
def _kept(folder: Path, stem: str, kind: str) -> Iterator[Path]:
    """A temporary file that takes its place under the name with its digest."""
    with replacing(folder / f"{stem}.{kind}", lambda partial: folder / f"{stem}.{_digest(partial)}.{kind}") as partial:
        yield partial


def _gone(folder: Path) -> WorkspaceError:
    return WorkspaceError(f"{folder}: kept results were removed while they were used: run the same command again")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # pyarrow raises a dozen types on damaged files
        raise WorkspaceError(f"{path} cannot be read: run the same command again, which makes it anew") from error


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

    schema = pa.schema(
        {
            "trace": pa.string(),
            "predictor": pa.string(),
            "layer": pa.int32(),
            "step": pa.int64(),
            "shares": pa.list_(pa.float64()),
        }
    )
    if key and path.exists() and _key_in(path) == key.encode():
        yield from forecasts
        return
    with replacing(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
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


def _key_in(path: Path) -> bytes | None:
    """The key that the forecast file at *path* was written with, None for any other or damaged file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found: bytes | None = (pq.read_metadata(path).metadata or {}).get(FORECAST_KEY)
    except (OSError, pa.ArrowException):
        return None
    return found
