"""Policies: when a plan is made anew and from what, as serving systems do it, replayed step by step on a trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.placement.plan import Plan, in_order, place, replan
from moetrace.placement.planner import greedy
from moetrace.trace import LEAST_ROWS, Counts, LayerLoad, LoadTrace, Shares, Steps

if TYPE_CHECKING:
    import pandas as pd

# Steps over which loads are added up before they are compared.
BLOCK = 250
# Policies whose plans a system reads from a file; the others plan by themselves.
FROM_FILES = ("static", "moetrace")
REPLAY_COLUMNS = (
    "trace", "system", "window", "interval", "redundant", "layer", "step", "mean_load", "peak_load", "block_peak",
    "moved",
)  # fmt: skip

Planner = Callable[[Plan, Shares, int], list[Plan]]
"""Plans for the shares (times, experts), one after the other, with so many redundant slots, from the plan in force."""


def from_nothing(before: Plan, shares: Shares, redundant: int) -> list[Plan]:
    """Planned anew each time, the heaviest first, as EPLB and after it SGLang, vLLM and TensorRT-LLM do."""
    gpus, experts = before.held.shape
    return [Plan.of(slots, experts) for slots in greedy(shares, gpus, redundant)]


def in_steps(before: Plan, shares: Shares, redundant: int, least_gain: float = 0.0) -> list[Plan]:
    """Changed where the load has moved: `replan`."""
    plans = [before]
    for share in shares:
        plans.append(replan(plans[-1], share, redundant, least_gain))
    return plans[1:]


def only_for_5_percent(before: Plan, shares: Shares, redundant: int) -> list[Plan]:
    """Changed only where the predicted peak falls by 5 %, as vllm-ascend's default policy does, in few moves."""
    return in_steps(before, shares, redundant, 0.05)


def as_even_as_can_be(before: Plan, shares: Shares, redundant: int) -> list[Plan]:
    """Planned from nothing by `place`, its GPUs named after those before."""
    return [place(share, len(before.held), redundant).aligned(before) for share in shares]


@dataclass(frozen=True)
class Policy:
    """Plans by the load of the last *window* steps, every *interval* steps, once (None) or never (0).

    A plan is in force so many steps *late*.
    """

    system: str
    window: int
    interval: int | None
    planner: Planner
    late: int = 0

    def due(self, steps: Steps) -> list[int]:
        """After which of *steps* plans are made: the first, and the first logged one of each interval after it."""
        if not self.interval or not len(steps):
            return [int(step) for step in steps[:1] if self.interval is None]
        _, first = np.unique((steps - steps[0]) // self.interval, return_index=True)
        return [int(step) for step in steps[first]]


def policies(layers: int) -> list[Policy]:
    """Each system with its defaults and a small grid around them; of vLLM and SGLang every window and interval.

    Defaults of vLLM 0.33 (window 1,000, interval 3,000), SGLang 0.5.23 (1,000 iterations), vllm-ascend (600 passes are
    collected, 50 later is planned, then a layer a pass changes) and TensorRT-LLM (one layer an iteration).
    """
    grid = [
        *(
            Policy("vLLM", window, every, from_nothing)
            for window, every in ((1000, 3000), *product((250, 1000), (250, 1000)))
        ),
        *(Policy("SGLang", every, every, from_nothing) for every in (1000, 250, 3000)),
        *(Policy("vllm-ascend", n, n + 50 + layers, only_for_5_percent, 50 + layers) for n in (600, 200)),
        Policy("TensorRT-LLM", max(layers, 1), max(layers, 1), from_nothing),
        *(Policy("moetrace", window, every, in_steps) for window, every in ((1000, 1000), (1000, 250), (250, 250))),
    ]
    return [Policy("none", 0, 0, in_steps), Policy("static", 1000, None, as_even_as_can_be), *grid]


def replayed(trace: LoadTrace, gpus: int, redundants: Sequence[int], first: int) -> pd.DataFrame:
    """What each policy leaves of the load: a row for each policy, number of redundant slots, layer and block of steps.

    From *first* steps on. *mean_load* and *peak_load* are the tokens of the mean and of the busiest GPU, added up step
    by step, *block_peak* those of the GPU that has most in all steps of the block; *moved* are slots changed in it.
    Experts are in order before the first plan.
    """
    import pandas as pd

    begin = int(trace.steps[0]) + first - 1
    rows: list[tuple[Any, ...]] = []
    for load in trace.by_layer():
        before = np.concatenate([np.zeros((1, load.experts), np.int64), np.cumsum(load.counts, axis=0)])
        for redundant, policy in product(redundants, policies(len(trace.layers))):
            key = (trace.name, policy.system, policy.window, policy.interval, redundant, load.layer)
            plain = in_order(load.experts, gpus, redundant)
            rows += [(*key, *block) for block in _blocks(load, before, policy, plain, redundant, begin)]
    return pd.DataFrame(rows, columns=REPLAY_COLUMNS).astype({"interval": "Int64"})


def _blocks(
    load: LayerLoad, before: Counts, policy: Policy, plain: Plan, redundant: int, begin: int
) -> Iterator[tuple[Any, ...]]:
    """Begin, loads and moves of each block."""
    end = int(load.steps[-1])
    due = policy.due(load.steps[(load.steps >= begin) & (load.steps < end)])
    shares = _window_shares(load, before, due, policy.window)
    plans = [plain, *(policy.planner(plain, shares, redundant) if len(due) else [])]
    starts = np.searchsorted(load.steps, [begin, *(step + policy.late for step in due), end], "right")
    gpu_loads = np.zeros((len(load.steps), len(plain.held)))
    for plan, (start, stop) in zip(plans, pairwise(starts)):
        if start < stop:
            gpu_loads[start:stop] = load.counts[start:stop] @ plan.parts.T
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


def launch(system: str, window: int, interval: int | None, gpus: int, redundant: int) -> str:
    """How *system* is started so that it plans by itself; empty for those that only read files."""
    if system == "vLLM":
        settings = {"window_size": window, "step_interval": interval, "num_redundant_experts": redundant}
        return f"--enable-expert-parallel --enable-eplb --eplb-config '{json.dumps(settings)}'"
    if system == "SGLang":
        return (
            f"--enable-eplb --eplb-rebalance-num-iterations {interval} --ep-size {gpus} "
            f"--ep-num-redundant-experts {redundant}"
        )
    if system == "vllm-ascend":
        settings = {
            "dynamic_eplb": True, "expert_heat_collection_interval": window, "algorithm_execution_interval": 50,
            "num_redundant_experts": redundant,
        }  # fmt: skip
        return f"--enable-expert-parallel --additional-config '{json.dumps({'eplb_config': settings})}'"
    return ""
