"""Choices of single tokens, counted into steps as they stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import SettingError, TraceError
from moetrace.formats.errors import require
from moetrace.formats.stream.blocks import BLOCK_CELLS
from moetrace.formats.stream.cells import Cells, Reading, dense_cells, starts_of
from moetrace.formats.stream.census import FAR, Census, no_choices

# Different numbers that a log may choose; beyond that they are no experts.
MOST_EXPERTS = 1 << 20


class Choices(NamedTuple):
    """A piece of a routing log: *expert* (rows, k), what a token chose in a layer, -1 for nothing.

    *layer* is of shape (rows,), and *step* too, or None where steps are counted in tokens.
    """

    step: NDArray[np.int64] | None
    layer: NDArray[np.int64]
    expert: NDArray[np.int64]


def side_by_side(flat: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The choices (rows, k) of lists of *sizes* (rows,) one after the other in *flat*; -1 where one is shorter."""
    sizes = sizes.astype(np.int64)
    width = int(sizes.max(initial=1))
    if (sizes == width).all():
        return flat.astype(np.int64).reshape(-1, width)
    rows = np.full((len(sizes), width), -1, np.int64)
    rows[np.arange(width) < sizes[:, None]] = flat
    return rows


@dataclass(frozen=True)
class Counting:
    """How choices are counted: *tokens* of a layer are a step where none is named, *experts* a layer.

    *ignore* is a number that stands for no routed expert, *highest* the largest that its type can hold.
    """

    tokens: int | None = None
    experts: int | None = None
    ignore: int | None = None
    highest: int | None = None


@dataclass(frozen=True)
class Shape:
    """The layers of a routing log, and the number of experts."""

    layers: NDArray[np.int64]
    experts: int


def census_of(pieces: Iterable[Choices], where: str) -> Census:
    """What a routing log holds, by reading it once; raises `TraceError` when it holds nothing."""
    census = Census()
    for piece in pieces:
        if len(piece.layer):
            census.add(piece.layer, piece.expert)
            if len(census.counts) > MOST_EXPERTS:
                raise TraceError(where, f"chooses over {MOST_EXPERTS:,} different experts", "is it the right column?")
    if not census.ids:
        raise TraceError(where, "holds no chosen expert", "is it the right file?")
    return census


