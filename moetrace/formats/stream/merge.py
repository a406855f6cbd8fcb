"""Several streams of blocks as one: replicas added up, experts or layers side by side, steps in a row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from moetrace.doctor.collector import Collector
from moetrace.errors import TraceError, shown
from moetrace.formats.location import Location
from moetrace.formats.stream.blocks import Grid, assemble
from moetrace.formats.stream.cells import (
    Block,
    Cells,
    Merge,
    Merged,
    NothingSelected,
    Reading,
    ReadOptions,
    Source,
    readings_of,
)
from moetrace.formats.stream.names import check_ranks, layer_in_name, rank_in_name, step_in_name

Stream = tuple[Grid, Iterator[Block]]
Report = Callable[[int], None]
"""Called with the number of cells of each piece as it is read."""


def blocks_of(source: Source, options: ReadOptions, report: Report) -> Stream:
    """The grid and the complete blocks of a source, its parts merged as it says.

    Parts that have none of the layers asked for are left out. Raises `OutOfOrder` where steps go backwards,
    `TraceError` for holes, repetitions and parts that do not fit together.
    """
    if isinstance(source, Reading):

        def cells() -> Iterator[Cells]:
            for piece in source.cells():
                report(len(piece.step))
                yield piece

        return assemble(cells, source.where, source.collector, options)
    # A part has as many experts as the whole, unless they are side by side.
    of_parts = replace(options, experts=None) if source.how == "experts" else options
    parts: list[tuple[Stream, str]] = []
    nothing: list[NothingSelected] = []
    for part in source.parts:
        try:
            parts.append((blocks_of(part, of_parts, report), readings_of(part)[0].where))
        except NothingSelected as error:
            nothing.append(error)
    if nothing and (source.how != "layers" or not parts):
        raise nothing[0]
    if source.how == "layers":
        parts.sort(key=lambda part: int(part[0][0].layers[0]))
    names = [name for _, name in parts]
    grid = _grid([grid for (grid, _), _ in parts], names, source.how)
    idle = source.how == "sum" and (source.idle or options.idle_experts)
    collector = readings_of(source)[0].collector
    return grid, _together([blocks for (_, blocks), _ in parts], names, source.how, idle, collector)


def merged(sources: Sequence[Source], paths: Sequence[Location], how: Merge) -> Source:
    """The sources read from *paths* as one; segments of a run (``steps``) follow each other as they are given.

    Where names hold the step as well as the rank, the files of a rank follow each other; where they hold the layer,
    files of one layer are added up and layers put side by side. Raises `TraceError` naming missing or duplicate ranks.
    """
    where = f"{paths[0]} and {len(paths) - 1} more"
    assumptions = (f"{len(paths)} files merged by {how}: {', '.join(path.name for path in paths)}",)
    if how == "steps":
        ranks = {rank_in_name(path) for path in paths if step_in_name(path) is not None} - {None}
        if len(ranks) > 1:
            raise TraceError(
                ", ".join(path.name for path in paths[:3]),
                f"are files of {len(ranks)} ranks, which are not segments of one run",
                "merge replicas by sum and expert-parallel ranks by experts: files of one rank follow each other",
            )
        return concatenate_segments(sources, where, assumptions)
    layers = [layer_in_name(path) for path in paths]
    if how == "sum" and len(set(layers)) > 1 and None not in layers:
        sums = tuple(Merged(tuple(group), "sum", where) for group in _by_number(layers, sources))
        return Merged(sums, "layers", where, (*assumptions, "files of one layer are added up"))
    places = [(rank_in_name(path), step_in_name(path)) for path in paths]
    ranks_of = [rank for rank, _ in places]
    if len(set(places)) == len(places) > len(set(ranks_of)) and all(None not in pair for pair in places):
        rows = tuple(concatenate_segments(group, where, ()) for group in _by_number(ranks_of, sources))
        return Merged(rows, how, where, (*assumptions, "files of one rank follow each other"))
    check_ranks(paths)
    return Merged(tuple(sources), how, where, assumptions)


def by_layers(ranks: Sequence[tuple[Sequence[int], Source]], where: str, *assumptions: str) -> Merged:
    """Ranks, each with its layers, as one: those with the same layers are added up, others are pipeline stages."""
    stages: dict[tuple[int, ...], list[Source]] = defaultdict(list)
    for layers, source in ranks:
        stages[tuple(layers)].append(source)
    each = f"{len(ranks)} ranks: tokens are added up, {len(stages)} pipeline stages put together"
    return Merged(
        tuple(Merged(tuple(group), "sum", where) for group in stages.values()), "layers", where, (each, *assumptions)
    )


def _by_number(numbers: Sequence[int | None], sources: Sequence[Source]) -> list[list[Source]]:
    """The *sources* of each number, in the order of the numbers."""
    found: dict[int, list[Source]] = defaultdict(list)
    for number, source in zip(numbers, sources):
        found[number or 0].append(source)
    return [found[number] for number in sorted(found)]


def concatenate_segments(sources: Sequence[Source], where: str, assumptions: tuple[str, ...]) -> Reading:
    """Segments of a run as one stream; where one begins before the end of the last, that is a restart.

    Steps that are only counted are counted on.
    """
    readings = [reading for source in sources for reading in readings_of(source)]
    rows = [reading.rows for reading in readings]
    counted_on = len(readings) > 1 and all(reading.steps_are_implicit for reading in readings)
    if counted_on:
        assumptions = (*assumptions, "steps are counted on from file to file")
    collector = Collector()

    def cells() -> Iterator[Cells]:
        done = 0
        for reading in readings:
            last = done
            for piece in reading.cells():
                yield piece._replace(step=piece.step + done) if done else piece
                last = max(last, done + int(piece.step.max(initial=0)))
            done = last if counted_on else 0
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
    if how != "experts" and len({grid.first_expert for grid in grids}) > 1:
        odd = next(i for i, grid in enumerate(grids) if grid.first_expert != first.first_expert)
        problem = f"numbers experts from {grids[odd].first_expert}, and {names[0]} from {first.first_expert}"
        raise TraceError(names[odd], problem, "say which with --first-expert")
    for grid, name in zip(grids[1:], names[1:]):
        if how != "layers" and not np.array_equal(grid.layers, first.layers):
            raise TraceError(
                name,
                f"has layers {shown(grid.layers)}, and {names[0]} has {shown(first.layers)}",
                "parts need the same layers here; pipeline stages are put together with --merge layers, those of "
                "Megatron-LM in one folder with --stages N",
            )
        if how != "experts" and grid.experts != first.experts:
            raise TraceError(
                name,
                f"has {grid.experts} experts, and {names[0]} has {first.experts}",
                "parts need the same experts here; expert-parallel ranks are merged by experts",
            )
    if how == "experts":
        return replace(first, experts=sum(grid.experts for grid in grids))
    if how == "layers":
        layers = np.concatenate([grid.layers for grid in grids])
        back = np.flatnonzero(np.diff(layers) <= 0)
        if back.size:
            part = int(np.searchsorted(np.cumsum([len(grid.layers) for grid in grids]), back[0] + 1, "right"))
            twice, before = layers[back[0] + 1], layers[back[0]]
            problem = f"has layer {twice}, and so has the part before it, with layers up to {before}"
            way_out = "number the layers through the whole model; replicas are merged by sum"
            raise TraceError(names[part], problem, way_out)
        return replace(first, layers=layers)
    return first


def _together(
    streams: Sequence[Iterator[Block]], names: Sequence[str], how: Merge, idle: bool, collector: Collector
) -> Iterator[Block]:
    """Blocks of the same steps from every stream, added up or side by side.

    Steps that a part lacks are zeros where it was *idle* in them; else what others have after its end is left out.
    """
    held: list[Block | None] = [None] * len(streams)
    while True:
        for i, stream in enumerate(streams):
            if held[i] is None:
                held[i] = next(stream, None)
        there = [block for block in held if block is not None]
        if not there:
            return
        if len(there) < len(held) and not idle:
            ended = [name for block, name in zip(held, names) if block is None]
            step = min(int(block.steps[0]) for block in there)
            evidence = f"{shown(ended, 2)} ended before step {step}; what others have from there on is left out"
            collector.note("unfinished", f"step {step}", evidence)
            return
        blocks, held = _with_idle(held, names, collector) if idle else _same_steps(there, names)
        counts = [block.counts for block in blocks]
        whole = sum(counts[1:], counts[0]) if how == "sum" else np.concatenate(counts, 1 if how == "layers" else 2)
        yield Block(blocks[0].steps, whole)


def _same_steps(held: Sequence[Block], names: Sequence[str]) -> tuple[list[Block], list[Block | None]]:
    """The longest common beginning of the blocks, and what is left; raises `TraceError` where their steps differ."""
    n = min(len(block.steps) for block in held)
    most = held[0].steps[:n]
    for block, name in zip(held, names):
        other = np.flatnonzero(block.steps[:n] != most)
        if other.size:
            at = int(other[0])
            raise TraceError(
                name,
                f"has step {block.steps[at]} where another part has step {most[at]}",
                "every part needs the same steps: choose those they share with --steps; if a replica was idle in "
                "them, --idle-experts takes the steps that it lacks as such",
            )
    return [Block(block.steps[:n], block.counts[:n]) for block in held], [_after(block, n) for block in held]


def _after(block: Block, n: int) -> Block | None:
    """What is left of *block* after *n* steps."""
    return Block(block.steps[n:], block.counts[n:]) if n < len(block.steps) else None


def _with_idle(
    held: Sequence[Block | None], names: Sequence[str], collector: Collector
) -> tuple[list[Block], list[Block | None]]:
    """The blocks up to where the first of them ends, filled with zeros to the same steps, and what is left."""
    there = [block for block in held if block is not None]
    end = min(int(block.steps[-1]) for block in there)
    steps = np.unique(np.concatenate([block.steps[block.steps <= end] for block in there]))
    filled: list[Block] = []
    rest: list[Block | None] = []
    for block, name in zip(held, names):
        n = 0 if block is None else int(np.searchsorted(block.steps, end, "right"))
        counts = np.zeros((len(steps), *there[0].counts.shape[1:]), np.int64)
        if block is not None:
            counts[np.searchsorted(steps, block.steps[:n])] = block.counts[:n]
        if n < len(steps):
            lacking = steps if block is None else np.setdiff1d(steps, block.steps[:n])
            evidence = f"{name} has no record of this step, and counts as idle in it"
            collector.note("idle", f"step {lacking[0]}", evidence, len(lacking))
        filled.append(Block(steps, counts))
        rest.append(None if block is None else _after(block, n))
    return filled, rest
