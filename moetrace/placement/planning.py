"""How plans are made and scored: for how many GPUs on how many nodes, with how many redundant experts, changed when.

`Planning` has all settings of a plan. At the end is `rebalance_experts`, the interface of EPLB: a plan of all layers as
arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moetrace.analysis.imbalance import max_over_mean
from moetrace.errors import SettingError
from moetrace.placement.dispatch import EVEN, EVENLY, Dispatch, Held
from moetrace.placement.plan import TOLERANCE, Evenness, Plan, default_plan, evenness, matched, place, replan, slots_of
from moetrace.placement.planner import Ints, members, planned, within_nodes
from moetrace.placement.step_peak import StepLoad
from moetrace.placement.step_time import BY_TOKENS, StepTime
from moetrace.trace import Counts, Shares

# With fewer steps their covariance is hardly one: measured on the sample traces, from 20 on plans by them are better
# than by the mean alone. More than 1,000 make none better.
FEWEST_STEPS, MOST_STEPS = 20, 1000
# There are as many covariances as pairs of experts. No published model has more than 512 experts in a layer.
MOST_EXPERTS = 2000
# Layers from which a mean over layers is computed where that takes long: no sample trace has more.
MOST_LAYERS = 12
# Sets of groups drawn to estimate on how many nodes a token is: their mean is known to about 0.01.
DRAWS = 2000


class ByNode(NamedTuple):
    """*node_peak_over_mean* is the load of the busiest node over the mean node's, see also `nodes_per_token`."""

    node_peak_over_mean: float
    nodes_per_token: float


