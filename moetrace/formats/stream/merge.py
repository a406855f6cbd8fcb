"""Several streams of blocks as one: replicas added up, experts or layers side by side, steps in a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np

from moetrace.doctor.collector import Collector
from moetrace.errors import TraceError, shown
from moetrace.formats.stream.blocks import Assembly, Grid, assemble
from moetrace.formats.stream.cells import LAYER_IN_NAME, Block, Cells, Merge, Merged, Reading, Source, readings_of


class Named(Protocol):
    """A path, or something like it."""

    @property
    def name(self) -> str:
        """Its last part."""

    @property
    def stem(self) -> str:
        """Its last part without the ending."""


AnyNamed = TypeVar("AnyNamed", bound=Named)
Stream = tuple[Grid, Iterator[Block]]
Report = Callable[[int], None]
"""Called with the number of cells of each piece as it is read."""


def blocks_of(source: Source, accept: Sequence[str], report: Report) -> Stream:
    """The grid and the complete blocks of a source, its parts merged as it says.

    Raises `OutOfOrder` where steps go backwards, `TraceError` for holes, repetitions and parts that
    do not fit together.
    """
    if isinstance(source, Reading):
        return assemble(_reported(source, report), Assembly(source.where, source.collector, accept))
    streams = [blocks_of(part, accept, report) for part in source.parts]
    names = [readings_of(part)[0].where for part in source.parts]
    if source.how == "layers":
        order = sorted(range(len(streams)), key=lambda i: int(streams[i][0].layers[0]))
        streams, names = [streams[i] for i in order], [names[i] for i in order]
    grid = _grid([grid for grid, _ in streams], names, source.how)
    axis = {"sum": None, "layers": 1, "experts": 2}[source.how]
    return grid, _together([blocks for _, blocks in streams], names, axis)


def _reported(reading: Reading, report: Report) -> Iterator[Cells]:
    for cells in reading.cells():
        report(len(cells.step))
        yield cells


def merged(sources: Sequence[Source], paths: Sequence[Named], how: Merge) -> Source:
    """The sources read from *paths* as one; segments of a run (``steps``) follow each other as they are given.

    Raises `TraceError` naming missing or duplicate ranks.
    """
    where = f"{paths[0]} and {len(paths) - 1} more"
    assumptions = (f"{len(paths)} files merged by {how}: {', '.join(path.name for path in paths)}",)
    if how == "steps":
        return _in_a_row(sources, where, assumptions)
    check_ranks(paths)
    return Merged(tuple(sources), how, where, assumptions)


def by_rank(paths: Sequence[AnyNamed]) -> list[AnyNamed]:
    """Paths in the order of the numbers in their names, so that rank 10 comes after rank 9."""

    def parts(path: AnyNamed) -> list[str | int]:
        return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", str(path)))]

    return sorted(paths, key=parts)


def rank_of(path: Named) -> int | None:
    """The rank in a file's name: the number after ``rank``, or else the last one, unless that is a layer."""
    found = re.search(r"rank[_-]?(\d+)", path.stem)
    if found is None and not LAYER_IN_NAME.fullmatch(path.stem):
        found = re.search(r"(\d+)(?!.*\d)", path.stem)
    return int(found[1]) if found else None


def check_ranks(paths: Sequence[Named]) -> None:
    """Raise `TraceError` when a rank is missing between the first and the last, or there twice."""
    if any(rank_of(path) is None for path in paths):
        return
    ranks = sorted((rank_of(path) or 0, path) for path in paths)
    for (a, first), (b, second) in pairwise(ranks):
        if a == b:
            raise TraceError(str(first), f"is rank {a}, and so is {second}", "merge each rank once")
        if b > a + 1:
            raise TraceError(
                str(second),
                f"is rank {b}, but rank {shown(range(a + 1, b))} is missing before it",
                "merge all ranks of the run",
            )


