"""Dumps of every known kind, and the canonical file they become.

A new format is one module with a `Format` and one line in `FORMATS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moetrace.atomic import replacing
from moetrace.errors import TraceError
from moetrace.formats import canonical
from moetrace.formats.assemble import Grid, OutOfOrder, assemble, sort_by_step
from moetrace.formats.base import Block, Cells, Format, Reading, ReadOptions
from moetrace.formats.canonical import open_trace, save_trace
from moetrace.formats.parquet import ParquetFormat
from moetrace.formats.parts import PartsFormat
from moetrace.trace import LoadTrace, TraceInfo

__all__ = [
    "FORMATS",
    "ReadOptions",
    "convert",
    "fingerprint",
    "open_trace",
    "read_trace",
    "save_trace",
    "sources_in",
]

FORMATS: dict[str, Format] = {format.name: format for format in (ParquetFormat(), PartsFormat())}

Progress = Callable[[int, int | None], None]
"""Called with the cells read so far, and their number in all where that is known."""


def sources_in(path: Path) -> list[Path]:
    """The sources that *path* stands for: itself, or every trace file lying in the folder.

    Raises `TraceError` when there is none.
    """
    if not path.exists():
        raise TraceError(str(path), "does not exist", "check the path")
    if path.is_file() or _format_of(path) is not None:
        return [path]
    found = sorted(child for child in path.iterdir() if child.is_file() and _format_of(child) is not None)
    if not found:
        raise TraceError(str(path), "holds no trace files", f"known formats: {', '.join(FORMATS)}")
    return found


def _format_of(path: Path) -> Format | None:
    return next((format for format in FORMATS.values() if format.claims(path)), None)


def chosen_format(path: Path, forced: str | None = None) -> Format:
    """The format *forced* by name, or the first that claims *path*; raises `TraceError` if none does."""
    if forced is not None:
        if forced not in FORMATS:
            raise TraceError(forced, "is not a known format", f"known formats: {', '.join(FORMATS)}")
        return FORMATS[forced]
    found = _format_of(path)
    if found is None:
        raise TraceError(str(path), "is in no known format", f"known formats: {', '.join(FORMATS)}; --from forces one")
    return found


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's content, or of the names and contents of a folder's files."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        parts = [
            f"{child.relative_to(path)} {fingerprint(child)}" for child in sorted(path.rglob("*")) if child.is_file()
        ]
    except OSError as error:
        raise TraceError(
            str(path), f"cannot be read: {error.strerror}", "check the file and its permissions"
        ) from error
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def convert(
    source: Path,
    destination: Path,
    *,
    name: str,
    options: ReadOptions = ReadOptions(),
    forced: str | None = None,
    progress: Progress | None = None,
) -> TraceInfo:
    """Read the dump *source* and write it as the canonical file *destination*, atomically.

    Streams where the rows come in the order of their steps. Returns what is known of the trace.
    Raises `TraceError` naming file, column and the first bad row or step.
    """
    mark = fingerprint(source)
    settings = {**options.as_settings(), **({"from": forced} if forced else {})}
    known: dict[str, Any] = {"name": name, "source": source.name, "fingerprint": mark, "settings": settings}
    if forced is None and canonical.is_canonical(source):
        trace = open_trace(source)
        save_trace(replace(trace, info=replace(trace.info, **known)), destination)
        return open_trace(destination).info
    format = chosen_format(source, forced)
    reading = format.read(source, options)
    info = TraceInfo(format=format.name, versions=_versions(), **known, **reading.known)
    info = replace(info, assumptions=reading.assumptions, findings=reading.findings)
    with replacing(destination) as partial:
        # The cheap way first; anew with a sort, or with 64-bit counts, where it does not do.
        for sort, wide in ((False, False), (True, False), (False, True), (True, True)):
            try:
                grid, blocks = _blocks_of(reading, str(source), sort, progress)
                return canonical.write_blocks(partial, grid.layers, blocks, info, wide=wide)
            except (OutOfOrder, canonical.CountsTooLarge):
                continue
    raise AssertionError("sorted 64-bit counts always fit")


def read_trace(source: str | Path, *, options: ReadOptions = ReadOptions(), forced: str | None = None) -> LoadTrace:
    """The trace in a dump of any known format, held in memory; a canonical file is opened lazily.

    Raises `TraceError` naming file, column and the first bad row or step.
    """
    path = Path(source)
    if forced is None and canonical.is_canonical(path):
        return open_trace(path)
    reading = chosen_format(path, forced).read(path, options)
    try:
        grid, blocks = _blocks_of(reading, str(path), False, None)
        whole = list(blocks)
    except OutOfOrder:
        grid, blocks = _blocks_of(reading, str(path), True, None)
        whole = list(blocks)
    steps, counts = (np.concatenate(parts) for parts in zip(*whole))
    trace = LoadTrace.from_counts(counts, name=path.stem, steps=steps, layers=grid.layers.tolist())
    return replace(trace, info=replace(trace.info, assumptions=reading.assumptions))


def _blocks_of(reading: Reading, where: str, sort: bool, progress: Progress | None) -> tuple[Grid, Iterator[Block]]:
    cells = _reported(reading, progress)
    return assemble(sort_by_step(cells, where) if sort else cells, where)


def _reported(reading: Reading, progress: Progress | None) -> Iterator[Cells]:
    done = 0
    for cells in reading.cells():
        yield cells
        done += len(cells.step)
        if progress is not None:
            progress(done, reading.rows)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("moetrace", "pyarrow", "numpy")}
