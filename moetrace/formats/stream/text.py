"""Text files as loggers write them: opened plain or compressed, without a cut last line, as Arrow batches."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.json as pj

from moetrace.doctor import finding
from moetrace.errors import TraceError
from moetrace.formats.sources import WRITE_AGAIN, library_errors, require
from moetrace.trace import Finding

# Bytes of text parsed at a time; a row cannot be longer.
BLOCK_BYTES = 8 << 20
HEAD_BYTES = 1 << 16
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
# Bytes of memory for each of a document's, which is held whole: a number takes 32 and as little as two digits.
IN_MEMORY = 20
MOST_PACKED = 1 << 30
DELIMITERS = ",\t;|"


def ends_with(path: Path, *suffixes: str) -> bool:
    """Whether the name of *path* has one of *suffixes*, with or without one for its compression."""
    endings = tuple(suffix + tail for suffix in suffixes for tail in ("", ".gz", ".zst", ".zstd"))
    return path.name.lower().endswith(endings)


def begins_with(path: Path, magic: bytes) -> bool:
    """Whether *path* is a file that begins so."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def compression_of(path: Path) -> str | None:
    """``gzip`` or ``zstd`` where the file begins as such a file does."""
    return next((name for magic, name in MAGIC.items() if begins_with(path, magic)), None)


# JSON nested deeper than that ends the process in Arrow's parser (30,000 deep, measured) and holds no counts.
MOST_DEPTH = 200
NO_BRACKETS, ONE_KIND = bytes(set(range(256)) - set(b"[]{}\n")), bytes.maketrans(b"{}", b"[]")


def opened(path: Path) -> Any:
    """An Arrow input stream of the text of *path*, decompressed, and without a last line that was cut off."""
    raw = pa.OSFile(str(path))
    name = compression_of(path)
    if name:
        return pa.CompressedInputStream(raw, name)
    whole = whole_lines(path)
    return raw if whole is None else raw.get_stream(0, whole)


def whole_lines(path: Path) -> int | None:
    """Bytes up to the last line of *path* where that was cut off, as by a kill; None where it was not, or is packed.

    A line of JSON is cut where it is not JSON, one of CSV where it has fewer columns than the header.
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
        header = file.readline()
    if not last.strip() or not newline:
        return None
    if json_lines:
        cut = json_of(last) is None
    else:
        delimiter = max((d.encode() for d in DELIMITERS), key=header.count)
        cut = last.count(delimiter) < header.count(delimiter) and b'"' not in last
    return start + len(before) + 1 if cut else None


def json_of(line: str | bytes) -> Any:
    """The JSON document that *line* is, None where it is not one."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def cut_findings(path: Path) -> tuple[Finding, ...]:
    """The finding that the last line of *path* was cut off, if it was."""
    if whole_lines(path) is None:
        return ()
    return (finding("cut", f"the end of {path.name}", "its last line is cut off, and left out"),)


def head_of(path: Path) -> str:
    """The beginning of the text of *path*, empty where it is not UTF-8 text; never raises."""
    try:
        with closing(opened(path)) as stream:
            return _decoded(stream.read(HEAD_BYTES))
    except Exception:  # noqa: BLE001 - whatever cannot be read is not text
        return ""


def _decoded(head: bytes) -> str:
    # A character may be cut at the end; anything else that does not decode is not text.
    text = head.decode("utf-8-sig", "ignore")
    return text if len(text.encode()) + 6 >= len(head) and "\0" not in text else ""


def header_of(path: Path) -> tuple[list[str], str]:
    """The names in the header of delimited text, and what separates them."""
    with library_errors(str(path), "cannot be read", WRITE_AGAIN), closing(opened(path)) as stream:
        line = _decoded(stream.read(BLOCK_BYTES).partition(b"\n")[0])
    delimiter = max(DELIMITERS, key=line.count)
    return next(csv.reader([line], delimiter=delimiter), []), delimiter


def csv_batches(path: Path) -> Any:
    """The Arrow batches of delimited text with a header."""
    read = pc.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
    # Cells may go over several lines, which costs time where they do not.
    broken = re.search(r'"[^",;]*\n', head_of(path)) is not None
    parse = pc.ParseOptions(delimiter=header_of(path)[1], newlines_in_values=broken)
    return pc.open_csv(opened(path), read, parse, pc.ConvertOptions(strings_can_be_null=True))


def json_batches(path: Path, schema: Any = None, block: int = BLOCK_BYTES) -> Any:
    """The Arrow batches of JSON lines; with a *schema* of its columns alone."""
    behavior = "infer" if schema is None else "ignore"
    parse = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior=behavior)
    # Read twice, as a wrapper in Python around each read would cost more: Arrow ends the process on what is too deep.
    check_depth(path)
    return pj.open_json(opened(path), pj.ReadOptions(block_size=block, use_threads=False), parse)


def lines(path: Path) -> Iterator[bytes]:
    """The lines of the text of *path*, one by one; raises `TraceError` where it cannot be read."""
    with library_errors(str(path), "cannot be read", WRITE_AGAIN), closing(opened(path)) as stream:
        rest = b""
        while block := stream.read(BLOCK_BYTES):
            *whole, rest = (rest + block).split(b"\n")
            yield from whole
        yield rest


def json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in the lines of *path*, one by one."""
    check_depth(path)
    with library_errors(str(path), "cannot be read", WRITE_AGAIN):
        yield from (json.loads(line) for line in lines(path) if line.strip())


def document(path: Path) -> Any:
    """The JSON document in a file, held whole; raises `TraceError` if it does not fit or is not JSON."""
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


def check_depth(path: Path) -> None:
    """Raise `TraceError` naming the first line of *path* whose JSON is nested more than `MOST_DEPTH` deep."""
    line, rest = 1, b""
    with closing(opened(path)) as stream:
        while chunk := stream.read(BLOCK_BYTES):
            brackets = rest + bytes(chunk).translate(ONE_KIND, NO_BRACKETS)
            for _ in range(MOST_DEPTH):
                if b"[]" not in brackets:
                    break
                brackets = brackets.replace(b"[]", b"")  # the innermost pairs of every line
            *whole, rest = brackets.split(b"\n")
            beyond = b"[]" in brackets or brackets.count(b"[") > MOST_DEPTH
            for i, left in enumerate((*whole, rest) if beyond else ()):
                if b"[]" in left or left.count(b"[") > MOST_DEPTH:
                    at, problem = f"{path}, line {line + i}", f"is nested more than {MOST_DEPTH} deep"
                    raise TraceError(at, problem, "log lists of counts, or layers of such lists")
            line += len(whole)


def refuse_empty(path: Path) -> None:
    """Raise `TraceError` for a file without a byte."""
    if path.stat().st_size == 0:
        raise TraceError(str(path), "is empty", "is it the right file?")
