"""A trace written back as what other programs read: Parquet in three layouts, CSV, NPZ, forecasting tables."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moetrace.files import replacing
from moetrace.formats.stream.cells import Block, dense_cells, to_lists
from moetrace.settings import unknown
from moetrace.trace import LoadTrace

# Cells held at a time (256 MB of counts). Every layer is read once for each such block of steps, so
# blocks are as large as memory allows, and rows still come in the order of their steps.
BLOCK_CELLS = 1 << 25
# Rows of a table written at a time.
ROWS = 1 << 20


def export_trace(trace: LoadTrace, path: str | Path, kind: str) -> None:
    """Write *trace* to *path* as one of `KINDS`, atomically, a block of steps or a layer at a time.

    Experts have the numbers that they have in the source, where the kind has numbers at all.

    Raises `SettingError` for another *kind*, `TraceError` when what is read of the trace is damaged.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> mt.export_trace(trace, "run.csv", "csv")
    >>> mt.read_trace("run.csv").experts
    8
    """
    if kind not in KINDS:
        raise unknown("kind of export", kind, KINDS)
    with replacing(Path(path)) as at:
        rows = KINDS[kind]
        if rows is None:
            _write_arrays(trace, at)
            return
        batches = rows(trace)
        first = next(batches)
        if kind == "csv":
            options = pc.WriteOptions(quoting_style="needed", quoting_header="needed")
            writer = pc.CSVWriter(at, first.schema, write_options=options)
        else:
            writer = pq.ParquetWriter(at, first.schema, compression="zstd", write_page_checksum=True)
        with writer:
            writer.write_batch(first)
            for batch in batches:
                writer.write_batch(batch)


def _blocks(trace: LoadTrace) -> Iterator[Block]:
    rows = max(1, BLOCK_CELLS // (len(trace.layers) * trace.experts))
    for a in range(0, len(trace.steps), rows):
        counts = [trace.read_layer(number)[a : a + rows] for number in trace.layers]
        yield Block(trace.steps[a : a + rows], np.stack(counts, axis=1))


def _long(trace: LoadTrace) -> Iterator[pa.RecordBatch]:
    for steps, counts in _blocks(trace):
        rows = max(1, ROWS // counts[0].size)
        for a in range(0, len(steps), rows):
            step, layer, expert, tokens = dense_cells(steps[a : a + rows], trace.layers, counts[a : a + rows])
            numbers = expert + trace.info.first_expert
            columns: dict[str, NDArray[Any]] = {"step": step, "layer": layer, "expert": numbers, "tokens": tokens}
            yield pa.RecordBatch.from_pydict(columns)


def _rows(trace: LoadTrace, lists: bool) -> Iterator[pa.RecordBatch]:
    """A row for each step and layer, in the order of the steps, its counts in a list or in a column for each expert."""
    names = [f"expert_{trace.info.first_expert + i}" for i in range(trace.experts)]
    at_once = max(1, ROWS // trace.experts)
    for steps, whole in _blocks(trace):
        step, layer = np.repeat(steps, len(trace.layers)), np.tile(np.array(trace.layers), len(steps))
        counts = whole.reshape(len(step), trace.experts)
        for a in range(0, len(step), at_once):
            part = counts[a : a + at_once]
            inside = {"counts": to_lists(part)} if lists else dict(zip(names, part.T))
            place = {"step": step[a : a + at_once], "layer": layer[a : a + at_once]}
            yield pa.RecordBatch.from_pydict({**place, **inside})


def _forecasting(trace: LoadTrace) -> Iterator[pa.RecordBatch]:
    """One series for each expert, as forecasting libraries have them: sorted by series, then by step."""
    for load in trace.by_layer():
        for expert in range(trace.experts):
            name = f"layer_{load.layer}/expert_{trace.info.first_expert + expert}"
            series = pa.repeat(name, len(load.steps))
            yield pa.RecordBatch.from_pydict({"unique_id": series, "ds": load.steps, "y": load.counts[:, expert]})


def _write_arrays(trace: LoadTrace, path: Path) -> None:
    shape = (len(trace.steps), len(trace.layers), trace.experts)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, values in (("steps", trace.steps), ("layers", np.array(trace.layers, np.int64))):
            with archive.open(f"{name}.npy", "w") as file:
                np.save(file, values, allow_pickle=False)
        with archive.open("counts.npy", "w", force_zip64=True) as file:
            header = {"descr": "<i8", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for _, counts in _blocks(trace):
                file.write(np.ascontiguousarray(counts, "<i8").tobytes())


# The rows of each kind; None is an archive of arrays.
KINDS: dict[str, Callable[[LoadTrace], Iterator[pa.RecordBatch]] | None] = {
    "long": _long,
    "wide": partial(_rows, lists=False),
    "nested": partial(_rows, lists=True),
    "csv": _long,
    "npz": None,
    "forecasting": _forecasting,
}
