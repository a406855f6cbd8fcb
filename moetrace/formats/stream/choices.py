"""Choices of single tokens, counted into steps as they stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.formats.errors import require
from moetrace.formats.stream.blocks import BLOCK_CELLS
from moetrace.formats.stream.cells import Cells, Reading, dense_cells, starts_of


class Choices(NamedTuple):
    """A piece of a routing log: every choice of an expert, by its step and layer; all of shape (choices,)."""

    step: NDArray[np.int64]
    layer: NDArray[np.int64]
    expert: NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """The layers of a routing log, and the number of experts: one more than the highest that was chosen."""

    layers: NDArray[np.int64]
    experts: int


def shape_of(pieces: Iterable[Choices], where: str) -> Shape:
    """What a routing log covers, by reading it once; raises `TraceError` when it holds nothing."""
    layers: set[int] = set()
    highest = -1
    for piece in pieces:
        if len(piece.expert):
            layers.update(np.unique(piece.layer).tolist())
            highest = max(highest, int(piece.expert.max()))
    if highest < 0:
        raise TraceError(where, "holds no chosen expert", "is it the right file?")
    return Shape(np.array(sorted(layers), np.int64), highest + 1)


def counted(pieces: Iterable[Choices], shape: Shape) -> Iterator[Cells]:
    """The counts of each step; a step ends where another begins."""
    n_layers, experts = len(shape.layers), shape.experts
    held: tuple[int, NDArray[np.int64]] | None = None
    for piece in _few_steps(pieces, max(1, BLOCK_CELLS // (n_layers * experts))):
        starts = starts_of(piece.step)
        steps = piece.step[starts]  # (steps,), as often as one begins
        row = np.repeat(np.arange(len(steps)), np.diff(starts, append=len(piece.step)))
        chosen = piece.expert >= 0  # -1 stands for no choice: padding, or a token that was dropped
        cell = (row * n_layers + np.searchsorted(shape.layers, piece.layer)) * experts + piece.expert
        counts = np.bincount(cell[chosen], minlength=len(steps) * n_layers * experts)
        counts = counts.reshape(len(steps), n_layers, experts).astype(np.int64)
        if held is not None and held[0] == steps[0]:
            counts[0] += held[1]
        elif held is not None:
            yield dense_cells(np.array([held[0]]), shape.layers, held[1][None])
        if len(steps) > 1:
            yield dense_cells(steps[:-1], shape.layers, counts[:-1])
        held = int(steps[-1]), counts[-1]
    if held is not None:
        yield dense_cells(np.array([held[0]]), shape.layers, held[1][None])


def _few_steps(pieces: Iterable[Choices], most: int) -> Iterator[Choices]:
    """The same choices in pieces of at most *most* steps, none of them empty."""
    for piece in pieces:
        if not len(piece.step):
            continue
        for a, b in pairwise([*starts_of(piece.step)[::most].tolist(), len(piece.step)]):
            yield Choices(*(column[a:b] for column in piece))


def reading_of(
    pieces: Callable[[], Iterator[Choices]],
    where: str,
    experts: int | None,
    *,
    shape: Shape | None = None,
    top_k: int | None = None,
    assumptions: tuple[str, ...] = (),
) -> Reading:
    """The reading of a routing log that *pieces* opens anew each time it is called.

    Raises `TraceError` when an expert was chosen beyond the *experts* there should be.
    """
    found = shape or shape_of(pieces(), where)
    assumed = list(assumptions)
    if experts is None:
        assumed.append(f"{found.experts} experts: the highest that was chosen is {found.experts - 1}")
    elif found.experts > experts:
        raise TraceError(
            where, f"expert {found.experts - 1} was chosen", f"with --experts {experts} the last is one less"
        )
    whole = Shape(found.layers, experts or found.experts)
    cells = len(whole.layers) * whole.experts
    require(
        cells * 64, where, f"a step of {len(whole.layers):,} layers of {whole.experts:,} experts", "check its numbers"
    )
    known = {} if top_k is None else {"top_k": top_k}
    return Reading(lambda: counted(pieces(), whole), where=where, assumptions=tuple(assumed), known=known)
