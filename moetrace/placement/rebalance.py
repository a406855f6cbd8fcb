"""Plans for all layers at once, with the arguments and the arrays of DeepSeek's EPLB."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moetrace.errors import SettingError
from moetrace.placement.packing import Ints
from moetrace.placement.plan import TOLERANCE, Plan
from moetrace.placement.planner import members, planned, within_nodes
from moetrace.placement.planning import Planning, check_nodes
from moetrace.placement.step_peak import StepLoad
from moetrace.trace import Shares


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
