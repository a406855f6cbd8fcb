"""SGLang's expert-distribution recorder: `stat` dumps, and `per_pass` or `per_token` ones by rank."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.collector import Watch
from moetrace.errors import TraceError
from moetrace.formats.errors import one_line, require
from moetrace.formats.stream.cells import Cells, Merged, Reading, ReadOptions, Source, dense_cells
from moetrace.formats.stream.merge import by_rank, check_ranks
from moetrace.formats.stream.tables import Values

RANK = re.compile(r"expert_distribution_recorder_[\d.]+_\d+\.pt")
# Forward modes of SGLang, by the numbers in per_token dumps; 3 is a mix of both, 4 an idle pass.
MODES = {"prefill": 1, "decode": 2}
# SGLang's buffer if nothing else is set; one that is full to the last place may have gone round.
DEFAULT_BUFFER = 1000


class SglangFormat:
    """`.pt` files of the recorder, opened with a restricted unpickler that builds tensors alone."""

    name = "sglang"
    needs = "a .pt file of the recorder, or a folder with those of all ranks; the extra torch"

    def claims(self, path: Path) -> bool:
        """A .pt file, or a folder with such of several ranks."""
        if path.is_dir():
            return bool(_ranks(path))
        if path.suffix.lower() not in {".pt", ".pth"}:
            return False
        with path.open("rb") as file:
            return file.read(2) == b"PK"

    def read(self, path: Path, options: ReadOptions) -> Source:
        """One buffer of passes, or the records of every rank, added up."""
        if not path.is_dir():
            return _read_file(path, options)
        files = _ranks(path)
        if not files:
            raise TraceError(str(path), "holds no rank files of the recorder", "give the folder that it writes to")
        check_ranks(files)
        readings = tuple(_read_file(file, options) for file in files)
        return Merged(readings, "sum", str(path), (f"{len(files)} ranks are added up", *readings[0].assumptions))


def _ranks(folder: Path) -> list[Path]:
    return by_rank([child for child in folder.iterdir() if RANK.fullmatch(child.name)])


def loaded(path: Path) -> dict[str, Any]:
    """The dict in a `.pt` file, tensors as they are; raises `TraceError` when torch is not there or it is none."""
    try:
        import torch
    except ImportError as error:
        raise TraceError(str(path), "is a torch file", 'install torch: pip install "moetrace[torch]"') from error
    require(4 * _unpacked(path), str(path), "what it unpacks to", "record fewer passes in a file")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises a dozen types on damaged files
        raise TraceError(
            str(path),
            f"cannot be opened: {one_line(error)}",
            "dump it again; nothing but tensors is read",
        ) from error
    if not isinstance(found, dict):
        raise TraceError(str(path), f"holds a {type(found).__name__}", "give a dump of SGLang's recorder")
    return found


def _unpacked(path: Path) -> int:
    """Bytes of the members of a `.pt` file, which is a zip archive; 0 where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(member.file_size for member in archive.infolist())
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return 0


def _read_file(path: Path, options: ReadOptions) -> Reading:
    document = loaded(path)
    if "records" in document:
        return _records(document, path, options)
    counts = _array(document.get("logical_count"), path)
    if counts is not None:
        # A tensor may be a view that repeats one number any number of times.
        require(4 * counts.size * 8, str(path), f"counts of the shape {counts.shape}", "record fewer passes in a file")
    if counts is None or counts.ndim not in (2, 3):
        raise TraceError(
            str(path), f"holds {', '.join(map(str, document)) or 'nothing'}", "a dump has logical_count or records"
        )
    if options.phase is not None:
        raise TraceError(str(path), "does not tell prefill from decode", "record with mode per_token for --phase")
    cube = counts if counts.ndim == 3 else counts[None]
    steps = np.arange(1, len(cube) + 1)
    said = ("passes are numbered from 1 in the order of the buffer",)
    return _Passes(str(path), steps, cube, Watch()).unpadded().reading(options, said)


def _array(value: Any, path: Path) -> NDArray[Any] | None:
    """A tensor or nested list as an array; raises `TraceError` where it is none of numbers."""
    try:
        array = None if value is None else np.asarray(value)
    except Exception as error:  # a tensor that NumPy has no type for, a ragged list
        raise TraceError(str(path), f"holds no numbers: {one_line(error)}", "dump it again") from error
    return array


