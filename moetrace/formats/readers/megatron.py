"""Megatron-LM: the tokens of each local expert by rank, and the router's choices by rank."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.formats.sources import WRITE_AGAIN, check_ranks, library_errors, rank_files
from moetrace.formats.stream.cells import Cells, Format, Merged, Reading, Source
from moetrace.formats.stream.choices import Census, Choices, choices_reading, side_by_side
from moetrace.formats.stream.columns import Rows, flattened
from moetrace.formats.stream.merge import by_layers
from moetrace.formats.stream.text import BLOCK_BYTES, cut_findings, head_of, json_batches

RANK = re.compile(r"rank\d+\.jsonl")
ROUTER_RANK = re.compile(r"router_trace_rank\d+\.jsonl")
NO_MTP = "layers of multi-token prediction are left out"


def records(path: Path, schema: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """The JSON lines of a rank as Arrow batches, each with the number of its first row.

    Those of multi-token prediction, which numbers its layers anew, are left out.
    """
    row = 0
    with (
        library_errors(str(path), lambda: f"cannot be read after row {row}", WRITE_AGAIN),
        json_batches(path, pa.schema({**schema, "block": pa.string()}), 4 * BLOCK_BYTES) as batches,
    ):
        for batch in batches:
            yield row, batch.filter(pc.not_equal(pc.fill_null(batch.column("block"), "decoder"), "mtp"))
            row += batch.num_rows


@dataclass(frozen=True)
class MegatronFormat(Format):
    """The folder tokens_per_expert of --save-tokens-per-expert-interval; --experts N (of a layer) where ranks are
    replicas too, --stages N with pipeline stages.

    Micro-batches are added up, ranks put together. *experts* are those of a layer in the whole model.
    """

    stages: int = 1
    experts: int | None = None
    name: ClassVar[str] = "megatron"

    def claims(self, path: Path) -> bool:
        files = rank_files(path / "tokens_per_expert" if (path / "tokens_per_expert").is_dir() else path, RANK)
        return bool(files) and '"tpe"' in head_of(files[0]).partition("\n")[0]

    def read(self, path: Path) -> Source:
        """Ranks side by side are experts, then replicas are added up, then pipeline stages are stacked."""
        inside = path / "tokens_per_expert"
        files = rank_files(inside if inside.is_dir() else path, RANK) or [path]
        check_ranks(files)
        first = next(_cells(files[0]), None)
        if first is None:
            raise TraceError(str(files[0]), "holds no records", "is it a rank file of Megatron-LM?")
        local = int(first.expert.max()) + 1
        stages = self.stages
        whole = self.experts or local * (len(files) // stages)
        parallel = whole // local
        if whole % local or not parallel or len(files) % (parallel * stages):
            problem = f"{len(files)} ranks of {local} experts make no {stages} stages of {whole} experts"
            way_out = "check --experts (of a layer, in the whole model) and --stages, and that no rank is missing"
            raise TraceError(str(path), problem, way_out)
        replicas = len(files) // (parallel * stages)
        assumed = [f"{len(files)} ranks: {parallel} expert-parallel x {replicas} replicas x {stages} pipeline stages"]
        assumed += ["" if self.experts else f"{whole} experts: every rank of a stage holds others", NO_MTP]
        # Layers are numbered within a stage, as its modules are.
        firsts = [files[i * len(files) // stages] for i in range(stages)] if stages > 1 else []
        layers = [int(next(_cells(first)).layer.max()) + 1 for first in firsts]
        if layers:
            each = ", ".join(map(str, layers))
            assumed.append(f"layers are numbered anew in every stage, of {each} layers")
        shifts = [sum(layers[: i * stages // len(files)]) for i in range(len(files))]
        cells = (partial(_cells, file, shift) for file, shift in zip(files, shifts))
        readings = [Reading(c, where=str(file), findings=cut_findings(file)) for c, file in zip(cells, files)]
        # Ranks are numbered expert-parallel first, then replicas, then stages.
        where = str(path)
        sides = [Merged(tuple(readings[i : i + parallel]), "experts", where) for i in range(0, len(files), parallel)]
        sums = [Merged(tuple(sides[i : i + replicas]), "sum", where) for i in range(0, len(sides), replicas)]
        return Merged(tuple(sums), "layers", where, tuple(text for text in assumed if text))


def _cells(path: Path, shift: int = 0) -> Iterator[Cells]:
    """The counts of a rank's experts, its micro-batches added up; its layers are numbered from *shift*."""
    for row, batch in records(path, {"iter": pa.int64(), "layer": pa.int64(), "tpe": pa.list_(pa.list_(pa.int64()))}):
        if not batch.num_rows:
            continue
        rows = Rows(batch, row, str(path))
        step, layer = rows.numbers("iter"), rows.numbers("layer")
        (flat, (passes, sizes), _), at = flattened(batch.column("tpe")), f"{path}, after row {row}"
        values = flat.to_numpy(zero_copy_only=False)
        if not passes.all() or not sizes.all() or (sizes != sizes[0]).any():
            raise TraceError(at, "has micro-batches of unlike length", "is it a rank file of Megatron-LM?")
        if values.dtype.kind != "i" or (values < 0).any():
            raise TraceError(at, "has counts that are negative or not whole", "they are whole numbers of tokens")
        experts = int(sizes[0])
        counts: NDArray[np.int64] = np.add.reduceat(values.reshape(-1, experts), np.cumsum(passes) - passes)
        numbers = np.tile(np.arange(experts), len(step))
        yield Cells(np.repeat(step, experts), np.repeat(layer + shift, experts), numbers, counts.ravel())


