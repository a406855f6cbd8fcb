"""Text as loggers write it: delimited columns or JSON lines, plain or compressed, as a stream of batches."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any, AnyStr, ClassVar

from moetrace.doctor.catalogue import finding
from moetrace.errors import TraceError, shown
from moetrace.formats.errors import library_errors
from moetrace.formats.stream.cells import Cells, Reading
from moetrace.formats.stream.columns import OF_LAYER, written_with_dots
from moetrace.formats.stream.keys import keyed_lines
from moetrace.formats.stream.roles import Layout, Naming
from moetrace.formats.stream.tables import TableFormat, few_columns, match_layout
from moetrace.formats.stream.values import Values
from moetrace.trace import Finding

# Bytes of text parsed at a time; a row cannot be longer.
BLOCK_BYTES = 8 << 20
HEAD_BYTES = 1 << 16
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
# What to do about a file that cannot be read.
WRITE_AGAIN = "write the file again"
DELIMITERS = ",\t;|"
# Three digits behind a dot: decimals, or thousands.
DOTTED = re.compile(rb"\.\d{3}(?!\d)")


def compression_of(path: Path) -> str | None:
    """``gzip`` or ``zstd`` where the file begins as such a file does."""
    with path.open("rb") as file:
        head = file.read(4)
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)


def opened(path: Path) -> Any:
    """An Arrow input stream of the text of *path*, decompressed, and without a last line that was cut off."""
    import pyarrow as pa

    raw = pa.OSFile(str(path))
    name = compression_of(path)
    if name:
        return pa.CompressedInputStream(raw, name)
    whole = whole_lines(path)
    return raw if whole is None else raw.get_stream(0, whole)


def whole_lines(path: Path) -> int | None:
    """Bytes up to the last line of *path* where that was cut off, as by a kill; None where it was not, or is packed.

    A line of JSON is cut where it is no JSON, one of CSV where it has fewer columns than the header.
    """
    json_lines, delimited = ends_with(path, ".jsonl", ".ndjson"), ends_with(path, ".csv", ".tsv")
    size = path.stat().st_size
    if not (json_lines or delimited) or not size or compression_of(path):
        return None
    with path.open("rb") as file:
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return None
        start = max(0, size - BLOCK_BYTES)
        file.seek(start)
        before, newline, last = file.read().rpartition(b"\n")
        file.seek(0)
        header = first_past(b"#", file)
    if not last.strip() or not newline:
        return None
    cut = _is_no_json(last) if json_lines else _is_short(last, header)
    return start + len(before) + 1 if cut else None


def _is_no_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _is_short(line: bytes, header: bytes) -> bool:
    delimiter = max((d.encode() for d in DELIMITERS), key=header.count)
    return line.count(delimiter) < header.count(delimiter) and b'"' not in line


def cut_findings(path: Path) -> tuple[Finding, ...]:
    """The finding that the last line of *path* was cut off, if it was."""
    if whole_lines(path) is None:
        return ()
    return (finding("cut", f"the end of {path.name}", "its last line is cut off, and left out"),)


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
        delimiter, comments = delimiter_of(path), comments_of(path)
        few_columns(_columns_of(path, delimiter), str(path))
        if delimiter not in _header_line(path):
            raise TraceError(
                str(path), "has no header with columns", "begin it with the names of its columns, in UTF-8"
            )
        assumed = () if delimiter == "," else (f"columns are separated by {delimiter!r}",)
        if comments:
            assumed = (*assumed, f"{comments} lines before the header that begin with # are comments")
        with library_errors(str(path), "cannot be read", WRITE_AGAIN):
            dotted = _dotted(path)
        if dotted:
            assumed = (*assumed, f"dots in {shown(dotted)} set thousands apart, as in 15.000")
        return reading_of(path, partial(csv_batches, path, dotted), self.values(), self.naming(path), assumed)


def header_of(path: Path) -> list[str]:
    """The names of the columns of delimited text."""
    return next(csv.reader([_header_line(path)], delimiter=delimiter_of(path)), [])


def delimiter_of(path: Path) -> str:
    """What there is most of in the header."""
    return max(DELIMITERS, key=_header_line(path).count)


def comments_of(path: Path) -> int:
    """How many lines before the header of delimited text begin with ``#``."""
    return sum(1 for _ in takewhile(lambda line: line.startswith("#"), head_of(path).split("\n")))


def _header_line(path: Path) -> str:
    return first_past("#", head_of(path).split("\n"))


def first_past(mark: AnyStr, lines: Iterable[AnyStr]) -> AnyStr:
    """The first of *lines* that does not begin with *mark*, an empty one if all do."""
    return next(dropwhile(lambda line: line.startswith(mark), lines), mark[:0])


