"""How plans are made and scored: for how many GPUs, judged by what, changed when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moetrace.analysis.imbalance import max_over_mean
from moetrace.errors import SettingError
from moetrace.placement.dispatch import EVEN, Dispatch
from moetrace.placement.nodes import check_nodes, nodes_per_token, place_on_nodes, replan_on_nodes
from moetrace.placement.plan import TOLERANCE, Evenness, Load, Plan, evenness, in_order, place, replan, slots_of
from moetrace.placement.step_peak import StepLoad
from moetrace.trace import Counts, Shares

STEPS, MEAN = JUDGES = ("steps", "mean")
# With fewer steps their covariance is hardly one: measured on the sample traces, from 20 on plans by them are better
# than by the mean alone. More than 1,000 make none better.
FEWEST_STEPS = 20
MOST_STEPS = 1000
# With more experts plans are judged by the mean alone: the loads of hundreds of experts on a GPU even out, and there
# are as many covariances as pairs of experts.
MOST_EXPERTS = 2000


class ByNode(NamedTuple):
    """*node_peak_over_mean* is the load of the busiest node over that of the mean one, see also `nodes_per_token`."""

    node_peak_over_mean: float
    nodes_per_token: float


@dataclass(frozen=True)
class Planning:
    """Plans for *gpus*, with *redundant* further slots, changed as `replan` does with *least_gain* and *tolerance*.

    *judge* says by what a plan is judged: by single ``steps``, each of which waits for its own busiest GPU, or by the
    ``mean`` load alone. *dispatch* says how the tokens of an expert are split among its replicas, see `Dispatch`, on so
    many *nodes*. With *groups* on several nodes, the experts of each group stay on one, for group-limited routing,
    where a token takes *top_groups* of them (half of them by default, as DeepSeek-V3 does, with 4 of 8).
    Raises `SettingError` for settings that there are not, or that do not fit together.

    >>> import moetrace as mt
    >>> load = mt.synthetic_trace([mt.settling(500, steps=2000)]).layer(0).until(1000).last(500)
    >>> planning = mt.Planning(gpus=4)
    >>> plan = planning.place(planning.load(load.counts, load.mean_shares))
    >>> planning.evenness(plan, load.counts).balance > planning.evenness(planning.in_order(8), load.counts).balance
    True
    """

    gpus: int
    redundant: int = 0
    least_gain: float = 0.0
    tolerance: float = TOLERANCE
    judge: str = STEPS
    dispatch: str = EVEN
    nodes: int = 1
    groups: int = 1
    top_groups: int | None = None

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise SettingError(f"experts are placed on one GPU or more, not on {self.gpus}")
        if self.nodes < 1 or self.gpus % self.nodes:
            raise SettingError(f"{self.gpus} GPUs are not the same number on each of {self.nodes} nodes")
        if self.judge not in JUDGES:
            raise SettingError(f"a plan is judged by {' or '.join(JUDGES)}, not by {self.judge!r}")
        if self.top_groups is not None and not 1 <= self.top_groups <= self.groups:
            raise SettingError(f"a token cannot take {self.top_groups} of {self.groups} groups")
        Dispatch(self.dispatch)  # raises for one that there is not

    @property
    def split(self) -> Dispatch:
        """How tokens are split."""
        return Dispatch(self.dispatch, self.nodes)

    @property
    def on_nodes(self) -> bool:
        """Whether groups of experts stay on one node."""
        return self.groups > 1 and self.nodes > 1

    def check(self, experts: int) -> None:
        """Raise `SettingError` where the slots do not fill the GPUs evenly, or groups do not fill the nodes."""
        slots_of(experts, self.gpus, self.redundant)
        nodes = self.nodes if self.on_nodes else 1
        check_nodes(experts, experts + self.redundant, self.groups, nodes, self.gpus)

    def in_order(self, experts: int) -> Plan:
        """Neighbours together, see `plan.in_order`."""
        return in_order(experts, self.gpus, self.redundant)

    def judged_by(self, experts: int, steps: int) -> str:
        """By what plans for so many *experts* are judged after so many *steps*: `FEWEST_STEPS`, `MOST_EXPERTS`."""
        return self.judge if steps >= FEWEST_STEPS and experts <= MOST_EXPERTS else MEAN

    def load(self, seen: Counts, mean: Shares) -> Load:
        """What is planned for, where *mean* (experts,) is forecast after steps *seen* with counts (steps, experts)."""
        if self.judged_by(len(mean), len(seen)) == MEAN:
            return mean if self.dispatch == EVEN else StepLoad(mean[None])
        rows = np.linspace(0, len(seen) - 1, min(len(seen), MOST_STEPS)).round().astype(np.int64)
        return StepLoad.of(seen[rows], mean)

    def place(self, load: Load, before: Plan | None = None) -> Plan:
        """Planned from nothing, see `plan.place`; GPUs are named after those *before*."""
        if self.on_nodes:
            plan = place_on_nodes(load, self.gpus, self.redundant, self.groups, self.split)
        else:
            plan = place(load, self.gpus, self.redundant, self.split)
        return plan if before is None else plan.aligned(before, self.nodes)

    def replan(self, before: Plan, load: Load, tolerance: float | None = None) -> Plan:
        """The plan *before*, changed for *load*, see `plan.replan`; with another *tolerance* where it is given."""
        near = self.tolerance if tolerance is None else tolerance
        if self.on_nodes:
            return replan_on_nodes(before, load, self.redundant, self.groups, self.split, self.least_gain, near)
        return replan(before, load, self.redundant, self.least_gain, near, self.split)

    def evenness(self, plan: Plan, counts: Counts) -> Evenness:
        """How even *plan* leaves *counts* (steps, experts)."""
        return evenness(plan, counts, self.split)

    def by_node(self, plan: Plan, counts: Counts, top_k: int | None) -> ByNode:
        """What *plan* makes of *counts* (steps, experts) on nodes, where a token takes *top_k* experts."""
        total = counts.sum(axis=0)
        loads = self.split.loads(plan.held, total[None]).reshape(self.nodes, -1).sum(axis=1)
        top_groups = self.top_groups or max(self.groups // 2, 1)
        token = nodes_per_token(plan.held, total / total.sum(), self.nodes, top_k, self.groups, top_groups)
        return ByNode(max_over_mean(loads), token)
