"""SGLang's expert-distribution recorder: `stat` dumps, and `per_pass` or `per_token` ones by rank."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor import HALVES, Collector
from moetrace.errors import TraceError, shown
from moetrace.formats.readers.tensors import is_torch, keys_of, loaded, tensor_array
from moetrace.formats.sources import check_ranks, library_errors, rank_files
from moetrace.formats.stream.cells import Format, Merged, Reading, Source, dense_cells
from moetrace.formats.stream.columns import Values, as_float32
from moetrace.formats.stream.merge import concatenate_segments
from moetrace.words import Phase

RANK = re.compile(r"expert_distribution_recorder_[\d.]+_(\d{1,9})\.pt")
# Keys of its dumps, as they are in the archive.
MARKS = (b"logical_count", b"global_physical_count")
# Forward modes of SGLang, by the numbers in per_token dumps; 3 is a mix of both, 4 an idle pass.
MODES: dict[Phase, int] = {"prefill": 1, "decode": 2}
# SGLang's buffer if nothing else is set; one that is full to the last place may have gone round.
DEFAULT_BUFFER = 1000
NO_PHASE = ("does not distinguish prefill from decode", "record with mode per_token for --phase")


@dataclass(frozen=True)
class SglangFormat(Format):
    """A .pt file of the recorder, or a folder with those of all ranks.

    *phase* is the one to take where the records distinguish them.
    """

    phase: Phase | None = None
    name: ClassVar[str] = "sglang"

    def claims(self, path: Path) -> bool:
        if path.is_dir():
            return bool(rank_files(path, RANK))
        return is_torch(path) and any(mark in keys_of(path) for mark in MARKS)

    def read(self, path: Path) -> Source:
        """One buffer of passes, or the records of every rank, added up."""
        if not path.is_dir():
            return _read_file(path, self.phase)
        files = rank_files(path, RANK)
        if not files:
            raise TraceError(str(path), "holds no rank files of the recorder", "give the folder that it writes to")
        ranks: dict[str, list[Reading]] = defaultdict(list)
        for file in files:
            ranks[RANK.fullmatch(file.name)[1]].append(_read_file(file, self.phase))  # type: ignore[index]
        check_ranks([Path(f"rank{rank}") for rank in ranks])
        # A rank that dumped several times has a file for each.
        segments = lambda parts: parts[0] if len(parts) == 1 else concatenate_segments(parts, str(path), ())  # noqa: E731
        readings = tuple(map(segments, ranks.values()))
        assumption = (f"{len(ranks)} ranks are added up", *readings[0].assumptions)
        return Merged(readings, "sum", str(path), assumption, idle=True)


def _read_file(path: Path, phase: Phase | None) -> Reading:
    document = loaded(path)
    if not isinstance(document, dict):
        raise TraceError(str(path), f"holds a {type(document).__name__}", "give a dump of SGLang's recorder")
    if "records" in document:
        return _records(document, path, phase)
    collector = Collector()
    counts = _array(document.get("logical_count"), path, collector)
    if counts is None or counts.ndim not in (2, 3):
        raise TraceError(str(path), f"holds {shown(document) or 'nothing'}", "a dump has logical_count or records")
    if phase is not None:
        raise TraceError(str(path), *NO_PHASE)
    cube, where = counts if counts.ndim == 3 else counts[None], str(path)
    used, whole = np.flatnonzero(cube.any(axis=(1, 2))), len(cube)
    if not used.size:
        raise TraceError(where, "has no tokens at all", "record while requests are served")
    end = int(used[-1]) + 1  # the end of a buffer that was never reached is left out
    if end < whole:
        collector.note("padded", f"step {end + 1}", f"{whole - end} of {whole} places of the buffer were not reached")
    if end == DEFAULT_BUFFER == whole:
        collector.note("wrapped", "the whole trace", f"all {whole:,} places of the default buffer are used")
    if len(used) < end:
        idle = int(np.setdiff1d(np.arange(end), used)[0]) + 1
        evidence = "places without tokens lie between others: idle passes, or the seam of a buffer that went round"
        collector.note("wrapped", f"step {idle}", evidence, end - len(used))
    assumptions = ("passes are numbered from 1 in the order of the buffer",)
    reading = _reading(np.arange(1, end + 1), cube[:end], collector, where, assumptions)
    return replace(reading, steps_are_implicit=True)


def _array(value: Any, path: Path, collector: Collector) -> NDArray[Any] | None:
    """A tensor or nested list as an array, None for what is neither; bfloat16, which NumPy lacks, is noted."""
    array = tensor_array(value, path)
    if array is None or array.dtype.kind != "V":
        return array
    wide = as_float32(array)
    if wide.ndim:
        collector.note_half(wide, 2 ** HALVES["bfloat16"], "bfloat16", "counts", 0)
    return wide


def _reading(
    steps: NDArray[np.int64], counts: NDArray[Any], collector: Collector, where: str, assumptions: tuple[str, ...]
) -> Reading:
    """The reading of passes (passes, layers, experts), of the layers that route anything."""
    layers = np.flatnonzero(counts.any(axis=(0, 2)))
    dense = np.setdiff1d(np.arange(counts.shape[1]), layers)
    if dense.size:
        assumptions = (*assumptions, f"layers without any token are dense ones and left out: {shown(dense)}")
    values = Values(where, collector=collector)
    return values.reading(
        lambda: iter([dense_cells(steps, layers, values.counts(counts[:, layers], "logical_count"))]),
        rows=len(steps) * len(layers) * counts.shape[2],
        assumptions=assumptions,
        findings=collector.findings,
    )


def _records(document: dict[str, Any], path: Path, phase: Phase | None) -> Reading:
    """The passes of a rank, physical experts added up to logical ones."""
    where, every = str(path), document["records"]
    if phase is not None and not all(isinstance(record, dict) and "forward_mode" in record for record in every):
        raise TraceError(where, *NO_PHASE)
    records = [record for record in every if phase is None or record["forward_mode"] == MODES[phase]]
    if not records:
        raise TraceError(where, "holds no such pass", "check --phase, and record while requests are served")
    collector = Collector()
    with library_errors(where, "has a record that is not one", "give a per_pass or per_token dump"):
        steps = np.array([int(record["forward_pass_id"]) for record in records])
        passes = [_array(record["global_physical_count"], path, collector) for record in records]
        physical = np.stack([np.asarray(counts) for counts in passes])
    mapping = _array(document.get("last_physical_to_logical_map"), path, collector)
    if mapping is None:
        evidence = "counts are of physical experts, and no map says which expert they hold"
        collector.note("physical", "every layer", evidence)
        return _reading(steps, physical, collector, where, ())
    if mapping.shape != physical.shape[1:] or mapping.dtype.kind not in "iu" or mapping.min() < 0:
        problem = f"has a map {mapping.dtype} {mapping.shape} for counts of {physical.shape[1:]}"
        raise TraceError(where, problem, "both are whole numbers (layers, physical experts)")
    logical = np.zeros((*physical.shape[:2], int(mapping.max()) + 1), np.int64)
    at = np.broadcast_to(mapping.astype(np.int64), physical.shape)
    np.add.at(logical, (np.arange(len(physical))[:, None, None], np.arange(physical.shape[1])[:, None], at), physical)
    assumption = "physical experts are added up by the last map, which may have changed while it was recorded"
    return _reading(steps, logical, collector, where, (assumption,))