def csv_batches(path: Path, as_text: Sequence[str] = ()) -> Any:
    """The Arrow batches of delimited text with a header, the columns *as_text* as they are written."""
    import pyarrow as pa
    import pyarrow.csv as pc

    read = pc.ReadOptions(block_size=BLOCK_BYTES, use_threads=False, skip_rows=comments_of(path))
    types = {name: pa.string() for name in as_text}
    convert = pc.ConvertOptions(strings_can_be_null=True, column_types=types)
    # Lists that NumPy wrote go over several lines.
    broken = re.search(r'"[^",;]*\n', head_of(path)) is not None
    parse = pc.ParseOptions(delimiter=delimiter_of(path), newlines_in_values=broken)
    return pc.open_csv(opened(path), read, parse, convert)


def _dotted(path: Path) -> list[str]:
    """The columns in which dots set thousands apart, by the first rows; they look like decimals to Arrow."""
    with closing(opened(path)) as stream:
        head = stream.read(BLOCK_BYTES)
    if not DOTTED.search(head):
        return []
    names = header_of(path)
    with closing(csv_batches(path, names)) as batches:
        first = next(iter(batches), None)
    if first is None:
        return []
    return [name for name in names if written_with_dots([x for x in first.column(name).to_pylist() if x])]


def _columns_of(path: Path, delimiter: str) -> int:
    """The number of columns of the first line; raises `TraceError` where the file cannot be unpacked."""
    with library_errors(str(path), "cannot be read", WRITE_AGAIN), closing(opened(path)) as stream:
        header: bytes = first_past(b"#", stream.read(BLOCK_BYTES).split(b"\n"))
        return header.count(delimiter.encode()) + 1


@dataclass(frozen=True)
class JsonLinesFormat(TableFormat):
    """One JSON object a line, long, wide or with the counts of a layer in a list or by key; plain, gzip or zstd."""

    name: ClassVar[str] = "jsonl"
    needs: ClassVar[str] = (
        "one JSON object a line with the names of the parquet format, or with experts as keys; plain, .gz or .zst"
    )

    def claims(self, path: Path) -> bool:
        """A file named .jsonl or .ndjson, compressed or not, or one named .json with objects in its first lines."""
        if not path.is_file():
            return False
        return ends_with(path, ".jsonl", ".ndjson") or (ends_with(path, ".json") and _begins_with_lines(path))

    def read(self, path: Path) -> Reading:
        """Match the keys to a layout and stream the lines."""
        import pyarrow.json as pj

        read = pj.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
        try:
            return reading_of(path, lambda: pj.open_json(opened(path), read), self.values(), self.naming(path))
        except TraceError:
            if _has_no_keyed_counts(path) or self.column or self.pattern:
                raise
        reading = keyed_lines(partial(_objects, path), path, self.values(), "experts, or layers of experts, by key")
        return replace(reading, findings=cut_findings(path))


def _begins_with_lines(path: Path) -> bool:
    first, _, rest = head_of(path).partition("\n")
    return first.startswith("{") and rest.lstrip().startswith("{") and not _is_no_json(first.encode())


def _has_no_keyed_counts(path: Path) -> bool:
    """Whether the first line of *path* holds no mapping, and no lists of several layers, which no column is."""
    try:
        first = json.loads(head_of(path).partition("\n")[0])
    except (ValueError, RecursionError):
        return True
    parts = list(first.values()) if isinstance(first, dict) else []
    lists = [key for key, part in first.items() if isinstance(part, list)] if parts else []
    of_layers = len(lists) > 1 and all(map(OF_LAYER.search, lists))
    return not of_layers and not any(isinstance(part, dict) for part in parts)


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in the lines of *path*, one by one."""
    with library_errors(str(path), "cannot be read", WRITE_AGAIN), closing(opened(path)) as stream:
        rest = b""
        while block := stream.read(BLOCK_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            yield from (json.loads(line) for line in lines if line.strip())
        if rest.strip():
            yield json.loads(rest)


def reading_of(
    path: Path, open_batches: Callable[[], Any], values: Values, naming: Naming, assumed: tuple[str, ...] = ()
) -> Reading:
    """The reading of a table that *open_batches* opens anew each time, as an Arrow batch reader."""
    where = str(path)
    if path.stat().st_size == 0:
        raise TraceError(where, "is empty", "is it the right file?")
    with library_errors(where, "cannot be read", WRITE_AGAIN), closing(open_batches()) as batches:
        schema, first = batches.schema, next(iter(batches), None)
    layout = match_layout(schema, where, values, naming, first)
    return Reading(
        cells=lambda: _cells(open_batches, layout, where),
        assumptions=(*assumed, *layout.assumptions),
        findings=cut_findings(path),
        where=where,
        collector=layout.collector,
        numbered=layout.numbered,
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
