"""Policies: when a plan is made anew and from what, as serving systems do it, and how they are started so.

`POLICIES` is the registry: what a system does, with its defaults and a small grid around them, is one entry.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np

from moetrace.analysis.jumps import since_jump
from moetrace.analysis.states import STABLE, state_at
from moetrace.placement.expert_maps import sglang_flags
from moetrace.placement.packing import Ints
from moetrace.placement.plan import Plan, replan
from moetrace.placement.planner import greedy
from moetrace.placement.planning import Planning
from moetrace.trace import Counts, LayerLoad, Shares, Steps

SETTINGS = ("system", "window", "interval", "threshold")
# Utilisation is the mean over so many passes at most: the longest window that SGLang keeps.
MEASURED = 1000
# So many tokens are added to loads before they are divided, as SGLang does.
LEAST_LOAD = 1e-5
# Steps that say what a moving load is now: on gpt-moe-8e-a as good as 250, with half of the moves.
MOVING = 500
# Steps that the state at a look is told from: a look then takes the same time at the end of a trace of any length.
LOOKED_BACK = 5000
# Shares of experts that are planned for in one go: plans of a policy are made as they are asked for.
AT_ONCE = 1_000_000


@dataclass(frozen=True, eq=False)
class Looks:
    """What a policy sees of a layer: at each of *steps* the *shares* (looks, experts) of the load of its *window*.

    Nothing of *load* after a step is for the plan that is made there.
    """

    load: LayerLoad
    steps: Sequence[int]
    window: int
    shares: Shares

    def since_last(self, look: int) -> Counts:
        """The counts since the look before, of at most `MEASURED` steps, shape (steps, experts)."""
        before = self.steps[look - 1] if look else self.steps[look] - MEASURED
        return self.load.between(max(before, self.steps[look] - MEASURED) + 1, self.steps[look]).counts

    @cached_property
    def settled(self) -> list[tuple[bool, int]]:
        """At each look whether the layer is stable, and the first step after its last jump."""
        histories = (self.load.until(step).last(LOOKED_BACK) for step in self.steps)
        return [(state_at(own, int(own.steps[-1])) == STABLE, int(since_jump(own).steps[0])) for own in histories]


Planner = Callable[[Looks, Plan, Planning], Iterator[Plan]]
"""The plan after each look, from the one in force before the first."""


def from_nothing(looks: Looks, before: Plan, planning: Planning) -> Iterator[Plan]:
    """Planned anew each time, the heaviest first, as EPLB and after it TensorRT-LLM do; nodes do not count."""
    for shares in _in_parts(looks.shares):
        for slots in greedy(shares, planning.gpus, planning.redundant):
            yield Plan.of(slots, before.held.shape[1])


def as_eplb(looks: Looks, before: Plan, planning: Planning) -> Iterator[Plan]:
    """`from_nothing`; where groups stay on nodes first groups to nodes, as EPLB, SGLang and vLLM do."""
    if not planning.on_nodes:
        yield from from_nothing(looks, before, planning)
        return
    for shares in _in_parts(looks.shares):
        for slots in _on_nodes(shares, planning):
            yield Plan.of(slots, shares.shape[1])


def _on_nodes(shares: Shares, planning: Planning) -> Ints:
    """Slots (rows, gpus, slots) as EPLB's hierarchical mode fills them for *shares* (rows, experts)."""
    (rows, experts), nodes = shares.shape, planning.nodes
    size = experts // planning.groups
    groups = greedy(shares.reshape(rows, planning.groups, size).sum(axis=2), nodes, 0)  # (rows, nodes, groups)
    homes = (groups[..., None] * size + np.arange(size)).reshape(rows * nodes, -1)
    own = np.take_along_axis(np.repeat(shares, nodes, axis=0), homes, axis=1)
    local = greedy(own, planning.gpus // nodes, planning.redundant // nodes).reshape(rows * nodes, -1)
    return np.take_along_axis(homes, local, axis=1).reshape(rows, planning.gpus, -1)


def _in_parts(shares: Shares) -> Iterator[Shares]:
    """The rows, so many at a time that no part has more than `AT_ONCE` shares, unless a row has."""
    rows = max(1, AT_ONCE // shares.shape[1])
    return (shares[row : row + rows] for row in range(0, len(shares), rows))


def utilisation(mean: Shares, busiest: Shares) -> float:
    """The *mean* GPU's load over the *busiest* one's, both (passes,), on the mean over passes, as SGLang has it.

    A pass without tokens is as even as can be.
    """
    return float(((mean + LEAST_LOAD) / (busiest + LEAST_LOAD)).mean())


def under_each(looks: Looks, plans: Sequence[Plan], planning: Planning) -> Shares:
    """The `utilisation` since the look before, of each look under each of the *plans* that may be in force by then.

    *plans* are the one before all looks and those after each; shape (looks, plans), 0 for those that come later.
    """
    found = np.zeros((len(looks.steps), len(plans)))
    for look, row in enumerate(found):
        seen = looks.since_last(look)
        mean = seen.sum(axis=1) / planning.gpus
        row[: look + 1] = [utilisation(mean, planning.split.peaks(plan.held, seen)) for plan in plans[: look + 1]]
    return found


def in_force(busy: Shares, threshold: float) -> list[int]:
    """Which plan is in force after each look, where none is made while utilisation is above *threshold*.

    As SGLang's gate has it, whose utilisation is the mean over layers: *busy* (looks, plans) is that of `under_each`.

    >>> in_force(np.array([[0.8, 0.0, 0.0], [0.8, 0.95, 0.0]]), 0.9)
    [1, 1]
    """
    found, now = [], 0
    for look, row in enumerate(busy):
        now = now if row[now] > threshold else look + 1
        found.append(now)
    return found


def only_for_5_percent(looks: Looks, before: Plan, planning: Planning) -> Iterator[Plan]:
    """Changed only where the predicted peak falls by 5 %, as vllm-ascend's default policy does, in few moves."""
    plan = before
    for share in looks.shares:
        plan = replan(plan, share, planning.redundant, 0.05)
        yield plan


def in_steps(looks: Looks, before: Plan, planning: Planning) -> Iterator[Plan]:
    """Changed where the load has moved, judged by the single steps of the window: `Planning.replan`."""
    plan = before
    for step, share in zip(looks.steps, looks.shares):
        plan = planning.replan(plan, planning.load(looks.load.until(step).last(looks.window).counts, share))
        yield plan


def as_even_as_can_be(looks: Looks, before: Plan, planning: Planning) -> Iterator[Plan]:
    """Planned from nothing for the single steps of the window, its GPUs named after those before."""
    for step, share in zip(looks.steps, looks.shares):
        yield planning.place(planning.load(looks.load.until(step).last(looks.window).counts, share), before)


def by_state(looks: Looks, before: Plan, planning: Planning) -> Iterator[Plan]:
    """Planned once a layer settles, by its window; changed at every look while it moves, by its last `MOVING` steps.

    Of a stable layer a plan is changed only when its load has jumped, by what came since.
    """
    plan, steady, planned_at = before, False, -1
    for share, step, (stable, since) in zip(looks.shares, looks.steps, looks.settled):
        if not (stable and steady and since <= planned_at):
            present = looks.load.between(since, step)
            whole = stable and since <= step - looks.window
            known = share if whole else present.last(MOVING).mean_shares
            plan = planning.replan(plan, planning.load(present.last(looks.window).counts, known))
            planned_at = step
        steady = stable
        yield plan


@dataclass(frozen=True)
class Policy:
    """Plans by the load of the last *window* steps, every *interval* steps, once (None) or never (0).

    A plan is in force so many steps *late*. *threshold* is the utilisation of all layers above which none is made, see
    `in_force`. *even* systems split the tokens of an expert evenly among its replicas, the others as they are told to.
    """

    system: str
    window: int
    interval: int | None
    plans: Planner
    late: int = 0
    threshold: float | None = None
    even: bool = False

    @property
    def settings(self) -> tuple[str, int, int | None, float | None]:
        """What tells it from the others: `SETTINGS`."""
        return self.system, self.window, self.interval, self.threshold

    def due(self, steps: Steps) -> list[int]:
        """After which of *steps* plans are made: the first, and the first logged one of each interval after it."""
        if not self.interval or not len(steps):
            return [int(step) for step in steps[:1] if self.interval is None]
        _, first = np.unique((steps - steps[0]) // self.interval, return_index=True)
        return [int(step) for step in steps[first]]


Launch = Callable[[Policy, Planning, int], str]
"""What starts a system with a policy, for so many experts."""


class System(NamedTuple):
    """What a system can do: its *policies* for a model of so many layers, its defaults first, and how it is started.

    *launch* is None where plans do not come from the system itself. One that is *planned* has to take plans while it
    runs, from `rebalance_experts`: no system does as it is.
    """

    policies: Callable[[int], list[Policy]]
    launch: Launch | None
    planned: bool = False


def _vllm(_layers: int) -> list[Policy]:
    grid = dict.fromkeys([(1000, 3000), *product((1000, 250), (1000, 250))])
    return [Policy("vLLM", window, every, as_eplb, even=True) for window, every in grid]


def _sglang(_layers: int) -> list[Policy]:
    own = [Policy("SGLang", every, every, as_eplb) for every in (1000, 250, 3000)]
    return [*own, Policy("SGLang", 1000, 1000, as_eplb, threshold=0.9)]


def _ascend(layers: int) -> list[Policy]:
    late = 50 + layers
    return [Policy("vllm-ascend", n, n + late, only_for_5_percent, late, even=True) for n in (600, 200)]


def _tensorrt_llm(layers: int) -> list[Policy]:
    # A layer an iteration, then one without; what came since decays by 0.9 a step, as scattered as a mean of 19 steps.
    return [Policy("TensorRT-LLM", min(layers + 1, 19), layers + 1, from_nothing, even=True)]


def _moetrace(_layers: int) -> list[Policy]:
    return [Policy("moetrace", 1000, every, in_steps) for every in (1000, 500)]


def _by_state(_layers: int) -> list[Policy]:
    return [Policy("moetrace by state", 1000, MOVING, by_state)]


def _launch_nothing(_policy: Policy, _planning: Planning, _experts: int) -> str:
    return ""


def _launch_vllm(policy: Policy, planning: Planning, _experts: int) -> str:
    settings = {
        "window_size": policy.window, "step_interval": policy.interval, "num_redundant_experts": planning.redundant,
    }  # fmt: skip
    return f"--enable-expert-parallel --enable-eplb --eplb-config '{json.dumps(settings)}'"


def _launch_sglang(policy: Policy, planning: Planning, _experts: int) -> str:
    # Utilisation is only measured where it is reported.
    gate = (
        f" --eplb-min-rebalancing-utilization-threshold {policy.threshold} --expert-balancedness-report-mode server_log"
        if policy.threshold is not None
        else ""
    )
    return (
        f"--enable-eplb --eplb-rebalance-num-iterations {policy.interval} "
        f"{sglang_flags(planning.gpus, planning.redundant, planning.dispatch)}{gate}"
    )


def _launch_ascend(policy: Policy, planning: Planning, _experts: int) -> str:
    settings = {
        "dynamic_eplb": True, "expert_heat_collection_interval": policy.window, "algorithm_execution_interval": 50,
        "num_redundant_experts": planning.redundant,
    }  # fmt: skip
    return f"--enable-expert-parallel --additional-config '{json.dumps({'eplb_config': settings})}'"


def _launch_tensorrt_llm(_policy: Policy, planning: Planning, experts: int) -> str:
    return (
        f"moe_config: {{backend: WIDEEP, load_balancer: {{num_slots: {experts + planning.redundant}, "
        f"layer_updates_per_iter: 1}}}}, enable_attention_dp: true, moe_expert_parallel_size: {planning.gpus}"
    )


# Defaults of vLLM 0.33 (window 1,000, interval 3,000), SGLang 0.5.23 (1,000 iterations, no gate), vllm-ascend (600
# passes are collected, 50 later is planned, then a layer a pass changes) and TensorRT-LLM (one layer an iteration).
POLICIES: Mapping[str, System] = {
    "none": System(lambda _: [Policy("none", 0, 0, in_steps)], _launch_nothing),
    "static": System(lambda _: [Policy("static", 1000, None, as_even_as_can_be)], None),
    "vLLM": System(_vllm, _launch_vllm),
    "SGLang": System(_sglang, _launch_sglang),
    "vllm-ascend": System(_ascend, _launch_ascend),
    "TensorRT-LLM": System(_tensorrt_llm, _launch_tensorrt_llm),
    "moetrace": System(_moetrace, None, planned=True),
    "moetrace by state": System(_by_state, None, planned=True),
}


def policies(layers: int) -> list[Policy]:
    """All policies that are replayed on a trace of so many *layers*, those of each system together."""
    return [policy for system in POLICIES.values() for policy in system.policies(layers)]


def launch(policy: Policy, planning: Planning, experts: int) -> str:
    """How the system of *policy* is started so that it plans by itself; empty where the plan comes from a file."""
    start = POLICIES[policy.system].launch
    return "" if start is None else start(policy, planning, experts)
