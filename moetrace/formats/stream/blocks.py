"""From a stream of cells to complete blocks of steps, with nothing dropped or repaired in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.collector import Collector
from moetrace.errors import TraceError, shown
from moetrace.formats.errors import require
from moetrace.formats.stream.cells import Block, Cells, ReadOptions, joined, starts_of
from moetrace.trace import FLOAT64_EXACT, check_layers

# Cells put in order at a time where a stream lists them in any order: 32 MiB of counts.
BLOCK_CELLS = 1 << 22
# Numbers of steps, layers and experts: some writer will have used a float.
HIGHEST = FLOAT64_EXACT


class OutOfOrder(Exception):
    """A step came after a later one; the stream has to be put in order first."""


@dataclass(frozen=True)
class Grid:
    """The layers' numbers and the number of experts, as the first steps have them.

    *first_expert* is the number of the first expert, mostly 0.
    """

    layers: NDArray[np.int64]
    experts: int
    first_expert: int = 0

    @property
    def cells(self) -> int:
        """Cells of one step."""
        return len(self.layers) * self.experts


def assemble(
    cells: Callable[[], Iterator[Cells]], where: str, collector: Collector, options: ReadOptions
) -> tuple[Grid, Iterator[Block]]:
    """The grid of a stream whose steps never go backwards, and its complete blocks.

    It is read once before where its first step need not hold every layer and expert.
    Raises `OutOfOrder` (also while the blocks are drawn) when they do,
    and `TraceError` for a hole or a repetition.
    """
    grid = None
    if options.idle_experts or "incomplete" in options.accept:
        layers = experts = np.empty(0, np.int64)
        for piece in cells():
            layers, experts = np.union1d(layers, piece.layer), np.union1d(experts, piece.expert)
            what = f"a step of {len(layers):,} layers of {len(experts):,} experts"
            require(len(layers) * len(experts) * 32, where, what, "check its rows")
        if len(layers):
            grid = _grid_of(layers, experts, where, options)
        collector.clear()  # what was noted on the way will be again
    pieces = _whole_steps(cells(), where)
    first = next(pieces, None)
    if first is None:
        raise TraceError(where, "holds no rows", "is it the right file?")
    if grid is None:
        _check_widths(first.part(0, int(np.searchsorted(first.step, first.step[0], "right"))), where)
        grid = _grid_of(np.unique(first.layer), np.unique(first.expert), where, options)

    def blocks() -> Iterator[Block]:
        held, alone = first, True
        for piece in pieces:
            yield _dense(held, grid, where, collector, options)
            held, alone = piece, False
        # The last step, a piece of its own, is left out if it is not whole: a writer that was killed leaves one.
        # Whatever else is wrong with it is an error.
        every_layer = len(np.unique(held.layer)) >= len(grid.layers)
        if alone or (every_layer and (options.idle_experts or len(held.step) >= grid.cells)):
            yield _dense(held, grid, where, collector, options)
        else:
            evidence = f"the last step of {where} is not whole ({len(held.step)} rows) and left out"
            collector.note("unfinished", f"step {held.step[-1]}", evidence)

    return grid, blocks()


def _whole_steps(cells: Iterable[Cells], where: str) -> Iterator[Cells]:
    """The stream cut between steps: no step is in two pieces, as long as steps never go backwards."""
    held: list[Cells] = []
    size = 0
    latest = None
    for piece in cells:
        if not len(piece.step):
            continue
        if (latest is not None and piece.step[0] < latest) or (piece.step[1:] < piece.step[:-1]).any():
            raise OutOfOrder
        latest = piece.step[-1]
        _check_numbers("step", piece.step[[0, -1]], where)
        cut = int(np.searchsorted(piece.step, latest, "left"))
        # A piece within one step only adds to what is held: joining once keeps this linear.
        if cut == 0 and (not held or held[-1].step[-1] == latest):
            held.append(piece)
            # A small file may hold any number of rows of one step.
            size += len(piece.step)
            require(size * 96, where, f"step {latest}, with more than {size:,} rows,", "log each expert once a step")
            continue
        # Only the step that was begun earlier is copied.
        begun = int(np.searchsorted(piece.step, held[-1].step[-1], "right")) if held else 0
        if held:
            yield joined([*held, piece.part(0, begun)])
        if begun < cut:
            yield piece.part(begun, cut)
        # A copy: as a part of it the whole piece would stay in memory.
        held = [Cells(*(column.copy() for column in piece.part(cut, len(piece.step))))]
        size = len(held[0].step)
    if held:
        yield joined(held)


def _check_widths(step: Cells, where: str) -> None:
    """Raise `TraceError` naming the layers of each width where the layers of one step have unlike ones."""
    pairs = np.unique(np.stack([step.layer, step.expert]), axis=1)  # (2, pairs)
    layers, sizes = np.unique(pairs[0], return_counts=True)
    by_width = {width: layers[sizes == width].tolist() for width in sorted(set(sizes.tolist()), reverse=True)}
    experts = np.unique(pairs[1])
    if len(by_width) == 1 or experts[-1] - experts[0] >= len(experts):
        return
    most = max(by_width.values(), key=len)
    each = " and ".join(f"{width} in {shown(those)}" for width, those in by_width.items())
    raise TraceError(
        f"{where}, step {step.step[0]}",
        f"layers have unlike numbers of experts: {each}",
        f"take those of one number with --layers {','.join(map(str, most))}, or, if experts without a row were idle, "
        "take them as idle with --idle-experts",
    )


def _grid_of(layers: NDArray[np.int64], experts: NDArray[np.int64], where: str, options: ReadOptions) -> Grid:
    """The grid of these *layers* and *experts*, increasing; raises `TraceError` where an expert is missing.

    The first expert has the number that was given, or else 0, or 1 where no row is of 0.
    """
    _check_numbers("layer", layers[[0, -1]], where)
    _check_numbers("expert", experts[[0, -1]], where)
    check_layers(layers[[0, -1]].tolist(), where)
    lowest, highest = int(experts[0]), int(experts[-1])
    if lowest < 0:
        raise TraceError(where, "an expert has a negative number", "number them from 0")
    if options.first_expert is not None:
        start = options.first_expert if lowest >= options.first_expert else 0  # positions, which are not numbers
    else:
        from_zero = options.experts is not None and highest < options.experts
        start = 1 if lowest == 1 and not from_zero else 0
    width = options.experts or highest - start + 1
    if highest >= start + width:
        problem = f"expert {highest} is there, and {width} experts from {start} on end with {start + width - 1}"
        raise TraceError(where, problem, "check --experts and --first-expert")
    if not options.idle_experts and len(experts) != width:
        gaps = np.flatnonzero(experts != start + np.arange(len(experts)))
        missing = start + int(gaps[0] if gaps.size else len(experts))
        first = f"say where their numbers begin with --first-expert {experts[0]}, " if experts[0] > start else ""
        raise TraceError(
            where,
            f"expert {missing} is missing",
            f"{first}take experts without a row as idle with --idle-experts (and --experts N for the last), "
            "or log every expert of every layer in every step",
        )
    grid = Grid(layers, width, start)
    # Complete steps have as many cells as the grid, so only a made-up file wants much here.
    require(grid.cells * 32, where, f"a step of {len(layers):,} layers of {width:,} experts", "check its rows")
    return grid


def _check_numbers(name: str, ends: NDArray[np.int64], where: str) -> None:
    """Raise `TraceError` where the lowest or the highest number is so large that differences would overflow."""
    for number in ends.tolist():
        if abs(number) > HIGHEST:
            raise TraceError(where, f"has a {name} {number}", f"number them up to {HIGHEST:,}")


def _dense(cells: Cells, grid: Grid, where: str, collector: Collector, options: ReadOptions) -> Block:
    """Cells of whole steps as one dense block, those in any order so many steps at a time that holes take no memory."""
    starts = starts_of(cells.step)
    steps = cells.step[starts]  # (steps,)
    if len(cells.step) == len(starts) * grid.cells and (np.diff(starts) == grid.cells).all():
        layer = cells.layer.reshape(-1, len(grid.layers), grid.experts)
        expert = cells.expert.reshape(-1, grid.experts)
        last = grid.first_expert + grid.experts
        # Layer by layer, expert by expert: the order most loggers write.
        if (layer == grid.layers[:, None]).all() and (expert == np.arange(grid.first_expert, last)).all():
            return Block(steps, cells.count.reshape(len(steps), len(grid.layers), grid.experts))
    borders = np.append(starts, len(cells.step))
    at_once = max(1, BLOCK_CELLS // grid.cells)
    parts = []
    for a in range(0, len(starts), at_once):
        b = min(len(starts), a + at_once)
        parts.append(_scatter(cells.part(borders[a], borders[b]), grid, steps[a:b], where, collector, options))
    return parts[0] if len(parts) == 1 else Block(*(np.concatenate(columns) for columns in zip(*parts)))


def _scatter(
    cells: Cells, grid: Grid, steps: NDArray[np.int64], where: str, collector: Collector, options: ReadOptions
) -> Block:
    """The block of cells in any order within their steps; incomplete steps are left out if that is accepted."""
    shape = (len(steps), len(grid.layers), grid.experts)
    cell = _places(cells, grid, steps, where)
    hits = np.bincount(cell, minlength=len(steps) * grid.cells).reshape(shape)
    there = np.asarray(hits.any(axis=2))  # (steps, layers)
    incomplete = np.asarray(~there.all(axis=1))  # (steps,)
    if "incomplete" in options.accept and incomplete.any():
        layer = grid.layers[~there[incomplete][0]][0]
        evidence = f"layer {layer} is missing, and the step is left out"
        collector.note("incomplete", f"step {steps[incomplete][0]}", evidence, int(incomplete.sum()))
    else:
        incomplete[:] = False
    wrong = (hits != 1) & ~incomplete[:, None, None]
    if options.idle_experts:
        wrong &= (hits > 1) | ~there[:, :, None]
    if wrong.any():
        step, layer, expert = np.argwhere(wrong)[0]
        place = f"{where}, step {steps[step]}, layer {grid.layers[layer]}"
        if hits[step, layer, expert] > 1:
            raise TraceError(
                place,
                f"expert {expert + grid.first_expert} is there {hits[step, layer, expert]} times",
                "keep one row for each step, layer and expert; name columns that were not recognised with "
                "--column step=NAME or layer=NAME; ranks in one file go into a file each, for --merge",
            )
        if not there[step, layer]:
            raise TraceError(
                place,
                "the layer is missing in this step (incomplete)",
                "leave such steps out with --accept incomplete, or choose other layers with --layers",
            )
        raise TraceError(
            place,
            f"there are {np.count_nonzero(hits[step, layer])} experts where others have {grid.experts}",
            "take experts without a row as idle with --idle-experts, or log every expert of every layer",
        )
    counts = np.zeros(hits.size, np.int64)
    counts[cell] = cells.count
    return Block(steps[~incomplete], counts.reshape(shape)[~incomplete])


def _places(cells: Cells, grid: Grid, steps: NDArray[np.int64], where: str) -> NDArray[np.int64]:
    """Where each cell lies in (step, layer, expert) order, shape (cells,)."""
    layer = np.searchsorted(grid.layers, cells.layer).clip(max=len(grid.layers) - 1)
    unknown = np.flatnonzero(grid.layers[layer] != cells.layer)
    if unknown.size:
        i = unknown[0]
        raise TraceError(
            f"{where}, step {cells.step[i]}",
            f"layer {cells.layer[i]} is there, but was missing in an earlier step",
            "leave steps without it out with --accept incomplete, or choose others with --layers",
        )
    expert = cells.expert - grid.first_expert
    unknown = np.flatnonzero((expert < 0) | (expert >= grid.experts))
    if unknown.size:
        i = unknown[0]
        raise TraceError(
            f"{where}, step {cells.step[i]}, layer {cells.layer[i]}",
            f"expert {cells.expert[i]} is there, but other steps have experts "
            f"{grid.first_expert} to {grid.first_expert + grid.experts - 1}",
            "if the others were idle, take experts without a row as idle with --idle-experts; "
            "if layers have unlike numbers of experts, choose those of one number with --layers",
        )
    places: NDArray[np.int64] = (np.searchsorted(steps, cells.step) * len(grid.layers) + layer) * grid.experts + expert
    return places