@dataclass(frozen=True)
class Planning:
    """Plans for *gpus*, with *redundant* further slots, changed as `replan` does with *least_gain* and *tolerance*.

    A plan is judged by single steps, each of which waits for its own busiest GPU; after fewer than `FEWEST_STEPS` by
    the mean load. *dispatch* is how the tokens of an expert are split among its replicas, see `Dispatch`, on so
    many *nodes*. With *groups* on several nodes, the experts of each group stay on one, for group-limited routing,
    where a token takes *top_groups* of them (half of them by default, as DeepSeek-V3 does, with 4 of 8). *time* is how
    long an expert takes for its tokens: plans, scores and policies count time.
    Raises `SettingError` for settings that are invalid or do not fit together.

    >>> import moetrace as mt
    >>> load = mt.synthetic_trace([mt.settling(500, steps=2000)]).layer(0).until(1000).last(500)
    >>> planning = mt.Planning(gpus=4)
    >>> plan = planning.place(planning.load(load.counts, load.mean_shares))
    >>> planning.evenness(plan, load.counts).balance > planning.evenness(planning.default(8), load.counts).balance
    True
    """

    gpus: int
    redundant: int = 0
    least_gain: float = 0.0
    tolerance: float = TOLERANCE
    dispatch: str = EVEN
    nodes: int = 1
    groups: int = 1
    top_groups: int | None = None
    time: StepTime = BY_TOKENS

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise SettingError(f"experts are placed on one GPU or more, not on {self.gpus}")
        if self.nodes < 1 or self.gpus % self.nodes:
            raise SettingError(f"{self.gpus} GPUs are not the same number on each of {self.nodes} nodes")
        if self.top_groups is not None and not 1 <= self.top_groups <= self.groups:
            raise SettingError(f"a token cannot take {self.top_groups} of {self.groups} groups")
        Dispatch(self.dispatch)  # raises for an unknown one

    @property
    def split(self) -> Dispatch:
        """How tokens are split, and how long experts take for them."""
        return Dispatch(self.dispatch, self.nodes, self.time)

    @property
    def evenly(self) -> Dispatch:
        """The same for a system that splits tokens evenly."""
        return Dispatch(time=self.time)

    @property
    def on_nodes(self) -> bool:
        """Whether groups of experts stay on one node."""
        return self.groups > 1 and self.nodes > 1

    def with_redundant(self, redundant: int) -> Planning:
        """The same with another number of redundant experts."""
        return replace(self, redundant=redundant)

    def check(self, experts: int) -> None:
        """Raise `SettingError` where the slots do not fill the GPUs evenly, or groups do not fill the nodes."""
        if experts > MOST_EXPERTS:
            raise SettingError(f"plans are made for up to {MOST_EXPERTS:,} experts in a layer, not for {experts:,}")
        slots_of(experts, self.gpus, self.redundant)
        nodes = self.nodes if self.on_nodes else 1
        check_nodes(experts, experts + self.redundant, self.groups, nodes, self.gpus)

    def fits(self, experts: int) -> bool:
        """Whether `check` passes."""
        try:
            self.check(experts)
        except SettingError:
            return False
        return True

    def default(self, experts: int) -> Plan:
        """The default placement, see `default_plan`."""
        return default_plan(experts, self.gpus, self.redundant)

    def load(self, seen: Counts, mean: Shares) -> StepLoad:
        """What is planned for, where *mean* (experts,) is forecast after steps *seen* with counts (steps, experts)."""
        if len(seen) < FEWEST_STEPS:
            tokens = seen.sum(axis=1).mean() if len(seen) else 1
            return StepLoad.of(mean[None] * tokens, mean)
        rows = np.linspace(0, len(seen) - 1, min(len(seen), MOST_STEPS)).round().astype(np.int64)
        return StepLoad.of(seen[rows], mean)

    def place(self, load: StepLoad, before: Plan | None = None) -> Plan:
        """A plan from scratch, see `plan.place`; its GPUs are numbered as in the plan *before*."""
        if not self.on_nodes:
            plan = place(load, self.gpus, self.redundant, self.split)
        else:  # every group on one of the nodes, and its replicas too, as EPLB does
            own = [self._on_node(load, home) for home in homes_of(load, self.groups, self.nodes)]
            plan = Plan.of(np.concatenate(own), len(load.mean))
        return plan if before is None else plan.aligned(before, self.nodes)

    def replan(self, before: Plan, load: StepLoad, tolerance: float | None = None) -> Plan:
        """The plan *before*, changed for *load*, see `plan.replan`; with another *tolerance* where it is given.

        Where groups stay on nodes it is changed node by node; experts stay on their nodes where those are whole groups
        and even enough.
        """
        near = self.tolerance if tolerance is None else tolerance
        if not self.on_nodes:
            return replan(before, load, self.redundant, self.least_gain, near, self.split)
        if before.held.sum() != len(load.mean) + self.redundant:
            return self.place(load, before)
        fresh, experts = homes_of(load, self.groups, self.nodes), len(load.mean)
        by_node = before.held.reshape(self.nodes, -1, experts)  # (nodes, gpus of a node, experts)
        own, size = [np.flatnonzero(held.any(axis=0)) for held in by_node], experts // self.groups
        whole = all(len(home) == fresh.shape[1] and np.isin(np.bincount(home // size), (0, size)).all() for home in own)
        busiest = [load.mean[np.array(homes)].sum(axis=1).max() for homes in (own if whole else fresh, fresh)]
        if whole and busiest[0] <= busiest[1] + near / self.nodes:
            homes = np.array(own)
        else:
            homes = fresh[matched(np.array([[len(np.intersect1d(new, old)) for old in own] for new in fresh]))]
        slots, local = [], replace(self.split, nodes=1)
        for held, was, home in zip(by_node, own, homes):
            if np.array_equal(was, home):
                few = self.redundant // self.nodes
                plan = replan(Plan(held[:, home]), load.of_experts(home), few, self.least_gain, near, local)
                slots.append(home[plan.slots])
            else:
                slots.append(Plan.of(self._on_node(load, home), experts).aligned(Plan(held)).slots)
        return Plan.of(np.concatenate(slots), experts)

    def _on_node(self, load: StepLoad, home: Ints) -> Ints:
        """The experts of *home* in the slots of one node, planned from scratch, shape (gpus of a node, slots)."""
        gpus, redundant = self.gpus // self.nodes, self.redundant // self.nodes
        return home[place(load.of_experts(home), gpus, redundant, replace(self.split, nodes=1)).slots]

    def evenness(self, plan: Plan, counts: Counts) -> Evenness:
        """How even *plan* leaves *counts* (steps, experts)."""
        return evenness(plan, counts, self.split)

    def by_node(self, plan: Plan, counts: Counts, top_k: int | None) -> ByNode:
        """What *plan* makes of *counts* (steps, experts) on nodes, where a token takes *top_k* experts."""
        total = counts.sum(axis=0)
        loads = self.split.by_tokens.loads(plan.held, total[None]).reshape(self.nodes, -1).sum(axis=1)
        top_groups = self.top_groups or max(self.groups // 2, 1)
        token = nodes_per_token(plan.held, total / total.sum(), self.nodes, top_k, self.groups, top_groups)
        return ByNode(max_over_mean(loads), token)


def spread(layers: Sequence[int], most: int = MOST_LAYERS) -> list[int]:
    """Up to so many of *layers*, spread evenly.

    >>> spread(range(58), 3)
    [0, 28, 57]
    """
    few = min(most, len(layers))
    return [layers[round(i)] for i in np.linspace(0, len(layers) - 1, few)]


def usual_gpus(experts: int) -> int:
    """GPUs for so many *experts* where nothing is said: the 8 of a node, or fewer where those have no two each.

    1 where no number divides the experts.

    >>> usual_gpus(256), usual_gpus(8), usual_gpus(7)
    (8, 4, 1)
    """
    return next((gpus for gpus in (8, 4, 2) if experts % gpus == 0 and experts >= 2 * gpus), 1)


def check_nodes(experts: int, slots: int, groups: int, nodes: int, gpus: int) -> None:
    """Raise `SettingError` where groups, slots and GPUs are not the same number on each of the *nodes*."""
    if min(nodes, gpus) < 1 or gpus % nodes:
        raise SettingError(f"{gpus} GPUs are not the same number on each of {nodes} nodes")
    if groups % nodes:
        raise SettingError(f"{groups} groups are not the same number on each of {nodes} nodes")
    if experts % groups:
        raise SettingError(f"{experts} experts are not the same number in each of {groups} groups")
    if slots < experts or slots % nodes:
        raise SettingError(f"{slots} replicas do not hold {experts} experts evenly on {nodes} nodes")
    slots_of(experts // nodes, gpus // nodes, (slots - experts) // nodes)


def homes_of(load: StepLoad, groups: int, nodes: int) -> Ints:
    """The experts of each node, whole groups, as even as possible, shape (nodes, experts of a node)."""
    size = load.steps.shape[1] // groups
    summed = StepLoad(load.steps.reshape(len(load.steps), groups, size).sum(axis=2))
    return np.sort(members(place(summed, nodes).slots, size), axis=1)


def nodes_per_token(
    held: Held, shares: Shares, nodes: int, top_k: int | None, groups: int = 1, top_groups: int = 1
) -> float:
    """On how many of the *nodes* the experts of a token are on average, with experts as in *held* (gpus, experts).

    Counts do not show which experts a token takes together, so that is assumed: a token takes *top_groups* groups, one
    after the other by their share of the load, none twice, and from each of them the same number of experts, in all
    *top_k*, each by its share and independently. A replica has the same part of an expert's tokens as any other.
    NaN where *top_k* is not known.

    >>> held = np.eye(8)  # 8 experts on 8 GPUs, 2 on each of 4 nodes
    >>> round(nodes_per_token(held, np.full(8, 1 / 8), 4, top_k=2, groups=4, top_groups=2), 6)
    2.0
    """
    if top_k is None:
        return float("nan")
    gpus, experts = held.shape
    parts = EVENLY.expected_parts(held) * shares
    on = parts.reshape(nodes, gpus // nodes, groups, experts // groups).sum(axis=(1, 3))  # (nodes, groups)
    weight = on.sum(axis=0)
    missed = (1 - np.divide(on, weight, out=np.zeros_like(on), where=weight > 0)) ** (top_k / top_groups)
    with np.errstate(divide="ignore"):
        taken_by = np.log(weight) + np.random.default_rng(0).gumbel(size=(DRAWS, groups))
    taken = np.argsort(-taken_by, axis=1, kind="stable")[:, :top_groups]
    return float(nodes - missed[:, taken].prod(axis=2).mean(axis=1).sum())


# --- the interface of EPLB --------------------------------------------------------------------


def rebalance_experts(
    weight: ArrayLike,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    before: ArrayLike | None = None,
    tolerance: float = TOLERANCE,
) -> tuple[Ints, Ints, Ints]:
    """A plan for every layer: ``phy2log``, ``log2phy`` and ``logcnt``, as DeepSeek's EPLB gives them.

    *weight* (layers, experts) is the load of each expert, in any unit; or (steps, layers, experts) that of single
    steps, each of which waits for its own busiest GPU: then plans are judged on them. With *num_groups* a multiple of
    *num_nodes*, groups of experts stay on one node (hierarchical, for group-limited routing); otherwise, as in EPLB,
    groups and nodes do not count. *before* (layers, num_replicas) is the current ``phy2log``: few experts are moved
    from there, none where its peak is within *tolerance*, a part of the mean GPU's load. No GPU gets two replicas of
    an expert.

    ``phy2log`` (layers, num_replicas) is the expert in each slot, GPU after GPU; ``log2phy`` (layers, experts, most
    replicas) are the slots of each expert, padded with -1; ``logcnt`` (layers, experts) its replicas.
    Raises `SettingError` if the numbers do not fit together, or a weight is negative or not finite.

    >>> import moetrace as mt
    >>> phy2log, log2phy, logcnt = mt.rebalance_experts([[4, 1, 1, 2]], 6, 1, 1, 3)
    >>> phy2log.shape, log2phy.shape, logcnt.tolist()
    ((1, 6), (1, 4, 2), [[2, 1, 1, 2]])
    """
    load, steps = _loads(weight)
    layers, experts = load.shape
    nodes = num_nodes if num_groups % num_nodes == 0 else 1
    groups = num_groups if nodes > 1 else 1
    check_nodes(experts, num_replicas, groups, nodes, num_gpus)
    if before is None and steps is None:
        by_group = load.reshape(layers, groups, -1)
        homes = np.sort(members(planned(by_group.sum(axis=2), nodes, 0).slots, by_group.shape[2]), axis=2)
        slots = within_nodes(load, homes, num_gpus, num_replicas - experts, lambda *own: planned(*own).slots)
        return _arrays(slots.reshape(layers, num_replicas), experts)
    planning = Planning(num_gpus, num_replicas - experts, tolerance=tolerance, nodes=nodes, groups=groups)
    current = None if before is None else _current(before, layers, num_replicas, experts)
    rows = []
    for layer, share in enumerate(load):
        wanted = StepLoad.of(share[None] if steps is None else steps[:, layer], share)
        if current is None:
            rows.append(planning.place(wanted).slots)
        else:
            was = current[layer].reshape(num_gpus, -1)
            rows.append(_in_their_slots(planning.replan(Plan.of(was, experts), wanted).slots, was))
    return _arrays(np.stack(rows).reshape(layers, num_replicas), experts)


def _loads(weight: ArrayLike) -> tuple[Shares, Shares | None]:
    """The load as parts of that of the layer, even where a layer has none; and its single steps where there are any."""
    load = np.asarray(weight, np.float64)
    if load.ndim not in (2, 3) or not load.size:
        raise SettingError(f"weight has the shape {load.shape}: (layers, experts) is needed")
    if not (np.isfinite(load).all() and (load >= 0).all()):
        *_, layer, expert = at = tuple(np.argwhere(~(np.isfinite(load) & (load >= 0)))[0])
        raise SettingError(f"weight of expert {expert} in layer {layer} is {load[at]}: a load is 0 or more")
    summed = load if load.ndim == 2 else load.sum(axis=0)
    total = summed.sum(axis=1, keepdims=True)
    shares = np.where(total > 0, summed / np.where(total > 0, total, 1), 1 / summed.shape[1])
    return shares, load if load.ndim == 3 else None


def _current(before: ArrayLike, layers: int, replicas: int, experts: int) -> Ints:
    """The current ``phy2log``, checked."""
    found = np.asarray(before)
    if found.shape != (layers, replicas) or not np.issubdtype(found.dtype, np.integer):
        raise SettingError(
            f"before has the shape {found.shape}: whole numbers of shape ({layers}, {replicas}) are needed"
        )
    whole = np.arange(experts)
    for layer, row in enumerate(found):
        if not np.array_equal(np.unique(row), whole):
            raise SettingError(
                f"before: layer {layer} does not hold every expert from 0 to {experts - 1}, and no other"
            )
    return found.astype(np.int64)


def _in_their_slots(slots: Ints, before: Ints) -> Ints:
    """*slots* (gpus, slots) with every expert that a GPU held *before* in the slot where it was."""
    placed = np.full_like(slots, -1)
    for own, new, old in zip(placed, slots, before):
        stays, where = np.unique(old, return_index=True)
        kept = np.isin(stays, new)
        own[where[kept]] = stays[kept]
        own[own < 0] = np.setdiff1d(new, own)
    return placed


def _arrays(phy2log: Ints, experts: int) -> tuple[Ints, Ints, Ints]:
    """The three arrays of EPLB."""
    layers, replicas = phy2log.shape
    rows = np.arange(layers)[:, None]
    logcnt = np.zeros((layers, experts), np.int64)
    np.add.at(logcnt, (rows, phy2log), 1)
    order = np.argsort(phy2log, axis=1, kind="stable")
    ordered = np.take_along_axis(phy2log, order, axis=1)
    first = np.cumsum(logcnt, axis=1) - logcnt
    log2phy = np.full((layers, experts, int(logcnt.max())), -1, np.int64)
    log2phy[rows, ordered, np.arange(replicas) - np.take_along_axis(first, ordered, axis=1)] = order
    return phy2log, log2phy, logcnt
