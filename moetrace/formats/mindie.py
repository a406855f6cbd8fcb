"""MindIE's expert hotspot dumps: a CSV without header for each NPU, matrices of counters one under the other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.formats.base import Cells, Merge, Merged, Reading, ReadOptions, dense_cells
from moetrace.formats.canonical import one_line
from moetrace.formats.columns import Values
from moetrace.formats.merge import by_rank, check_ranks
from moetrace.formats.text import BLOCK_BYTES, opened
from moetrace.formats.watch import Watch

CONFIG = "model_gen_config.json"
RANK = re.compile(r"(?P<phase>prefill|decode)_\d{1,9}\.csv")
# Forward passes from one matrix to the next, where the configuration does not say: MindIE has no other.
INTERVAL = 8
MOST_LAYERS, MOST_EXPERTS = 10_000, 1 << 17


class MindieFormat:
    """The folder of MINDIE_EXPERT_HOTPOT_DUMP_PATH: counters of the experts on each NPU, side by side."""

    name = "mindie"
    needs = (
        f"the folder of MINDIE_EXPERT_HOTPOT_DUMP_PATH, or its prefill or decode, with {CONFIG} and "
        "<phase>_<rank>.csv; --phase where it holds both"
    )

    def claims(self, path: Path) -> bool:
        """A folder with rank files and their configuration, or one of such folders named by phase."""
        return bool(_phases(path))

    def read(self, path: Path, options: ReadOptions) -> Merged:
        """What the counters grew by from each matrix to the next is one step."""
        phases = _phases(path)
        chosen = {phase: folder for phase, folder in phases.items() if options.phase in (None, phase)}
        if not chosen:
            way = "check --phase" if phases else f"give the folder with {CONFIG} and <phase>_<rank>.csv"
            raise TraceError(str(path), "holds no hotspot dump" + (f" of {options.phase}" if phases else ""), way)
        if len(chosen) > 1:
            raise TraceError(str(path), "holds counts of prefill and decode", "choose one with --phase")
        ((phase, folder),) = chosen.items()
        return _read_folder(folder, phase, options)


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
    return by_rank([child for match, child in matches if match and match["phase"] == phase])


def _read_folder(folder: Path, phase: str, options: ReadOptions) -> Merged:
    config = _config(folder / CONFIG)
    files = _ranks(folder, phase)
    check_ranks(files)
    files = files[config.shared_devices :]
    if not files:
        raise TraceError(str(folder), "holds no ranks but those of shared experts", "gather the files of all machines")
    held = [_matrices(file, config.layers) for file in files]
    if not min(held):
        raise TraceError(str(files[held.index(0)]), f"holds no matrix of {config.layers} layers", "record for longer")
    watch = Watch()
    columns = _logical_experts(config, folder, [_width(file) for file in files], watch)
    said = [
        f"{len(files)} ranks of {phase}; counters only grow, so a step is what they grew by",
        f"steps count forward passes, one in {config.interval}; layers are numbered from 0, dense ones left out",
    ]
    if max(held) > min(held):
        said.append(f"the first {min(held):,} matrices are taken, which every rank has; the longest has {max(held):,}")
    how: Merge = "experts" if columns is None else "sum"
    if columns is not None:
        said.append(f"physical experts are added up by {config.map_file}")
    values = Values(options, watch)
    parts = tuple(
        Reading(
            _cells_of(_Rank(file, config, min(held), None if columns is None else columns[i]), values),
            rows=min(held) * config.layers * (_width(file) if columns is None else config.experts),
            findings=watch.findings if i == 0 else (),
            known={"top_k": config.top_k} if config.top_k else {},
            where=str(file),
        )
        for i, file in enumerate(files)
    )
    return Merged(parts, how, str(folder), tuple(said))


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
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        top_k = raw.get("num_of_selected_experts") or [0]
        map_file = raw.get("eplb_expert_map_file")
        config = _Config(
            layers=int(raw["num_moe_layers"]),
            experts=int(raw["num_of_experts"]),
            top_k=int(top_k[0]),
            interval=int(raw.get("collection_Interval", INTERVAL)),
            shared_devices=max(0, int(raw.get("num_dangling_shared_experts", 0))),
            map_file=Path(str(map_file)).name if map_file else None,
        )
    except OSError:
        raise
    except Exception as error:  # whatever may be in a JSON document instead of the numbers
        raise TraceError(
            str(path), f"is no configuration of a dump: {one_line(error)}", "it is written by rank 0"
        ) from error
    if not (0 < config.layers <= MOST_LAYERS and 0 < config.experts <= MOST_EXPERTS and config.interval > 0):
        raise TraceError(str(path), f"says {config.layers} layers of {config.experts} experts", "check its numbers")
    return config


def _logical_experts(config: _Config, folder: Path, widths: list[int], watch: Watch) -> list[NDArray[np.int64]] | None:
    """The logical expert of each column, by rank an array (layers, columns); None where columns are the experts."""
    if config.map_file is None:
        if sum(widths) != config.experts:
            evidence = f"{sum(widths)} columns for {config.experts} experts, and no map says which expert they hold"
            watch.say("physical", "every layer", evidence)
        return None
    if not (folder / config.map_file).is_file():
        watch.say("physical", "every layer", f"experts are placed by {config.map_file}, which is not in the folder")
        return None
    table = _placement(folder / config.map_file, config)
    where = str(folder / config.map_file)
    if table.shape[1] != sum(widths):
        raise TraceError(
            where, f"places {table.shape[1]} experts, and the ranks have {sum(widths)} columns", "check it"
        )
    return np.split(table, np.cumsum(widths)[:-1], axis=1)


def _placement(path: Path, config: _Config) -> NDArray[np.int64]:
    """The logical expert in each place, shape (layers, places), those of shared devices left out."""
    try:
        layers = sorted(json.loads(path.read_text(encoding="utf-8"))["layer_list"], key=lambda layer: layer["layer_id"])
        rows = [
            [int(n) for device in layer["device_list"][config.shared_devices :] for n in device["device_expert"]]
            for layer in layers
        ]
        table = np.array(rows, np.int64).reshape(config.layers, -1)
    except OSError:
        raise
    except Exception as error:  # whatever may be in a JSON document instead of a placement
        raise TraceError(
            str(path), f"is no placement of experts: {one_line(error)}", "give the map that was served by"
        ) from error
    if table.size == 0 or table.min() < 0:
        raise TraceError(str(path), "places no expert, or one with a negative number", "number experts from 0")
    return table


@dataclass(frozen=True)
class _Rank:
    """One rank's file: *matrices* of it are read; *experts* (layers, columns) says what the columns hold."""

    path: Path
    config: _Config
    matrices: int
    experts: NDArray[np.int64] | None