def counted(pieces: Iterable[Choices], shape: Shape) -> Iterator[Cells]:
    """The counts of each step; a step ends where another begins."""
    n_layers, experts = len(shape.layers), shape.experts
    held: tuple[int, NDArray[np.int64]] | None = None
    for piece in _few_steps(pieces, max(1, BLOCK_CELLS // (n_layers * experts))):
        assert piece.step is not None
        starts = starts_of(piece.step)
        steps = piece.step[starts]  # (steps,), as often as one begins
        row = np.repeat(np.arange(len(steps)), np.diff(starts, append=len(piece.step)))
        first = (row * n_layers + np.searchsorted(shape.layers, piece.layer)) * experts
        chosen = piece.expert >= 0  # -1 stands for no choice: padding, or a token that was dropped
        counts = np.bincount((first[:, None] + piece.expert)[chosen], minlength=len(steps) * n_layers * experts)
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
        if not len(piece.layer):
            continue
        assert piece.step is not None
        for a, b in pairwise([*starts_of(piece.step)[::most].tolist(), len(piece.step)]):
            yield Choices(piece.step[a:b], piece.layer[a:b], piece.expert[a:b])


@dataclass(frozen=True)
class Padding:
    """Numbers that stand for no choice: *beyond* the experts in any place, *inside* in rows of it alone."""

    beyond: tuple[int, ...] = ()
    inside: tuple[int, ...] = ()

    def removed(self, pieces: Iterable[Choices], counted: bool) -> Iterator[Choices]:
        """The choices with -1 for padding; rows without any are left out where steps are *counted* in tokens."""
        for piece in pieces:
            expert = piece.expert
            for number in self.beyond:
                expert = np.where(expert == number, -1, expert)
            for number in self.inside:
                expert = np.where((expert == number).all(axis=1, keepdims=True), -1, expert)
            kept = (expert >= 0).any(axis=1) if counted else slice(None)
            yield Choices(None if piece.step is None else piece.step[kept], piece.layer[kept], expert[kept])


@dataclass
class _Places:
    """Numbers the tokens of each layer, so that every so many are a step."""

    tokens: int
    done: dict[int, int] = field(default_factory=dict)

    def numbered(self, piece: Choices) -> Choices:
        """The same choices with their steps, which begin at 1, in the order of these."""
        places = np.empty(len(piece.layer), np.int64)
        for number in np.unique(piece.layer).tolist():
            rows = np.flatnonzero(piece.layer == number)
            places[rows] = self.done.get(number, 0) + np.arange(len(rows))
            self.done[number] = self.done.get(number, 0) + len(rows)
        step = places // self.tokens + 1
        order = np.argsort(step, kind="stable")
        return Choices(step[order], piece.layer[order], piece.expert[order])


def _numbered(pieces: Iterable[Choices], tokens: int | None) -> Iterator[Choices]:
    places = _Places(tokens or 1)
    for piece in pieces:
        yield piece if piece.step is not None else places.numbered(piece)


def reading_of(
    pieces: Callable[[], Iterator[Choices]],
    where: str,
    counting: Counting,
    *,
    census: Census | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    assumptions: tuple[str, ...] = (),
) -> Reading:
    """The reading of a routing log that *pieces* opens anew each time it is called.

    *census* is what is known of it, *experts* how many others have that it is merged with. Raises `TraceError` when
    an expert was chosen beyond the experts there should be, or far beyond all others.
    """
    found = census or census_of(pieces(), where)
    padding, said = _padding(found, counting, where)
    real = [number for number in found.ids if number not in padding.beyond]
    n = counting.experts or max(experts or 0, real[-1] + 1)
    assumed = [*assumptions, *said]
    if counting.experts is None:
        assumed.append(f"{n} experts: the highest that was chosen is {real[-1]}")
    # A layer that holds nothing but padding is none.
    layers = [layer for layer in found.layers if not found.is_padding(layer, {*padding.beyond, *padding.inside})]
    if padding != Padding():
        found = census_of(padding.removed(pieces(), counted=True), where)
    whole = Shape(np.array(layers, np.int64), n)
    cells = len(layers) * n
    require(cells * 64, where, f"a step of {len(layers):,} layers of {n:,} experts", "check its numbers")
    known = {} if top_k is None else {"top_k": top_k}
    in_tokens = counting.tokens is not None

    def counts() -> Iterator[Cells]:
        rows = padding.removed(pieces(), counted=True)
        inside = (_of_layers(piece, whole.layers) for piece in rows)
        return counted(_numbered(inside, counting.tokens), whole)

    return Reading(
        counts,
        where=where,
        assumptions=tuple(assumed),
        known=known,
        numbered=in_tokens,
        of_layers=found.findings,
    )


def _of_layers(piece: Choices, layers: NDArray[np.int64]) -> Choices:
    inside = np.isin(piece.layer, layers)
    if inside.all():
        return piece
    return Choices(None if piece.step is None else piece.step[inside], piece.layer[inside], piece.expert[inside])


def _padding(census: Census, counting: Counting, where: str) -> tuple[Padding, list[str]]:
    """Which numbers are padding, and what is said of that; raises `TraceError` for what may be or may not."""
    padding, said = _ignored(census, counting, where)
    ids = [number for number in census.ids if number not in padding.beyond]
    if counting.experts is not None and ids[-1] < counting.experts:
        return padding, said
    highest, before = ids[-1], ids[-2] if len(ids) > 1 else ids[-1]
    if no_choices(ids, counting.highest) and before < (counting.experts or highest):
        said.append(
            f"{highest} stands for no choice ({census.counts[highest]:,} of them left out), since no other expert is "
            f"beyond {before}; --experts {highest + 1} takes it for one"
        )
        return replace(padding, beyond=(*padding.beyond, highest)), said
    if counting.experts is not None:
        way = f"with --experts {counting.experts} the last is one less; leave what is no routed expert out with "
        raise TraceError(where, f"expert {highest} was chosen", f"{way}--ignore {highest}")
    if highest - before > max(FAR, before + 1):
        raise TraceError(
            where,
            f"expert {highest} is far beyond all others, which end with {before}",
            f"leave it out with --ignore {highest}, or give the number of experts with --experts N",
        )
    return padding, said


def _ignored(census: Census, counting: Counting, where: str) -> tuple[Padding, list[str]]:
    """What was said to be no expert; raises `SettingError` where there is none of it."""
    number = counting.ignore
    if number is None:
        return Padding(), []
    if number not in census.counts:
        raise SettingError(f"{where} holds no {number}, and has no use for --ignore")
    if len(census.ids) > 1 and number == census.ids[-1]:
        return Padding(beyond=(number,)), [f"{number} is left out, {census.counts[number]:,} times, by --ignore"]
    return Padding(inside=(number,)), [f"tokens that choose {number} alone are left out, by --ignore"]
