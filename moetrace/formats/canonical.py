"""The canonical trace file: one Parquet file, readable layer by layer, that notices damage.

One row per (step, layer), columns ``step: int64``, ``layer: int32``, ``counts: list<int32>``
(``list<int64>`` where a count needs it). Each row group holds one layer over a block of
consecutive steps, so rows are *not* sorted by step alone.

Two keys of the file's metadata belong to moetrace: ``moetrace.trace`` is a JSON document with
what is known of the trace, the layer of each row group, and for each layer the number of rows and
a digest of its counts; ``moetrace.digest`` is the digest of that document. With the page checksums
that leaves no byte unguarded: the checksums cover the pages, the digests cover what the page
headers and the footer say about them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow.parquet import FileMetaData

from moetrace.errors import TraceError, printable
from moetrace.files import replacing
from moetrace.formats.sources import library_errors, require
from moetrace.formats.stream.cells import Block, to_arrow, to_lists, to_numpy
from moetrace.formats.stream.text import begins_with
from moetrace.trace import Counts, Finding, LoadTrace, Steps, TraceInfo

SCHEMA_VERSION = 1
DOCUMENT_KEY = "moetrace.trace"
DIGEST_KEY = "moetrace.digest"
# Characters of a trace's name; longer ones are those of the file instead.
LONGEST_NAME = 120
# Cells written at a time, a row group for each layer: large enough that the work is done in NumPy and
# pages are worth their overhead, small enough that so many of any trace fit in memory.
GROUP_CELLS = 1 << 22


Item = TypeVar("Item")


def is_trace_name(name: str) -> bool:
    """Whether a trace may be called so: it is the name of its file as well."""
    return 0 < len(name) <= LONGEST_NAME and not set("/\\") & set(name) and not name.startswith(".")


def _digest_of(data: bytes | NDArray[np.int64]) -> str:
    """SHA-256 of bytes, or of whole numbers as 64-bit little-endian ones."""
    raw = data if isinstance(data, bytes) else np.ascontiguousarray(data, "<i8").tobytes()
    return hashlib.sha256(raw).hexdigest()


class CountsTooLarge(Exception):
    """A count needs 64 bits in a file that was begun with 32."""


def is_canonical(path: Path) -> bool:
    """Whether *path* is a Parquet file with moetrace's metadata, whole or damaged."""
    try:
        keys = pq.read_metadata(path).metadata or {}
    except Exception:  # noqa: BLE001 - pyarrow raises a dozen types for other files
        return False
    return DOCUMENT_KEY.encode() in keys or DIGEST_KEY.encode() in keys


# Consecutive steps of one layer: its number, the steps (steps,), the counts in pieces (steps, experts).
Piece = tuple[int, Steps, Sequence[Counts]]


def _write(
    path: Path, layers: Sequence[int], pieces: Iterator[list[Piece]], about: Callable[[Steps], TraceInfo], *, wide: bool
) -> TraceInfo:
    """Write *pieces* of *layers* as row groups of a canonical file, and what *about* says of their steps.

    Raises `CountsTooLarge` where a count needs 64 bits and it is not *wide*. What is written half is no trace.
    """
    kind = np.dtype("<i8" if wide else "<i4")
    lists = pa.list_(pa.field("element", pa.from_numpy_dtype(kind), nullable=False))
    columns = {"step": pa.int64(), "layer": pa.int32(), "counts": lists}
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])
    packed = "DELTA_BINARY_PACKED"
    digests = {layer: hashlib.sha256() for layer in layers}
    steps: list[Steps] = []
    of_groups: list[int] = []  # the layer of each
    experts = 0

    def stored(pieces: list[Piece]) -> list[tuple[int, Steps, NDArray[Any]]]:
        """The same, the counts together as they are stored."""
        groups = []
        for layer, steps, counts in pieces:
            if max(part.max() for part in counts) > np.iinfo(kind).max:
                raise CountsTooLarge
            whole = np.concatenate(counts, dtype=kind, casting="same_kind")
            digests[layer].update(whole.data)
            groups.append((layer, steps, whole))
        return groups

    writer = pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=-1,  # counts split by byte come out no smaller at a higher level
        use_dictionary=False,
        write_statistics=["step", "layer"],
        column_encoding={"step": packed, "layer": packed, "counts.list.element": "BYTE_STREAM_SPLIT"},
        write_page_checksum=True,
    )
    try:
        # Decoding, digesting and compressing share the cores, each in a thread.
        for layer, own, counts in chain.from_iterable(prefetch(map(stored, pieces))):
            steps += [own] if layer == layers[0] else []
            of_groups.append(layer)
            experts = counts.shape[1]
            place = to_arrow(own.astype(np.int64, copy=False)), to_arrow(np.full(len(own), layer, np.int32))
            table = pa.Table.from_arrays([*place, to_lists(counts, lists)], schema=schema)
            writer.write_table(table, row_group_size=len(own))
        whole = np.concatenate(steps)
        info = about(whole)
        document = {
            "schema_version": SCHEMA_VERSION,
            "info": asdict(info),
            "experts": experts,
            "steps": {"rows": len(whole), "digest": _digest_of(whole)},
            "row_groups": of_groups,
            "layers": [{"layer": layer, "digest": digest.hexdigest()} for layer, digest in digests.items()],
        }
        text = json.dumps(document)
        writer.add_key_value_metadata({DOCUMENT_KEY: text, DIGEST_KEY: _digest_of(text.encode())})
        writer.close()
        return info
    finally:  # where it is not closed, that writes a footer, which may not fit on the disk either
        with suppress(OSError):
            writer.close()


