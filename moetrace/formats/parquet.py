"""Parquet as loggers write it: one file, or a hive-partitioned folder as one trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moetrace.errors import TraceError
from moetrace.formats.base import Cells, Reading, ReadOptions
from moetrace.formats.canonical import one_line
from moetrace.formats.columns import Layout, match_layout

if TYPE_CHECKING:
    import pyarrow.dataset as ds

# Cells handed on at a time: a few tens of MB in NumPy.
BATCH_CELLS = 1 << 20


class ParquetFormat:
    """Any Parquet file or hive-partitioned folder whose columns name step, layer and experts."""

    name = "parquet"
    needs = "columns step, layer, expert, tokens; or step, layer, expert_0 ...; or step, layer, counts: list"

    def claims(self, path: Path) -> bool:
        """A file that begins and ends with Parquet's magic, or a folder of `key=value` folders."""
        if path.is_dir():
            return is_hive(path)
        try:
            with path.open("rb") as file:
                head = file.read(4)
        except OSError:
            return False
        return head == b"PAR1" or path.suffix.lower() in {".parquet", ".pq"}

    def read(self, path: Path, options: ReadOptions) -> Reading:
        """Match the columns to a layout and stream the rows."""
        import pyarrow.dataset as ds

        where = str(path)
        if path.is_file() and path.stat().st_size == 0:
            raise TraceError(where, "is empty", "is it the right file?")
        try:
            data = ds.dataset(path, format="parquet", partitioning="hive" if path.is_dir() else None)
            rows = data.count_rows()
        except Exception as error:  # pyarrow raises a dozen types on damaged files
            raise TraceError(where, f"cannot be read as Parquet: {one_line(error)}", "write the file again") from error
        return dataset_reading(data, rows, where, options)


def dataset_reading(data: ds.Dataset, rows: int, where: str, options: ReadOptions) -> Reading:
    """The reading of an Arrow data set of *rows* rows; raises `TraceError` when no layout fits."""
    layout = match_layout(data.schema, where, options)
    return Reading(
        cells=lambda: _stream(data, layout, where),
        rows=rows * layout.width,
        assumptions=layout.assumptions,
        where=where,
        watch=layout.watch,
    )


def is_hive(path: Path) -> bool:
    """Whether a folder holds folders named ``key=value``."""
    return any(child.is_dir() and "=" in child.name for child in path.iterdir())


def _stream(data: ds.Dataset, layout: Layout, where: str) -> Iterator[Cells]:
    row = 0
    size = max(1, BATCH_CELLS // layout.width)
    try:
        batches = data.to_batches(columns=layout.columns, batch_size=size, batch_readahead=1, fragment_readahead=1)
        for batch in batches:
            if batch.num_rows:
                yield layout.cells(batch, row, where)
            row += batch.num_rows
    except (TraceError, MemoryError):
        raise
    except Exception as error:  # pyarrow raises a dozen types on damaged files
        raise TraceError(where, f"cannot be read after row {row}: {one_line(error)}", "write the file again") from error