def _in_a_row(sources: Sequence[Source], where: str, assumptions: tuple[str, ...]) -> Reading:
    """Segments of a run as one stream; where one begins before the end of the last, that is a restart."""
    readings = [reading for source in sources for reading in readings_of(source)]
    rows = [reading.rows for reading in readings]
    collector = Collector()

    def cells() -> Iterator[Cells]:
        for reading in readings:
            yield from reading.cells()
            collector.merge(reading.collector)

    return replace(
        readings[0],
        cells=cells,
        rows=sum(n or 0 for n in rows) if all(rows) else None,
        where=where,
        assumptions=(*assumptions, *dict.fromkeys(text for reading in readings for text in reading.assumptions)),
        findings=tuple(finding for reading in readings for finding in reading.findings),
        collector=collector,
    )


def _grid(grids: Sequence[Grid], names: Sequence[str], how: Merge) -> Grid:
    """The grid of parts put together; raises `TraceError` naming the part that does not fit."""
    first = grids[0]
    for grid, name in zip(grids[1:], names[1:]):
        if how != "layers" and not np.array_equal(grid.layers, first.layers):
            raise TraceError(
                name,
                f"has layers {shown(grid.layers)}, and {names[0]} has {shown(first.layers)}",
                "parts need the same layers here; pipeline ranks are merged by layers",
            )
        if how != "experts" and grid.experts != first.experts:
            raise TraceError(
                name,
                f"has {grid.experts} experts, and {names[0]} has {first.experts}",
                "parts need the same experts here; expert-parallel ranks are merged by experts",
            )
    if how == "experts":
        return Grid(first.layers, sum(grid.experts for grid in grids))
    if how == "layers":
        return replace(first, layers=_stacked(grids, names))
    return first


def _stacked(grids: Sequence[Grid], names: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    layers = np.concatenate([grid.layers for grid in grids])
    back = np.flatnonzero(np.diff(layers) <= 0)
    if back.size:
        part = int(np.searchsorted(np.cumsum([len(grid.layers) for grid in grids]), back[0] + 1, "right"))
        raise TraceError(
            names[part],
            f"has layer {layers[back[0] + 1]}, and so has the part before it, with layers up to {layers[back[0]]}",
            "number the layers through the whole model; replicas are merged by sum",
        )
    return layers


def _together(streams: Sequence[Iterator[Block]], names: Sequence[str], axis: int | None) -> Iterator[Block]:
    """Blocks of the same steps from every stream, added up or side by side along *axis*."""
    held: list[Block | None] = [None] * len(streams)
    while True:
        for i, stream in enumerate(streams):
            if held[i] is None:
                held[i] = next(stream, None)
        if all(block is None for block in held):
            return
        blocks = _same_steps(held, names)
        n = len(blocks[0].steps)
        counts = [block.counts for block in blocks]
        yield Block(blocks[0].steps, sum(counts[1:], counts[0]) if axis is None else np.concatenate(counts, axis))
        rest = [Block(block.steps[n:], block.counts[n:]) for block in held if block is not None]
        held = [block if len(block.steps) else None for block in rest]


def _same_steps(held: Sequence[Block | None], names: Sequence[str]) -> list[Block]:
    """The longest common beginning of the blocks; raises `TraceError` where their steps differ."""
    n = min(len(block.steps) for block in held if block is not None)
    most = next(block for block in held if block is not None).steps[:n]
    for i, block in enumerate(held):
        steps = most[:0] if block is None else block.steps[:n]
        if not np.array_equal(steps, most):
            at = 0 if block is None else int(np.flatnonzero(steps != most)[0])
            there = f"has step {steps[at]}" if block is not None else "has ended"
            raise TraceError(
                names[i],
                f"{there} where another part has step {most[at]}",
                "every part needs the same steps: take those they share with --steps, or find what is missing",
            )
    return [Block(block.steps[:n], block.counts[:n]) for block in held if block is not None]
