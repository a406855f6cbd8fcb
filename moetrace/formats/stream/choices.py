"""Choices of single tokens: what a log of them holds, and how they are counted into steps as they stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor import finding
from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.sources import require
from moetrace.formats.stream.blocks import BLOCK_CELLS
from moetrace.formats.stream.cells import Cells, Reading, dense_cells, starts_of
from moetrace.trace import Finding

# Different numbers that a log may choose; beyond that they are not experts.
MOST_EXPERTS = 1 << 20
# Experts up to which their counts are taken without sorting.
FEW = 1 << 16
# What -1 is read as in the types that people save choices in, and how far from all others it is a question; as is any
# number that is beyond twice as many experts.
MAXIMA = (2**8 - 1, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1)
NEAR, FAR = 8, 64


class Choices(NamedTuple):
    """A piece of a routing log: *expert* (rows, k), what a token chose in a layer, -1 for nothing.

    *layer* is of shape (rows,), and *step* too, or None where steps are counted in tokens.
    """

    step: NDArray[np.int64] | None
    layer: NDArray[np.int64]
    expert: NDArray[np.int64]

    def part(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Choices:
        """These *rows* of it."""
        return Choices(None if self.step is None else self.step[rows], self.layer[rows], self.expert[rows])


def side_by_side(flat: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The choices (rows, k) of lists of *sizes* (rows,) one after the other in *flat*; -1 where one is shorter."""
    width = int(sizes.max(initial=1))
    if (sizes == width).all():
        return flat.astype(np.int64).reshape(-1, width)
    rows = np.full((len(sizes), width), -1, np.int64)
    rows[np.arange(width) < sizes[:, None]] = flat
    return rows


@dataclass
class LayerChoices:
    """What the tokens of one layer chose: *repeated* rows have one expert twice, *by_all* is what every row chose."""

    rows: int = 0
    repeated: int = 0
    alone: Counter[int] = field(default_factory=Counter)
    experts: set[int] = field(default_factory=set)
    by_all: set[int] | None = None
    width: int = 1

    def add(self, rows: NDArray[np.int64]) -> dict[int, int]:
        """Add choices (rows, k); returns how often each number was chosen."""
        rows = rows[(rows >= 0).any(axis=1)]
        chosen = rows[rows >= 0]
        if chosen.size and chosen.max() < FEW:
            counts = np.bincount(chosen)
            ids = np.flatnonzero(counts)
            times = counts[ids]
        else:
            ids, times = np.unique(chosen, return_counts=True)
        self.rows += len(rows)
        self.experts.update(ids.tolist())
        chosen_by_all = set(ids[times == len(rows)].tolist())
        self.by_all = chosen_by_all if self.by_all is None else self.by_all & chosen_by_all
        if rows.shape[1] > 1 and len(rows):
            self.width = rows.shape[1]
            ordered = np.sort(rows)
            same = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
            self.repeated += int(same.any(axis=1).sum())
            self.alone.update(ordered[same.all(axis=1), 0].tolist())
        return dict(zip(ids.tolist(), times.tolist()))


@dataclass
class Census:
    """The *counts* of each number that was chosen, -1 left out, and what each layer holds."""

    counts: Counter[int] = field(default_factory=Counter)
    by_layer: dict[int, LayerChoices] = field(default_factory=dict)

    @classmethod
    def of(cls, pieces: Iterable[Choices], where: str) -> Census:
        """What a routing log holds, by reading it once; raises `TraceError` when it holds nothing."""
        census = cls()
        for piece in pieces:
            if (lowest := int(piece.expert.min(initial=0))) < -1:
                raise TraceError(where, f"holds expert {lowest}", "number experts from 0; -1 stands for no choice")
            for number in np.unique(piece.layer).tolist():
                layer = census.by_layer.setdefault(number, LayerChoices())
                census.counts.update(layer.add(piece.expert[piece.layer == number]))
            if len(census.counts) > MOST_EXPERTS:
                raise TraceError(where, f"chooses over {MOST_EXPERTS:,} different experts", "is it the right column?")
        if not census.counts:
            raise TraceError(where, "holds no chosen expert", "is it the right file?")
        return census

    def findings(self, layers: Sequence[int]) -> tuple[Finding, ...]:
        """What is odd about what is chosen in *layers*."""
        those = {layer: self.by_layer[layer] for layer in layers if layer in self.by_layer}
        if not those:
            return ()
        found = []
        # A router does not choose one expert twice for a token.
        twice = {number: layer for number, layer in those.items() if layer.repeated}
        if twice:
            rows, repeated = (sum(getattr(layer, name) for layer in twice.values()) for name in ("rows", "repeated"))
            evidence = f"in layers {shown(list(twice))} {repeated:,} of {rows:,} tokens choose one expert twice"
            for expert, times in sum((layer.alone for layer in twice.values()), Counter()).most_common(1):
                if times > repeated // 2:
                    evidence += f", {times:,} of them {expert} alone, as rows do that nothing was written to"
            found.append(finding("repeated-choice", f"layer {min(twice)}", evidence))
        alone = [number for number, layer in those.items() if len(layer.experts) == 1 and layer.rows > 1]
        if alone and len(set().union(*(layer.experts for layer in those.values()))) > 1:
            (only,) = those[alone[0]].experts
            evidence = f"every choice in layers {shown(alone)} is expert {only}"
            found.append(finding("one-expert", f"layer {alone[0]}", evidence))
        last = max(max(layer.experts, default=-1) for layer in those.values())
        by_all = all(last in (layer.by_all or ()) and layer.width > 1 and layer.rows >= 32 for layer in those.values())
        if by_all and any(len(layer.experts) > layer.width for layer in those.values()):
            evidence = f"every token chooses expert {last}, the last one, in every layer"
            found.append(finding("every-token", "every layer", evidence))
        return tuple(found)


