"""GPUs on nodes: groups of experts that stay on one node, and on how many nodes the experts of a token are."""

from __future__ import annotations

import numpy as np

from moetrace.errors import SettingError
from moetrace.placement.dispatch import EVENLY, Dispatch, Held
from moetrace.placement.packing import Ints
from moetrace.placement.plan import TOLERANCE, Load, Plan, matched, mean_of, place, replan, slots_of
from moetrace.placement.step_peak import StepLoad
from moetrace.trace import Shares

# Sets of groups drawn to tell on how many nodes a token is: their mean is known to about 0.01.
DRAWS = 2000


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


def homes_of(load: Load, groups: int, nodes: int) -> Ints:
    """The experts of each node, whole groups, as even as can be, shape (nodes, experts of a node)."""
    size = len(mean_of(load)) // groups
    summed: Load
    if isinstance(load, StepLoad):
        summed = StepLoad(load.steps.reshape(len(load.steps), groups, size).sum(axis=2))
    else:
        summed = load.reshape(groups, size).sum(axis=1)
    own = place(summed, nodes).slots  # (nodes, groups of a node)
    homes: Ints = np.sort((own[..., None] * size + np.arange(size)).reshape(nodes, -1), axis=1)
    return homes


def place_on_nodes(load: Load, gpus: int, redundant: int, groups: int, dispatch: Dispatch = EVENLY) -> Plan:
    """Planned from nothing with every group on one of the nodes of *dispatch*, and its replicas too, as EPLB does."""
    homes, nodes = homes_of(load, groups, dispatch.nodes), dispatch.nodes
    within = Dispatch(dispatch.kind)
    parts = [home[place(_of(load, home), gpus // nodes, redundant // nodes, within).slots] for home in homes]
    return Plan.of(np.concatenate(parts), len(mean_of(load)))


def replan_on_nodes(
    before: Plan,
    load: Load,
    redundant: int,
    groups: int,
    dispatch: Dispatch = EVENLY,
    least_gain: float = 0.0,
    tolerance: float = TOLERANCE,
) -> Plan:
    """The plan *before* changed node by node, see `replan`; groups move where that makes the nodes more even."""
    gpus, experts = before.held.shape
    if before.held.sum() != experts + redundant:
        return place_on_nodes(load, gpus, redundant, groups, dispatch).aligned(before, dispatch.nodes)

    fresh = homes_of(load, groups, dispatch.nodes)
    slots = changed(before.slots, load, fresh, groups, Dispatch(dispatch.kind), least_gain, tolerance)
    return Plan.of(slots, experts)


def changed(
    force: Ints,
    load: Load,
    fresh: Ints,
    groups: int,
    within: Dispatch = EVENLY,
    least_gain: float = 0.0,
    tolerance: float = TOLERANCE,
) -> Ints:
    """The slots of one layer, changed node by node from those in *force* (gpus, slots), see `replan`.

    *fresh* (nodes, experts of a node) are the homes planned from nothing, whole ones of so many *groups*; *within* is
    the dispatch on a node.
    """
    nodes, experts = fresh.shape
    redundant, size = force.size // nodes - experts, len(mean_of(load)) // groups
    parts = []
    for own, home in zip(force.reshape(nodes, len(force) // nodes, -1), _homes(force, load, fresh, size, tolerance)):
        if np.array_equal(np.unique(own), home):
            before = Plan.of(np.searchsorted(home, own), experts)
            plan = replan(before, _of(load, home), redundant, least_gain, tolerance, within)
            parts.append(home[plan.slots])
        else:
            plan = Plan.of(home[place(_of(load, home), len(own), redundant, within).slots], len(mean_of(load)))
            parts.append(plan.aligned(Plan.of(own, len(mean_of(load)))).slots)
    return np.concatenate(parts)


def _homes(force: Ints, load: Load, fresh: Ints, group: int, tolerance: float) -> Ints:
    """The experts of each node: as in *force* where those are whole groups and even enough, else the *fresh* ones."""
    nodes, size = fresh.shape
    shares = mean_of(load)
    own = [np.unique(node) for node in force.reshape(nodes, -1)]
    if all(len(node) == size and np.isin(np.bincount(node // group), (0, group)).all() for node in own):
        stays, best = (shares[np.array(homes)].sum(axis=1).max() for homes in (own, fresh))
        if stays <= best + tolerance * shares.sum() / nodes:
            return np.array(own)
    common = np.array([[len(np.intersect1d(mine, theirs)) for theirs in own] for mine in fresh])
    return fresh[matched(common)]


def _of(load: Load, experts: Ints) -> Load:
    """The load of these *experts* alone."""
    return StepLoad(load.steps[:, experts]) if isinstance(load, StepLoad) else load[experts]


def nodes_per_token(
    held: Held, shares: Shares, nodes: int, top_k: int | None, groups: int = 1, top_groups: int = 1
) -> float:
    """On how many of the *nodes* the experts of a token are on average, with experts as in *held* (gpus, experts).

    Counts do not say which experts a token takes together, so that is assumed: a token takes *top_groups* groups, one
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
    taken = np.argsort(-taken_by, axis=1)[:, :top_groups]
    return float(nodes - missed[:, taken].prod(axis=2).mean(axis=1).sum())
