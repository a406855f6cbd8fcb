"""Megatron-LM: the tokens of each local expert by rank, and the router's choices by rank."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.formats.errors import library_errors
from moetrace.formats.readers.text import BLOCK_BYTES, cut_findings, head_of, opened
from moetrace.formats.stream.cells import Cells, Merged, Reading, Source
from moetrace.formats.stream.choices import Choices, Counting, census_of, reading_of, side_by_side
from moetrace.formats.stream.names import by_rank, check_ranks

RANK = re.compile(r"rank\d+\.jsonl")
ROUTER_RANK = re.compile(r"router_trace_rank\d+\.jsonl")
NO_MTP = "layers of multi-token prediction are left out"


def rank_files(path: Path, name: re.Pattern[str]) -> list[Path]:
    """The rank files that *path* is or holds, in the order of their ranks."""
    inside = path.iterdir() if path.is_dir() else [path]
    return by_rank([child for child in inside if name.fullmatch(child.name) and child.is_file()])


def records(path: Path, schema: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """The JSON lines of a rank as Arrow batches, each with the number of its first row.

    Raises `TraceError` where a line is cut or is no such record.
    """
    import pyarrow as pa
    import pyarrow.json as pj

    parse = pj.ParseOptions(explicit_schema=pa.schema(schema), unexpected_field_behavior="ignore")
    read = pj.ReadOptions(block_size=4 * BLOCK_BYTES, use_threads=False)
    row = 0
    with (
        library_errors(str(path), lambda: f"cannot be read after row {row}", "write it again"),
        pj.open_json(opened(path), read, parse) as batches,
    ):
        for batch in batches:
            yield row, batch
            row += batch.num_rows


def column(batch: Any, name: str, row: int, path: Path) -> NDArray[np.int64]:
    """A column of whole numbers; raises `TraceError` for a record without it."""
    values = batch.column(name)
    if values.null_count:
        bad = row + int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
        raise TraceError(f"{path}, row {bad}", f"has no {name}", "is it a rank file of Megatron-LM?")
    numbers: NDArray[np.int64] = values.to_numpy()
    return numbers


def decoder_only(batch: Any) -> Any:
    """The records of decoder layers; those of multi-token prediction number their layers anew."""
    import pyarrow.compute as pc

    return batch.filter(pc.not_equal(pc.fill_null(batch.column("block"), "decoder"), "mtp"))


@dataclass(frozen=True)
class MegatronFormat:
    """`tokens_per_expert/rank<R>.jsonl`: micro-batches are added up, ranks put together.

    *stages* is the number of pipeline stages, *experts* how many a layer has in the whole model.
    """

    stages: int = 1
    experts: int | None = None

    name: ClassVar[str] = "megatron"
    needs: ClassVar[str] = (
        "the folder tokens_per_expert of --save-tokens-per-expert-interval; --experts N (of a layer) where ranks are "
        "replicas too, --stages N with pipeline stages"
    )

    def claims(self, path: Path) -> bool:
        """A folder with rank files of such records, the folder above it, or one such file."""
        files = rank_files(path / "tokens_per_expert" if (path / "tokens_per_expert").is_dir() else path, RANK)
        return bool(files) and '"tpe"' in head_of(files[0]).partition("\n")[0]

    def read(self, path: Path) -> Source:
        """Ranks side by side are experts, then replicas are added up, then pipeline stages are stacked."""
        inside = path / "tokens_per_expert"
        files = rank_files(inside if inside.is_dir() else path, RANK) or [path]
        check_ranks(files)
        local = _local_experts(files[0])
        stages = self.stages
        whole = self.experts or local * (len(files) // stages)
        parallel = whole // local
        if whole % local or not parallel or len(files) % (parallel * stages):
            raise TraceError(
                str(path),
                f"{len(files)} ranks of {local} experts make no {stages} stages of {whole} experts",
                "check --experts (of a layer, in the whole model) and --stages, and that no rank is missing",
            )
        replicas = len(files) // (parallel * stages)
        assumed = [f"{len(files)} ranks: {parallel} expert-parallel x {replicas} replicas x {stages} pipeline stages"]
        assumed += ["" if self.experts else f"{whole} experts: every rank of a stage holds others", NO_MTP]
        shifts = _shifts([files[i * len(files) // stages] for i in range(stages)], assumed)
        readings = [_reading(file, shifts[i * stages // len(files)]) for i, file in enumerate(files)]
        return _together(readings, parallel, replicas, str(path), tuple(text for text in assumed if text))


def _together(
    readings: list[Reading], parallel: int, replicas: int, where: str, assumptions: tuple[str, ...]
) -> Source:
    """Megatron numbers ranks expert-parallel first, then replicas, then stages."""
    groups = [readings[i : i + parallel] for i in range(0, len(readings), parallel)]
    sides: list[Source] = [Merged(tuple(group), "experts", where) for group in groups]
    stages = [sides[i : i + replicas] for i in range(0, len(sides), replicas)]
    sums: list[Source] = [Merged(tuple(group), "sum", where) for group in stages]
    return Merged(tuple(sums), "layers", where, assumptions)


def _schema() -> dict[str, Any]:
    import pyarrow as pa

    counts = pa.list_(pa.list_(pa.int64()))
    return {"iter": pa.int64(), "block": pa.string(), "layer": pa.int64(), "tpe": counts}


def _reading(path: Path, shift: int) -> Reading:
    return Reading(lambda: _cells(path, shift), where=str(path), findings=cut_findings(path))


def _cells(path: Path, shift: int = 0) -> Iterator[Cells]:
    for row, whole in records(path, _schema()):
        batch = decoder_only(whole)
        if batch.num_rows:
            step, layer = (column(batch, name, row, path) for name in ("iter", "layer"))
            counts = _summed(batch.column("tpe"), path, row)  # (records, experts)
            experts = counts.shape[1]
            yield Cells(
                np.repeat(step, experts),
                np.repeat(layer + shift, experts),
                np.tile(np.arange(experts), len(step)),
                counts.ravel(),
            )


def _summed(lists: Any, path: Path, row: int) -> NDArray[np.int64]:
    """Counts of each record, its micro-batches added up, shape (records, experts)."""
    passes = lists.value_lengths().to_numpy(zero_copy_only=False)
    inner = lists.flatten()
    sizes = inner.value_lengths().to_numpy(zero_copy_only=False)
    values = inner.flatten().to_numpy(zero_copy_only=False)
    if lists.null_count or inner.null_count or not len(sizes) or (passes == 0).any() or (sizes != sizes[0]).any():
        raise TraceError(
            f"{path}, after row {row}", "has micro-batches of unlike length", "is it a rank file of Megatron?"
        )
    if values.dtype.kind != "i" or (values < 0).any():
        raise TraceError(f"{path}, after row {row}", "has counts that are none", "counts are whole numbers of tokens")
    summed: NDArray[np.int64] = np.add.reduceat(values.reshape(-1, sizes[0]), np.cumsum(passes) - passes, axis=0)
    return summed


def _local_experts(path: Path) -> int:
    cells = next(_cells(path), None)
    if cells is None:
        raise TraceError(str(path), "holds no records", "is it a rank file of Megatron-LM?")
    return int(cells.expert.max()) + 1


def _shifts(firsts: list[Path], assumed: list[str]) -> list[int]:
    """What to add to the layers of each stage: they are numbered within the stage, as its modules are."""
    if len(firsts) == 1:
        return [0]
    ends = []
    for path in firsts:
        cells = next(_cells(path))
        ends.append(int(cells.layer.max()) + 1)
    assumed.append(f"layers are numbered anew in every stage, of {', '.join(str(end) for end in ends)} layers")
    return [sum(ends[:i]) for i in range(len(ends))]


@dataclass(frozen=True)
class MegatronRouterFormat:
    """`router_trace_rank<R>.jsonl`: the choices of every token, added up over micro-batches and ranks.

    *experts* is how many a layer has, *ignore* a number that stands for none.
    """

    experts: int | None = None
    ignore: int | None = None

    name: ClassVar[str] = "megatron-router"
    needs: ClassVar[str] = "the folder of --moe-routing-trace-path; --experts N where not every expert was chosen"

    def claims(self, path: Path) -> bool:
        """A folder with router traces, or one of them."""
        return bool(rank_files(path, ROUTER_RANK))

    def read(self, path: Path) -> Source:
        """Ranks with the same layers are replicas and are added up; others are pipeline stages."""
        files = rank_files(path, ROUTER_RANK) or [path]
        check_ranks(files)
        found = [census_of(_choices(file), str(file)) for file in files]
        experts = max(census.ids[-1] for census in found) + 1
        ignored = [file for file, census in zip(files, found) if self.ignore in census.counts]
        stages: dict[tuple[int, ...], list[Reading]] = defaultdict(list)
        for file, census in zip(files, found):
            ignore = self.ignore if file in ignored or not ignored else None  # which not every rank need hold
            counting = Counting(experts=self.experts, ignore=ignore)
            pieces = partial(_choices, file)
            reading = reading_of(pieces, str(file), counting, census=census, experts=experts, top_k=_top_k(file))
            stages[tuple(census.layers)].append(replace(reading, findings=cut_findings(file)))
        sums: list[Source] = [Merged(tuple(group), "sum", str(path)) for group in stages.values()]
        assumptions = (
            f"{len(files)} ranks: tokens are added up, {len(stages)} pipeline stages put together",
            NO_MTP,
        )
        return Merged(tuple(sums), "layers", str(path), assumptions)


def _choices(path: Path) -> Iterator[Choices]:
    import pyarrow as pa

    lists = pa.list_(pa.list_(pa.int64()))
    schema = {"step": pa.int64(), "block": pa.string(), "layer": pa.int64(), "top_indices": lists}
    for row, whole in records(path, schema):
        batch = decoder_only(whole)
        step, layer = (column(batch, name, row, path) for name in ("step", "layer"))
        tokens = batch.column("top_indices")
        inner = tokens.flatten()
        of_token = np.repeat(np.arange(batch.num_rows), tokens.fill_null([]).value_lengths().to_numpy())
        sizes = inner.value_lengths().to_numpy(zero_copy_only=False)
        flat = inner.flatten().to_numpy(zero_copy_only=False)
        if flat.dtype.kind != "i" or (flat < -1).any() or len(sizes) != len(of_token):
            raise TraceError(f"{path}, after row {row}", "has choices that are no expert", "number experts from 0")
        yield Choices(step[of_token], layer[of_token], side_by_side(flat, sizes))


def _top_k(path: Path) -> int | None:
    import pyarrow as pa

    _, batch = next(records(path, {"topk": pa.int64()}))
    first = batch.column("topk")[0].as_py()
    return None if first is None else int(first)
