"""From a dump of any known kind to the canonical file, or to a trace in memory, and from that to other files.

Other programs read it back as Parquet in three layouts, CSV, NPZ, or tables of forecasting libraries.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moetrace.doctor import finding, gap_findings, raise_for_errors
from moetrace.errors import SettingError, TraceError, shown
from moetrace.files import replacing
from moetrace.formats import canonical
from moetrace.formats.canonical import open_trace, save_trace
from moetrace.formats.readers import chosen_format, source_of
from moetrace.formats.sources import (
    Location,
    by_rank,
    fingerprinting,
    library_errors,
    locations,
    readable,
    require,
    source_label,
)
from moetrace.formats.stream import merge
from moetrace.formats.stream.blocks import Grid, OutOfOrder, in_order
from moetrace.formats.stream.cells import Block, Format, ReadOptions, Source, dense_cells, joined, readings_of, to_lists
from moetrace.formats.stream.columns import Values
from moetrace.formats.stream.tables import Naming, table_reading
from moetrace.settings import label, unknown, with_settings
from moetrace.trace import LoadTrace, Steps, TraceInfo

# Rows of a data frame looked at at a time.
BATCH_ROWS = 1 << 18
# Findings that are no news of counts known to be rounded.
ROUNDED = ("rounded", "doubled", "multiplied")
# Cells held at a time for an export (256 MB of counts). Every layer is read once for each such block of steps, so
# blocks are as large as memory allows, and rows still come in the order of their steps.
EXPORT_CELLS = 1 << 25
# Rows of a table written at a time.
EXPORT_ROWS = 1 << 20

Progress = Callable[[int, int | None], None]
"""Called with the cells read so far, and their number in all where that is known."""
About = Callable[[Steps], dict[str, Any]]
Result = TypeVar("Result")


def convert(
    source: Location | Sequence[Location],
    destination: Path,
    *,
    name: str,
    options: ReadOptions = ReadOptions(),
    format: str | None = None,
    progress: Progress | None = None,
) -> TraceInfo:
    """Read the dump *source* and write it as the canonical file *destination*, atomically.

    *format* is its format with its settings, ``name:setting=value``; without a name, the settings of the one
    that is recognised from the file. Several sources become one trace as ``options.merge`` says.
    Streams where the rows come in the order of their steps. Returns what is known of the trace.
    Raises `TraceError` naming file, column and the first bad row or step, or a finding that is an error, and
    `SettingError` for a setting that the format has not.
    """
    paths = [source] if isinstance(source, Location) else list(source)
    known: dict[str, Any] = {"name": name, "source": source_label(paths), "settings": options.as_settings(format)}
    with fingerprinting(paths) as mark:
        if format is None and _is_already_canonical(paths, options):
            trace = open_trace(str(paths[0]))
            info = replace(trace.info, **known, fingerprint=mark.result())
            chosen = trace.select(options.layers or None, options.first, options.last)
            save_trace(replace(chosen, info=info), destination)
            return open_trace(destination).info
        dump = _opened(paths, options, format)
        known["versions"] = {package: version(package) for package in ("moetrace", "pyarrow", "numpy")}

        def written(grid: Grid, blocks: Iterator[Block], about: About) -> TraceInfo:
            info = lambda steps: TraceInfo(**known, fingerprint=mark.result(), **about(steps))  # noqa: E731
            return canonical.write_blocks(at, grid.layers, blocks, info, wide=wide)

        with replacing(destination) as at:
            wide = False
            try:
                return dump.stream(written, progress)
            except canonical.CountsTooLarge:
                wide = True
                return dump.stream(written, progress)


def read_trace(
    source: str | Location | Sequence[str | Location],
    *,
    options: ReadOptions = ReadOptions(),
    format: str | None = None,
) -> LoadTrace:
    """The trace in a dump of any known format, held in memory; a canonical file is opened lazily.

    *format* is its format with its settings, ``name:setting=value``; without a name, the settings of the one
    that is recognised from the file. Several sources become one trace as ``options.merge`` says.
    Raises `TraceError` naming file, column and the first bad row or step, a finding that is an error, or the
    memory that it would take, and `SettingError` for a setting that the format has not.

    >>> import moetrace as mt
    >>> from pathlib import Path
    >>> rows = [f"{step},{expert},{10 + expert}" for step in (1, 2) for expert in (0, 1)]
    >>> _ = Path("log.csv").write_text("\\n".join(["step,expert,tokens", *rows]))
    >>> mt.read_trace("log.csv").counts.tolist()
    [[[10, 11]], [[10, 11]]]
    """
    paths = locations(source)
    if format is None and _is_already_canonical(paths, options):
        return open_trace(str(paths[0])).select(options.layers or None, options.first, options.last)
    return _opened(paths, options, format).trace(paths[0].stem, source_label(paths))


def from_frame(
    frame: Any,
    *,
    step: str = "step",
    layer: str | None = "layer",
    expert: str = "expert",
    tokens: str = "tokens",
    name: str = "trace",
    top_k: int | None = None,
    tokens_per_step: int | None = None,
    idle_experts: bool = False,
) -> LoadTrace:
    """The trace in a data frame of pandas, Polars or Arrow with a row for each step, layer and expert.

    *step*, *layer*, *expert* and *tokens* name its columns; without a *layer* there is one, number 0. Rows may come
    in any order. *tokens_per_step*, what a layer routes in a step, turns shares into counts, and counts are checked
    against it; *top_k* is how many experts a token is sent to. With *idle_experts*, an expert without a row had no
    tokens. Raises `TraceError` naming the column and the first bad row, and `SettingError` for anything but a frame.

    >>> import moetrace as mt
    >>> import pandas as pd
    >>> frame = pd.DataFrame({"it": [1, 1, 2, 2], "expert": [0, 1, 0, 1], "n": [5, 3, 4, 4]})
    >>> mt.from_frame(frame, step="it", layer=None, tokens="n").counts.tolist()
    [[[5, 3]], [[4, 4]]]
    """
    where = "data frame"
    if not hasattr(frame, "__arrow_c_stream__"):
        way_out = "give one of pandas, Polars or Arrow; LoadTrace.from_counts makes a trace of an array"
        raise SettingError(f"a {type(frame).__name__} is not a data frame: {way_out}")
    roles = {"step": step, "layer": layer, "expert": expert, "tokens": tokens}
    wanted = {role: column for role, column in roles.items() if column is not None}
    is_pandas = hasattr(frame, "iloc")
    frame = frame if is_pandas else pa.table(frame)
    names = list(frame.columns if is_pandas else frame.column_names)
    for role, column in wanted.items():
        if (n := names.count(column)) != 1:
            problem = f"has {n} columns called {column}" if n else f"has no column {column} among {shown(names)}"
            way_out = ", or layer=None where there is one layer" if role == "layer" else ""
            raise TraceError(where, problem, f"name it, as in from_frame(frame, {role}='NAME'){way_out}")
    columns = list(dict.fromkeys(wanted.values()))
    with library_errors(where, "holds columns that are not numbers", "give whole numbers"):
        table = pa.Table.from_pandas(frame[columns], preserve_index=False) if is_pandas else frame.select(columns)
    opened = partial(table.to_reader, max_chunksize=BATCH_ROWS)
    reading = table_reading(where, opened, Naming(Values(where, tokens_per_step), wanted))
    options = ReadOptions(tokens_per_step=tokens_per_step, top_k=top_k, idle_experts=idle_experts)
    return Dump.of(reading, "frame", options).trace(name, None)


def _is_already_canonical(paths: Sequence[Location], options: ReadOptions) -> bool:
    """Whether the source is a canonical file of which at most layers and steps are selected."""
    path = paths[0]
    more = ReadOptions(layers=options.layers, first=options.first, last=options.last) != options
    return len(paths) == 1 and not more and isinstance(path, Path) and canonical.is_canonical(path)


def _opened(paths: Sequence[Location], options: ReadOptions, format: str | None) -> Dump:
    """The start of a source, or of several that become one trace."""
    if len(paths) > 1 and options.merge is None:
        raise TraceError(source_label(paths), "are several sources", "say how they become one trace with --merge")
    paths = by_rank(paths)
    sources, names = [], []
    for path in paths:
        with readable(str(path)):
            reader = reader_of(path, options, format)
            source = source_of(reader, path)
            forced, known = (format or "").partition(":")[0], f"or say --from {reader.name} if "
            for reading in () if forced else readings_of(source):  # numbers that need not be counts are a question
                if reading.counters and not options.difference:
                    way_out = "take what they grew by with --difference, from file to file with --merge steps as well"
                    raise TraceError(reading.where, "holds counters", way_out)
                if reading.doubt == "choices":
                    problem = "holds numbers that may be experts that were chosen, as their sums vary too much for "
                    way_out = f"count them with --from routing, and --tokens N where no step is named, {known}they are "
                    raise TraceError(reading.where, f"{problem}counts", f"{way_out}counts")
                if reading.doubt == "map" and options.bin is None:
                    problem = "holds zeros and ones, as many ones in every row, as a map of the experts of each token "
                    way_out = f"add N tokens up into a step with --bin N, {known}each row is a step"
                    raise TraceError(reading.where, f"{problem}does", way_out)
        sources.append(source if source.where else replace(source, where=str(path)))
        names.append(reader.name)
    together = merge.merged(sources, paths, options.merge) if options.merge and len(paths) > 1 else sources[0]
    return Dump.of(together, ", ".join(dict.fromkeys(names)), options)


def reader_of(path: Location, options: ReadOptions, format: str | None) -> Format:
    """The format that reads *path*, with the settings in the spec *format* and those that *options* imply.

    Raises `SettingError` for an option that the format lacks, `TraceError` for an unknown format.
    """
    reader = with_settings(chosen_format(path, format), options.settings)
    has = {field.name for field in fields(reader)}
    if options.tokens is not None and options.top_k is None and "tokens" not in has:
        choices = "choices of tokens are, with --from routing; totals are checked with --top-k as well"
        raise SettingError(f"{reader.name} is not cut into steps of --tokens: {choices}")
    implied = {name: getattr(options, name) for name in ("tokens", "top_k", "experts")}
    implied["tokens_per_step"] = options.expected
    return replace(reader, **{name: n for name, n in implied.items() if name in has and getattr(reader, name) is None})


@dataclass(frozen=True)
class Dump:
    """What is read, and the name of its format; *available* gets the layers that there are to select from."""

    source: Source
    format: str
    options: ReadOptions
    available: set[int]

    @classmethod
    def of(cls, source: Source, format: str, options: ReadOptions) -> Dump:
        """A *source*, of which *options* select some layers and steps."""
        available: set[int] = set()
        return cls(merge.selected(source, options, available), format, options, available)

    def trace(self, name: str, source: str | None) -> LoadTrace:
        """The trace, held in memory; raises `TraceError` where it grows beyond that."""

        def held(grid: Grid, stream: Iterator[Block], about: About) -> LoadTrace:
            blocks: list[Block] = []
            cells = 0
            for block in stream:
                cells += block.counts.size
                # Held once in blocks and once as a whole, and the blocks are here already.
                what = f"a trace of over {cells:,} counts"
                require(cells * 8, self.source.where, what, "ingest it, and open what comes of it")
                blocks.append(block)
            steps, counts = (np.concatenate(parts) for parts in zip(*blocks))
            trace = LoadTrace.from_counts(counts, name=name, steps=steps, layers=grid.layers.tolist())
            return replace(trace, info=replace(trace.info, source=source, **about(trace.steps)))

        return self.stream(held, None)

    def stream(self, into: Callable[[Grid, Iterator[Block], About], Result], progress: Progress | None) -> Result:
        """What *into* makes of the stream as it comes, or else of the stream in order."""
        try:
            return into(*self.flow(progress))
        except OutOfOrder:
            return into(*replace(self, source=in_order(self.source)).flow(progress))

    def flow(self, progress: Progress | None) -> tuple[Grid, Iterator[Block], About]:
        """Start the stream: its blocks, and what is known of the trace once they have passed, given its steps.

        Counters are subtracted, passes added up, the steps of a clock numbered. Findings of an earlier try are removed.
        Raises `TraceError` if the dump does not fit the options.
        """
        options, where, readings = self.options, self.source.where, readings_of(self.source)
        for reading in readings:
            reading.collector.clear()
        rows, done, collector = [reading.rows for reading in readings], 0, readings[0].collector
        total = sum(n or 0 for n in rows) if all(rows) else None

        def report(cells: int) -> None:
            nonlocal done
            done += cells
            if progress is not None:
                progress(done, total)

        grid, blocks = merge.blocks_of(self.source, options, report)
        for layer in sorted(set(options.layers) - set(grid.layers.tolist())):
            raise merge.no_layer(where, layer, self.available)
        if options.experts not in (None, grid.experts):
            problem = f"layers have {grid.experts} experts where --experts says {options.experts}"
            raise TraceError(where, problem, "check --experts, and that no rank is missing")
        if options.difference:
            blocks = merge.differences(blocks, options.first, collector)
        if options.bin is not None or any(reading.clock for reading in readings):
            blocks = merge.binned(blocks, options.bin or 1, where, collector)
        summary = merge.Summary(grid)
        whole = summary.complete_steps(blocks, where, collector, options.accept)
        return grid, whole, partial(self._about, grid, summary)

    def _about(self, grid: Grid, summary: merge.Summary, steps: Steps) -> dict[str, Any]:
        """What is known of the trace of these *steps*; raises `TraceError` for a finding that is an error."""
        source, options, where = self.source, self.options, self.source.where
        readings, layers = readings_of(source), grid.layers.tolist()
        raw = [f for r in readings for f in (*r.findings, *r.layer_findings(layers), *r.collector.findings)]
        raw += [finding("part", "the whole trace", r.part) for r in readings if r.part and r is source]
        findings = [*dict.fromkeys(raw), *summary.findings(options)]
        if any(found.name == "rounded" for found in raw):  # their common factor is that of rounding
            findings = [found for found in findings if found in raw or found.name not in ROUNDED]
        lacking = [found for found in findings if found.name == "tokens-differ" and options.idle_experts]
        if lacking and min(int(totals.min()) for totals in summary.totals) < (options.expected or 0):
            problem = f"{lacking[0].evidence}: experts without a row were not idle"
            raise TraceError(f"{where}, {lacking[0].place}", problem, "log every expert in every step")
        raise_for_errors(findings, options.accept, where)
        first = grid.first_expert if options.first_expert is None else options.first_expert
        texts = [*source.assumptions, *(text for reading in readings for text in reading.assumptions)]
        if first and options.first_expert is None:
            last = first + grid.experts - 1
            numbered = f"experts are numbered from {first} to {last}, and keep their numbers; if they count from 0 and "
            texts.append(numbered + f"expert 0 has no rows, say so with --idle-experts --experts {last + 1}")
        if options.idle_experts:
            texts.append("an expert without a row had no tokens")
        if options.difference:
            texts.append("counts are counters: a step is what they grew by, the first from 0")
        if options.bin is not None:
            texts.append(f"each step is the sum of {options.bin} logged passes, numbered from 1")
        sizes = {"step": len(steps), "layer": len(layers), "expert": grid.experts}
        shape = " x ".join(f"{n:,} {axis}{'' if n == 1 else 's'}" for axis, n in sizes.items())
        texts.append(f"{shape}, layers numbered from {layers[0]}, experts from {first}")
        return {
            "format": self.format,
            "assumptions": tuple(dict.fromkeys(texts)),
            "first_expert": first,
            "findings": (*findings, *gap_findings(steps)),
            "tokens_per_step": summary.tokens_per_step,
            **{"top_k": options.top_k, **readings[0].known},
        }


def check_format(format: Format, path: str | Path, options: ReadOptions = ReadOptions()) -> LoadTrace:
    """The trace that *format* reads of the dump at *path*; raises `AssertionError` where it breaks what reading needs.

    It has a line on what it needs, and its text makes it again; it claims the dump, and nothing that is empty or not
    there; its cells come out the same each time. Raises `TraceError` if the dump is not a trace.

    >>> import moetrace as mt
    >>> from moetrace.formats import FORMATS
    >>> from pathlib import Path
    >>> _ = Path("log.csv").write_text("step,layer,expert,tokens\\n1,0,0,7\\n1,0,1,5\\n2,0,0,6\\n2,0,1,6\\n")
    >>> mt.check_format(FORMATS["csv"], "log.csv").experts
    2
    """
    path = Path(path)
    assert format.needs, "needs says nothing: a line on what it reads"
    assert "\n" not in format.needs, "needs is more than a line"
    assert format == with_settings(type(format)(), label(format).partition(":")[2]), f"{label(format)} makes another"
    assert format.claims(path), f"{path} is not claimed"
    with tempfile.TemporaryDirectory() as name:
        empty = Path(name, "empty")
        empty.touch()
        for other in (empty, Path(name), Path(name, "missing")):
            assert not format.claims(other), f"what is empty or missing is claimed: {other.name}"
    source = source_of(format, path)
    for reading in readings_of(source):
        first, again = ([*reading.cells()] for _ in range(2))
        assert first, "there is no cell"
        same = again and all(np.array_equal(*columns) for columns in zip(joined(first), joined(again)))
        assert same, "the cells are others the second time"
    return Dump.of(source, format.name, options).trace(path.stem, str(path))


# --- and back ------------------------------------------------------------------------------------------


def export_trace(trace: LoadTrace, path: str | Path, kind: str) -> None:
    """Write *trace* to *path* as one of `LAYOUTS`, atomically, a block of steps or a layer at a time.

    Experts have the numbers that they have in the source, where the kind has numbers at all.

    Raises `SettingError` for another *kind*, `TraceError` when what is read of the trace is damaged.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> mt.export_trace(trace, "run.csv", "csv")
    >>> mt.read_trace("run.csv").experts
    8
    """
    if kind not in LAYOUTS:
        raise unknown("kind of export", kind, LAYOUTS)
    with replacing(Path(path)) as at:
        rows = LAYOUTS[kind]
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
    rows = max(1, EXPORT_CELLS // (len(trace.layers) * trace.experts))
    for a in range(0, len(trace.steps), rows):
        counts = [trace.read_layer(number)[a : a + rows] for number in trace.layers]
        yield Block(trace.steps[a : a + rows], np.stack(counts, axis=1))


def _long(trace: LoadTrace) -> Iterator[pa.RecordBatch]:
    for steps, counts in _blocks(trace):
        rows = max(1, EXPORT_ROWS // counts[0].size)
        for a in range(0, len(steps), rows):
            step, layer, expert, tokens = dense_cells(steps[a : a + rows], trace.layers, counts[a : a + rows])
            numbers = expert + trace.info.first_expert
            columns: dict[str, NDArray[Any]] = {"step": step, "layer": layer, "expert": numbers, "tokens": tokens}
            yield pa.RecordBatch.from_pydict(columns)


def _rows(trace: LoadTrace, lists: bool) -> Iterator[pa.RecordBatch]:
    """A row for each step and layer, in the order of the steps, its counts in a list or in a column for each expert."""
    names = [f"expert_{trace.info.first_expert + i}" for i in range(trace.experts)]
    at_once = max(1, EXPORT_ROWS // trace.experts)
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
LAYOUTS: dict[str, Callable[[LoadTrace], Iterator[pa.RecordBatch]] | None] = {
    "long": _long,
    "wide": partial(_rows, lists=False),
    "nested": partial(_rows, lists=True),
    "csv": _long,
    "npz": None,
    "forecasting": _forecasting,
}