def write_blocks(
    path: Path, layers: Iterable[int], blocks: Iterable[Block], about: Callable[[Steps], TraceInfo], *, wide: bool
) -> TraceInfo:
    """Stream *blocks* into a canonical file at *path*, not atomically; returns what *about* says of their steps.

    Raises what *about* raises, and `CountsTooLarge` if not *wide* and a count needs 64 bits.
    """
    numbers = [int(n) for n in layers]

    def pieces() -> Iterator[list[Piece]]:
        together: list[Block] = []
        cells = 0
        for block in chain(blocks, (None,)):
            together += [] if block is None else [block]
            cells += 0 if block is None else block.counts.size
            if together and (block is None or cells >= GROUP_CELLS):
                steps = np.concatenate([own.steps for own in together])
                yield [(n, steps, [own.counts[:, i] for own in together]) for i, n in enumerate(numbers)]
                together, cells = [], 0

    return _write(path, numbers, prefetch(pieces()), about, wide=wide)


def save_trace(trace: LoadTrace, path: str | Path) -> None:
    """Write *trace* as a canonical file at *path*, atomically, one layer at a time.

    Raises `TraceError` when what is read of the trace is damaged.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> mt.save_trace(trace, "run.parquet")
    >>> mt.open_trace("run.parquet").experts
    8
    """
    wide = any(load.counts.max() > np.iinfo(np.int32).max for load in trace.by_layer())
    rows = max(1, GROUP_CELLS // trace.experts)

    def pieces() -> Iterator[list[Piece]]:
        for load in trace.by_layer():
            for a in range(0, len(load.steps), rows):
                yield [(load.layer, load.steps[a : a + rows], [load.counts[a : a + rows]])]

    with replacing(Path(path)) as at:
        _write(at, trace.layers, pieces(), lambda _: trace.info, wide=wide)


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """The same items and errors, each item made by another thread while the one before is in use; one more is held.

    Decoding, NumPy and compression release the interpreter, so reading and writing share two cores.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="moetrace-reader") as reader:
        coming = reader.submit(next, items, None)
        try:
            while (item := coming.result()) is not None:
                coming = reader.submit(next, items, None)
                yield item
        finally:
            del coming  # it keeps an error, the error keeps the stream, and the stream its files


def not_a_trace(path: Path) -> TraceError:
    """That the file *path* is a dump, or anything else that was not ingested."""
    return TraceError(str(path), "is not a trace that moetrace wrote", f"run `moetrace ingest {path}` first")


def damaged(path: Path, problem: str) -> TraceError:
    """That the canonical file *path* is not as it was written."""
    return TraceError(str(path), f"is damaged: {problem}", "ingest its source again")


def version_of(path: Path) -> tuple[int, ...]:
    """Inode, time and size of the file at *path*, which differ once it is replaced; empty if there is no file."""
    with suppress(OSError):
        now = path.stat()
        return now.st_ino, now.st_mtime_ns, now.st_size
    return ()


@contextmanager
def reporting_damage(path: Path, version: tuple[int, ...]) -> Iterator[None]:
    """Whatever is raised on a canonical file that is damaged, gone, or no longer *version* becomes a `TraceError`."""
    try:
        with library_errors(str(path), "is damaged", "ingest its source again"):
            yield
    except TraceError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError):
            raise TraceError(str(path), "does not exist", "see `moetrace list` for the traces there are") from None
        if isinstance(cause, PermissionError):
            raise TraceError(str(path), "may not be read", "check its permissions") from None
        if version_of(path) != version:
            raise TraceError(str(path), "changed while it was read", "run the same command again") from error
        if not begins_with(path, b"PAR1"):
            raise not_a_trace(path) from None
        raise


def open_trace(path: str | Path) -> LoadTrace:
    """Open a canonical file; layers are read, and checked, when they are asked for.

    Raises `TraceError` when it is not one, is damaged, or was written by a later version.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> mt.save_trace(trace, "run.parquet")
    >>> mt.open_trace("run.parquet").layer(0).counts.shape
    (2000, 8)
    """
    path = Path(path)
    version = version_of(path)
    with reporting_damage(path, version):
        footer = pq.read_metadata(path)
        document = _read_document(path, footer)
        if footer.num_row_groups != len(document["row_groups"]):
            raise damaged(path, "its row groups are not those it was written with")
        by_layer = {entry["layer"]: entry["digest"] for entry in document["layers"]}
        groups: dict[int, list[int]] = {layer: [] for layer in by_layer}
        for i, layer in enumerate(document["row_groups"]):
            groups[layer].append(i)
        with pq.ParquetFile(path, metadata=footer, page_checksum_verification=True) as file:
            table = file.read_row_groups(next(iter(groups.values())), columns=["step"])
        steps = to_numpy(table.column("step"))
        if len(steps) != document["steps"]["rows"] or _digest_of(steps) != document["steps"]["digest"]:
            raise damaged(path, "its steps are not those it was written with")
        experts = document["experts"]
        # What was stored, what is handed on, and the step from one to the other.
        require(len(steps) * experts * 20, str(path), "one layer of it", "ingest fewer steps with --steps")

        read_layer = lambda n: _read_layer(path, version, n, groups[n], steps, experts, by_layer[n])  # noqa: E731
        return LoadTrace(document["info"], steps, tuple(by_layer), experts, read_layer, by_layer)


@lru_cache(maxsize=8)
def _footer(path: Path, *_version: int) -> pq.FileMetaData:
    """The footer of this version of the file, parsed once in a process: with many layers it is long."""
    return pq.read_metadata(path)


def _read_layer(
    path: Path, version: tuple[int, ...], number: int, groups: list[int], steps: Steps, experts: int, digest: str
) -> Counts:
    """The counts of a layer, row group by row group, so that nothing but they is held whole."""
    counts, found, row = np.empty((len(steps), experts), np.int64), hashlib.sha256(), 0
    changed = damaged(path, f"layer {number} is not as it was written")
    checked = {"page_checksum_verification": True}
    with (
        reporting_damage(path, version),
        pq.ParquetFile(path, metadata=_footer(path, *version_of(path)), **checked) as file,
    ):
        for group in groups:
            table = file.read_row_group(group)
            rows = slice(row, row + table.num_rows)
            lists = table.column("counts").combine_chunks()
            flat = to_numpy(lists.flatten())
            own_steps, layers = (to_numpy(table.column(name)) for name in ("step", "layer"))
            whole = (np.diff(to_numpy(lists.offsets)) == experts).all()
            if not (np.array_equal(own_steps, steps[rows]) and (layers == number).all() and whole):
                raise changed
            found.update(np.ascontiguousarray(flat, flat.dtype.newbyteorder("<")).tobytes())
            counts[rows] = flat.reshape(-1, experts)
            row = rows.stop
        if row != len(steps) or found.hexdigest() != digest:
            raise changed
    return counts


def _read_document(path: Path, footer: FileMetaData) -> dict[str, Any]:
    """The document in *footer*, its texts made printable; raises `TraceError` for a missing, damaged or later one."""
    keys = footer.metadata or {}
    text, digest = keys.get(DOCUMENT_KEY.encode()), keys.get(DIGEST_KEY.encode())
    if text is None and digest is None:
        raise not_a_trace(path)
    if text is None or digest is None or _digest_of(text) != digest.decode("ascii", "replace"):
        raise damaged(path, "its metadata are not those it was written with")
    document: dict[str, Any] = json.loads(text)
    if document["schema_version"] > SCHEMA_VERSION:
        problem = f"was written with schema {document['schema_version']}"
        raise TraceError(str(path), problem, "upgrade moetrace, or ingest the source again")
    raw = _printable(document["info"])
    if not is_trace_name(raw["name"]):
        raw["name"] = printable(path.stem)
    findings = tuple(Finding(**finding) for finding in raw["findings"])
    document["info"] = TraceInfo(**{**raw, "findings": findings, "assumptions": tuple(raw["assumptions"])})
    return document


def _printable(value: Any) -> Any:
    """The same texts, lists and mappings with nothing in them that a terminal would act on."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_printable(part) for part in value]
    if isinstance(value, dict):
        return {printable(key): _printable(part) for key, part in value.items()}
    return value
