"""The planner: which replicas, and which of them on which GPU, for many layers at once.

Rows and slots are those of `packing`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moetrace.placement.packing import LEAST_GAIN, Ints, Packing, exchanged, in_units, picked
from moetrace.trace import Shares

# Replicas are chosen together with the packing, and every slot is filled with all loads known, where so few slots share
# the load that one more or less is felt.
FEW_SLOTS = 64
# Choices of replicas that are tried in one round for one row, while the peak is so far above the mean: the forecast of
# a horizon is hardly ever better known.
MOST_TRIED = 256
EVEN_ENOUGH = 1e-3


def planned(shares: Shares, gpus: int, redundant: int) -> Packing:
    """The experts of *shares* (rows, experts), none negative, on *gpus* with *redundant* further slots.

    Replicas go one by one to the expert with most load a replica (as EPLB does, DeepSeek-AI 2025). Then the heaviest
    comes first to the GPU with least load and a free slot (longest processing time, Graham 1969), or where slots are
    many in turns to all GPUs, and experts are exchanged with the busiest GPU as long as that lowers the peak. Where
    slots are few, one replica at a time is given to another expert and all is packed anew, as long as that lowers the
    peak.
    """
    load = in_units(shares)
    copies = replicas_of(load, redundant, gpus)
    found = arranged(load, copies, gpus)
    few = redundant and gpus > 1 and load.shape[1] + redundant <= FEW_SLOTS
    return _other_replicas(found, load, copies, gpus) if few else found


def greedy(shares: Shares, gpus: int, redundant: int) -> Ints:
    """Slots (rows, gpus, slots) as EPLB's planner fills them: replicas, then the heaviest first; nothing exchanged."""
    load = in_units(shares)
    copies = replicas_of(load, redundant, gpus)
    return _packed(np.rint(load / copies), copies, gpus)


def members(groups: Ints, size: int) -> Ints:
    """The experts of *groups* (..., n), each of so many neighbours, shape (..., experts)."""
    return (groups[..., None] * size + np.arange(size)).reshape(*groups.shape[:-1], -1)


