"""MindIE's expert hotspot dumps: a CSV without header for each NPU, matrices of counters one under the other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.collector import Collector
from moetrace.errors import TraceError, shown
from moetrace.formats.errors import library_errors
from moetrace.formats.stream.cells import Cells, Merge, Merged, Reading, dense_cells
from moetrace.formats.stream.names import by_rank, check_ranks, rank_or_last_number
from moetrace.formats.stream.tables import few_columns
from moetrace.formats.stream.text import BLOCK_BYTES, opened
from moetrace.formats.stream.values import Values

CONFIG = "model_gen_config.json"
RANK = re.compile(r"(?P<phase>prefill|decode)_\d{1,9}\.csv")
# Forward passes from one matrix to the next, where the configuration does not say: MindIE has no other.
INTERVAL = 8
MOST_LAYERS, MOST_EXPERTS, MOST_INTERVAL = 10_000, 1 << 16, 1 << 20
# All ranks are read side by side, so each in small pieces: cells handed on, and bytes of text, at a time.
RANK_CELLS = 1 << 16
LEAST_BYTES = 1 << 16


@dataclass(frozen=True)
class MindieFormat:
    """The folder of MINDIE_EXPERT_HOTPOT_DUMP_PATH: counters of the experts on each NPU, side by side.

    *phase* is the one to take where there are both.
    """

    phase: Literal["prefill", "decode"] | None = None

    name: ClassVar[str] = "mindie"
    needs: ClassVar[str] = (
        f"the folder of MINDIE_EXPERT_HOTPOT_DUMP_PATH, or its prefill or decode, with {CONFIG} and "
        "<phase>_<rank>.csv; --phase where it holds both"
    )

    def claims(self, path: Path) -> bool:
        """A folder with rank files and their configuration, or one of such folders named by phase."""
        return bool(_phases(path))

    def read(self, path: Path) -> Merged:
        """What the counters grew by from each matrix to the next is one step."""
        phases = _phases(path)
        chosen = {phase: folder for phase, folder in phases.items() if self.phase in (None, phase)}
        if not chosen:
            way = "check --phase" if phases else f"give the folder with {CONFIG} and <phase>_<rank>.csv"
            raise TraceError(str(path), "holds no hotspot dump" + (f" of {self.phase}" if phases else ""), way)
        if len(chosen) > 1:
            raise TraceError(str(path), "holds counts of prefill and decode", "choose one with --phase")
        ((phase, folder),) = chosen.items()
        return _read_folder(folder, phase)


def _phases(path: Path) -> dict[str, Path]:
    """The folders that hold a dump, by phase."""
    found = {}
    for phase in ("prefill", "decode"):
        for folder in (path, path / phase):
            if (folder / CONFIG).is_file() and _ranks(folder, phase):
                found[phase] = folder
    return found


def _ranks(folder: Path, phase: str) -> list[Path]:
    matches = [(RANK.fullmatch(child.name), child) for child in folder.iterdir()]
    return by_rank([child for match, child in matches if match and match["phase"] == phase and child.is_file()])


def _read_folder(folder: Path, phase: str) -> Merged:
    config = _config(folder / CONFIG)
    files = [file for file in _ranks(folder, phase) if (rank_or_last_number(file) or 0) >= config.shared_devices]
    if not files:
        raise TraceError(str(folder), "holds no ranks but those of shared experts", "gather the files of all machines")
    check_ranks(files)
    sizes = [_Size.of(file, config) for file in files]
    matrices = min(size.matrices for size in sizes)
    if not matrices:
        short = files[[size.matrices for size in sizes].index(0)]
        raise TraceError(str(short), f"holds no matrix of {config.layers} layers", "record for longer")
    collector = Collector()
    columns = _logical_experts(config, folder, [size.width for size in sizes], collector)
    assumptions = [
        f"{len(files)} ranks of {phase}; counters only grow, so a step is what they grew by",
        f"steps count forward passes, one in {config.interval}; layers are numbered from 0, dense ones left out",
    ]
    if any(size.matrices > matrices or size.rest for size in sizes):
        assumptions.append(
            f"the first {matrices:,} matrices are taken, which every rank has whole; the rest is left out"
        )
    how: Merge = "experts" if columns is None else "sum"
    if columns is not None:
        shared = sum(int((places >= config.experts).sum()) for places in columns)
        left_out = f", {shared} places of shared ones left out" if shared else ""
        assumptions.append(f"physical experts are added up by {config.map_file}{left_out}")
    block = max(LEAST_BYTES, BLOCK_BYTES // len(files))
    parts = tuple(
        Reading(
            partial(
                _cells,
                _Rank(file, config, matrices, block, size.width, None if columns is None else columns[i]),
                Values(collector),
            ),
            rows=matrices * config.layers * (size.width if columns is None else config.experts),
            findings=collector.findings if i == 0 else (),
            known={"top_k": config.top_k} if config.top_k else {},
            where=str(file),
        )
        for i, (file, size) in enumerate(zip(files, sizes))
    )
    return Merged(parts, how, str(folder), tuple(assumptions))


# --- configuration and places ------------------------------------------------------------------


@dataclass(frozen=True)
class _Config:
    """What `model_gen_config.json` says; *shared_devices* come first among the ranks and route nothing."""

    layers: int
    experts: int
    top_k: int
    interval: int
    shared_devices: int
    map_file: str | None


def _config(path: Path) -> _Config:
    raw = _json(path, "configuration of a dump")
    chosen = raw.get("num_of_selected_experts")
    map_file = raw.get("eplb_expert_map_file")
    experts = _whole(path, raw.get("num_of_experts"), "num_of_experts", 1, MOST_EXPERTS)
    shared = "num_dangling_shared_experts"  # below 0 where there are none
    return _Config(
        layers=_whole(path, raw.get("num_moe_layers"), "num_moe_layers", 1, MOST_LAYERS),
        experts=experts,
        top_k=_whole(path, chosen[0], "num_of_selected_experts", 0, experts)
        if isinstance(chosen, list) and chosen
        else 0,
        interval=_whole(path, raw.get("collection_Interval", INTERVAL), "collection_Interval", 1, MOST_INTERVAL),
        shared_devices=max(0, _whole(path, raw.get(shared, 0), shared, -MOST_EXPERTS, MOST_EXPERTS)),
        map_file=Path(str(map_file)).name if map_file else None,
    )


def _json(path: Path, what: str) -> dict[str, Any]:
    text = path.read_bytes()
    with library_errors(str(path), f"is no {what}", "it is written by rank 0"):
        found = json.loads(text.decode("utf-8"))
    if not isinstance(found, dict):
        raise TraceError(str(path), f"is no {what}, but a {type(found).__name__}", "it is written by rank 0")
    return found


def _whole(path: Path, value: Any, key: str, low: int, high: int) -> int:
    """*value* where it is a whole number in its bounds; raises `TraceError` naming its *key* where not."""
    if type(value) is not int or not low <= value <= high:
        raise TraceError(str(path), f"says {key}: {value!r:.40}", f"it is a whole number from {low} to {high:,}")
    return value


def _logical_experts(
    config: _Config, folder: Path, widths: list[int], collector: Collector
) -> list[NDArray[np.int64]] | None:
    """The logical expert of each column, by rank an array (layers, columns); None where columns are the experts."""
    if config.map_file is None or not (folder / config.map_file).is_file():
        if sum(widths) < config.experts:
            missing = f"has {sum(widths)} columns in {len(widths)} ranks for {config.experts} experts"
            raise TraceError(str(folder), missing, "gather the files of all machines")
        if config.map_file is not None:
            evidence = f"experts are placed by {config.map_file!r}, which is not in the folder"
            collector.note("physical", "every layer", evidence)
        elif sum(widths) > config.experts:
            evidence = f"{sum(widths)} columns for {config.experts} experts, and no map says which expert they hold"
            collector.note("physical", "every layer", evidence)
        return None
    table = _placement(folder / config.map_file, config, widths)
    return np.split(table, np.cumsum(widths)[:-1], axis=1)


def _placement(path: Path, config: _Config, widths: list[int]) -> NDArray[np.int64]:
    """The logical expert in each place, shape (layers, places), those of shared devices left out.

    Raises `TraceError` where it is not of so many layers and of ranks with so many columns.
    """
    raw = _json(path, "placement of experts")
    with library_errors(str(path), "is no placement of experts", "give the served map"):
        layers = sorted(raw["layer_list"], key=lambda layer: int(layer["layer_id"]))
        numbers = [layer["layer_id"] for layer in layers]
        devices = [sorted(layer["device_list"], key=lambda device: int(device["device_id"])) for layer in layers]
        places = [[device["device_expert"] for device in own[config.shared_devices :]] for own in devices]
        whole = all(type(n) is int and 0 <= n < MOST_EXPERTS for layer in places for device in layer for n in device)
        fits = all([len(device) for device in layer] == widths for layer in places)
    if len(set(numbers)) != len(numbers) or len(layers) != config.layers:
        raise TraceError(
            str(path), f"places the experts of {len(set(numbers))} layers of {config.layers}", "give the served map"
        )
    if not whole or not fits:
        wanted = f"{len(widths)} devices with {shown(widths, 4)} experts"
        raise TraceError(str(path), "does not place whole numbers as the ranks have columns", f"it takes {wanted}")
    return np.array([[n for device in layer for n in device] for layer in places], np.int64)


# --- the files of ranks ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Size:
    """Columns and whole matrices of a file, and whether there is more than those."""

    width: int
    matrices: int
    rest: bool

    @classmethod
    def of(cls, path: Path, config: _Config) -> _Size:
        rows, last, width = 0, b"", 0
        with _rank_errors(path), closing(opened(path)) as stream:
            while block := stream.read(BLOCK_BYTES):
                width = width or block.partition(b"\n")[0].count(b",") + 1
                rows, last = rows + block.count(b"\n"), block
        few_columns(width, str(path))
        # A row that does not end may be cut within its last number.
        return cls(width, rows // config.layers, rows % config.layers > 0 or not last.endswith(b"\n"))


@dataclass(frozen=True)
class _Rank:
    """One rank's file, *width* columns: *matrices* of it are read, *block* bytes at a time.

    *experts* (layers, width) is what the columns hold, None where they are the experts.
    """

    path: Path
    config: _Config
    matrices: int
    block: int
    width: int
    experts: NDArray[np.int64] | None


def _cells(rank: _Rank, values: Values) -> Iterator[Cells]:
    """What the counters of a rank grew by, matrix by matrix."""
    layers, interval = rank.config.layers, rank.config.interval
    before: NDArray[np.int64] | None = None
    done = 0
    for counters in _counters(rank, values):
        counters = counters[: rank.matrices - done]
        if not len(counters):
            return
        first = np.zeros_like(counters[0]) if before is None else before
        counts = np.diff(counters, axis=0, prepend=first[None])
        fallen = np.argwhere(counts < 0)
        if fallen.size:
            at, layer, column = fallen[0].tolist()
            raise TraceError(
                f"{rank.path}, row {(done + at) * layers + layer}, column {column}",
                "a counter falls: it was reset, as dynamic balancing does",
                "record with static balancing or none, each run into a folder of its own",
            )
        steps = interval * (np.arange(done, done + len(counts), dtype=np.int64) + 1)
        if rank.experts is not None:  # places are added up to logical experts; shared ones are left out
            by_expert = np.zeros((*counts.shape[:2], rank.config.experts), np.int64)
            for layer, experts in enumerate(rank.experts):
                for place, expert in enumerate(experts.tolist()):
                    if expert < rank.config.experts:
                        by_expert[:, layer, expert] += counts[:, layer, place]
            counts = by_expert
        yield dense_cells(steps, range(layers), counts)
        before, done = counters[-1], done + len(counters)


def _counters(rank: _Rank, values: Values) -> Iterator[NDArray[np.int64]]:
    """The matrices of a file, a few at a time: (matrices, layers, columns); an unfinished one is left out."""
    import pyarrow as pa
    import pyarrow.csv as pc

    layers = rank.config.layers
    at_once = max(1, RANK_CELLS // (layers * rank.config.experts))
    read = pc.ReadOptions(block_size=rank.block, use_threads=False, autogenerate_column_names=True)
    # A blank line would be skipped, and shift what follows by a layer; only whole numbers are counters.
    parse = pc.ParseOptions(ignore_empty_lines=False)
    convert = pc.ConvertOptions(column_types={f"f{i}": pa.int64() for i in range(rank.width)})
    rest: NDArray[np.int64] | None = None
    row = 0
    with _rank_errors(rank.path), closing(pc.open_csv(opened(rank.path), read, parse, convert)) as batches:
        for batch in batches:
            stacked = np.stack([np.asarray(column.to_numpy(zero_copy_only=False)) for column in batch.columns], axis=1)
            rows = values.counts(stacked, "counter", row, str(rank.path))
            row += len(rows)
            rows = rows if rest is None else np.concatenate([rest, rows])
            whole = rows[: len(rows) // layers * layers].reshape(-1, layers, rows.shape[1])
            for start in range(0, len(whole), at_once):
                yield whole[start : start + at_once]
            rest = rows[whole.shape[0] * layers :]


def _rank_errors(path: Path) -> AbstractContextManager[None]:
    """What a library raises on a damaged file becomes a `TraceError` that points to the copy MindIE keeps."""
    copy = path.with_name(f"{path.stem}_bak.csv")
    way = f"its copy {copy.name} may be whole: put it in its place" if copy.exists() else "write the file again"
    return library_errors(str(path), "cannot be read", way)
