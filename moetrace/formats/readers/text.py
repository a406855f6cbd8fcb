"""Delimited columns and JSON lines, plain or compressed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from moetrace.errors import TraceError
from moetrace.formats.errors import WRITE_AGAIN, library_errors
from moetrace.formats.stream.cells import Reading
from moetrace.formats.stream.columns import OF_LAYER
from moetrace.formats.stream.keys import keyed_lines
from moetrace.formats.stream.tables import TableFormat, few_columns
from moetrace.formats.stream.text import (
    BLOCK_BYTES,
    Header,
    csv_batches,
    cut_findings,
    ends_with,
    head_of,
    is_json,
    json_batches,
    opened,
    refuse_empty,
    table_reading,
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
        where, header = str(path), Header(path)
        with library_errors(where, "cannot be read", WRITE_AGAIN), closing(opened(path)) as stream:
            lines: list[bytes] = stream.read(BLOCK_BYTES).split(b"\n")
            first = next((line for line in lines if not line.startswith(b"#")), b"")
        few_columns(first.count(header.delimiter.encode()) + 1, where)  # the header may be longer than its head
        if header.delimiter not in header.line:
            way_out = "begin it with the names of its columns, in UTF-8"
            raise TraceError(where, "has no header with columns", way_out)
        assumed = () if header.delimiter == "," else (f"columns are separated by {header.delimiter!r}",)
        if header.comments:
            assumed = (*assumed, f"{header.comments} lines before the header that begin with # are comments")
        naming = self.naming(path)
        return table_reading(where, partial(csv_batches, path), self.values(), naming, assumed, cut_findings(path))


@dataclass(frozen=True)
class JsonLinesFormat(TableFormat):
    """One JSON object a line, long, wide or with the counts of a layer in a list or by key; plain, gzip or zstd."""

    name: ClassVar[str] = "jsonl"
    needs: ClassVar[str] = (
        "one JSON object a line with the names of the parquet format, or with experts as keys; plain, .gz or .zst"
    )

    def claims(self, path: Path) -> bool:
        """A file named .jsonl or .ndjson, compressed or not, or one named .json with objects in its first lines."""
        if not path.is_file() or ends_with(path, ".jsonl", ".ndjson"):
            return path.is_file()
        if not ends_with(path, ".json"):
            return False
        first, _, rest = head_of(path).partition("\n")
        return first.startswith("{") and rest.lstrip().startswith("{") and is_json(first)

    def read(self, path: Path) -> Reading:
        """Match the keys to a layout and stream the lines."""
        refuse_empty(path)
        findings = cut_findings(path)
        try:
            naming = self.naming(path)
            return table_reading(str(path), partial(json_batches, path), self.values(), naming, findings=findings)
        except TraceError:
            if self.column or self.pattern or not _may_have_keyed_counts(path):
                raise
        reading = keyed_lines(partial(_objects, path), path, self.values(), "experts, or layers of experts, by key")
        return replace(reading, findings=findings)


def _may_have_keyed_counts(path: Path) -> bool:
    """Whether the first line of *path* holds a mapping, or lists of several layers, as no column does."""
    line = head_of(path).partition("\n")[0]
    first = json.loads(line) if is_json(line) else None
    if not isinstance(first, dict):
        return False
    lists = [key for key, part in first.items() if isinstance(part, list)]
    of_layers = len(lists) > 1 and all(map(OF_LAYER.search, lists))
    return of_layers or any(isinstance(part, dict) for part in first.values())


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in the lines of *path*, one by one."""
    with library_errors(str(path), "cannot be read", WRITE_AGAIN), closing(opened(path)) as stream:
        rest = b""
        while block := stream.read(BLOCK_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            yield from (json.loads(line) for line in lines if line.strip())
        if rest.strip():
            yield json.loads(rest)
