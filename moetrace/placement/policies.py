"""Policies: when a plan is made and from what. `systems` has those of each serving system."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moetrace.analysis.states import state_at
from moetrace.analysis.variogram import since_jump
from moetrace.placement.plan import Plan, replan
from moetrace.placement.planner import greedy, members, within_nodes
from moetrace.placement.planning import Planning
from moetrace.trace import LayerLoad, Shares, Steps
from moetrace.words import STABLE

SETTINGS = ("system", "window", "interval", "threshold")
# Utilisation is the mean over so many passes at most: the longest window that SGLang keeps.
MEASURED = 1000
# So many tokens are added to loads before they are divided, as SGLang does.
LEAST_LOAD = 1e-5
# Steps whose mean is the present value of a moving load: on gpt-moe-8e-a as good as 250, with half of the moves.
MOVING = 500
# Steps of history from which the state at a planning step is known: the cost is then the same in a trace of any length.
LOOKED_BACK = 5000
# Shares of experts that are planned for in one go: plans of a policy are made as they are asked for.
AT_ONCE = 1_000_000
# Utilisation is compared to so many digits, which all BLAS kernels agree on.
DIGITS = 9


@dataclass(frozen=True, eq=False)
class Observed:
    """What a policy sees of a layer: at each planning step of *steps* the *shares* (steps, experts) of its *window*.

    Nothing of *load* after a step may be used for the plan that is made there. Policies of a layer share *made*.
    """

    load: LayerLoad
    steps: Sequence[int]
    window: int
    shares: Shares
    made: dict[tuple[Planning, int, int], Plan] = field(default_factory=dict)

    def recent(self, step: int) -> LayerLoad:
        """The load of the window that ends at *step*."""
        return self.load.until(step).last(self.window)

    def planned(self, step: int, before: Plan, planning: Planning) -> Plan:
        """The plan from scratch at *step* by the window; *made* has those that other policies made of it."""
        key = planning, step, self.window
        if key not in self.made:
            share = self.shares[self.steps.index(step)]
            self.made[key] = planning.place(planning.load(self.recent(step).counts, share), before)
        return self.made[key]

    @cached_property
    def settled(self) -> list[tuple[bool, int]]:
        """At each planning step whether the layer is stable, and the first step after its last jump."""
        histories = (self.load.until(step).last(LOOKED_BACK) for step in self.steps)
        return [(state_at(own, int(own.steps[-1])) == STABLE, int(since_jump(own).steps[0])) for own in histories]


Planner = Callable[[Observed, Plan, Planning], Iterator[Plan]]
"""The plan after each planning step, from the one that is active before the first."""


@dataclass(frozen=True)
class Policy:
    """Plans by the load of the last *window* steps, every *interval* steps, once (None) or never (0).

    A plan is active so many steps *late*. *threshold* is the utilisation of all layers above which none is made, see
    `active_plan_after_gate`. *even* systems split the tokens of an expert evenly among its replicas; the others split
    them as `Planning.dispatch` has it.
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
        """What distinguishes it from the others: `SETTINGS`."""
        return self.system, self.window, self.interval, self.threshold

    def due(self, steps: Steps) -> list[int]:
        """After which of *steps* plans are made: the first, and the first logged one of each interval after it."""
        if not self.interval or not len(steps):
            return [int(step) for step in steps[:1] if self.interval is None]
        _, first = np.unique((steps - steps[0]) // self.interval, return_index=True)
        return [int(step) for step in steps[first]]


def plan_from_scratch(seen: Observed, before: Plan, planning: Planning) -> Iterator[Plan]:
    """Planned from scratch each time, the heaviest first, as EPLB and TensorRT-LLM do; nodes do not count."""
    for shares in _in_parts(seen.shares):
        for slots in greedy(shares, planning.gpus, planning.redundant):
            yield Plan.of(slots, before.held.shape[1])


def plan_as_eplb(seen: Observed, before: Plan, planning: Planning) -> Iterator[Plan]:
    """`plan_from_scratch`; where groups stay on nodes, groups first (EPLB's hierarchical mode, SGLang, vLLM)."""
    if not planning.on_nodes:
        yield from plan_from_scratch(seen, before, planning)
        return
    for shares in _in_parts(seen.shares):
        rows, experts = shares.shape
        by_group = shares.reshape(rows, planning.groups, -1)
        homes = members(greedy(by_group.sum(axis=2), planning.nodes, 0), by_group.shape[2])
        slots = within_nodes(shares, homes, planning.gpus, planning.redundant, greedy)
        yield from (Plan.of(row, experts) for row in slots)


def _in_parts(shares: Shares) -> Iterator[Shares]:
    """The rows, so many at a time that no part has more than `AT_ONCE` shares, unless a row has."""
    rows = max(1, AT_ONCE // shares.shape[1])
    return (shares[row : row + rows] for row in range(0, len(shares), rows))


def replan_above_min_gain(seen: Observed, before: Plan, planning: Planning) -> Iterator[Plan]:
    """Changed only where the predicted peak falls by 5%, as vllm-ascend's default policy does, in few moves."""
    plan = before
    for share in seen.shares:
        plan = replan(plan, share, planning.redundant, 0.05)
        yield plan


def replan_by_steps(seen: Observed, before: Plan, planning: Planning) -> Iterator[Plan]:
    """Planned once, then changed where the load has moved, judged by the single steps: `Planning.replan`."""
    plan = before
    for step, share in zip(seen.steps, seen.shares):
        if step == seen.steps[0]:
            plan = seen.planned(step, before, planning)
        else:
            plan = planning.replan(plan, planning.load(seen.recent(step).counts, share))
        yield plan


def plan_once_for_balance(seen: Observed, before: Plan, planning: Planning) -> Iterator[Plan]:
    """Planned from scratch for the single steps of the window, GPUs numbered as before."""
    return (seen.planned(step, before, planning) for step in seen.steps)


def replan_by_state(seen: Observed, before: Plan, planning: Planning) -> Iterator[Plan]:
    """Planned once a layer settles, by its window; changed at every planning step while it moves.

    While it moves the mean of its last `MOVING` steps counts. The plan of a stable layer is changed only when its load
    has jumped, by the load since the jump.
    """
    plan, steady, planned_at = before, False, -1
    for share, step, (stable, since) in zip(seen.shares, seen.steps, seen.settled):
        if not (stable and steady and since <= planned_at):
            present = seen.load.between(since, step)
            whole = stable and since <= step - seen.window
            known = share if whole else present.last(MOVING).mean_shares
            plan = planning.replan(plan, planning.load(present.last(seen.window).counts, known))
            planned_at = step
        steady = stable
        yield plan


def utilisation(mean: Shares, busiest: Shares) -> float:
    """The *mean* GPU's load over the *busiest* one's, both (passes,), averaged over passes, as SGLang defines it.

    The utilisation of a pass without tokens is 1.
    """
    return float(((mean + LEAST_LOAD) / (busiest + LEAST_LOAD)).mean())


def utilisation_by_plan(seen: Observed, plans: Sequence[Plan], planning: Planning) -> Shares:
    """The `utilisation` since the last planning step under each of the *plans* that may be active by then.

    *plans* are the one before all planning steps and those after each; shape (steps, plans), 0 for later plans.
    """
    found = np.zeros((len(seen.steps), len(plans)))
    for index, row in enumerate(found):
        now = seen.steps[index]
        since = max(seen.steps[index - 1], now - MEASURED) if index else now - MEASURED
        counts = seen.load.between(since + 1, now).counts
        mean = counts.sum(axis=1) / planning.gpus
        row[: index + 1] = [
            utilisation(mean, planning.split.by_tokens.peaks(plan.held, counts)) for plan in plans[: index + 1]
        ]
    return found


def active_plan_after_gate(busy: Shares, threshold: float) -> list[int]:
    """Which plan is active after each planning step, where none is made while utilisation is above *threshold*.

    As SGLang's gate does, whose utilisation is the mean over layers: *busy* (steps, plans), see `utilisation_by_plan`.

    >>> active_plan_after_gate(np.array([[0.8, 0.0, 0.0], [0.8, 0.95, 0.0]]), 0.9)
    [1, 1]
    """
    found, now = [], 0
    for index, row in enumerate(busy.round(DIGITS)):
        now = now if row[now] > threshold else index + 1
        found.append(now)
    return found
