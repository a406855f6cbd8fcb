"""From a stream of cells to complete blocks of steps in order, with nothing dropped or repaired in silence.

Where steps go backwards, a run went back to a checkpoint, or rows come in another order; the latter are sorted by step
in memory, as long as there are not too many of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError, shown
from moetrace.formats.sources import require
from moetrace.formats.stream.cells import Block, Cells, Merged, Reading, ReadOptions, Source, joined, starts_of
from moetrace.trace import FLOAT64_EXACT, check_layers

# Cells put in order at a time where a stream lists them in any order: 32 MiB of counts.
BLOCK_CELLS = 1 << 22
# Numbers of steps, layers and experts: some writer will have used a float.
HIGHEST = FLOAT64_EXACT
# Times a run may go back to a checkpoint; rows in another order go back far more often.
MOST_RUNS = 64
# Rows sorted in memory, which take 2 GiB of it, and twice as much again while they are sorted.
MOST_SORTED = 1 << 26
# Sorted cells handed on at a time.
PIECE_CELLS = 1 << 18


class OutOfOrder(Exception):
    """A step came after a later one; the stream has to be put in order first."""


@dataclass(frozen=True)
class Grid:
    """The layers' numbers, the number of experts, and that of the first one, as the first steps of *where* have."""

    layers: NDArray[np.int64]
    experts: int
    first_expert: int
    where: str

    @property
    def cells(self) -> int:
        """Cells of one step."""
        return len(self.layers) * self.experts


def assemble(
    cells: Callable[[], Iterator[Cells]], source: Reading, options: ReadOptions
) -> tuple[Grid, Iterator[Block]]:
    """The grid of the *cells* of a source whose steps never go backwards, and its complete blocks.

    Raises `OutOfOrder`, also while the blocks are drawn, where steps go backwards, `TraceError` for a hole or a
    repetition.
    """
    grid, where, collector = None, source.where, source.collector
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
            yield _dense(held, grid, source, options)
            held, alone = piece, False
        # The last step, a piece of its own, is left out if it is not whole: a writer that was killed leaves one.
        # Whatever else is wrong with it is an error.
        every_layer = len(np.unique(held.layer)) >= len(grid.layers)
        if alone or (every_layer and (options.idle_experts or len(held.step) >= grid.cells)):
            yield _dense(held, grid, source, options)
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
    most = ",".join(str(layer) for layer in max(by_width.values(), key=lambda those: len(those)))
    each = " and ".join(f"{width} in {shown(those)}" for width, those in by_width.items())
    way_out = f"take those of one number with --layers {most}, or, if experts without a row were idle, "
    way_out += "take them as idle with --idle-experts"
    raise TraceError(f"{where}, step {step.step[0]}", f"layers have unlike numbers of experts: {each}", way_out)


def _grid_of(layers: NDArray[np.int64], experts: NDArray[np.int64], where: str, options: ReadOptions) -> Grid:
    """The grid of *layers* and *experts*, increasing; raises `TraceError` where an expert is missing."""
    _check_numbers("layer", layers[[0, -1]], where)
    _check_numbers("expert", experts[[0, -1]], where)
    check_layers(layers[[0, -1]].tolist(), where)
    lowest, highest = int(experts[0]), int(experts[-1])
    if lowest < 0:
        raise TraceError(where, "an expert has a negative number", "number them from 0")
    start = int(lowest == 1 and not (options.experts is not None and highest < options.experts))
    if options.first_expert is not None:
        start = options.first_expert if lowest >= options.first_expert else 0  # positions, which are not numbers
    width = options.experts or highest - start + 1
    if highest >= start + width:
        problem = f"expert {highest} is there, and {width} experts from {start} on end with {start + width - 1}"
        raise TraceError(where, problem, "check --experts and --first-expert")
    if not options.idle_experts and len(experts) != width:
        gaps = np.flatnonzero(experts != start + np.arange(len(experts)))
        missing = start + int(gaps[0] if gaps.size else len(experts))
        way_out = f"say where their numbers begin with --first-expert {experts[0]}, " if experts[0] > start else ""
        way_out += "take experts without a row as idle with --idle-experts (and --experts N for the last), "
        way_out += "or log every expert of every layer in every step"
        raise TraceError(where, f"expert {missing} is missing", way_out)
    grid = Grid(layers, width, start, where)
    # Complete steps have as many cells as the grid, so only a made-up file wants much here.
    require(grid.cells * 32, where, f"a step of {len(layers):,} layers of {width:,} experts", "check its rows")
    return grid