@dataclass(frozen=True)
class MegatronRouterFormat(Format):
    """The folder of --moe-routing-trace-path; --experts N where not every expert was chosen.

    Choices are added up over micro-batches and ranks. *experts* is how many a layer has, *ignore* a number of none.
    """

    experts: int | None = None
    ignore: int | None = None
    name: ClassVar[str] = "megatron-router"

    def claims(self, path: Path) -> bool:
        return bool(rank_files(path, ROUTER_RANK))

    def read(self, path: Path) -> Source:
        """Ranks with the same layers are replicas and are added up; others are pipeline stages."""
        files = rank_files(path, ROUTER_RANK) or [path]
        check_ranks(files)
        found = [Census.of(_choices(file), str(file)) for file in files]
        experts = max(max(census.counts) for census in found) + 1
        ignored = [file for file, census in zip(files, found) if self.ignore in census.counts]
        ranks = []
        for file, census in zip(files, found):
            ignore = self.ignore if file in ignored or not ignored else None  # which not every rank need hold
            asked: dict[str, Any] = {"experts": self.experts, "ignore": ignore, "at_least": experts}
            reading = choices_reading(partial(_choices, file), str(file), census=census, **asked)
            ranks.append((sorted(census.by_layer), replace(reading, findings=cut_findings(file))))
        return by_layers(ranks, str(path), NO_MTP)


def _choices(path: Path) -> Iterator[Choices]:
    lists = pa.list_(pa.list_(pa.int64()))
    for row, batch in records(path, {"step": pa.int64(), "layer": pa.int64(), "top_indices": lists}):
        rows = Rows(batch, row, str(path))
        step, layer = rows.numbers("step"), rows.numbers("layer")
        values, (tokens, sizes), _ = flattened(batch.column("top_indices"))
        of_token, flat = np.repeat(np.arange(batch.num_rows), tokens), values.to_numpy(zero_copy_only=False)
        if flat.dtype.kind != "i" or (flat < -1).any():
            raise TraceError(f"{path}, after row {row}", "has choices that are not experts", "number experts from 0")
        yield Choices(step[of_token], layer[of_token], side_by_side(flat, sizes))
