"""A trace replayed step by step under each policy: what is left of the load, and how many experts move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.forecasting.backtest import Progress, Run, counted, in_turn
from moetrace.placement.dispatch import Dispatch
from moetrace.placement.plan import Plan, least_redundant
from moetrace.placement.planning import Planning
from moetrace.placement.policies import (
    LOOKED_BACK,
    SETTINGS,
    Observed,
    Policy,
    active_plan_after_gate,
    utilisation_by_plan,
)
from moetrace.placement.step_time import HIGHEST_RIDGE
from moetrace.placement.systems import policies
from moetrace.trace import LEAST_ROWS, LayerLoad, LoadTrace, Shares, Steps

if TYPE_CHECKING:
    import pandas as pd

# Steps over which loads are added up before they are compared; of a short trace fewer, for so many blocks.
BLOCK, BLOCKS = 250, 8
# Of a longer trace the last so many steps are replayed: what is planned for is what comes after them, and a policy may
# plan every other step.
MOST_REPLAYED = 100_000
REPLAY_COLUMNS = (
    "trace", *SETTINGS, "redundant", "dispatch", "layer", "step", "mean_load", "peak_load", "block_peak", "moved",
    "peak_memory_bound",
)  # fmt: skip


def replayed(
    trace: LoadTrace,
    planning: Planning,
    redundants: Sequence[int],
    first: int,
    progress: Progress | None = None,
    run: Run = in_turn,
    systems: Sequence[str] = (),
) -> pd.DataFrame:
    """What each policy makes of the load: a row by policy, number of redundant experts, layer and block of steps.

    From *first* steps on, or the last `MOST_REPLAYED` of a longer trace; in any case also for the default placement
    with as few redundant experts as fill the GPUs. *mean_load* and *peak_load* are the loads of the mean GPU, without
    replicas, and of the busiest one, added up step by step, *block_peak* that of the GPU that has most in all steps of
    the block; *moved* are slots changed in it. Loads are tokens, or time as *planning* has it; where it has none,
    *peak_memory_bound* is the time of the busiest GPU on hardware with `HIGHEST_RIDGE`, else NaN.
    The default placement is active before the first plan. A layer is a task for *run*; *progress* gets how many are
    done. Of serving systems those named in *systems* are replayed, all if none is. Our own policies plan as *planning*
    does, with each of *redundants*, and systems that have a choice split tokens as its dispatch does.
    """
    import pandas as pd

    numbers = sorted({least_redundant(trace.experts, planning.gpus), *redundants})
    plannings = [planning.with_redundant(redundant) for redundant in numbers]
    replay = _Replay(
        trace, policies(len(trace.layers), systems), plannings, tuple(redundants), replayed_from(trace, first)
    )
    gates = _gates([_Utilisation(replay, number) for number in trace.layers], run)
    tasks = [_Layer(replay, number, gates) for number in trace.layers]
    rows = dict(counted(run, tasks, progress))
    every = [row for number in trace.layers for row in rows[number]]
    return pd.DataFrame(every, columns=REPLAY_COLUMNS).astype({"interval": "Int64", "threshold": "Float64"})


@dataclass(frozen=True, eq=False)
class _Replay:
    """What is replayed: the policies *known*, scored from the step *begin* on, with each of *plannings*.

    Those whose redundant experts are not in *redundants* are for the default placement alone.
    """

    trace: LoadTrace
    known: Sequence[Policy]
    plannings: Sequence[Planning]
    redundants: Sequence[int]
    begin: int

    def observed(self, number: int) -> tuple[LayerLoad, list[Observed]]:
        """A layer as far as it counts, and what each policy sees of it."""
        load = self.trace.layer(number)
        row = int(np.searchsorted(load.steps, self.begin, "right")) - LOOKED_BACK
        if row > 0:  # no policy looks back further: the rest need not be in memory
            load = replace(load, steps=load.steps[row:], counts=load.counts[row:].copy())
        before = np.concatenate([np.zeros((1, load.experts), np.int64), np.cumsum(load.counts, axis=0)])
        planning_steps = load.steps[(load.steps >= self.begin) & (load.steps < load.steps[-1])]
        found, made = list[Observed](), dict[Any, Plan]()
        for policy in self.known:
            due = policy.due(planning_steps)
            # What the window up to each planning step holds, as `LayerLoad.last` has it, from sums up to each row.
            last, first = (
                np.searchsorted(load.steps, np.array(due, np.int64) - back, "right") for back in (0, policy.window)
            )
            counts = before[last] - before[np.maximum(np.minimum(first, last - min(policy.window, LEAST_ROWS)), 0)]
            found.append(Observed(load, due, policy.window, counts / counts.sum(axis=1, keepdims=True), made))
        return load, found

    def planned(self, policy: Policy, planning: Planning) -> bool:
        """Whether the *policy* is replayed with so many redundant experts."""
        return planning.redundant in self.redundants or policy.interval == 0


Gates = Mapping[tuple[Policy, int], list[int]]
"""Which plan is active after each planning step of a policy with a threshold, in all layers, by redundant experts."""


@dataclass(frozen=True, eq=False)
class _Utilisation:
    """How busy the GPUs of one layer are under each plan of the policies with a threshold: a task."""

    replay: _Replay
    number: int

    def run(self) -> tuple[int, dict[tuple[Policy, int], Shares]]:
        """The layer, and its utilisation by policy and redundant experts."""
        load, observed = self.replay.observed(self.number)
        found = {}
        for (policy, seen), planning in product(zip(self.replay.known, observed), self.replay.plannings):
            if policy.threshold is not None and self.replay.planned(policy, planning):
                default = planning.default(load.experts)
                plans = [default, *policy.plans(seen, default, planning)]
                found[policy, planning.redundant] = utilisation_by_plan(seen, plans, planning)
        return self.number, found


def _gates(tasks: Sequence[_Utilisation], run: Run) -> Gates:
    """By the mean over layers, added up in their order whoever is done first."""
    if not any(policy.threshold is not None for policy in tasks[0].replay.known):
        return {}
    busy: dict[tuple[Policy, int], Shares] = {}
    by_layer = dict(run(tasks))
    for key, found in ((key, found) for task in tasks for key, found in by_layer[task.number].items()):
        busy[key] = busy.get(key, 0) + found / len(tasks)
    return {key: active_plan_after_gate(rate, key[0].threshold or 0.0) for key, rate in busy.items()}


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer under each policy: a task."""

    replay: _Replay
    number: int
    gates: Gates

    def run(self) -> tuple[int, list[tuple[Any, ...]]]:
        """The layer, and its rows of `REPLAY_COLUMNS`."""
        load, observed = self.replay.observed(self.number)
        begin, rows = self.replay.begin, list[tuple[Any, ...]]()
        for planning, (policy, seen) in product(self.replay.plannings, zip(self.replay.known, observed)):
            if self.replay.planned(policy, planning):
                split = planning.evenly if policy.even else planning.split
                # The row from which on each plan is active, that before the first plan's first, and the end.
                moments = [begin, *(step + policy.late for step in seen.steps), int(load.steps[-1])]
                starts = np.searchsorted(load.steps, moments, "right")
                key = (self.replay.trace.name, *policy.settings, planning.redundant, split.kind, self.number)
                blocks = _blocks(load, self._plans(policy, seen, planning), split, starts, self.replay)
                rows += [(*key, *block) for block in blocks]
        return self.number, rows

    def _plans(self, policy: Policy, seen: Observed, planning: Planning) -> Iterable[Plan]:
        """The default placement, and the plans that are active after each planning step."""
        default = planning.default(seen.load.experts)
        plans = policy.plans(seen, default, planning)
        chosen = self.gates.get((policy, planning.redundant))
        if chosen is None:
            return chain([default], plans)
        every = [default, *plans]
        return [default, *(every[i] for i in chosen)]


