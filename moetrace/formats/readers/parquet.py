"""Parquet as loggers write it: a file or a hive-partitioned folder as one trace, on disk or by URI."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from moetrace.errors import SettingError, TraceError
from moetrace.formats.errors import library_errors, require
from moetrace.formats.stream.cells import Cells, Reading
from moetrace.formats.stream.columns import is_text
from moetrace.formats.stream.roles import Layout, Naming
from moetrace.formats.stream.tables import TableFormat, few_columns, is_list, match_layout
from moetrace.formats.stream.values import Values

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

# Cells handed on at a time: 6 MiB in NumPy, which also fits the caches. Not a power of two: where it is one,
# pyarrow's reader finds its memory a little too small, doubles it and copies, which takes a third of its time.
BATCH_CELLS = 3 << 16
# Of a table with a column for each expert some rows at a time all the same: each column has its price.
WIDE_ROWS = 64
WIDE_CELLS = 1 << 20
# Bytes of compressed columns read ahead, all together and of one at most.
BUFFER_BYTES = 64 << 20
COLUMN_BYTES = 1 << 20


@dataclass(frozen=True)
class Uri:
    """A source that is no local path, such as ``s3://bucket/run7``."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def path(self) -> PurePosixPath:
        """The part after the bucket or host."""
        parts = urlsplit(self.text)
        return PurePosixPath(parts.path if parts.path.strip("/") else parts.netloc)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name

    @property
    def stem(self) -> str:
        """The last part of the path without its ending."""
        return self.path.stem


Location = Path | Uri


def locations(source: str | Location | Sequence[str | Location]) -> list[Location]:
    """Where one source lies, or several; raises `SettingError` for an array or a frame, which lies nowhere."""
    if not isinstance(source, str | Location | Sequence):
        way_out = "LoadTrace.from_counts makes a trace of counts in memory"
        raise SettingError(f"a {type(source).__name__} is no path to read from: {way_out}")
    given = [source] if isinstance(source, str | Location) else source
    return [location(part) if isinstance(part, str) else part for part in given]


def location(text: str) -> Location:
    """The path or URI that *text* is."""
    return Uri(text) if "://" in text else Path(text)


@dataclass(frozen=True)
class ParquetFormat(TableFormat):
    """Any Parquet file or hive-partitioned folder whose columns name step, layer and experts."""

    name: ClassVar[str] = "parquet"
    needs: ClassVar[str] = (
        "columns step, layer, expert, tokens; or step, layer, expert_0 ...; or step, layer, counts: list"
    )

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

    def read(self, path: Location) -> Reading:
        """Match the columns to a layout and stream the rows."""
        if isinstance(path, Uri):
            return _files_at(path).reading(str(path), self.values(), self.naming(path))
        where = str(path)
        if path.is_file() and path.stat().st_size == 0:
            raise TraceError(where, "is empty", "is it the right file?")
        with library_errors(where, "cannot be read as Parquet", "write the file again"):
            files = _one_file(path) if path.is_file() else _hive(path)
        return files.reading(where, self.values(), self.naming(path))


class Piece(NamedTuple):
    """A file on a file system, and what the names of its folders say: columns with one value each."""

    system: Any
    path: str
    keys: Mapping[str, Any]


@dataclass(frozen=True)
class Files:
    """Parquet files with the same columns, one after the other, *rows* in all."""

    schema: pa.Schema
    rows: int
    pieces: Sequence[Piece]

    def reading(self, where: str, values: Values, naming: Naming) -> Reading:
        """The reading of all of them; raises `TraceError` when no layout fits."""
        layout = match_layout(self.schema, where, values, naming, self._first_texts(where))
        return Reading(
            cells=lambda: _stream(self.pieces, layout, where),
            rows=self.rows * layout.width,
            assumptions=layout.assumptions,
            where=where,
            collector=layout.collector,
            numbered=layout.numbered,
        )

    def _first_texts(self, where: str) -> pa.RecordBatch | None:
        """Some rows of the first file where a column holds lists, or text, which may be lists."""
        import pyarrow.parquet as pq

        if (
            not self.pieces
            or self.pieces[0].keys
            or not any(is_text(field.type) or is_list(field.type) for field in self.schema)
        ):
            return None
        system, path, _ = self.pieces[0]
        with (
            library_errors(where, "cannot be read as Parquet", "write the file again"),
            system.open_input_file(path) as raw,
        ):
            return next(pq.ParquetFile(raw, pre_buffer=False).iter_batches(WIDE_ROWS), None)


def files_of(data: ds.Dataset) -> Files:
    """The files of an Arrow data set."""
    import pyarrow.dataset as ds

    fragments = data.get_fragments()
    pieces = [Piece(part.filesystem, part.path, ds.get_partition_keys(part.partition_expression)) for part in fragments]
    return Files(data.schema, data.count_rows(), pieces)


def _one_file(path: Path) -> Files:
    """Without a data set, which loads pandas and says less clearly what is wrong with its only file."""
    import pyarrow.fs as pf
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        few_columns(file.metadata.num_columns, str(path))
        return Files(file.schema_arrow, file.metadata.num_rows, [Piece(pf.LocalFileSystem(), str(path), {})])


def _hive(path: Path) -> Files:
    import pyarrow.dataset as ds

    return files_of(ds.dataset(path, format="parquet", partitioning="hive"))


def is_hive(path: Path) -> bool:
    """Whether a folder holds folders named ``key=value``."""
    return any(child.is_dir() and "=" in child.name for child in path.iterdir())


