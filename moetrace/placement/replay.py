"""A trace replayed step by step under each policy: what is left of the load, and what was moved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.forecasting.backtest import Progress
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
    **settings: Any,
) -> pd.DataFrame:
    """What each policy leaves of the load: a row for each policy, number of redundant slots, layer and block of steps.

    From *first* steps on, or the last `MOST_REPLAYED` of a longer trace; in any case also for experts in order without
    replicas, or as few as fill the GPUs. *mean_load* and *peak_load* are the tokens of the mean and of the busiest GPU,
    added up step by step, *block_peak* those of the GPU that has most in all steps of the block; *moved* are slots
    changed in it. Experts are in order before the first plan. *progress* is told how many layers are done. *settings*
    are those of `Planning`, by which our own policies plan, and by whose dispatch systems that have a choice split
    tokens.
    """
    import pandas as pd

    begin, known = replayed_from(trace, first), policies(len(trace.layers))
    bare = least_redundant(trace.experts, gpus)
    plannings = [Planning(gpus, redundant, **settings) for redundant in sorted({bare, *redundants})]
    plans_of = _Gates.of(trace, known, [own for own in plannings if own.redundant in redundants], begin)
    rows: list[tuple[Any, ...]] = []
    for done, (load, looks) in enumerate(_layers(trace, known, begin), 1):
        for planning in plannings:
            plain = planning.in_order(load.experts)
            for policy, own in zip(known, looks):
                if planning.redundant not in redundants and policy.interval != 0:
                    continue
                split = EVENLY if policy.even else planning.split
                key = (trace.name, *policy.settings, planning.redundant, split.kind, load.layer)
                plans = chain([plain], plans_of(policy, own, planning))
                rows += [(*key, *block) for block in _blocks(load, plans, split, _starts(policy, own, begin), begin)]
        if progress:
            progress(done, len(trace.layers))
    return pd.DataFrame(rows, columns=REPLAY_COLUMNS).astype({"interval": "Int64", "threshold": "Float64"})


@dataclass(frozen=True)
class _Gates:
    """Which plan is in force after each look of a policy with a threshold, in all layers alike, by replicas."""

    chosen: Mapping[tuple[Policy, int], list[int]]

    @classmethod
    def of(cls, trace: LoadTrace, known: Sequence[Policy], plannings: Sequence[Planning], begin: int) -> _Gates:
        """From the utilisation in all layers, one after the other."""
        own = [policy for policy in known if policy.threshold is not None]
        busy: dict[tuple[Policy, int], Shares] = {}
        for load, looks in _layers(trace, own, begin) if own else ():
            for (policy, seen), planning in product(zip(own, looks), plannings):
                key = policy, planning.redundant
                plain = planning.in_order(load.experts)
                found = under_each(seen, [plain, *policy.plans(seen, plain, planning)], planning)
                busy[key] = busy.get(key, 0) + found / len(trace.layers)
        return cls({key: in_force(rate, key[0].threshold or 0.0) for key, rate in busy.items()})

    def __call__(self, policy: Policy, looks: Looks, planning: Planning) -> Iterable[Plan]:
        """The plans after all *looks* of a layer."""
        plain = planning.in_order(looks.load.experts)
        plans = policy.plans(looks, plain, planning)
        chosen = self.chosen.get((policy, planning.redundant))
        if chosen is None:
            return plans
        every = [plain, *plans]
        return (every[i] for i in chosen)


def _layers(trace: LoadTrace, known: Sequence[Policy], begin: int) -> Iterator[tuple[LayerLoad, list[Looks]]]:
    """Each layer as far as it counts, and what each policy sees of it."""
    for number in trace.layers:
        load = _recent(trace.layer(number), begin)
        before = np.concatenate([np.zeros((1, load.experts), np.int64), np.cumsum(load.counts, axis=0)])
        yield load, [_looks(load, before, policy, begin) for policy in known]


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