@dataclass(frozen=True)
class _Passes:
    """Forward passes of one rank: *counts* (passes, layers, experts), as they were dumped."""

    where: str
    steps: NDArray[np.int64]
    counts: NDArray[Any]
    watch: Watch

    def unpadded(self) -> _Passes:
        """Without the end of a buffer that was never reached; says where it may have gone round."""
        used = np.flatnonzero(self.counts.any(axis=(1, 2)))
        if not used.size:
            raise TraceError(self.where, "has no tokens at all", "record while requests are served")
        end = int(used[-1]) + 1
        whole = len(self.steps)
        if end < whole:
            self.watch.say(
                "padded", f"step {end + 1}", f"{whole - end} of {whole} places of the buffer were not reached"
            )
        if end == DEFAULT_BUFFER == whole:
            self.watch.say("wrapped", "the whole trace", f"all {whole:,} places of the default buffer are used")
        if len(used) < end:
            idle = int(np.setdiff1d(np.arange(end), used)[0]) + 1
            evidence = "places without tokens lie between others: idle passes, or the seam of a buffer that went round"
            self.watch.say("wrapped", f"step {idle}", evidence, end - len(used))
        return _Passes(self.where, self.steps[:end], self.counts[:end], self.watch)

    def reading(self, options: ReadOptions, said: tuple[str, ...]) -> Reading:
        """The cells of the layers that route anything."""
        layers = np.flatnonzero(self.counts.any(axis=(0, 2)))
        dense = np.setdiff1d(np.arange(self.counts.shape[1]), layers)
        if dense.size:
            shown = ", ".join(str(n) for n in dense[:8])
            said = (*said, f"layers without any token are dense ones and left out: {shown}")
        values = Values(options, self.watch)
        heard = self.watch.findings
        return Reading(
            cells=lambda: self._cells(layers, values),
            rows=len(self.steps) * len(layers) * self.counts.shape[2],
            assumptions=said,
            findings=heard,
            where=self.where,
            watch=self.watch,
        )

    def _cells(self, layers: NDArray[np.intp], values: Values) -> Iterator[Cells]:
        yield dense_cells(self.steps, layers, values.counts(self.counts[:, layers], "logical_count", 0, self.where))


def _records(document: dict[str, Any], path: Path, options: ReadOptions) -> Reading:
    """The passes of a rank, physical experts added up to logical ones."""
    records = [record for record in document["records"] if _wanted(record, options, path)]
    if not records:
        raise TraceError(str(path), "holds no such pass", "check --phase, and record while requests are served")
    try:
        steps = np.array([int(record["forward_pass_id"]) for record in records])
        physical = np.stack([np.asarray(record["global_physical_count"]) for record in records])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TraceError(
            str(path), f"has a record that is none: {one_line(error)}", "give a per_pass or per_token dump"
        ) from error
    watch = Watch()
    mapping = _array(document.get("last_physical_to_logical_map"), path)
    if mapping is None:
        watch.say("physical", "every layer", "counts are of physical experts, and no map says which expert they hold")
        return _Passes(str(path), steps, physical, watch).reading(options, ())
    if mapping.shape != physical.shape[1:] or mapping.dtype.kind not in "iu" or mapping.min() < 0:
        raise TraceError(
            str(path),
            f"has a map {mapping.dtype} {mapping.shape} for counts of {physical.shape[1:]}",
            "both are whole numbers (layers, physical experts)",
        )
    said = "physical experts are added up by the last map, which may have changed while it was recorded"
    return _Passes(str(path), steps, _logical(physical, mapping), watch).reading(options, (said,))


def _wanted(record: Any, options: ReadOptions, path: Path) -> bool:
    """Whether a record is of the phase asked for; raises `TraceError` where it does not tell."""
    if options.phase is None:
        return True
    if not isinstance(record, dict) or "forward_mode" not in record:
        raise TraceError(str(path), "does not tell prefill from decode", "record with mode per_token for --phase")
    return bool(record["forward_mode"] == MODES[options.phase])


def _logical(physical: NDArray[Any], mapping: NDArray[Any]) -> NDArray[np.int64]:
    """Counts (passes, layers, logical experts) of *physical* ones by *mapping* (layers, physical experts)."""
    counts = np.zeros((*physical.shape[:2], int(mapping.max()) + 1), np.int64)
    at = np.broadcast_to(mapping.astype(np.int64), physical.shape)
    row = np.arange(physical.shape[0])[:, None, None]
    layer = np.arange(physical.shape[1])[:, None]
    np.add.at(counts, (row, layer, at), physical)
    return counts
