"""Results as files: scores, shares, forecasts and fits, each under a name that says what it depends on.

    <root>/<trace>/<predictor>/layer-3.horizon-1000.<key>.scores.parquet    the rows of `Score`
                                                          .shares.parquet    the shares they were computed from
                                                          .forecast.parquet  the steps after the end of the trace
                               fit.<key>.npz, fit.<key>.json                 one fit for all layers, and its seconds

A key is the digest of all that a result depends on: what has another input, other settings or other
code has another name. So a result is there or it is not, and is never out of date.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.errors import WorkspaceError
from moetrace.files import replacing, sweep
from moetrace.forecasting.fits import Timed
from moetrace.forecasting.forecasts import Coming
from moetrace.forecasting.predictors.base import Predictor
from moetrace.formats.arrow import to_lists

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

FOLDER = "parts"
"""Where in a workspace the results lie."""
# File names may have 255 bytes on common file systems.
LONGEST_NAME = 100
FORECAST_KEY = b"moetrace.forecast"


@dataclass(frozen=True)
class Result:
    """One result by its name; *predictor* is the label, *key* the digest of what it depends on."""

    trace: str
    predictor: str
    layer: int
    horizon: int
    key: str


@dataclass(frozen=True)
class Fit:
    """One fit for all layers, by its name."""

    trace: str
    predictor: str
    key: str


@dataclass(frozen=True)
class Store:
    """The results under *root*. Whatever is damaged raises `WorkspaceError` when it is read."""

    root: Path

    def has_scores(self, result: Result) -> bool:
        """Whether its scores, and so its shares, are there."""
        return self._path(result, "scores").exists()

    def has_forecast(self, result: Result) -> bool:
        """Whether its forecast is there."""
        return self._path(result, "forecast").exists()

    def put_scores(self, result: Result, scores: pd.DataFrame, shares: pd.DataFrame) -> None:
        """Keep the rows of one result; the scores come last, so that they are never there without their shares."""
        _write_frame(self._path(result, "shares"), shares)
        _write_frame(self._path(result, "scores"), scores)

    def scores(self, result: Result) -> pd.DataFrame:
        """The scores of *result*, one row per cutoff."""
        return _read_frame(self._path(result, "scores"))

    def shares(self, result: Result) -> pd.DataFrame:
        """The shares of *result*, one row per cutoff and expert; no rows where every history was too short."""
        return _read_frame(self._path(result, "shares"))

    def put_forecast(self, result: Result, coming: Coming) -> None:
        """Keep the forecast of the steps after the end of the trace."""
        said = {"predictor": coming.predictor, "layer": coming.layer, "first_step": coming.first_step}
        said |= {"status": coming.status, "deviation": coming.deviation.tolist()}
        table = _table({"shares": to_lists(coming.shares)}, {FORECAST_KEY: json.dumps(said).encode()})
        _write_table(self._path(result, "forecast"), table)

    def status(self, result: Result) -> str:
        """The status of its forecast."""
        import pyarrow.parquet as pq

        path = self._path(result, "forecast")
        with _damage_named(path):
            return str(json.loads(pq.read_metadata(path).metadata[FORECAST_KEY])["status"])

    def forecast(self, result: Result) -> Coming:
        """The forecast of the steps after the end of the trace."""
        path = self._path(result, "forecast")
        with _damage_named(path):
            table = _read_table(path)
            said = json.loads(table.schema.metadata[FORECAST_KEY])
            flat = table.column("shares").combine_chunks().flatten().to_numpy()
            return Coming(**{**said, "deviation": np.array(said["deviation"])}, shares=flat.reshape(len(table), -1))

    def put_fit(self, fit: Fit, learned: Timed) -> None:
        """Keep a fit; its seconds come last, so that they are never there without it."""
        learned.fitted.save(self._fit_path(fit, "npz"))
        with replacing(self._fit_path(fit, "json")) as partial:
            partial.write_text(json.dumps({"seconds": learned.seconds}))

    def has_fit(self, fit: Fit) -> bool:
        """Whether it is there."""
        return self._fit_path(fit, "json").exists()

    def fit(self, fit: Fit, made: Predictor) -> Timed:
        """What the predictor *made* learned."""
        path = self._fit_path(fit, "json")
        with _damage_named(path):
            return Timed(made.load(self._fit_path(fit, "npz")), float(json.loads(path.read_text())["seconds"]))

    def remove(self, trace: str) -> None:
        """Delete every result of the trace of that name, where there are any."""
        shutil.rmtree(self.root / safe(trace), ignore_errors=True)

    def sweep(self, trace: str) -> None:
        """Remove what killed processes left half-written of a trace."""
        for folder in (self.root / safe(trace)).glob("*/"):
            sweep(folder)

    def _path(self, result: Result, kind: str) -> Path:
        name = f"layer-{result.layer}.horizon-{result.horizon}.{result.key}.{kind}.parquet"
        return self.root / safe(result.trace) / safe(result.predictor) / name

    def _fit_path(self, fit: Fit, suffix: str) -> Path:
        return self.root / safe(fit.trace) / safe(fit.predictor) / f"fit.{fit.key}.{suffix}"


def safe(name: str) -> str:
    """*name* as a file name of any system; two names may become one, which their keys tell apart."""
    return re.sub(r"[^A-Za-z0-9_=,+@ -]|^\.", "_", name.replace(".", "-"))[:LONGEST_NAME] or "_"


# --- what a result depends on -----------------------------------------------------------------


def key_of(*facts: Any) -> str:
    """The digest of *facts*, anything that JSON can say."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def settings_of(made: Predictor) -> list[Any]:
    """What tells one predictor from another: its class, all its settings, and the code that computes."""
    return [f"{type(made).__module__}.{type(made).__qualname__}", asdict(made), code_digest()]


