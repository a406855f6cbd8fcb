"""A trace replayed step by step under each policy: what is left of the load, and what was moved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.forecasting.backtest import Progress, Run, in_turn
from moetrace.placement.dispatch import EVENLY, Dispatch
from moetrace.placement.plan import Plan, least_redundant
from moetrace.placement.planning import Planning
from moetrace.placement.policies import LOOKED_BACK, SETTINGS, Looks, Policy, in_force, policies, under_each
from moetrace.trace import LEAST_ROWS, Counts, LayerLoad, LoadTrace, Shares, Steps

if TYPE_CHECKING:
    import pandas as pd

# Steps over which loads are added up before they are compared.
BLOCK = 250
# Of a longer trace the last so many steps are replayed: what is planned for is what comes after them, and a policy may
# plan every other step.
MOST_REPLAYED = 100_000
REPLAY_COLUMNS = (
    "trace", *SETTINGS, "redundant", "dispatch", "layer", "step", "mean_load", "peak_load", "block_peak", "moved",
)  # fmt: skip


def replayed(
    trace: LoadTrace,
    gpus: int,
    redundants: Sequence[int],
    first: int,
    progress: Progress | None = None,
    run: Run = in_turn,
    **settings: Any,
) -> pd.DataFrame:
    """What each policy leaves of the load: a row for each policy, number of redundant slots, layer and block of steps.

    From *first* steps on, or the last `MOST_REPLAYED` of a longer trace; in any case also for experts in order without
    replicas, or as few as fill the GPUs. *mean_load* and *peak_load* are the tokens of the mean and of the busiest GPU,
    added up step by step, *block_peak* those of the GPU that has most in all steps of the block; *moved* are slots
    changed in it. Experts are in order before the first plan. A layer is a task for *run*; *progress* is told how many
    are done. *settings* are those of `Planning`, by which our own policies plan, and by whose dispatch systems that
    have a choice split tokens.
    """
    import pandas as pd

    bare = least_redundant(trace.experts, gpus)
    plannings = [Planning(gpus, redundant, **settings) for redundant in sorted({bare, *redundants})]
    replay = _Replay(trace, policies(len(trace.layers)), plannings, tuple(redundants), replayed_from(trace, first))
    gates = _gates([_Utilisation(replay, number) for number in trace.layers], run)
    tasks = [_Layer(replay, number, gates) for number in trace.layers]
    rows: dict[int, list[tuple[Any, ...]]] = {}
    for number, own in run(tasks):
        rows[number] = own
        if progress:
            progress(len(rows), len(tasks))
    every = [row for number in trace.layers for row in rows[number]]
    return pd.DataFrame(every, columns=REPLAY_COLUMNS).astype({"interval": "Int64", "threshold": "Float64"})


@dataclass(frozen=True, eq=False)
class _Replay:
    """What is replayed: the policies *known*, scored from the step *begin* on, under each of the *plannings*.

    Those whose replicas are none of *redundants* are for experts in order alone.
    """

    trace: LoadTrace
    known: Sequence[Policy]
    plannings: Sequence[Planning]
    redundants: Sequence[int]
    begin: int

    def looks(self, number: int) -> tuple[LayerLoad, list[Looks]]:
        """A layer as far as it counts, and what each policy sees of it."""
        load = _recent(self.trace.layer(number), self.begin)
        before = np.concatenate([np.zeros((1, load.experts), np.int64), np.cumsum(load.counts, axis=0)])
        return load, [_looks(load, before, policy, self.begin) for policy in self.known]

    def planned(self, policy: Policy, planning: Planning) -> bool:
        """Whether the *policy* is replayed with so many replicas."""
        return planning.redundant in self.redundants or policy.interval == 0


Gates = Mapping[tuple[Policy, int], list[int]]
"""Which plan is in force after each look of a policy with a threshold, in all layers alike, by replicas."""


@dataclass(frozen=True, eq=False)
class _Utilisation:
    """How busy the GPUs of one layer are under each plan of the policies with a threshold: a task."""

    replay: _Replay
    number: int

    def run(self) -> tuple[int, dict[tuple[Policy, int], Shares]]:
        """The layer, and what is found by policy and replicas."""
        load, looks = self.replay.looks(self.number)
        found = {}
        for (policy, seen), planning in product(zip(self.replay.known, looks), self.replay.plannings):
            if policy.threshold is not None and self.replay.planned(policy, planning):
                plain = planning.in_order(load.experts)
                plans = [plain, *policy.plans(seen, plain, planning)]
                found[policy, planning.redundant] = under_each(seen, plans, planning)
        return self.number, found


def _gates(tasks: Sequence[_Utilisation], run: Run) -> Gates:
    """By the mean over layers, added up in their order whoever is done first."""
    if not any(policy.threshold is not None for policy in tasks[0].replay.known):
        return {}
    busy: dict[tuple[Policy, int], Shares] = {}
    by_layer = dict(run(tasks))
    for key, found in ((key, found) for task in tasks for key, found in by_layer[task.number].items()):
        busy[key] = busy.get(key, 0) + found / len(tasks)
    return {key: in_force(rate, key[0].threshold or 0.0) for key, rate in busy.items()}


@dataclass(frozen=True, eq=False)
class _Layer:
    """One layer under each policy: a task."""

    replay: _Replay
    number: int
    gates: Gates

    def run(self) -> tuple[int, list[tuple[Any, ...]]]:
        """The layer, and its rows of `REPLAY_COLUMNS`."""
        load, looks = self.replay.looks(self.number)
        begin, rows = self.replay.begin, list[tuple[Any, ...]]()
        for planning, (policy, own) in product(self.replay.plannings, zip(self.replay.known, looks)):
            if self.replay.planned(policy, planning):
                split = EVENLY if policy.even else planning.split
                key = (self.replay.trace.name, *policy.settings, planning.redundant, split.kind, self.number)
                blocks = _blocks(load, self._plans(policy, own, planning), split, _starts(policy, own, begin), begin)
                rows += [(*key, *block) for block in blocks]
        return self.number, rows

    def _plans(self, policy: Policy, looks: Looks, planning: Planning) -> Iterable[Plan]:
        """Experts in order, and the plans after all *looks*."""
        plain = planning.in_order(looks.load.experts)
        plans = policy.plans(looks, plain, planning)
        chosen = self.gates.get((policy, planning.redundant))
        if chosen is None:
            return chain([plain], plans)
        every = [plain, *plans]
        return [plain, *(every[i] for i in chosen)]


def replayed_from(trace: LoadTrace, first: int) -> int:
    """The step after which policies are scored: *first* steps on, or the last `MOST_REPLAYED` logged ones of more.

    >>> import moetrace as mt
    >>> replayed_from(mt.synthetic_trace([mt.settling(500, steps=2000)]), 500)
    500
    """
    whole = int(trace.steps[0]) + first - 1
    return max(whole, int(trace.steps[-MOST_REPLAYED - 1])) if len(trace.steps) > MOST_REPLAYED else whole


def _recent(load: LayerLoad, begin: int) -> LayerLoad:
    """The part of a layer that policies see that plan from the step *begin* on, and no more in memory."""
    row = int(np.searchsorted(load.steps, begin, "right")) - LOOKED_BACK
    return load if row <= 0 else replace(load, steps=load.steps[row:], counts=load.counts[row:].copy())


def _looks(load: LayerLoad, before: Counts, policy: Policy, begin: int) -> Looks:
    """What *policy* sees of the layer; *before* (rows + 1, experts) is what was counted before each row."""
    due = policy.due(load.steps[(load.steps >= begin) & (load.steps < load.steps[-1])])
    return Looks(load, due, policy.window, _window_shares(load, before, due, policy.window))


def _starts(policy: Policy, looks: Looks, begin: int) -> Steps:
    """The row from which on each plan is in force, that before the first plan's first, and the end."""
    moments = [begin, *(step + policy.late for step in looks.steps), int(looks.load.steps[-1])]
    return np.searchsorted(looks.load.steps, moments, "right")


