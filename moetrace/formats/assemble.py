"""From a stream of cells to complete blocks of steps, with nothing dropped or repaired."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.formats.base import Block, Cells
from moetrace.trace import check_totals

# 2**22 cells are 32 MiB of counts: large enough that the work is done in NumPy and Parquet
# pages are worth their overhead, small enough that a block of any trace fits in memory.
BLOCK_CELLS = 1 << 22
# Cells in another order than that of their steps are sorted in memory up to here (about 3 GiB).
SORT_CELLS = 50_000_000


class OutOfOrder(Exception):
    """A step came after a later one; the stream has to be sorted first."""


@dataclass(frozen=True)
class Grid:
    """The layers' numbers and the number of experts, as the first steps have them.

    *first_expert* is the number of the first expert, 0 or 1.
    """

    layers: NDArray[np.int64]
    experts: int
    first_expert: int

    @property
    def cells(self) -> int:
        """Cells of one step."""
        return len(self.layers) * self.experts


def assemble(cells: Iterable[Cells], where: str) -> tuple[Grid, Iterator[Block]]:
    """The grid of a stream whose steps never go backwards, and its complete blocks.

    Raises `OutOfOrder` (also while the blocks are drawn) when they do,
    and `TraceError` for a hole, a repetition or a step without tokens.
    """
    pieces = _whole_steps(cells)
    first = next(pieces, None)
    if first is None:
        raise TraceError(where, "holds no rows", "is it the right file?")
    grid = _grid_of(first, where)
    return grid, _blocks(first, pieces, grid, where)


def sort_by_step(cells: Iterable[Cells], where: str) -> Iterator[Cells]:
    """The same cells in the order of their steps, sorted in memory."""
    pieces, n = [], 0
    for piece in cells:
        pieces.append(piece)
        n += len(piece.step)
        if n > SORT_CELLS:
            raise TraceError(
                where,
                f"its rows are not in the order of their steps, and more than {SORT_CELLS:,} of them",
                "sort the file by step first (in DuckDB: COPY (FROM 'file' ORDER BY step) TO 'sorted.parquet')",
            )
    whole = _join(pieces)
    order = np.argsort(whole.step, kind="stable")
    for start in range(0, n, BLOCK_CELLS):
        part = order[start : start + BLOCK_CELLS]
        yield Cells(*(column[part] for column in whole))


def _join(pieces: list[Cells]) -> Cells:
    return pieces[0] if len(pieces) == 1 else Cells(*(np.concatenate(columns) for columns in zip(*pieces)))


def _whole_steps(cells: Iterable[Cells]) -> Iterator[Cells]:
    """The stream cut between steps: no step is in two pieces, as long as steps never go backwards."""
    held: list[Cells] = []
    latest = None
    for piece in cells:
        if not len(piece.step):
            continue
        if (latest is not None and piece.step[0] < latest) or (np.diff(piece.step) < 0).any():
            raise OutOfOrder
        latest = piece.step[-1]
        cut = int(np.searchsorted(piece.step, latest, "left"))
        # A piece within one step only adds to what is held: joining once keeps this linear.
        if cut == 0 and (not held or held[-1].step[-1] == latest):
            held.append(piece)
            continue
        yield _join([*held, Cells(*(column[:cut] for column in piece))])
        held = [Cells(*(column[cut:] for column in piece))]
    if held:
        yield _join(held)


def _grid_of(cells: Cells, where: str) -> Grid:
    layers = np.unique(cells.layer)
    experts = np.unique(cells.expert)
    start = int(experts[0])
    if layers[0] < 0 or start < 0:
        raise TraceError(where, "a layer or expert has a negative number", "number them from 0")
    if start > 1 or len(experts) != experts[-1] - start + 1:
        missing = next(e for e in range(int(experts[-1]) + 1) if e not in experts)
        raise TraceError(
            where,
            f"expert {missing} is missing",
            "log every expert of every layer in every step, with 0 where it is idle",
        )
    return Grid(layers, len(experts), start)


def _blocks(first: Cells, rest: Iterator[Cells], grid: Grid, where: str) -> Iterator[Block]:
    """Blocks of about `BLOCK_CELLS` cells."""
    gathered: list[Block] = []
    size = 0
    piece: Cells | None = first
    while piece is not None:
        block = _dense(piece, grid, where)
        gathered.append(block)
        size += block.counts.size
        if size >= BLOCK_CELLS:
            yield Block(*(np.concatenate(parts) for parts in zip(*gathered)))
            gathered, size = [], 0
        piece = next(rest, None)
    if gathered:
        yield Block(*(np.concatenate(parts) for parts in zip(*gathered)))


def _dense(cells: Cells, grid: Grid, where: str) -> Block:
    """Cells of whole steps as one dense block."""
    starts = np.flatnonzero(np.diff(cells.step, prepend=cells.step[0] - 1))  # (steps,)
    steps = cells.step[starts]
    shape = (len(steps), len(grid.layers), grid.experts)
    if _regular(cells, grid, starts):
        counts = cells.count.reshape(shape)
    else:
        counts = _scatter(cells, grid, steps, where).reshape(shape)
    check_totals(counts, steps, [int(n) for n in grid.layers], where)
    return Block(steps, counts)


def _regular(cells: Cells, grid: Grid, starts: NDArray[np.intp]) -> bool:
    """Whether every step lists layer by layer, expert by expert: the order most loggers write."""
    if len(cells.step) != len(starts) * grid.cells or (np.diff(starts) != grid.cells).any():
        return False
    layer = cells.layer.reshape(-1, len(grid.layers), grid.experts)
    expert = cells.expert.reshape(-1, grid.experts)
    return bool(
        (layer == grid.layers[:, None]).all()
        and (expert == np.arange(grid.first_expert, grid.first_expert + grid.experts)).all()
    )


def _scatter(cells: Cells, grid: Grid, steps: NDArray[np.int64], where: str) -> NDArray[np.int64]:
    """Counts in (step, layer, expert) order, shape (steps * layers * experts,)."""
    layer = np.searchsorted(grid.layers, cells.layer).clip(max=len(grid.layers) - 1)
    strange = np.flatnonzero(grid.layers[layer] != cells.layer)
    if strange.size:
        i = strange[0]
        raise TraceError(
            f"{where}, step {cells.step[i]}",
            f"layer {cells.layer[i]} is there, but was missing in an earlier step",
            "log every layer in every step",
        )
    expert = cells.expert - grid.first_expert
    strange = np.flatnonzero((expert < 0) | (expert >= grid.experts))
    if strange.size:
        i = strange[0]
        raise TraceError(
            f"{where}, step {cells.step[i]}, layer {cells.layer[i]}",
            f"expert {cells.expert[i]} is there, but other steps have experts "
            f"{grid.first_expert} to {grid.first_expert + grid.experts - 1}",
            "every layer needs the same number of experts",
        )
    cell = (np.searchsorted(steps, cells.step) * len(grid.layers) + layer) * grid.experts + expert
    hits = np.bincount(cell, minlength=len(steps) * grid.cells)
    if (hits != 1).any():
        _raise_for(hits.reshape(len(steps), len(grid.layers), grid.experts), grid, steps, where)
    counts = np.empty(len(hits), np.int64)
    counts[cell] = cells.count
    return counts


def _raise_for(hits: NDArray[np.intp], grid: Grid, steps: NDArray[np.int64], where: str) -> None:
    step, layer, expert = np.argwhere(hits != 1)[0]
    place = f"{where}, step {steps[step]}, layer {grid.layers[layer]}"
    if hits[step, layer, expert] > 1:
        raise TraceError(
            place,
            f"expert {expert + grid.first_expert} is there {hits[step, layer, expert]} times",
            "keep one row for each step, layer and expert",
        )
    if not hits[step, layer].any():
        raise TraceError(place, "the layer is missing in this step", "log every layer in every step")
    raise TraceError(
        place,
        f"there are {np.count_nonzero(hits[step, layer])} experts where others have {grid.experts}",
        "log every expert of every layer, with 0 where it is idle",
    )
