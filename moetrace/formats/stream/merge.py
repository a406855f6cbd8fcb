"""Blocks between the dumps and the trace: parts put together, counters subtracted, passes added up, totals seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor import Collector, Factor, expectation_findings, finding, roughness_findings, totals_findings
from moetrace.errors import TraceError, shown
from moetrace.formats.sources import Location, check_ranks, layer_in_name, rank_in_name, readable, step_in_name
from moetrace.formats.stream.blocks import Grid, assemble
from moetrace.formats.stream.cells import Block, Cells, Merged, Reading, ReadOptions, Source, readings_of
from moetrace.trace import Counts, Finding, Steps, check_sums
from moetrace.words import Merge

# Roughness is measured on the first steps alone: so many cells of them, and at least so many steps.
ROUGH_CELLS = 1 << 20
ROUGH_STEPS = 100
# Experts from which on a block of them with all tokens is taken for those of a rank.
LEAST_EXPERTS = 8

Stream = tuple[Grid, Iterator[Block]]


class NothingSelected(TraceError):
    """A source has none of the layers, or of the steps, that were asked for."""


def no_layer(where: str, layer: int, layers: set[int]) -> NothingSelected:
    """The error that *where* lacks this layer, with those that it has."""
    return NothingSelected(where, f"has no layer {layer}", f"choose --layers among {shown(sorted(layers), 20)}")


def selected(source: Source, options: ReadOptions, available: set[int]) -> Source:
    """The same source with the layers and steps of *options* alone; *available* gets the layers that there are.

    No first step is cut off where counters are subtracted: the one after it needs it.
    """
    first = None if options.difference else options.first
    if not options.layers and first is None and options.last is None:
        return source
    if isinstance(source, Merged):
        return replace(source, parts=tuple(selected(part, options, available) for part in source.parts))

    def cells() -> Iterator[Cells]:
        mine: set[int] = set()
        steps: list[int] = []
        kept = False
        for piece in source.cells():
            if not len(piece.step):
                continue
            layers = np.unique(piece.layer).tolist()
            mine.update(layers)
            available.update(layers)
            steps = [min([*steps, int(piece.step.min())]), max([*steps, int(piece.step.max())])]
            inside = np.isin(piece.layer, options.layers) if options.layers else np.ones(len(piece.step), bool)
            if first is not None:
                inside &= piece.step >= first
            if options.last is not None:
                inside &= piece.step <= options.last
            if inside.any():
                kept = True
                yield piece if inside.all() else Cells(*(column[inside] for column in piece))
        if kept or not mine:
            return
        if options.layers and mine.isdisjoint(options.layers):
            raise no_layer(source.where, min(options.layers), mine)
        way_out = f"choose other --steps: it has {steps[0]} to {steps[1]}"
        raise NothingSelected(source.where, "has no step left", way_out)

    return replace(source, cells=cells, rows=None)


def blocks_of(source: Source, options: ReadOptions, report: Callable[[int], None]) -> Stream:
    """The grid and the complete blocks of a source, its parts merged as it says; those without a layer are left out.

    *report* is called with the number of cells of each piece as it is read.
    Raises `OutOfOrder` where steps go backwards, `TraceError` for holes, repetitions and parts that do not fit
    together.
    """
    if isinstance(source, Reading):

        def cells() -> Iterator[Cells]:
            with readable(source.where):
                for piece in source.cells():
                    report(len(piece.step))
                    yield piece

        return assemble(cells, source, options)
    # A part has as many experts as the whole, unless they are side by side.
    of_parts = replace(options, experts=None) if source.how == "experts" else options
    parts: list[Stream] = []
    for part in source.parts:
        try:
            parts.append(blocks_of(part, of_parts, report))
        except NothingSelected:
            if source.how != "layers" or (part is source.parts[-1] and not parts):
                raise
    if source.how == "layers":
        parts.sort(key=lambda part: int(part[0].layers[0]))
    grids, streams = zip(*parts)
    idle = source.how == "sum" and (source.idle or options.idle_experts)
    names, collector = [grid.where for grid in grids], readings_of(source)[0].collector
    return _grid(grids, source.how), _together(streams, names, source.how, idle, collector)


def merged(sources: Sequence[Source], paths: Sequence[Location], how: Merge) -> Source:
    """The sources read from *paths* as one; segments of a run (``steps``) follow each other as they are given.

    Where names hold the step as well as the rank, the files of a rank follow each other; where they hold the layer,
    files of one layer are added up and layers put side by side. Raises `TraceError` naming missing or duplicate ranks.
    """
    where = f"{paths[0]} and {len(paths) - 1} more"
    assumptions = (f"{len(paths)} files merged by {how}: {shown([path.name for path in paths])}",)
    if how == "sum" and any(reading.part for source in sources for reading in readings_of(source)):
        raise TraceError(where, "are of ranks with other experts each, which are not added up", "use --merge experts")
    if how == "steps":
        ranks = {rank_in_name(path) for path in paths if step_in_name(path) is not None} - {None}
        if len(ranks) > 1:
            problem = f"are files of {len(ranks)} ranks, which are not segments of one run"
            way_out = "merge replicas by sum and expert-parallel ranks by experts: files of one rank follow each other"
            raise TraceError(", ".join(path.name for path in paths[:3]), problem, way_out)
        return concatenate_segments(sources, where, assumptions)
    layers = [layer_in_name(path) for path in paths]
    if how == "sum" and len(set(layers)) > 1 and None not in layers:
        sums = tuple(Merged(tuple(group), "sum", where) for group in _grouped(layers, sources))
        return Merged(sums, "layers", where, (*assumptions, "files of one layer are added up"))
    places = [(rank_in_name(path), step_in_name(path)) for path in paths]
    ranks_of = [rank for rank, _ in places]
    if len(set(places)) == len(places) > len(set(ranks_of)) and all(None not in pair for pair in places):
        rows = tuple(concatenate_segments(group, where, ()) for group in _grouped(ranks_of, sources))
        return Merged(rows, how, where, (*assumptions, "files of one rank follow each other"))
    check_ranks(paths)
    return Merged(tuple(sources), how, where, assumptions)


def by_layers(ranks: Sequence[tuple[Sequence[int], Source]], where: str, *assumptions: str) -> Merged:
    """Ranks, each with its layers, as one: those with the same layers are added up, others are pipeline stages."""
    stages = _grouped([tuple(layers) for layers, _ in ranks], [source for _, source in ranks])
    each = f"{len(ranks)} ranks: tokens are added up, {len(stages)} pipeline stages put together"
    sums = tuple(Merged(tuple(group), "sum", where) for group in stages)
    return Merged(sums, "layers", where, (each, *assumptions))


def _grouped(keys: Sequence[Any], sources: Sequence[Source]) -> list[list[Source]]:
    """The *sources* of each key, in the order of the keys."""
    return [[source for own, source in zip(keys, sources) if own == key] for key in sorted(set(keys))]


def concatenate_segments(sources: Sequence[Source], where: str, assumptions: tuple[str, ...]) -> Reading:
    """Segments of a run as one stream, where one may go back; steps that are only counted are counted on."""
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


def _grid(grids: Sequence[Grid], how: Merge) -> Grid:
    """The grid of parts put together; raises `TraceError` naming the part that does not fit."""
    first = grids[0]
    for before, grid in pairwise(grids):
        if how != "experts" and grid.first_expert != first.first_expert:
            problem = f"numbers experts from {grid.first_expert}, and {first.where} from {first.first_expert}"
            raise TraceError(grid.where, problem, "say which with --first-expert")
        if how != "layers" and not np.array_equal(grid.layers, first.layers):
            problem = f"has layers {shown(grid.layers)}, and {first.where} has {shown(first.layers)}"
            way_out = "parts need the same layers here; pipeline stages are put together with --merge layers, those of "
            raise TraceError(grid.where, problem, way_out + "Megatron-LM in one folder with --stages N")
        if how != "experts" and grid.experts != first.experts:
            problem = f"has {grid.experts} experts, and {first.where} has {first.experts}"
            way_out = "parts need the same experts here; expert-parallel ranks are merged by experts"
            raise TraceError(grid.where, problem, way_out)
        if how == "layers" and grid.layers[0] <= before.layers[-1]:
            layers = f"with layers up to {before.layers[-1]}"
            problem = f"has layer {grid.layers[0]}, and so has the part before it, {layers}"
            way_out = "number the layers through the whole model; replicas are merged by sum"
            raise TraceError(grid.where, problem, way_out)
    if how == "experts":
        return replace(first, experts=sum(grid.experts for grid in grids))
    return replace(first, layers=np.concatenate([grid.layers for grid in grids])) if how == "layers" else first


def _together(
    streams: Sequence[Iterator[Block]], names: Sequence[str], how: Merge, idle: bool, collector: Collector
) -> Iterator[Block]:
    """Blocks of the same steps from every stream, added up or side by side.

    Steps that a part lacks are zeros where it was *idle* in them; else what others have after its end is left out.
    """
    held: list[Block | None] = [None] * len(streams)
    apart = False
    while True:
        held = [next(stream, None) if block is None else block for block, stream in zip(held, streams)]
        there = [block for block in held if block is not None]
        if not there:
            return
        if len(there) < len(held) and not idle:
            ended = [name for block, name in zip(held, names) if block is None]
            step = min(int(block.steps[0]) for block in there)
            evidence = f"{shown(ended, 2)} ended before step {step}; what others have from there on is left out"
            collector.note("unfinished", f"step {step}", evidence)
            return
        if idle:  # up to where the first of them ends, filled with zeros to the same steps
            end = min(int(block.steps[-1]) for block in there)
            steps = np.unique(np.concatenate([block.steps[block.steps <= end] for block in there]))
            sizes = [0 if block is None else int(np.searchsorted(block.steps, end, "right")) for block in held]
            counts = []
            for block, n, name in zip(held, sizes, names):
                own, some = (steps[:0], there[0].counts[:0]) if block is None else (block.steps[:n], block.counts[:n])
                counts.append(np.zeros((len(steps), *some.shape[1:]), np.int64))
                counts[-1][np.searchsorted(steps, own)] = some
                if n < len(steps):
                    lacking = np.setdiff1d(steps, own)
                    evidence = f"{name} has no record of this step, and counts as idle in it"
                    collector.note("idle", f"step {lacking[0]}", evidence, len(lacking))
        else:
            steps = min((block.steps for block in there), key=len)
            sizes = [len(steps)] * len(there)
            for block, name in zip(there, names):
                for at in np.flatnonzero(block.steps[: len(steps)] != there[0].steps[: len(steps)])[:1]:
                    problem = f"has step {block.steps[at]} where another part has step {there[0].steps[at]}"
                    way_out = "every part needs the same steps: choose those they share with --steps; if a replica was "
                    way_out += "idle in them, --idle-experts takes the steps that it lacks as such"
                    raise TraceError(name, problem, way_out)
            counts = [block.counts[: len(steps)] for block in there]
        if how == "experts" and not apart:
            apart = True
            alike = len(counts) > 1 and len({part.shape for part in counts}) == 1
            used: NDArray[np.bool_] = np.ones((1, 1), bool)  # (parts, experts)
            if alike:
                used = np.asarray(np.stack(counts).any(axis=(1, 2)))
            if not used.all(axis=1).any() and (used.sum(axis=0) <= 1).all():
                problem = "holds all experts, with tokens for those of its rank alone"
                raise TraceError(names[0], problem, "add such parts up with --merge sum")
        rests = (block and Block(block.steps[n:], block.counts[n:]) for block, n in zip(held, sizes))
        held = [rest if rest and len(rest.steps) else None for rest in rests]
        whole = sum(counts[1:], counts[0]) if how == "sum" else np.concatenate(counts, 1 if how == "layers" else 2)
        yield Block(steps, whole)


class Summary:
    """What is needed of the blocks of a trace with this *grid* to find errors in it: totals, and its beginning."""

    def __init__(self, grid: Grid) -> None:
        self.layers: list[int] = grid.layers.tolist()
        # Steps on which roughness is measured.
        self.enough = max(ROUGH_STEPS, ROUGH_CELLS // grid.cells)
        self.rows = 0
        self.beginning: list[Block] = []
        self.totals: list[Counts] = []  # each (steps, layers)
        self.steps: list[Steps] = []
        self.factor = Factor()
        self.used = np.zeros(grid.experts, bool)

    def complete_steps(
        self, blocks: Iterator[Block], where: str, collector: Collector, accept: Sequence[str]
    ) -> Iterator[Block]:
        """Blocks in which every layer has tokens in every step; others are refused, or left out if that is accepted."""
        passed = np.zeros(len(self.layers))
        for block in blocks:
            largest = int(block.counts.max(initial=0))
            check_sums(block.counts, block.steps, self.layers, where, passed, largest)
            totals = block.counts.sum(axis=2)  # (steps, layers)
            passed += totals.sum(axis=0)
            full = totals.all(axis=1)  # (steps,)
            if not full.all():
                if "empty" not in accept:
                    raise _empty(block.steps, totals, self.layers, where)
                evidence = "a layer has no tokens, and the step is left out"
                collector.note("empty", f"step {block.steps[np.argmin(full)]}", evidence, int((~full).sum()))
                block, totals = Block(block.steps[full], block.counts[full]), totals[full]
            if not len(block.steps):
                continue
            if self.rows < self.enough:
                self.beginning.append(block)
            self.rows += len(block.steps)
            self.steps.append(block.steps)
            self.totals.append(totals)
            self.factor.add(block.counts, largest)
            if not self.used.all():
                self.used |= block.counts.any(axis=(0, 1))
            yield block
        if not self.steps:
            raise TraceError(where, "has no step left", "choose other --steps, or accept fewer findings")

    @property
    def tokens_per_step(self) -> int | None:
        """The tokens of a layer in a step, None where they vary."""
        first = int(self.totals[0].flat[0])
        return first if all((totals == first).all() for totals in self.totals) else None

    def findings(self, options: ReadOptions) -> list[Finding]:
        """The findings, also against the tokens that *options* expect of a layer in a step."""
        totals, steps = np.concatenate(self.totals), np.concatenate(self.steps)
        found: list[Finding] = []
        for i, layer in enumerate(self.layers):  # a layer at a time, to use little memory
            counts = np.concatenate([block.counts[:, i] for block in self.beginning])[: self.enough]
            if found := roughness_findings(counts, steps[: len(counts)], layer):
                break
        found = [*found, *self.factor.findings, *totals_findings(totals, steps, self.layers)]
        own, n = np.flatnonzero(self.used), len(self.used)
        block = int(own[-1] - own[0] + 1)
        if n >= LEAST_EXPERTS and block == len(own) > 1 and block < n and not (n % block or own[0] % block):
            evidence = f"{n - block} of {n} experts have no tokens at all, every one but {own[0]} to {own[-1]}, as in "
            found.append(finding("part", "the whole trace", f"{evidence}the dump of one rank of {n // block}"))
        if options.expected is None:
            return found
        expected = options.expected * (options.bin or 1)
        # The last step may be a part of one where passes or tokens were counted into steps.
        counted = options.bin is not None or options.tokens is not None
        whole = len(totals) - (counted and len(totals) > 1 and bool((totals[-1] < expected).all()))
        return found + expectation_findings(totals[:whole], steps[:whole], self.layers, expected)


def differences(blocks: Iterator[Block], first: int | None, collector: Collector) -> Iterator[Block]:
    """What counters grew by from each step to the next, from 0 to the first, without the steps before *first*.

    Where a count of a layer falls, its counters were reset, and what they hold then is what they grew by.
    """
    before: Counts | None = None
    for steps, counters in blocks:
        earlier = np.zeros_like(counters[0]) if before is None else before
        counts = np.diff(counters, axis=0, prepend=earlier[None])
        reset = np.asarray((counts < 0).any(axis=2))  # (steps, layers)
        if reset.any():
            step = int(steps[reset.any(axis=1)][0])
            times = int(reset.any(axis=1).sum())
            collector.note("reset", f"step {step}", "counters fall: they were reset, and begin at 0 again", times)
            counts[reset] = counters[reset]
        before = counters[-1]
        start = 0 if first is None else int(np.searchsorted(steps, first))
        yield Block(steps[start:], counts[start:])


def binned(blocks: Iterator[Block], passes: int, where: str, collector: Collector) -> Iterator[Block]:
    """Every *passes* logged passes added up into one step, numbered from 1; passes left over are left out."""
    held: Counts | None = None
    done = 0
    for block in blocks:
        counts = block.counts if held is None else np.concatenate([held, block.counts])
        n = len(counts) // passes
        if n:
            whole = counts[: n * passes].reshape(n, passes, *counts.shape[1:])
            yield Block(done + 1 + np.arange(n), whole.sum(axis=1))
        held, done = counts[n * passes :], done + n
    if held is not None and len(held) and done:
        evidence = f"the last {len(held):,} passes make no step of {passes:,}, and are left out"
        collector.note("unfinished", f"step {done + 1}", evidence)
    elif held is not None and len(held):
        problem = f"has {len(held):,} passes, which make no step of {passes:,}"
        raise TraceError(where, problem, f"choose --bin {len(held)} or less")


def _empty(steps: Steps, totals: Counts, layers: Sequence[int], where: str) -> TraceError:
    """The error that a layer has no tokens in a step, or in any, as dense layers have none."""
    step, layer = np.argwhere(totals == 0)[0]
    dense = np.asarray(~totals.any(axis=0))
    if len(steps) > 1 and dense.any() and not dense.all():
        others = ",".join(str(number) for number, none in zip(layers, dense) if not none)
        problem = f"the layer has no tokens in any of the first {len(steps):,} steps (empty), as dense layers have"
        place = f"{where}, layer {layers[int(dense.argmax())]}"
        return TraceError(place, problem, f"choose others with --layers {others}")
    way_out = "leave such steps out with --accept empty, or add passes up into steps with --bin N"
    place = f"{where}, step {steps[step]}, layer {layers[layer]}"
    return TraceError(place, "the layer has no tokens at all (empty)", way_out)
