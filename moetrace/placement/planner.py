"""The planner by mean load: which replicas, and which of them on which GPU, for many layers at once.

A *row* is a load to plan for: a layer, a node of a layer, or a choice of replicas that is tried. All arrays have the
rows first. Slots are an array (rows, gpus, slots of a GPU) of experts; no GPU ever holds an expert twice.

Loads are whole numbers in float64 arrays (`in_units`). Their sums are exact in any order, and ties are broken by index,
so that a plan does not depend on the processor or on the BLAS kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.trace import Shares

Ints = NDArray[np.int64]

# An exchange has to lower the peak by more than rounding, or two could undo each other for ever.
LEAST_GAIN = 1e-9
# A peak so close to the mean is even: the load of no step is known to a ten-thousandth.
EVEN = 1e-4
# The GPUs with least load are tried first as partners of the busiest, more of them where those have nothing to offer:
# measured on 58 layers of 256 experts, two thirds of the time of trying all at once.
PARTNERS = (4, 24)
# Where no exchange of one expert for another helps, two are exchanged for two with so many partners, if a GPU has not
# more slots than that: with 9 slots, what the peak is above the mean falls to a third. Of 3 slots, two are all but one.
TWO_PARTNERS, MOST_PAIRED = (1, 3), 12
# With more slots on a GPU, partners are looked up by their weight instead of trying all pairs.
MANY_SLOTS = 200
# A load is rounded to this part of the total of its row: forecasts differ from kernel to kernel by up to 1e-10
# (arima, measured), and no load is known to a ten-millionth. A unit is finer, so that a replica's part is whole, too.
COARSE, UNITS = 2.0**24, 2.0**40
# Replicas are chosen together with the packing, and every slot is filled with all loads known, where so few slots share
# the load that one more or less is felt.
FEW_SLOTS = 64
# Choices of replicas that are tried in one round for one row, while the peak is so far above the mean: the forecast of
# a horizon is hardly ever better known.
MOST_TRIED = 256
EVEN_ENOUGH = 1e-3


def in_units(load: Shares) -> Shares:
    """*load* (rows, experts), none negative, as whole numbers whose total is about `UNITS` in each row.

    >>> in_units(np.array([[0.25, 0.75 + 1e-12]])) / UNITS
    array([[0.25, 0.75]])
    """
    total = load.sum(axis=1, keepdims=True)
    return np.rint(load / np.where(total > 0, total, 1) * COARSE) * (UNITS / COARSE)


# --- plans ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Packing:
    """Experts in *slots* (rows, gpus, slots) and the *weight* (rows, experts) of one replica of each, whole numbers."""

    slots: Ints
    weight: Shares

    @property
    def loads(self) -> Shares:
        """The load of each GPU, shape (rows, gpus)."""
        return picked(self.weight, self.slots).sum(axis=2)

    @property
    def peaks(self) -> Shares:
        """The load of the busiest GPU, shape (rows,)."""
        return self.loads.max(axis=1)


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


def _other_replicas(found: Packing, load: Shares, copies: Ints, gpus: int) -> Packing:
    """Replicas given to other experts, all packed anew and the best kept where the peak falls; *copies* change."""
    slots, weight, peaks = found.slots.copy(), found.weight.copy(), found.peaks
    for changes in (1, 2, 1):  # replicas given to other experts, one or two at once
        rows = np.arange(len(load))
        while len(rows := rows[peaks[rows] > load[rows].sum(axis=1) / gpus * (1 + EVEN_ENOUGH)]):
            choices = [_choices(load[row], copies[row], gpus, changes) for row in rows]
            ends = np.cumsum([len(own) for own in choices])
            tried = np.concatenate(choices)
            new = arranged(np.repeat(load[rows], np.diff(ends, prepend=0), axis=0), tried, gpus)
            low = new.peaks
            best = np.array([end - len(own) + low[end - len(own) : end].argmin() for end, own in zip(ends, choices)])
            better = low[best] < peaks[rows] * (1 - LEAST_GAIN)
            rows, best = rows[better], best[better]
            slots[rows], weight[rows], peaks[rows] = new.slots[best], new.weight[best], low[best]
            copies[rows] = tried[best]
    return Packing(slots, weight)


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


def _choices(shares: Shares, copies: Ints, gpus: int, changes: int) -> Ints:
    """Replicas with so many given from one expert to another, those first that leave least weight; as they are at last.

    Shape (choices, experts).
    """
    found, most = [copies], round(MOST_TRIED ** (1 / changes))
    for _ in range(changes):
        earlier, found = found, []
        for own in earlier:
            giving, taking = np.flatnonzero(own > 1), np.flatnonzero(own < gpus)
            after = (shares[giving] / (own[giving] - 1))[:, None] - shares[taking] / own[taking]
            for place in np.argsort(after, axis=None, kind="stable")[:most]:
                choice = own.copy()
                choice[giving[place // len(taking)]] -= 1
                choice[taking[place % len(taking)]] += 1
                found.append(choice)
    return np.unique([*found, copies], axis=0)


# --- exchanges --------------------------------------------------------------------------------


def exchanged(packing: Packing) -> Packing:
    """Experts exchanged between the busiest GPU and another, the best pair at a time, while the peak falls.

    Then two for two. Until every peak is even.
    """
    slots, (gpus, size) = packing.slots.copy(), packing.slots.shape[1:]
    load = packing.loads
    enough = load.mean(axis=1) * (1 + EVEN)
    ways = [(1, few) for few in (*PARTNERS, gpus)] + [(2, few) for few in TWO_PARTNERS if 3 < size <= MOST_PAIRED]
    for number, partners in dict.fromkeys((number, min(few, gpus - 1)) for number, few in ways):
        rows = np.flatnonzero(load.max(axis=1) > enough)
        while len(rows):
            kept = _exchange(slots, packing.weight, load, rows, partners, number)
            rows = rows[kept]
            rows = rows[load[rows].max(axis=1) > enough[rows]]
    return Packing(slots, packing.weight)


def _exchange(
    slots: Ints, weight: Shares, load: Shares, rows: Ints, partners: int, number: int = 1
) -> NDArray[np.bool_]:
    """The best exchange of so many experts of each of *rows* with one of so many *partners*, made in place.

    Whether there was one.
    """
    own, at, (gpus, size) = load[rows], np.arange(len(rows)), slots.shape[1:]
    peak = own.argmax(axis=1)
    few = partners < gpus - 1
    if few:  # of GPUs with the same load the first: no two keys are alike, so that every sort has the same answer
        keys = own * gpus + np.arange(gpus)
        others = np.sort(np.argpartition(keys, partners - 1, axis=1)[:, :partners], axis=1)
    else:
        others = np.arange(gpus - 1)[None]  # all but the busiest, shape (rows, gpus - 1)
        others = others + (others >= peak[:, None])
    ours, theirs = slots[rows, peak], slots[rows[:, None], others].reshape(len(rows), -1)  # (n, size), (n, all theirs)
    begin = (rows * weight.shape[1])[:, None]
    sets, our_weight, their_weight = _sets(size, number), weight.take(begin + ours), weight.take(begin + theirs)
    if number > 1:
        our_weight = our_weight[:, sets].sum(axis=1)  # (n, sets)
        their_weight = their_weight.reshape(-1, size)[:, sets].sum(axis=1).reshape(len(rows), -1)  # (n, all their sets)
    high, low = own[at, peak], np.repeat(picked(own, others), sets.shape[1], axis=1)
    # The busier of the two GPUs has their mean after an exchange, and what it is off half of their difference.
    mean, wanted = (high[:, None] + low) / 2, their_weight + (high[:, None] - low) / 2
    best = _nearest_of_many if size > MANY_SLOTS else partial(_nearest, sets=sets)
    worst, mine, other = best(ours, theirs, our_weight, wanted, mean, gpus * size > weight.shape[1])
    gain: NDArray[np.bool_] = worst < high * (1 - LEAST_GAIN)
    at, mine, other = at[gain], mine[gain], other[gain]
    rows, peak, apart = rows[gain], peak[gain], our_weight[at, mine] - their_weight[at, other]
    gpu, other = np.divmod(other, sets.shape[1])
    gpu = others[at, gpu]
    for here, there in zip(sets[:, mine], sets[:, other]):
        slots[rows, peak, here], slots[rows, gpu, there] = slots[rows, gpu, there], slots[rows, peak, here]
    load[rows, peak] -= apart
    load[rows, gpu] += apart
    return gain


@cache
def _sets(size: int, number: int) -> Ints:
    """All sets of so many of *size* slots, shape (number, sets)."""
    return np.array([*combinations(range(size), number)]).T


@cache
def _sets_with(size: int, number: int) -> Ints:
    """Which of them have each slot, shape (size, sets with it)."""
    has = (_sets(size, number) == np.arange(size)[:, None, None]).any(axis=1)
    return np.nonzero(has)[1].reshape(size, -1)


def _nearest(
    ours: Ints, theirs: Ints, weight: Shares, wanted: Shares, mean: Shares, replicas: bool, sets: Ints
) -> tuple[Shares, Ints, Ints]:
    """For each row the least of *mean* and how far the *weight* of one of our *sets* is from what is *wanted*.

    And of which of both. *sets* (slots of one, sets) of ours (n, slots) have weight (n, sets), and what is *wanted* of
    those of theirs (n, partners * slots), and the mean, shape (n, partners * sets). With *replicas*, none comes to a
    GPU that has one.
    """
    (n, size), at, number = ours.shape, np.arange(len(ours)), sets.shape[1]
    worst = weight[:, :, None] - wanted[:, None]
    np.abs(worst, out=worst)
    worst += mean[:, None]
    if replicas:
        both = np.flatnonzero(ours[:, :, None] == theirs[:, None])
        row, mine, other = np.unravel_index(both, (n, size, theirs.shape[1]))
        gpu, slot = np.divmod(other[:, None], size)
        having = _sets_with(size, len(sets))
        pairs = worst.reshape(n, number, -1, number)
        pairs[row[:, None], having[mine], gpu] = np.inf
        pairs[row[:, None], :, gpu, having[slot[:, 0]]] = np.inf
    worst = worst.reshape(n, -1)
    best = worst.argmin(axis=1)
    return worst[at, best], *np.divmod(best, wanted.shape[1])


def _nearest_of_many(
    ours: Ints, theirs: Ints, weight: Shares, wanted: Shares, mean: Shares, replicas: bool
) -> tuple[Shares, Ints, Ints]:
    """The same, looked up in sorted weights, one pair of GPUs at a time."""
    size = ours.shape[1]
    found = [(np.inf, 0, 0)] * len(ours)
    for row, begin in product(range(len(ours)), range(0, theirs.shape[1], size)):
        if mean[row, begin] >= found[row][0]:
            continue
        part = slice(begin, begin + size)
        mine, other = np.arange(size), np.arange(begin, begin + size)
        if replicas:
            mine = mine[~np.isin(ours[row], theirs[row, part])]
            other = other[~np.isin(theirs[row, part], ours[row])]
        if not len(mine):
            continue
        mine = mine[np.argsort(weight[row, mine], kind="stable")]
        above = np.searchsorted(weight[row, mine], wanted[row, other])
        near = np.clip(above + np.array([[-1], [0]]), 0, len(mine) - 1)  # the next lighter and heavier of ours
        worst = mean[row, begin] + np.abs(weight[row, mine[near]] - wanted[row, other])
        side, best = np.unravel_index(worst.argmin(), worst.shape)
        found[row] = min(found[row], (worst[side, best], int(mine[near[side, best]]), int(other[best])))
    worst, one, another = zip(*found)
    return np.array(worst), np.array(one, np.int64), np.array(another, np.int64)


def picked(values: NDArray[Any], index: Ints) -> NDArray[Any]:
    """The *values* (rows, n) at *index* (rows, ...)."""
    return np.take_along_axis(values, index.reshape(len(values), -1), axis=1).reshape(index.shape)
