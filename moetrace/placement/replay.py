"""A trace replayed step by step under each policy: what is left of the load, and what was moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.placement.dispatch import EVENLY, Dispatch
from moetrace.placement.plan import Plan
from moetrace.placement.planning import Planning
from moetrace.placement.policies import SETTINGS, Looks, Policy, policies
from moetrace.trace import LEAST_ROWS, Counts, LayerLoad, LoadTrace, Shares, Steps

if TYPE_CHECKING:
    import pandas as pd

# Steps over which loads are added up before they are compared.
BLOCK = 250
REPLAY_COLUMNS = (
    "trace", *SETTINGS, "redundant", "dispatch", "layer", "step", "mean_load", "peak_load", "block_peak", "moved",
)  # fmt: skip


def replayed(trace: LoadTrace, gpus: int, redundants: Sequence[int], first: int, **settings: Any) -> pd.DataFrame:
    """What each policy leaves of the load: a row for each policy, number of redundant slots, layer and block of steps.

    From *first* steps on; in any case also for experts in order without replicas, or as few as fill the GPUs.
    *mean_load* and *peak_load* are the tokens of the mean and of the busiest GPU, added up step by step, *block_peak*
    those of the GPU that has most in all steps of the block; *moved* are slots changed in it.
    Experts are in order before the first plan. *settings* are those of `Planning`, by which our own policies plan, and
    by whose dispatch systems that have a choice split tokens.
    """
    import pandas as pd

    begin = int(trace.steps[0]) + first - 1
    rows: list[tuple[Any, ...]] = []
    known, bare = policies(len(trace.layers)), -trace.experts % gpus
    for load in trace.by_layer():
        before = np.concatenate([np.zeros((1, load.experts), np.int64), np.cumsum(load.counts, axis=0)])
        looks = [_looks(load, before, policy, begin) for policy in known]
        for planning in (Planning(gpus, redundant, **settings) for redundant in sorted({bare, *redundants})):
            plain = planning.in_order(load.experts)
            for policy, own in zip(known, looks):
                if planning.redundant not in redundants and policy.interval != 0:
                    continue
                split = EVENLY if policy.even else planning.split
                key = (trace.name, *policy.settings, planning.redundant, split.kind, load.layer)
                plans = [plain, *policy.plans(own, plain, planning)]
                rows += [(*key, *block) for block in _blocks(load, plans, split, _starts(policy, own, begin), begin)]
    return pd.DataFrame(rows, columns=REPLAY_COLUMNS).astype({"interval": "Int64", "threshold": "Float64"})


def _looks(load: LayerLoad, before: Counts, policy: Policy, begin: int) -> Looks:
    """What *policy* sees of the layer; *before* (rows + 1, experts) is what was counted before each row."""
    due = policy.due(load.steps[(load.steps >= begin) & (load.steps < load.steps[-1])])
    return Looks(load, due, policy.window, _window_shares(load, before, due, policy.window))


def _starts(policy: Policy, looks: Looks, begin: int) -> Steps:
    """The row from which on each plan is in force, that before the first plan's first, and the end."""
    moments = [begin, *(step + policy.late for step in looks.steps), int(looks.load.steps[-1])]
    return np.searchsorted(looks.load.steps, moments, "right")


def _blocks(
    load: LayerLoad, plans: Sequence[Plan], split: Dispatch, starts: Steps, begin: int
) -> Iterator[tuple[Any, ...]]:
    """Begin, loads and moves of each block."""
    end = int(load.steps[-1])
    gpu_loads = np.zeros((len(load.steps), len(plans[0].held)))
    for plan, (start, stop) in zip(plans, pairwise(starts)):
        if start < stop:
            gpu_loads[start:stop] = split.loads(plan.held, load.counts[start:stop])
    changed = np.array([0, *(np.maximum(new.held - old.held, 0).sum() for old, new in pairwise(plans))])
    # Whole blocks alone, and of them those in which something was logged.
    numbers, edges = np.unique((load.steps[starts[0] :] - begin - 1) // BLOCK, return_index=True)
    whole = begin + (numbers + 1) * BLOCK <= end
    if not whole.any():
        return
    own = gpu_loads[starts[0] :]
    busiest = np.add.reduceat(own, edges, axis=0).max(axis=1)
    mean, peak = (np.add.reduceat(loads, edges) for loads in (own.mean(axis=1), own.max(axis=1)))
    # The first plan is made before anything is scored.
    moved = np.zeros(len(edges), np.int64)
    np.add.at(moved, np.searchsorted(edges, starts[2:-1] - starts[0], "right") - 1, changed[2:])
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
