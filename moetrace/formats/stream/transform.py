"""What is done to blocks between the dump and the trace: selecting, adding up passes, looking at totals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from moetrace.doctor.catalogue import expectation_findings, roughness_findings, totals_findings
from moetrace.doctor.collector import Collector, Factor
from moetrace.errors import TraceError
from moetrace.formats.stream.blocks import Grid
from moetrace.formats.stream.cells import Available, Block, ReadOptions
from moetrace.formats.stream.merge import Stream
from moetrace.trace import Counts, Finding, Steps, check_sums

# Roughness is measured on the first steps alone: so many cells of them, and at least so many steps.
ROUGH_CELLS = 1 << 20
ROUGH_STEPS = 100


@dataclass
class Summary:
    """What is needed of the blocks of a trace to find errors in it, such as totals (steps, layers).

    *beginning* are the blocks that roughness is measured on, the first *enough* steps; *rows* are the steps so far.
    """

    layers: Sequence[int]
    enough: int
    beginning: list[Block] = field(default_factory=list)
    rows: int = 0
    totals: list[Counts] = field(default_factory=list)
    steps: list[Steps] = field(default_factory=list)
    factor: Factor = field(default_factory=Factor)

    def add(self, block: Block, totals: Counts, largest: int) -> None:
        """Add the next block: *totals* (steps, layers) are the tokens over all experts, no count is above *largest*."""
        if self.rows < self.enough:
            self.beginning.append(block)
        self.rows += len(block.steps)
        self.steps.append(block.steps)
        self.totals.append(totals)
        self.factor.add(block.counts, largest)

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
        if options.expected is None:
            return found
        expected = options.expected * (options.bin or 1)
        # The last step may be a part of one where passes or tokens were counted into steps.
        counted = options.bin is not None or options.tokens is not None
        whole = len(totals) - (counted and len(totals) > 1 and bool((totals[-1] < expected).all()))
        return found + expectation_findings(totals[:whole], steps[:whole], self.layers, expected)


def transformed(
    stream: Stream, options: ReadOptions, where: str, collector: Collector, available: Available
) -> tuple[Grid, Iterator[Block], Summary]:
    """The blocks as they go into the trace: counters subtracted, passes added up, none empty.

    *available* is what there was before layers were selected. Raises `TraceError` when a layer is not
    there, a layer has not as many experts as *options* say, no step is left, or a layer has no tokens in a step.
    """
    grid, blocks = stream
    for layer in sorted(set(options.layers) - set(grid.layers.tolist())):
        raise available.no_layer(where, layer)
    if options.experts not in (None, grid.experts):
        problem = f"layers have {grid.experts} experts where --experts says {options.experts}"
        raise TraceError(where, problem, "check --experts, and that no rank is missing")
    if options.difference:
        blocks = differences(blocks, options.first, collector)
    if options.bin is not None:
        blocks = _binned(blocks, options.bin, where, collector)
    summary = Summary(grid.layers.tolist(), max(ROUGH_STEPS, ROUGH_CELLS // grid.cells))
    return grid, _complete_steps(blocks, summary, where, collector, options.accept), summary


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


def _binned(blocks: Iterator[Block], passes: int, where: str, collector: Collector) -> Iterator[Block]:
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


def _complete_steps(
    blocks: Iterator[Block], summary: Summary, where: str, collector: Collector, accept: Sequence[str]
) -> Iterator[Block]:
    """Blocks in which every layer has tokens in every step; others are refused, or left out if that is accepted."""
    passed = np.zeros(len(summary.layers))
    for block in blocks:
        largest = int(block.counts.max(initial=0))
        check_sums(block.counts, block.steps, summary.layers, where, passed, largest)
        totals = block.counts.sum(axis=2)  # (steps, layers)
        passed += totals.sum(axis=0)
        full = totals.all(axis=1)  # (steps,)
        if not full.all():
            step = int(block.steps[np.argmin(full)])
            if "empty" not in accept:
                raise _empty(block.steps, totals, summary.layers, where)
            evidence = "a layer has no tokens, and the step is left out"
            collector.note("empty", f"step {step}", evidence, int((~full).sum()))
            block, totals = Block(block.steps[full], block.counts[full]), totals[full]
        if len(block.steps):
            summary.add(block, totals, largest)
            yield block
    if not summary.rows:
        raise TraceError(where, "has no step left", "choose other --steps, or accept fewer findings")


def _empty(steps: Steps, totals: Counts, layers: Sequence[int], where: str) -> TraceError:
    """The error that a layer has no tokens in a step, or in any, as dense layers have none."""
    step, layer = np.argwhere(totals == 0)[0]
    dense = np.asarray(~totals.any(axis=0))
    if len(steps) > 1 and dense.any() and not dense.all():
        others = ",".join(str(number) for number, none in zip(layers, dense) if not none)
        return TraceError(
            f"{where}, layer {layers[int(np.argmax(dense))]}",
            f"the layer has no tokens in any of the first {len(steps):,} steps (empty), as dense layers have",
            f"choose others with --layers {others}",
        )
    return TraceError(
        f"{where}, step {steps[step]}, layer {layers[layer]}",
        "the layer has no tokens at all (empty)",
        "leave such steps out with --accept empty, or add passes up into steps with --bin N",
    )