def _stream(pieces: Sequence[Piece], layout: Layout, where: str) -> Iterator[Cells]:
    row = 0
    with library_errors(where, lambda: f"cannot be read after row {row}", "write the file again"):
        for batch in _batches(pieces, layout, where):
            if batch.num_rows:
                yield layout.cells(batch, row, where)
            row += batch.num_rows


def _batches(pieces: Sequence[Piece], layout: Layout, where: str) -> Iterator[pa.RecordBatch]:
    """The wanted columns of every file, a batch at a time, with what the names of its folders say.

    Not by a scan of the data set: that decodes whole row groups, which may be of any size, and several ahead.
    """
    import pyarrow.parquet as pq

    for system, path, inside in pieces:
        columns = [name for name in layout.columns if name not in inside]
        buffer = max(1 << 12, min(COLUMN_BYTES, BUFFER_BYTES // len(layout.columns)))
        with system.open_input_file(path) as raw:
            file = pq.ParquetFile(raw, pre_buffer=False, buffer_size=buffer, page_checksum_verification=True)
            _check_rows(file.metadata, where)
            row = 0
            rows = _rows_at_once(file.metadata, layout, where)
            # One thread decodes while another writes: more of them would be in each other's way.
            for batch in file.iter_batches(rows, columns=columns, use_threads=False):
                yield _with_keys(batch, {name: inside[name] for name in layout.columns if name in inside})
                row += batch.num_rows
            if row != file.metadata.num_rows:
                problem = f"says that it has {file.metadata.num_rows:,} rows, and only {row:,} are there"
                raise TraceError(where, problem, "write the file again")


def _rows_at_once(metadata: pq.FileMetaData, layout: Layout, where: str) -> int:
    """Rows that make a batch; raises `TraceError` when a single one does not fit in memory."""
    cells = layout.width if layout.width > 1 else longest_list(metadata, where)
    return max(1, BATCH_CELLS // cells, min(WIDE_ROWS, WIDE_CELLS // cells))


def _check_rows(metadata: pq.FileMetaData, where: str) -> None:
    """Raise `TraceError` where the footer contradicts itself: pyarrow believes whichever number it looks at.

    The columns of a row group are not asked: on some damaged files that aborts the process.
    """
    rows = sum(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    if rows != metadata.num_rows:
        problem = f"says that it has {metadata.num_rows:,} rows, and {rows:,} in its row groups"
        raise TraceError(where, problem, "write the file again")


def longest_list(metadata: pq.FileMetaData, where: str) -> int:
    """The mean length of the lists in a column, of the row group where it is longest; 1 without lists.

    Raises `TraceError` when a single one does not fit in memory.
    """
    lists = [i for i in range(metadata.num_columns) if metadata.schema.column(i).max_repetition_level]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)] if lists else []
    longest = max(
        (-(-group.column(i).num_values // group.num_rows) for group in groups for i in lists if group.num_rows > 0),
        default=1,
    )
    # Levels, values and four columns of cells.
    require(longest * 48, where, f"one row of it, a list of {longest:,},", "log one list for each step and layer")
    return max(1, longest)


def _with_keys(batch: pa.RecordBatch, keys: Mapping[str, Any]) -> pa.RecordBatch:
    """The batch with a column for each of the *keys* of its folders."""
    import pyarrow as pa

    for name, value in keys.items():
        batch = batch.append_column(name, pa.array([value]).take(pa.array(np.zeros(batch.num_rows, np.int8))))
    return batch


# --- by URI ------------------------------------------------------------------------------------


def _files_at(uri: Uri) -> Files:
    """The Parquet file, or all those of a folder or a hive-partitioned data set, at *uri*."""
    import pyarrow.dataset as ds
    import pyarrow.fs as pf

    system, path = _opened(uri)
    with library_errors(str(uri), "cannot be read as Parquet", "check the URI and access"):
        folder = system.get_file_info(path).type == pf.FileType.Directory
        return files_of(ds.dataset(path, filesystem=system, format="parquet", partitioning="hive" if folder else None))


def mark_of(uri: Uri) -> str:
    """A fingerprint of the names, sizes and times of the files at *uri*; their content is not fetched for it."""
    import pyarrow.fs as pf

    system, path = _opened(uri)
    with library_errors(str(uri), "cannot be read", "check the URI and access"):
        there = system.get_file_info(path)
        folder = there.type == pf.FileType.Directory
        files = system.get_file_info(pf.FileSelector(path, recursive=True)) if folder else [there]
    lines = sorted(f"{file.path} {file.size} {file.mtime_ns}" for file in files if file.type == pf.FileType.File)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _opened(uri: Uri) -> tuple[Any, str]:
    """The file system of *uri* and the path on it: pyarrow's own, or else one of fsspec."""
    import pyarrow as pa
    import pyarrow.fs as pf

    try:
        system, path = pf.FileSystem.from_uri(uri.text)
        return system, path
    except (pa.ArrowException, OSError, ValueError):
        pass  # a scheme, or a build of pyarrow, without it
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        scheme = urlsplit(uri.text).scheme
        raise TraceError(
            str(uri), f"pyarrow opens no {scheme}://", 'install fsspec: pip install "moetrace[fsspec]"'
        ) from error
    with library_errors(str(uri), "cannot be opened", "check the URI and its back end"):
        system, path = url_to_fs(uri.text)
    return pf.PyFileSystem(pf.FSSpecHandler(system)), path