def _cells_of(rank: _Rank, values: Values) -> Callable[[], Iterator[Cells]]:
    return lambda: _cells(rank, values)


def _cells(rank: _Rank, values: Values) -> Iterator[Cells]:
    """What the counters of a rank grew by, matrix by matrix."""
    where, layers = str(rank.path), rank.config.layers
    before: NDArray[np.int64] | None = None
    done = 0
    for counters in _counters(rank.path, layers, values):
        counters = counters[: rank.matrices - done]
        if not len(counters):
            return
        first = np.zeros_like(counters[0]) if before is None else before
        counts = np.diff(counters, axis=0, prepend=first[None])
        fallen = np.argwhere(counts < 0)
        if fallen.size:
            at, layer, column = fallen[0].tolist()
            raise TraceError(
                f"{where}, row {(done + at) * layers + layer}, column {column}",
                "a counter falls: it was reset, as dynamic balancing does",
                "record with static balancing or none, each run into a folder of its own",
            )
        steps = rank.config.interval * (np.arange(done, done + len(counts), dtype=np.int64) + 1)
        yield dense_cells(steps, range(layers), counts if rank.experts is None else _folded(counts, rank))
        before, done = counters[-1], done + len(counters)


def _folded(counts: NDArray[np.int64], rank: _Rank) -> NDArray[np.int64]:
    """Counts (matrices, layers, columns) of places as counts of all logical experts; shared ones are left out."""
    assert rank.experts is not None
    all_of_them = np.zeros((*counts.shape[:2], rank.config.experts), np.int64)
    for layer, experts in enumerate(rank.experts):
        for column, expert in enumerate(experts.tolist()):
            if expert < rank.config.experts:
                all_of_them[:, layer, expert] += counts[:, layer, column]
    return all_of_them


def _counters(path: Path, layers: int, values: Values) -> Iterator[NDArray[np.int64]]:
    """The matrices of a file, several at a time: (matrices, layers, columns); an unfinished one is left out."""
    rest: NDArray[np.int64] | None = None
    row = 0
    for batch in _batches(path):
        stacked = np.stack([_numbers(column) for column in batch.columns], axis=1)
        rows = values.counts(stacked, "counter", row, str(path))
        row += len(rows)
        rows = rows if rest is None else np.concatenate([rest, rows])
        whole = len(rows) // layers * layers
        rest = rows[whole:]
        if whole:
            yield rows[:whole].reshape(-1, layers, rows.shape[1])


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.csv as pc

    read = pc.ReadOptions(block_size=BLOCK_BYTES, use_threads=False, autogenerate_column_names=True)
    try:
        with closing(pc.open_csv(opened(path), read)) as batches:
            yield from batches
    except (pa.ArrowException, ValueError) as error:
        copy = path.with_name(f"{path.stem}_bak.csv")
        way = f"its copy {copy.name} may be whole: put it in its place" if copy.exists() else "write the file again"
        raise TraceError(str(path), f"cannot be read: {one_line(error)}", way) from error


def _numbers(column: Any) -> NDArray[Any]:
    numbers: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return numbers


def _width(path: Path) -> int:
    """Columns of a file."""
    with closing(opened(path)) as stream:
        return int(stream.read(BLOCK_BYTES).partition(b"\n")[0].count(b",")) + 1


def _matrices(path: Path, layers: int) -> int:
    """Whole matrices of a file."""
    with closing(opened(path)) as stream:
        rows = 0
        while block := stream.read(BLOCK_BYTES):
            rows += block.count(b"\n")
    return rows // layers