@cache
def code_digest() -> str:
    """The digest of the source of every module that a result may depend on.

    Whoever changes a predictor sees new numbers, not stored ones; a version number would have to be
    thought of.
    """
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*here.glob("*.py"), *here.glob("predictors/*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def layer_digests(path: Path) -> dict[int, str]:
    """The digest of the counts of each layer of the canonical trace file at *path*, as its metadata say."""
    import pyarrow.parquet as pq

    from moetrace.formats.canonical import DOCUMENT_KEY

    document = json.loads(pq.read_metadata(path).metadata[DOCUMENT_KEY.encode()])
    return {entry["layer"]: entry["digest"] for entry in document["layers"]}


# --- files ------------------------------------------------------------------------------------


def write_forecast(path: Path, forecasts: Iterable[tuple[str, Coming]], key: str = "") -> None:
    """Write *forecasts*, pairs of trace and `Coming`, as one Parquet file, atomically.

    Does nothing where the file there was written with the same *key*, the digest of what goes into it.

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
        return
    with replacing(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        writer.add_key_value_metadata({FORECAST_KEY: key.encode()})
        for trace, coming in forecasts:
            horizon = len(coming.shares)
            columns = {
                "trace": [trace] * horizon,
                "predictor": [coming.predictor] * horizon,
                "layer": pa.array(np.full(horizon, coming.layer), pa.int32()),
                "step": coming.first_step + np.arange(horizon),
                "shares": to_lists(coming.shares),
            }
            writer.write_table(pa.table(columns, schema=schema))


def _key_in(path: Path) -> bytes | None:
    """The key that the forecast file at *path* was written with, None for any other or damaged file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found: bytes | None = (pq.read_metadata(path).metadata or {}).get(FORECAST_KEY)
    except (OSError, pa.ArrowException):
        return None
    return found


def _table(columns: dict[str, Any], metadata: dict[bytes, bytes]) -> pa.Table:
    import pyarrow as pa

    return pa.table(columns).replace_schema_metadata(metadata)


def _write_frame(path: Path, frame: pd.DataFrame) -> None:
    import pyarrow as pa

    _write_table(path, pa.Table.from_pandas(frame, preserve_index=False))


def _read_frame(path: Path) -> pd.DataFrame:
    with _damage_named(path):
        frame: pd.DataFrame = _read_table(path).to_pandas()
        return frame


def _write_table(path: Path, table: pa.Table) -> None:
    import pyarrow.parquet as pq

    with replacing(path) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


def _read_table(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.read_table(path, page_checksum_verification=True, partitioning=None)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # pyarrow raises a dozen types on damaged files
        raise WorkspaceError(f"{path} cannot be read: delete it and run the same command again") from error