def _check_numbers(name: str, ends: NDArray[np.int64], where: str) -> None:
    """Raise `TraceError` where the lowest or the highest number is so large that differences would overflow."""
    for number in ends.tolist():
        if abs(number) > HIGHEST:
            raise TraceError(where, f"has a {name} {number}", f"number them up to {HIGHEST:,}")


def _dense(cells: Cells, grid: Grid, source: Reading, options: ReadOptions) -> Block:
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
        parts.append(_scatter(cells.part(borders[a], borders[b]), grid, steps[a:b], source, options))
    return parts[0] if len(parts) == 1 else Block(*(np.concatenate(columns) for columns in zip(*parts)))


def _scatter(cells: Cells, grid: Grid, steps: NDArray[np.int64], source: Reading, options: ReadOptions) -> Block:
    """The block of cells in any order within their steps; incomplete steps are left out if that is accepted."""
    where, collector = source.where, source.collector
    shape = (len(steps), len(grid.layers), grid.experts)
    first, last = grid.first_expert, grid.first_expert + grid.experts - 1
    at_layer = np.searchsorted(grid.layers, cells.layer).clip(max=len(grid.layers) - 1)
    for i in np.flatnonzero(grid.layers[at_layer] != cells.layer)[:1]:
        problem = f"layer {cells.layer[i]} is there, but was missing in an earlier step"
        way_out = "leave steps without it out with --accept incomplete, or choose others with --layers"
        raise TraceError(f"{where}, step {cells.step[i]}", problem, way_out)
    for i in np.flatnonzero((cells.expert < first) | (cells.expert > last))[:1]:
        problem = f"expert {cells.expert[i]} is there, but other steps have experts {first} to {last}"
        way_out = "if the others were idle, take experts without a row as idle with --idle-experts; "
        way_out += "if layers have unlike numbers of experts, choose those of one number with --layers"
        raise TraceError(f"{where}, step {cells.step[i]}, layer {cells.layer[i]}", problem, way_out)
    # Where each cell lies in (step, layer, expert) order, shape (cells,).
    cell = (np.searchsorted(steps, cells.step) * len(grid.layers) + at_layer) * grid.experts + cells.expert - first
    hits = np.bincount(cell, minlength=len(steps) * grid.cells).reshape(shape)
    there = np.asarray(hits.any(axis=2))  # (steps, layers)
    incomplete = np.asarray(~there.all(axis=1)) & ("incomplete" in options.accept)  # (steps,)
    if incomplete.any():
        layer = grid.layers[~there[incomplete][0]][0]
        evidence = f"layer {layer} is missing, and the step is left out"
        collector.note("incomplete", f"step {steps[incomplete][0]}", evidence, int(incomplete.sum()))
    wrong = (hits != 1) & ~incomplete[:, None, None]
    if options.idle_experts:
        wrong &= (hits > 1) | ~there[:, :, None]
    if source.adds:
        wrong &= hits == 0
    for step, layer, expert in np.argwhere(wrong)[:1]:
        if hits[step, layer, expert] > 1:
            problem = f"expert {expert + first} is there {hits[step, layer, expert]} times"
            way_out = "keep one row for each step, layer and expert; name columns that were not recognised with "
            way_out += "--column step=NAME or layer=NAME; ranks in one file go into a file each, for --merge"
            if source.apart:
                name = min(source.apart)
                way_out = f"take one {name} with --where {name}=VALUE, or add them up with --sum-over {name}"
        elif not there[step, layer]:
            problem = "the layer is missing in this step (incomplete)"
            way_out = "leave such steps out with --accept incomplete, or choose other layers with --layers"
        else:
            n = np.count_nonzero(hits[step, layer])
            problem = f"there are {n} experts where others have {grid.experts}"
            way_out = "take experts without a row as idle with --idle-experts, or log every expert of every layer"
        raise TraceError(f"{where}, step {steps[step]}, layer {grid.layers[layer]}", problem, way_out)
    counts = np.zeros(hits.size, np.int64)
    counts[cell] = cells.count
    if source.adds:
        counts[:] = 0
        np.add.at(counts, cell, cells.count)
    return Block(steps[~incomplete], counts.reshape(shape)[~incomplete])


