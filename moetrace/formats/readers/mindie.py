"""MindIE's expert hotspot dumps: a CSV without header for each NPU, matrices of counters one under the other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
from numpy.typing import NDArray

from moetrace.doctor import Collector
from moetrace.errors import TraceError, shown
from moetrace.formats.sources import WRITE_AGAIN, check_ranks, library_errors, rank_files, rank_or_last_number
from moetrace.formats.stream.cells import Cells, Format, Merged, Reading, dense_cells
from moetrace.formats.stream.columns import Values, few_columns
from moetrace.formats.stream.text import BLOCK_BYTES, opened
from moetrace.words import Phase

CONFIG = "model_gen_config.json"
# Forward passes from one matrix to the next, where the configuration does not say: MindIE has no other.
INTERVAL = 8
MOST_LAYERS, MOST_EXPERTS, MOST_INTERVAL = 10_000, 1 << 16, 1 << 20
# All ranks are read side by side, so each in small pieces: cells handed on, and bytes of text, at a time.
RANK_CELLS = 1 << 16
LEAST_BYTES = 1 << 16


@dataclass(frozen=True)
class MindieFormat(Format):
    """The folder of MINDIE_EXPERT_HOTPOT_DUMP_PATH, or its prefill or decode, with model_gen_config.json and
    <phase>_<rank>.csv; --phase where it holds both.
    """

    phase: Phase | None = None
    name: ClassVar[str] = "mindie"

    def claims(self, path: Path) -> bool:
        return bool(_dumps(path))

    def read(self, path: Path) -> Merged:
        """What the counters grew by from each matrix to the next is one step."""
        dumps = _dumps(path)
        chosen = [phase for phase in dumps if self.phase in (None, phase)]
        if not chosen:
            way = "check --phase" if dumps else f"give the folder with {CONFIG} and <phase>_<rank>.csv"
            raise TraceError(str(path), "holds no hotspot dump" + (f" of {self.phase}" if dumps else ""), way)
        if len(chosen) > 1:
            raise TraceError(str(path), "holds counts of prefill and decode", "choose one with --phase")
        (phase,) = chosen
        folder, files = dumps[phase]
        config = _config_of(folder / CONFIG)
        # Devices of shared experts come first, and route nothing.
        files = [file for file in files if (rank_or_last_number(file) or 0) >= config.shared_devices]
        if not files:
            problem = "holds no ranks but those of shared experts"
            raise TraceError(str(folder), problem, "gather the files of all machines")
        check_ranks(files)
        widths, whole, rest = zip(*(_extent(file, config.layers) for file in files))
        matrices = min(whole)
        if not matrices:
            problem = f"holds no matrix of {config.layers} layers"
            raise TraceError(str(files[whole.index(0)]), problem, "record for longer")
        collector = Collector()
        places = _logical_experts(config, folder, list(widths), collector)
        assumptions = [
            f"{len(files)} ranks of {phase}; counters only grow, so a step is what they grew by",
            f"steps count forward passes, one in {config.interval}; layers are numbered from 0, dense ones left out",
        ]
        if any(rest) or max(whole) > matrices:
            taken = f"the first {matrices:,} matrices are taken, which every rank has whole; the rest is left out"
            assumptions.append(taken)
        if places is not None:
            shared = sum(int((experts >= config.experts).sum()) for experts in places)
            left_out = f", {shared} places of shared ones left out" if shared else ""
            assumptions.append(f"physical experts are added up by {config.map_file}{left_out}")
        known = {"top_k": config.top_k} if config.top_k else {}
        block = max(LEAST_BYTES, BLOCK_BYTES // len(files))
        parts: list[Reading] = []
        for file, width, experts in zip(files, widths, places or repeat(None)):
            cells = partial(_cells, file, config, matrices, width, block, experts)
            rows = matrices * config.layers * (width if experts is None else config.experts)
            findings = () if parts else collector.findings
            parts.append(Reading(cells, rows=rows, findings=findings, known=known, where=str(file)))
        return Merged(tuple(parts), "experts" if places is None else "sum", str(folder), tuple(assumptions))


def _dumps(path: Path) -> dict[str, tuple[Path, list[Path]]]:
    """The folder of the dump of each phase, and the files of its ranks."""
    found = {}
    for phase in ("prefill", "decode"):
        for folder in (path, path / phase):
            if (folder / CONFIG).is_file() and (files := rank_files(folder, re.compile(rf"{phase}_\d{{1,9}}\.csv"))):
                found[phase] = folder, files
    return found


class _Config(NamedTuple):
    """What `model_gen_config.json` says."""

    layers: int
    experts: int
    top_k: int
    interval: int
    shared_devices: int
    map_file: str | None


def _config_of(path: Path) -> _Config:
    """Raises `TraceError` naming the key whose value is not a whole number in its bounds."""
    raw = _json(path, "configuration of a dump")
    chosen = raw.get("num_of_selected_experts")
    raw["num_of_selected_experts"] = chosen[0] if isinstance(chosen, list) and chosen else 0

    def whole(key: str, low: int, high: int, usual: int | None = None) -> int:
        value = raw.get(key, usual)
        if type(value) is not int or not low <= value <= high:
            raise TraceError(str(path), f"says {key}: {value!r:.40}", f"it is a whole number from {low} to {high:,}")
        return value

    experts, map_file = whole("num_of_experts", 1, MOST_EXPERTS), raw.get("eplb_expert_map_file")
    return _Config(
        layers=whole("num_moe_layers", 1, MOST_LAYERS),
        experts=experts,
        top_k=whole("num_of_selected_experts", 0, experts),
        interval=whole("collection_Interval", 1, MOST_INTERVAL, INTERVAL),
        # Below 0 where there are none.
        shared_devices=max(0, whole("num_dangling_shared_experts", -MOST_EXPERTS, MOST_EXPERTS, 0)),
        map_file=Path(str(map_file)).name if map_file else None,
    )


def _json(path: Path, what: str) -> dict[str, Any]:
    text = path.read_bytes()
    with library_errors(str(path), f"is no {what}", "it is written by rank 0"):
        found = json.loads(text.decode("utf-8"))
    if not isinstance(found, dict):
        raise TraceError(str(path), f"is no {what}, but a {type(found).__name__}", "it is written by rank 0")
    return found


def _logical_experts(
    config: _Config, folder: Path, widths: list[int], collector: Collector
) -> list[NDArray[np.int64]] | None:
    """The logical expert of each column, an array (layers, columns) by rank; None where columns are the experts."""
    if config.map_file is None or not (folder / config.map_file).is_file():
        columns = sum(widths)
        if columns < config.experts:
            missing = f"has {columns} columns in {len(widths)} ranks for {config.experts} experts"
            raise TraceError(str(folder), missing, "gather the files of all machines")
        evidence = f"experts are placed by {config.map_file!r}, which is not in the folder"
        if config.map_file is None:
            evidence = f"{columns} columns for {config.experts} experts, and no map says which expert they hold"
        if config.map_file is not None or columns > config.experts:
            collector.note("physical", "every layer", evidence)
        return None
    path = folder / config.map_file
    raw = _json(path, "placement of experts")
    with library_errors(str(path), "is no placement of experts", "give the served map"):
        layers = sorted(raw["layer_list"], key=lambda layer: int(layer["layer_id"]))
        numbers = {layer["layer_id"] for layer in layers}
        devices = [sorted(layer["device_list"], key=lambda device: int(device["device_id"])) for layer in layers]
        places = [[device["device_expert"] for device in own[config.shared_devices :]] for own in devices]
        flat = [[n for device in layer for n in device] for layer in places]
        whole = all(type(n) is int and 0 <= n < MOST_EXPERTS for layer in flat for n in layer)
        fits = all([len(device) for device in layer] == widths for layer in places)
    if len(numbers) != len(layers) or len(layers) != config.layers:
        problem = f"places the experts of {len(numbers)} layers of {config.layers}"
        raise TraceError(str(path), problem, "give the served map")
    if not whole or not fits:
        wanted = f"{len(widths)} devices with {shown(widths, 4)} experts"
        raise TraceError(str(path), "does not place whole numbers as the ranks have columns", f"it takes {wanted}")
    return np.split(np.array(flat, np.int64), np.cumsum(widths)[:-1], axis=1)


def _extent(path: Path, layers: int) -> tuple[int, int, bool]:
    """Columns and whole matrices of a file, and whether there is more than those."""
    rows, last, width = 0, b"", 0
    with _rank_errors(path), closing(opened(path)) as stream:
        while block := stream.read(BLOCK_BYTES):
            width = width or block.partition(b"\n")[0].count(b",") + 1
            rows, last = rows + block.count(b"\n"), block
    few_columns(width, str(path))
    # A row that does not end may be cut within its last number.
    return width, rows // layers, rows % layers > 0 or not last.endswith(b"\n")


def _cells(
    path: Path, config: _Config, matrices: int, width: int, block: int, experts: NDArray[np.int64] | None
) -> Iterator[Cells]:
    """What the counters of a rank grew by, for so many *matrices* of *width* columns, *block* bytes read at a time.

    *experts* (layers, width) is what the columns hold, None where they are the experts. An unfinished matrix is left
    out.
    """
    layers, values, done, row = config.layers, Values(str(path)), 0, 0
    at_once = max(1, RANK_CELLS // (layers * config.experts))
    read = pc.ReadOptions(block_size=block, use_threads=False, autogenerate_column_names=True)
    # A blank line would be skipped, and shift what follows by a layer; only whole numbers are counters.
    parse = pc.ParseOptions(ignore_empty_lines=False)
    convert = pc.ConvertOptions(column_types={f"f{i}": pa.int64() for i in range(width)})
    before, rest = np.zeros((layers, width), np.int64), np.empty((0, width), np.int64)
    with _rank_errors(path), pc.open_csv(opened(path), read, parse, convert) as batches:
        for batch in batches:
            stacked = np.stack([column.to_numpy(zero_copy_only=False) for column in batch.columns], axis=1)
            rows = np.concatenate([rest, values.counts(stacked, "counter", row)])
            row += len(stacked)
            whole = rows[: len(rows) // layers * layers].reshape(-1, layers, width)
            rest = rows[whole.shape[0] * layers :]
            for start in range(0, len(whole), at_once):
                counters = whole[start : start + at_once][: matrices - done]
                if not len(counters):
                    return
                counts = np.diff(counters, axis=0, prepend=before[None])
                for at, layer, column in np.argwhere(counts < 0)[:1].tolist():
                    problem = "a counter falls: it was reset, as dynamic balancing does"
                    way_out = "record with static balancing or none, each run into a folder of its own"
                    where = f"{path}, row {(done + at) * layers + layer}, column {column}"
                    raise TraceError(where, problem, way_out)
                steps = config.interval * (np.arange(done, done + len(counts), dtype=np.int64) + 1)
                before, done = counters[-1], done + len(counters)
                if experts is not None:  # places are added up to logical experts; shared ones are left out
                    by_expert = np.zeros((len(counts), layers, config.experts), np.int64)
                    for layer, place in np.argwhere(experts < config.experts).tolist():
                        by_expert[:, layer, experts[layer, place]] += counts[:, layer, place]
                    counts = by_expert
                yield dense_cells(steps, range(layers), counts)


def _rank_errors(path: Path) -> AbstractContextManager[None]:
    """What a library raises on a damaged file becomes a `TraceError` that points to the copy MindIE keeps."""
    copy = path.with_name(f"{path.stem}_bak.csv")
    way = f"its copy {copy.name} may be whole: put it in its place" if copy.exists() else WRITE_AGAIN
    return library_errors(str(path), "cannot be read", way)
