"""JSON documents: counts under a known key, layers and experts as keys, or a table in one of the usual forms."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.errors import WRITE_AGAIN, library_errors, require
from moetrace.formats.readers.routing import choice_columns
from moetrace.formats.stream.arrays import COUNTS_KEYS, Array, Arrays
from moetrace.formats.stream.cells import Reading
from moetrace.formats.stream.keys import keyed_reading
from moetrace.formats.stream.tables import EXPERT_NAMES, LAYER_NAMES, STEP_NAMES, TableFormat
from moetrace.formats.stream.text import compression_of, ends_with, table_reading
from moetrace.formats.stream.values import simple_name

# Bytes of memory for each of a document's, which is held whole: a number takes 32 and as little as two digits.
IN_MEMORY = 20
# Keys of lists of windows, each a mapping with its counts.
WINDOWS = ("load_history", "history", "windows")
MOST_PACKED = 1 << 30
NEEDS = (
    "one of load_history, logical_count or counts, columns and data of a table, a list of objects with step, layer and "
    "counts, or layers whose values are experts; any other goes with moetrace.from_frame (docs/recipes.md)"
)


@dataclass(frozen=True)
class JsonFormat(TableFormat):
    """A JSON document with counts: EPLB's histories, layers of experts, tables of Weights & Biases or pandas.

    *axes* says what the axes of nested lists are, such as ``layers,steps,experts``.
    """

    axes: str | None = None

    name: ClassVar[str] = "json"
    needs: ClassVar[str] = f"a document, plain or .gz, with {NEEDS}"

    def claims(self, path: Path) -> bool:
        """A file named .json, compressed or not."""
        return path.is_file() and ends_with(path, ".json") and not path.name.startswith(".")

    def read(self, path: Path) -> Reading:
        """Find the counts by the keys of the document."""
        document = _document(path)
        rows = _rows_of(document, path)
        if rows is not None:
            self._no_use(path, axes=self.axes)
            if rows and choice_columns(list(rows[0])):
                raise TraceError(str(path), "holds choices of tokens", "write them as JSON lines, one object a line")
            import pyarrow as pa

            with library_errors(str(path), "holds no table", "give the same columns in every row"):
                table = pa.Table.from_pylist(rows).combine_chunks()
            return table_reading(str(path), table.to_reader, self.values(), self.naming(path))
        self._no_use(path, column=self.column, pattern=self.pattern)
        if isinstance(document, list) and document:
            return self._array(document, path, None)
        if not isinstance(document, dict):
            raise TraceError(str(path), f"is a {type(document).__name__}", f"it needs {NEEDS}")
        names = {simple_name(str(key)) for key in document}
        if {"schema", "data"} <= names or (names & set(STEP_NAMES) and names & {*LAYER_NAMES, *EXPERT_NAMES}):
            way_out = f'give it to moetrace.from_frame(pandas.read_json("{path.name}")), as in docs/recipes.md'
            raise TraceError(str(path), "is a table by columns, as pandas writes it", way_out)
        history = next((document[key] for key in WINDOWS if isinstance(document.get(key), list)), None)
        if history is not None:
            return self._array([_load_of(window, path) for window in history], path, "steps,layers,experts")
        key = next((key for key in COUNTS_KEYS if key in document), None)
        if key is not None and not isinstance(document[key], dict):
            one_window = key == "logical_count" and np.ndim(_array(document[key], path)) == 2
            extra = {name: document[name] for name in ("steps", "step", "layers") if name in document}
            return self._array(document[key], path, "layers,experts" if one_window else None, key, extra)
        self._no_use(path, axes=self.axes)
        return keyed_reading(document if key is None else document[key], path, self.values(), NEEDS)

    def _no_use(self, path: Path, **settings: object) -> None:
        """Raise `SettingError` for a setting that this kind of document has no use for."""
        for name, value in settings.items():
            if value is not None:
                raise SettingError(f"{path.name} is a document that has no use for --{name}")

    def _array(
        self, value: Any, path: Path, axes: str | None, key: str = "counts", extra: Mapping[str, Any] | None = None
    ) -> Reading:
        """The reading of nested lists *value*, with the numbers of steps and layers in *extra*."""
        arrays = {name: Array.held(_array(part, path)) for name, part in ((key, value), *(extra or {}).items())}
        assumption = () if key == "counts" else (f"{key} holds the counts",)
        return Arrays(arrays, path, self.axes or axes, self.values(), assumption).reading()


def _document(path: Path) -> Any:
    require(IN_MEMORY * path.stat().st_size, str(path), "the document, which is held whole,", "log JSON lines")
    with library_errors(str(path), "cannot be read", WRITE_AGAIN):
        if compression_of(path) == "gzip":
            with gzip.open(path) as file:
                data = file.read(MOST_PACKED + 1)
            if len(data) > MOST_PACKED:
                raise ValueError(f"it is longer than {MOST_PACKED >> 20} MiB")
            require(IN_MEMORY * len(data), str(path), "what it unpacks to", "log JSON lines")
        else:
            data = path.read_bytes()
        try:
            return json.loads(data.decode("utf-8-sig"))
        except RecursionError:
            raise ValueError("it is nested too deeply") from None


def _load_of(window: Any, path: Path) -> Any:
    """The counts of one window of a history."""
    if not isinstance(window, dict):
        return window
    key = next((key for key in COUNTS_KEYS if key in window), None)
    if key is None:
        problem = f"has windows with {shown(list(window))}"
        raise TraceError(f"{path}, load_history", problem, "each needs logical_expert_load or expert_load")
    return window[key]


def _array(value: Any, path: Path) -> NDArray[Any]:
    """Nested lists as an array; raises `TraceError` for what is ragged or no number."""
    with library_errors(str(path), "holds counts that are no array of numbers", "give lists of one length"):
        array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise TraceError(str(path), "holds counts that are no numbers", "counts are whole numbers of tokens")
    return array


def _rows_of(document: Any, path: Path) -> list[dict[str, Any]] | None:
    """The rows of a table: a list of objects, or columns and data as Weights & Biases writes them; None for others."""
    if isinstance(document, list):
        return document if document and all(isinstance(row, dict) for row in document) else None
    if not isinstance(document, dict):
        return None
    data, columns = document.get("data"), document.get("columns")
    if not isinstance(columns, list) or not isinstance(data, list):
        return None
    names = [str(name) for name in columns]
    bad = next((i for i, row in enumerate(data) if not isinstance(row, list) or len(row) != len(names)), None)
    if bad is not None:
        raise TraceError(f"{path}, row {bad}", f"has not {len(names)} values", "give one for each of `columns`")
    return [dict(zip(names, row)) for row in data]