def choices_reading(
    pieces: Callable[[], Iterator[Choices]],
    where: str,
    assumptions: tuple[str, ...] = (),
    *,
    tokens: int | None = None,
    experts: int | None = None,
    ignore: int | None = None,
    top_k: int | None = None,
    census: Census | None = None,
    at_least: int = 0,
) -> Reading:
    """The reading of a routing log, of which *tokens* of a layer are a step where it names none.

    Each call of *pieces* opens it anew. *experts* is how many a layer has, or else *at_least* so many as others have
    that it is merged with; *ignore* is a number that is no routed expert, *top_k* how many a token chooses, 0 where
    that is not known. Raises `TraceError` when an expert was chosen beyond those there should be, or far beyond all
    others, and `SettingError` where the number to ignore was never chosen.
    """
    found, chosen = census or Census.of(pieces(), where), pieces
    layers, real = sorted(found.by_layer), sorted(found.counts)
    top_k = max(layer.width for layer in found.by_layer.values()) if top_k is None else top_k
    if ignore is not None:
        if ignore not in found.counts:
            raise SettingError(f"{where} holds no {ignore}, and has no use for --ignore")
        # The last number stands for no choice everywhere, one among the experts where it is all that a token chose.
        everywhere = len(real) > 1 and ignore == real[-1]

        def chosen() -> Iterator[Choices]:
            for piece in pieces():
                padded = piece.expert == ignore
                padded = padded if everywhere else padded.all(axis=1, keepdims=True)
                yield piece._replace(expert=np.where(padded, -1, piece.expert))

        left_out = f"{ignore} is left out, {found.counts[ignore]:,} times,"
        left_out = left_out if everywhere else f"tokens that choose {ignore} alone are left out,"
        assumptions = (*assumptions, f"{left_out} by --ignore")
        # A layer that holds nothing but padding does not count.
        layers = [layer for layer in layers if not found.by_layer[layer].experts <= {ignore}]
        real = real[:-1] if everywhere else real
        found = Census.of(chosen(), where)
    highest, before = real[-1], real[-2] if len(real) > 1 else real[-1]
    if experts is not None and highest >= experts:
        way_out = f"with --experts {experts} the last is one less; leave a number that is not a routed expert out with "
        raise TraceError(where, f"expert {highest} was chosen", f"{way_out}--ignore {highest}")
    if experts is None and highest - before > (NEAR if highest in MAXIMA else max(FAR, before + 1)):
        problem = f"expert {highest} is far beyond all others, which end with {before}: an expert, or padding"
        way_out = f"leave it out with --ignore {highest}, or give the number of experts with --experts N"
        raise TraceError(where, problem, way_out)
    n = experts or max(at_least, highest + 1)
    if experts is None:
        assumptions = (*assumptions, f"{n} experts: the highest that was chosen is {highest}")
    require(len(layers) * n * 64, where, f"a step of {len(layers):,} layers of {n:,} experts", "check its numbers")

    def cells() -> Iterator[Cells]:
        kept = (piece.part((piece.expert >= 0).any(axis=1) & np.isin(piece.layer, layers)) for piece in chosen())
        return counted(kept, tokens or 1, np.array(layers, np.int64), n)

    return Reading(
        cells,
        where=where,
        assumptions=assumptions,
        known={"top_k": top_k} if top_k else {},
        steps_are_implicit=tokens is not None,
        layer_findings=found.findings,
    )


def counted(pieces: Iterable[Choices], tokens: int, layers: NDArray[np.int64], experts: int) -> Iterator[Cells]:
    """The counts of each step over *layers* of so many *experts*; a step ends where another begins.

    Where none are named, every so many *tokens* of each layer are one, from 1 on.
    """
    size = len(layers) * experts
    most = max(1, BLOCK_CELLS // size)  # steps counted at a time
    done: Counter[int] = Counter()
    held: tuple[int, NDArray[np.int64]] | None = None
    for whole in pieces:
        step = whole.step
        if step is None:
            step = np.empty(len(whole.layer), np.int64)
            for number in np.unique(whole.layer).tolist():
                rows = np.flatnonzero(whole.layer == number)
                step[rows] = (done[number] + np.arange(len(rows))) // tokens + 1
                done[number] += len(rows)
            order = np.argsort(step, kind="stable")
            step, whole = step[order], whole.part(order)
        for a, b in pairwise([*starts_of(step)[::most].tolist(), len(step)] if len(step) else []):
            starts = starts_of(step[a:b])
            steps = step[a:b][starts]  # (steps,), as often as one begins
            row = np.repeat(np.arange(len(steps)), np.diff(starts, append=b - a))
            first = (row * len(layers) + np.searchsorted(layers, whole.layer[a:b])) * experts
            chosen = whole.expert[a:b] >= 0  # -1 stands for no choice: padding, or a token that was dropped
            counts = np.bincount((first[:, None] + whole.expert[a:b])[chosen], minlength=len(steps) * size)
            counts = counts.reshape(len(steps), len(layers), experts).astype(np.int64)
            if held is not None and held[0] == steps[0]:
                counts[0] += held[1]
            elif held is not None:
                yield dense_cells(np.array([held[0]]), layers, held[1][None])
            if len(steps) > 1:
                yield dense_cells(steps[:-1], layers, counts[:-1])
            held = int(steps[-1]), counts[-1]
    if held is not None:
        yield dense_cells(np.array([held[0]]), layers, held[1][None])
