"""Tables that libraries read as Arrow batches: Parquet, on disk or by URI, and the rows of a DuckDB query."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pf
import pyarrow.parquet as pq

from moetrace.errors import TraceError, shown
from moetrace.formats.canonical import is_canonical
from moetrace.formats.readers.parts import phase_of
from moetrace.formats.sources import WRITE_AGAIN, Query, Uri, extra, library_errors, require
from moetrace.formats.stream.cells import Reading
from moetrace.formats.stream.columns import ValueFormat, few_columns, kind_of
from moetrace.formats.stream.tables import Naming, TableFormat, reading_of, table_of, table_reading
from moetrace.formats.stream.text import begins_with, refuse_empty

# Cells handed on at a time: 6 MiB in NumPy, which also fits the caches. Not a power of two: where it is one,
# pyarrow's reader finds its memory a little too small, doubles it and copies, which takes a third of its time.
BATCH_CELLS = 3 << 16
# Of a table with a column for each expert some rows at a time all the same: each column has its price.
WIDE_ROWS = 64
WIDE_CELLS = 1 << 20
# Bytes of compressed columns read ahead, all together and of one at most.
BUFFER_BYTES = 64 << 20
COLUMN_BYTES = 1 << 20
# The columns of a query, and its rows handed on at a time.
ROLES = ("step", "layer", "expert", "tokens")
QUERY_ROWS = 1 << 17


@dataclass(frozen=True)
class ParquetFormat(TableFormat):
    """Columns step, layer, expert, tokens; or step, layer, expert_0 ...; or step, layer, counts: list."""

    name: ClassVar[str] = "parquet"

    def claims(self, path: Path) -> bool:
        if path.is_dir():
            return any(child.is_dir() and "=" in child.name for child in path.iterdir())
        return path.is_file() and (path.suffix.lower() in {".parquet", ".pq"} or begins_with(path, b"PAR1"))

    def read(self, path: Path | Uri) -> Reading:
        """Match the columns to a layout and stream the rows."""
        where = str(path)
        if isinstance(path, Path) and path.is_file():
            refuse_empty(path)
            if self.phase is not None and is_canonical(path):
                return phase_of(path, self.phase)
        system, inside = path.opened() if isinstance(path, Uri) else (pf.LocalFileSystem(), where)
        way_out = "check the URI and access" if isinstance(path, Uri) else WRITE_AGAIN
        with library_errors(where, "cannot be read as Parquet", way_out):
            if isinstance(path, Path) and path.is_file():
                # Without a data set, which loads pandas and says less clearly what is wrong with its only file.
                with pq.ParquetFile(path) as file:
                    few_columns(file.metadata.num_columns, where)
                    schema, rows = file.schema_arrow, file.metadata.num_rows
                files: list[tuple[Any, str, Mapping[str, Any]]] = [(system, inside, {})]
            else:
                import pyarrow.dataset as ds

                folder = isinstance(path, Path) or system.get_file_info(inside).type == pf.FileType.Directory
                hive = "hive" if folder else None
                data = ds.dataset(inside, filesystem=system, format="parquet", partitioning=hive)
                schema, rows = data.schema, data.count_rows()
                keys = ds.get_partition_keys
                files = [(p.filesystem, p.path, keys(p.partition_expression)) for p in data.get_fragments()]
            first = None
            # A column of text may hold lists, and one of lists such of layers: its first rows show it.
            if files and not files[0][2] and any(kind_of(field.type) in ("text", "list") for field in schema):
                with files[0][0].open_input_file(files[0][1]) as raw:
                    first = next(pq.ParquetFile(raw, pre_buffer=False).iter_batches(WIDE_ROWS), None)
        table = table_of(schema, first, where, self.naming(where))
        return reading_of(table, partial(_batches, files, where), rows)


def _batches(
    files: Sequence[tuple[Any, str, Mapping[str, Any]]], where: str, wanted: list[str], width: int
) -> Iterator[pa.RecordBatch]:
    """The *wanted* columns of every file, a batch at a time: its file system, its path, what its folders' names say.

    Not by a scan of the data set: that decodes whole row groups, which may be of any size, and several ahead.
    """
    for system, path, inside in files:
        columns = [name for name in wanted if name not in inside]
        buffer = max(1 << 12, min(COLUMN_BYTES, BUFFER_BYTES // len(wanted)))
        with system.open_input_file(path) as raw:
            file = pq.ParquetFile(raw, pre_buffer=False, buffer_size=buffer, page_checksum_verification=True)
            metadata = file.metadata
            # pyarrow believes whichever number it looks at. The columns of a row group are not asked: on some damaged
            # files that aborts the process.
            rows = sum(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
            if rows != metadata.num_rows:
                problem = f"says that it has {metadata.num_rows:,} rows, and {rows:,} in its row groups"
                raise TraceError(where, problem, WRITE_AGAIN)
            cells = width if width > 1 else longest_list(metadata, where)
            at_once = max(1, BATCH_CELLS // cells, min(WIDE_ROWS, WIDE_CELLS // cells))
            row = 0
            # One thread decodes while another writes: more of them would be in each other's way.
            for batch in file.iter_batches(at_once, columns=columns, use_threads=False):
                row += batch.num_rows
                for name in inside.keys() & set(wanted):
                    value = pa.array([inside[name]]).take(pa.array(np.zeros(batch.num_rows, np.int8)))
                    batch = batch.append_column(name, value)
                yield batch
            if row != metadata.num_rows:
                problem = f"says that it has {metadata.num_rows:,} rows, and only {row:,} are there"
                raise TraceError(where, problem, WRITE_AGAIN)


def longest_list(metadata: pq.FileMetaData, where: str) -> int:
    """The mean length of the lists of the row group where they are longest, 1 without lists; they have to fit."""
    lists = [i for i in range(metadata.num_columns) if metadata.schema.column(i).max_repetition_level]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)] if lists else []
    values = ((group.column(i).num_values, group.num_rows) for group in groups for i in lists)
    longest = max((-(-n // rows) for n, rows in values if rows > 0), default=1)
    # Levels, values and four columns of cells.
    require(longest * 48, where, f"one row of it, a list of {longest:,},", "log one list for each step and layer")
    return max(1, longest)


@dataclass(frozen=True)
class SqlFormat(ValueFormat):
    """A query whose columns are called step, layer, expert and tokens."""

    name: ClassVar[str] = "sql"

    def claims(self, path: object) -> bool:
        return isinstance(path, Query)

    def read(self, path: Query) -> Reading:
        """Run the query, and once more each time its rows are read again."""
        with _rows(path) as rows:
            columns = rows.schema.names
        absent = [role for role in ROLES if role not in columns]
        if absent:
            problem = f"has no column {absent[0]} among {shown(columns)}"
            raise TraceError(str(path), problem, f"name it in the query, as in SELECT NAME AS {absent[0]}, ...")
        naming = Naming(self.values(path), {role: role for role in ROLES})
        return table_reading(str(path), lambda: _rows(path), naming)


@contextmanager
def _rows(query: Query) -> Iterator[pa.RecordBatchReader]:
    """The rows of a query as Arrow batches, with a connection of their own; raises `TraceError` for DuckDB's errors.

    It is closed afterwards: what DuckDB still runs at the end of a process may not let it end.
    """
    with extra("sql", str(query)):
        import duckdb
    with closing(duckdb.connect()) as connection:
        with library_errors(str(query), "cannot be run", "check the query, and the files in it"):
            rows = connection.sql(query.sql)
            if rows is None:
                raise TraceError(str(query), "gives no rows", "write it as SELECT step, layer, expert, tokens FROM ...")
            # Older versions call it by another name.
            read: Any = getattr(rows, "to_arrow_reader", None) or rows.fetch_arrow_reader
            reader = read(QUERY_ROWS)
        with closing(reader):
            yield reader