def _blocks(
    load: LayerLoad, plans: Iterable[Plan], split: Dispatch, starts: Steps, begin: int
) -> Iterator[tuple[Any, ...]]:
    """Begin, loads and moves of each block."""
    end = int(load.steps[-1])
    # Whole blocks alone, and of them those in which something was logged.
    numbers, edges = np.unique((load.steps[starts[0] :] - begin - 1) // BLOCK, return_index=True)
    whole = begin + (numbers + 1) * BLOCK <= end
    if not whole.any():
        return
    changed: list[int] = []
    parts, before = [], None
    for plan, (start, stop) in zip(plans, pairwise(starts)):
        changed.append(0 if before is None else int(np.maximum(plan.held - before.held, 0).sum()))
        parts += [split.loads(plan.held, load.counts[start:stop])] if start < stop else []
        before = plan
    own = np.concatenate(parts)
    busiest = np.add.reduceat(own, edges, axis=0).max(axis=1)
    mean, peak = (np.add.reduceat(loads, edges) for loads in (own.mean(axis=1), own.max(axis=1)))
    # The first plan is made before anything is scored.
    moved = np.zeros(len(edges), np.int64)
    np.add.at(moved, np.searchsorted(edges, starts[2:-1] - starts[0], "right") - 1, np.array(changed[2:], int))
    for i in np.flatnonzero(whole):
        yield int(begin + numbers[i] * BLOCK), mean[i], peak[i], busiest[i], int(moved[i])


def _window_shares(load: LayerLoad, before: Counts, due: Sequence[int], window: int) -> Shares:
    """The share of each expert of the load of the last *window* steps up to each of *due*, shape (due, experts).

    As `LayerLoad.last` has them; *before* (rows + 1, experts) is what was counted before each row.
    """
    last = np.searchsorted(load.steps, np.array(due, np.int64), "right")
    first = np.searchsorted(load.steps, np.array(due, np.int64) - window, "right")
    counts = before[last] - before[np.maximum(np.minimum(first, last - min(window, LEAST_ROWS)), 0)]
    shares: Shares = counts / counts.sum(axis=1, keepdims=True)
    return shares
