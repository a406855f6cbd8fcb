"""Text as loggers write it: delimited columns or JSON lines, plain or compressed, as a stream of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from moetrace.errors import TraceError
from moetrace.formats.errors import library_errors
from moetrace.formats.stream.cells import Cells, Reading
from moetrace.formats.stream.tables import Layout, TableFormat, Values, few_columns, match_layout

# Bytes of text parsed at a time; a row cannot be longer.
BLOCK_BYTES = 8 << 20
HEAD_BYTES = 1 << 16
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
# What to do about a file that cannot be read.
WRITE_AGAIN = "write the file again"
DELIMITERS = ",\t;|"


def compression_of(path: Path) -> str | None:
    """``gzip`` or ``zstd`` where the file begins as such a file does."""
    with path.open("rb") as file:
        head = file.read(4)
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)


def opened(path: Path) -> Any:
    """An Arrow input stream of the text of *path*, decompressed."""
    import pyarrow as pa

    raw = pa.OSFile(str(path))
    name = compression_of(path)
    return pa.CompressedInputStream(raw, name) if name else raw


def head_of(path: Path) -> str:
    """The beginning of the text of *path*, empty for what is no UTF-8 text; never raises."""
    try:
        with closing(opened(path)) as stream:
            head: bytes = stream.read(HEAD_BYTES)
    except Exception:  # noqa: BLE001 - whatever cannot be read is no text
        return ""
    # A character may be cut at the end; anything else that does not decode is no text.
    text = head.decode("utf-8-sig", "ignore")
    return text if len(text.encode()) + 6 >= len(head) and "\0" not in text else ""


def ends_with(path: Path, *suffixes: str) -> bool:
    """Whether the name of *path* has one of *suffixes*, with or without one for its compression."""
    return any(
        path.name.lower().endswith(suffix + tail) for suffix in suffixes for tail in ("", ".gz", ".zst", ".zstd")
    )


@dataclass(frozen=True)
class CsvFormat(TableFormat):
    """Delimited text with a header, long or wide: ``, ; | `` or tabs, plain, gzip or zstd, UTF-8."""

    name: ClassVar[str] = "csv"
    needs: ClassVar[str] = (
        "a header with the columns of the parquet format, long or wide; plain, .gz or .zst; any of , ; | and tabs"
    )

    def claims(self, path: Path) -> bool:
        """A file named .csv or .tsv, whatever its delimiter, or compressed one."""
        return path.is_file() and ends_with(path, ".csv", ".tsv")

    def read(self, path: Path) -> Reading:
        """Match the header to a layout and stream the rows."""
        import pyarrow.csv as pc

        header = head_of(path).partition("\n")[0]
        delimiter = max(DELIMITERS, key=header.count)
        few_columns(_columns_of(path, delimiter), str(path))
        if not header.strip() or delimiter not in header:
            raise TraceError(
                str(path), "has no header with columns", "begin it with the names of its columns, in UTF-8"
            )
        parse = pc.ParseOptions(delimiter=delimiter)
        read = pc.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
        convert = pc.ConvertOptions(strings_can_be_null=True)
        assumed = () if delimiter == "," else (f"columns are separated by {delimiter!r}",)
        return reading_of(path, lambda: pc.open_csv(opened(path), read, parse, convert), self.values(), assumed)


def _columns_of(path: Path, delimiter: str) -> int:
    """The number of columns of the first line; raises `TraceError` where the file cannot be unpacked."""
    with library_errors(str(path), "cannot be read", WRITE_AGAIN), closing(opened(path)) as stream:
        return int(stream.read(BLOCK_BYTES).partition(b"\n")[0].count(delimiter.encode())) + 1


@dataclass(frozen=True)
class JsonLinesFormat(TableFormat):
    """One JSON object a line, long, wide or with the counts of a layer in a list; plain, gzip or zstd."""

    name: ClassVar[str] = "jsonl"
    needs: ClassVar[str] = "one JSON object a line with the names of the parquet format; plain, .gz or .zst"

    def claims(self, path: Path) -> bool:
        """A file named .jsonl or .ndjson, compressed or not."""
        return path.is_file() and ends_with(path, ".jsonl", ".ndjson")

    def read(self, path: Path) -> Reading:
        """Match the keys to a layout and stream the lines."""
        import pyarrow.json as pj

        read = pj.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
        return reading_of(path, lambda: pj.open_json(opened(path), read), self.values())


def reading_of(path: Path, open_batches: Callable[[], Any], values: Values, assumed: tuple[str, ...] = ()) -> Reading:
    """The reading of a table that *open_batches* opens anew each time, as an Arrow batch reader."""
    where = str(path)
    if path.stat().st_size == 0:
        raise TraceError(where, "is empty", "is it the right file?")
    with library_errors(where, "cannot be read", WRITE_AGAIN), closing(open_batches()) as batches:
        schema = batches.schema
    layout = match_layout(schema, where, values)
    return Reading(
        cells=lambda: _cells(open_batches, layout, where),
        assumptions=(*assumed, *layout.assumptions),
        where=where,
        collector=layout.collector,
    )


def _cells(open_batches: Callable[[], Any], layout: Layout, where: str) -> Iterator[Cells]:
    row = 0
    with (
        library_errors(where, lambda: f"cannot be read after row {row}", WRITE_AGAIN),
        closing(open_batches()) as batches,
    ):
        for batch in batches:
            if batch.num_rows:
                yield layout.cells(batch.select(layout.columns), row, where)
            row += batch.num_rows