def replayed_from(trace: LoadTrace, first: int) -> int:
    """The step after which policies are scored: *first* steps on, or the last `MOST_REPLAYED` logged ones of more.

    >>> import moetrace as mt
    >>> replayed_from(mt.synthetic_trace([mt.settling(500, steps=2000)]), 500)
    500
    """
    whole = int(trace.steps[0]) + first - 1
    return max(whole, int(trace.steps[-MOST_REPLAYED - 1])) if len(trace.steps) > MOST_REPLAYED else whole


def _blocks(
    load: LayerLoad, plans: Iterable[Plan], split: Dispatch, starts: Steps, replay: _Replay
) -> Iterator[tuple[Any, ...]]:
    """Begin, loads and moves of each block."""
    begin, end = replay.begin, int(replay.trace.steps[-1])
    block = BLOCK if end - begin >= BLOCKS * BLOCK else max((end - begin) // BLOCKS, replay.trace.stride)
    # Whole blocks alone, and of them those in which something was logged.
    numbers, edges = np.unique((load.steps[starts[0] :] - begin - 1) // block, return_index=True)
    whole = begin + (numbers + 1) * block <= end
    if not whole.any():
        return
    bounded = None if split.time.known else replace(split, time=replace(split.time, ridge=HIGHEST_RIDGE))
    changed: list[int] = []
    parts, bound, before = [], [], None
    for plan, (start, stop) in zip(plans, pairwise(starts)):
        changed.append(0 if before is None else int(np.maximum(plan.held - before.held, 0).sum()))
        if start < stop:
            counts = load.counts[start:stop]
            parts.append(split.loads(plan.held, counts))
            bound.append(np.full(len(counts), np.nan) if bounded is None else bounded.peaks(plan.held, counts))
        before = plan
    own = np.concatenate(parts)
    alone = (
        own.mean(axis=1) if split.time.linear else split.time.cost(load.counts[starts[0] :]).sum(axis=1) / own.shape[1]
    )
    busiest = np.add.reduceat(own, edges, axis=0).max(axis=1)
    each = (alone, own.max(axis=1), np.concatenate(bound))
    mean, peak, memory = (np.add.reduceat(loads, edges) for loads in each)
    # The first plan is made before anything is scored.
    moved = np.zeros(len(edges), np.int64)
    np.add.at(moved, np.searchsorted(edges, starts[2:-1] - starts[0], "right") - 1, np.array(changed[2:], int))
    for i in np.flatnonzero(whole):
        yield int(begin + numbers[i] * block), mean[i], peak[i], busiest[i], int(moved[i]), memory[i]