@dataclass
class Run:
    """A stretch of a stream in which steps never go backwards: the *cells* in it, and how many each step has."""

    first: int
    last: int
    cells: int = 0
    steps: Counter[int] = field(default_factory=Counter)
    layers: set[int] = field(default_factory=set)
    experts: set[int] = field(default_factory=set)

    def repeats(self, before: Run) -> bool:
        """Whether this run writes whole steps of *before* again, all from some step on."""
        whole = len(before.layers) * len(before.experts)
        again = {step for step in before.steps if self.first <= step <= self.last}
        mine = {step for step in self.steps if step <= before.last}
        alike = (self.layers, self.experts) == (before.layers, before.experts) and again == mine
        # A run that was killed may have left its last step half written.
        complete = all(n == whole for step, n in before.steps.items() if step != before.last)
        return bool(mine) and alike and complete and all(self.steps[step] == whole for step in mine)


def in_order(source: Source) -> Source:
    """The same source with the steps of every stream in order.

    Where whole steps are written again after steps went back, the last ones count, and a finding says so; any other
    order is sorted, or raises `TraceError` while it is read where there are too many rows.
    """
    if isinstance(source, Merged):
        return replace(source, parts=tuple(in_order(part) for part in source.parts))
    runs = _runs_of(source.cells())
    if len(runs) == 1:
        return source
    is_one_run = not source.adds and not source.apart and len(runs) <= MOST_RUNS
    if is_one_run and all(after.repeats(before) for before, after in pairwise(runs)):
        return replace(source, cells=lambda: _resumed(source, runs))
    return replace(source, cells=lambda: _sorted(source))


def _runs_of(cells: Iterable[Cells]) -> list[Run]:
    """The runs of a stream, up to one more than `MOST_RUNS`."""
    runs: list[Run] = []
    for piece in cells:
        # Only as many borders as matter.
        back = (np.flatnonzero(piece.step[1:] < piece.step[:-1]) + 1).tolist()[: MOST_RUNS + 1]
        for a, b in pairwise([0, *back, len(piece.step)]):
            if a == b:
                continue
            part = piece.part(a, b)
            if not runs or part.step[0] < runs[-1].last:
                runs.append(Run(int(part.step[0]), int(part.step[0])))
            run = runs[-1]
            run.cells, run.last = run.cells + b - a, int(part.step[-1])
            run.steps.update(dict(zip(*(found.tolist() for found in np.unique(part.step, return_counts=True)))))
            run.layers.update(np.unique(part.layer).tolist())
            run.experts.update(np.unique(part.expert).tolist())
            if len(runs) > MOST_RUNS:
                return runs
    return runs


def _sorted(reading: Reading) -> Iterator[Cells]:
    """The cells in the order of their steps; those of one step stay in the order they came in."""
    query = "sort them while they are read, as with --sql 'SELECT step, layer, expert, tokens FROM ... ORDER BY step'"
    held: list[Cells] = []
    n = 0
    for piece in reading.cells():
        held.append(piece)
        n += len(piece.step)
        if n > MOST_SORTED:
            problem = f"its rows are not in the order of their steps, and over {MOST_SORTED:,} are too many to sort"
            raise TraceError(reading.where, problem, query)
        require(n * 96, reading.where, f"sorting over {n:,} rows by step", query)
    whole = joined(held)
    held.clear()
    order = np.argsort(whole.step, kind="stable")
    for start in range(0, len(order), PIECE_CELLS):
        rows = order[start : start + PIECE_CELLS]
        yield Cells(*(column[rows] for column in whole))


def _resumed(reading: Reading, runs: list[Run]) -> Iterator[Cells]:
    """The stream without the steps that a later run writes again."""
    starts = [run.first for run in runs]
    for i, (before, after) in enumerate(pairwise(runs), 1):
        reached = max(run.last for run in runs[i:])
        # From its first step again, or ending early, it may as well be another rank or a mistake.
        name = "repeated" if after.first <= runs[0].first or reached < before.last else "restart"
        again = f"steps {after.first} to {min(before.last, reached)} are there again after step {before.last}"
        lost = f"; steps {reached + 1} to {before.last} of the run that was given up are left out"
        reading.collector.note(name, f"step {after.first}", again + (lost if reached < before.last else ""))
    at = done = 0
    for piece in reading.cells():
        start = 0
        while start < len(piece.step):
            while done == runs[at].cells:
                at, done = at + 1, 0
            size = min(len(piece.step) - start, runs[at].cells - done)
            part = piece.part(start, start + size)
            end = min(starts[at + 1 :], default=None)
            keep = size if end is None else int(np.searchsorted(part.step, end, "left"))
            yield part.part(0, keep)
            start, done = start + size, done + size