def within_nodes(
    shares: Shares, homes: Ints, gpus: int, redundant: int, plan: Callable[[Shares, int, int], Ints]
) -> Ints:
    """Slots (rows, gpus, slots) with the experts of each node in *homes* (rows, nodes, experts), as *plan* places them.

    *plan* takes shares, GPUs and redundant experts as `greedy` does.
    """
    rows, nodes, own = homes.shape
    homes = homes.reshape(rows * nodes, own)
    of_node = picked(np.repeat(shares, nodes, axis=0), homes)
    return picked(homes, plan(of_node, gpus // nodes, redundant // nodes)).reshape(rows, gpus, -1)


def replicas_of(shares: Shares, redundant: int, gpus: int) -> Ints:
    """How many slots each expert gets, at most one on each GPU, shape (rows, experts)."""
    copies, each, rows = np.ones(shares.shape, np.int64), shares.copy(), np.arange(len(shares))
    for _ in range(redundant):
        hot = each.argmax(axis=1)
        copies[rows, hot] += 1
        each[rows, hot] = np.where(copies[rows, hot] < gpus, shares[rows, hot] / copies[rows, hot], -1)
    return copies


def arranged(load: Shares, copies: Ints, gpus: int) -> Packing:
    """Experts of *load* (rows, experts), whole numbers, in *copies* slots each: packed or dealt, then exchanged."""
    weight = np.rint(load / copies)
    filled = _packed if copies[0].sum() <= FEW_SLOTS else _dealt
    return exchanged(Packing(filled(weight, copies, gpus), weight))


def _heaviest_first(weight: Shares, copies: Ints) -> Ints:
    """What fills the slots, replicas of an expert one after the other, shape (rows, all slots)."""
    heaviest = np.argsort(-weight, axis=1, kind="stable")
    return np.repeat(heaviest.ravel(), picked(copies, heaviest).ravel()).reshape(len(weight), -1)


def _dealt(weight: Shares, copies: Ints, gpus: int) -> Ints:
    """The heaviest first, in every turn one to each GPU, the heavier to those with less load; no replica twice.

    Less even than `_packed` where slots are few, and as many turns as a GPU has slots instead of one for each.
    """
    items, at = _heaviest_first(weight, copies).reshape(len(weight), -1, gpus), np.arange(len(weight))[:, None]
    heavy, load, slots = picked(weight, items), np.zeros((len(weight), gpus)), np.empty_like(items)
    for turn in range(items.shape[1]):
        order = np.argsort(load, axis=1, kind="stable")
        again = np.flatnonzero((items[:, turn, 0] == items[:, turn - 1, -1]) & (turn > 0))
        if len(again):  # further replicas of an expert that the last turn had: GPUs without it come first
            split = items[again, turn, :1]
            without = slots[again[:, None], turn - 1, order[again]] != split
            first = without & (without.cumsum(axis=1) <= (items[again, turn] == split).sum(axis=1, keepdims=True))
            order[again] = picked(order[again], np.argsort(~first, axis=1, kind="stable"))
        slots[at, turn, order] = items[:, turn]
        load[at, order] += heavy[:, turn]
    return np.ascontiguousarray(slots.swapaxes(1, 2))


def _packed(weight: Shares, copies: Ints, gpus: int) -> Ints:
    """Heaviest first to the GPU with least load that has a free slot and no replica of it."""
    rows, items = np.arange(len(weight)), _heaviest_first(weight, copies)
    total, size = items.shape[1], items.shape[1] // gpus
    heavy, items = picked(weight, items).T.copy(), items.T.copy()
    again = np.zeros((total + 1, len(weight)), bool)  # whether a turn has the expert of the turn before
    again[1:-1] = items[1:] == items[:-1]
    some: NDArray[np.bool_] = np.logical_or.reduce(again, axis=1)
    ends = np.logical_and(again[:-1], ~again[1:])
    slots, load = np.full((len(weight), gpus, size), -1, np.int64), np.zeros((len(weight), gpus))
    filled, free = np.zeros(load.shape, np.int64), np.zeros(load.shape)  # free: infinite where an item cannot go
    for turn, item in enumerate(items):
        gpu = free.argmin(axis=1)
        if some[turn]:
            for row in np.flatnonzero(np.isinf(free[rows, gpu])):
                gpu[row] = _make_room(slots[row], filled[row], load[row], weight[row], item[row])
        at = rows * gpus + gpu
        spot = filled.take(at)
        slots.put(at * size + spot, item)
        filled.put(at, spot + 1)
        now = load.take(at) + heavy[turn]
        load.put(at, now)
        now[(spot + 1 == size) | again[turn + 1]] = np.inf
        free.put(at, now)
        if some[turn]:
            over = np.flatnonzero(ends[turn])
            free[over] = np.where(filled[over] < size, load[over], np.inf)
    return slots


def _make_room(slots: Ints, filled: Ints, load: Shares, weight: Shares, expert: int) -> int:
    """A full GPU without *expert* gives one of its experts to one with a free slot, which has *expert*; the first."""
    free = int(np.flatnonzero(filled < slots.shape[1])[0])
    without = np.flatnonzero(~(slots == expert).any(axis=1))
    gpu = int(without[load[without].argmin()])
    slot = int(np.flatnonzero(~np.isin(slots[gpu], slots[free]))[0])
    given = slots[gpu, slot]
    slots[free, filled[free]] = given
    slots[gpu, slot] = slots[gpu, -1]
    for own, sign in ((free, 1), (gpu, -1)):
        filled[own] += sign
        load[own] += sign * weight[given]
    return gpu


def _other_replicas(found: Packing, shares: Shares, copies: Ints, gpus: int) -> Packing:
    """Replicas given to other experts, all packed anew and the best kept where the peak falls; one, or two at once."""
    slots, weight, copies, peaks = found.slots.copy(), found.weight.copy(), copies.copy(), found.peaks
    for changes in (1, 2, 1):
        rows = np.arange(len(shares))
        while len(rows := rows[peaks[rows] > shares[rows].sum(axis=1) / gpus * (1 + EVEN_ENOUGH)]):
            choices = [_choices(shares[row], copies[row], gpus, changes) for row in rows]
            ends = np.cumsum([len(own) for own in choices])
            tried = np.concatenate(choices)
            new = arranged(np.repeat(shares[rows], np.diff(ends, prepend=0), axis=0), tried, gpus)
            low = new.peaks
            best = np.array([end - len(own) + low[end - len(own) : end].argmin() for end, own in zip(ends, choices)])
            better = low[best] < peaks[rows] * (1 - LEAST_GAIN)
            rows, best = rows[better], best[better]
            slots[rows], weight[rows], peaks[rows] = new.slots[best], new.weight[best], low[best]
            copies[rows] = tried[best]
    return Packing(slots, weight)


def _choices(shares: Shares, copies: Ints, gpus: int, changes: int) -> Ints:
    """Replicas with so many given from one expert to another, those first that leave least weight; as they are at last.

    Shape (choices, experts).
    """
    found, most = [copies], round(MOST_TRIED ** (1 / changes))
    for _ in range(changes):
        found = [choice for before in found for choice in _given(shares, before, gpus)[:most]]
    return np.unique([*found, copies], axis=0)


def _given(shares: Shares, copies: Ints, gpus: int) -> list[Ints]:
    """Replicas with one given from an expert to another, the pairs first that leave the least weight."""
    giving, taking = np.flatnonzero(copies > 1), np.flatnonzero(copies < gpus)
    heavier = shares[giving] / (copies[giving] - 1)
    after = heavier[:, None] - shares[taking] / copies[taking]
    found = []
    for place in np.argsort(after, axis=None, kind="stable"):
        choice = copies.copy()
        choice[giving[place // len(taking)]] -= 1
        choice[taking[place % len(taking)]] += 1
        found.append(choice)
    return found
