"""The planner: which replicas, and which of them on which GPU, for many layers at once.

A *row* is a load to plan for: a layer, a node of a layer, or a choice of replicas that is tried. All arrays have the
rows first. Slots are an array (rows, gpus, slots of a GPU) of experts; no GPU ever holds an expert twice.
"""

from __future__ import annotations

from dataclasses import dataclass
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
# measured on 58 layers of 256 experts, a third of the time of trying all at once.
PARTNERS = (4, 12)
# Replicas are chosen together with the packing where so few slots share the load that one more or less is felt.
FEW_SLOTS = 64
# Choices of replicas that are tried in one round for one row, while the peak is so far above the mean: the forecast of
# a horizon is hardly ever better known.
MOST_TRIED = 256
EVEN_ENOUGH = 1e-3


@dataclass(frozen=True, eq=False)
class Packing:
    """Experts in *slots* (rows, gpus, slots) and the *weight* (rows, experts) of one replica of each."""

    slots: Ints
    weight: Shares

    @property
    def loads(self) -> Shares:
        """The load of each GPU, shape (rows, gpus)."""
        loads: Shares = _of(self.weight, self.slots).sum(axis=2)
        return loads

    @property
    def peaks(self) -> Shares:
        """The load of the busiest GPU, shape (rows,)."""
        peaks: Shares = self.loads.max(axis=1)
        return peaks


def planned(shares: Shares, gpus: int, redundant: int) -> Packing:
    """The experts of *shares* (rows, experts), none negative, on *gpus* with *redundant* further slots.

    Replicas go one by one to the expert with most load a replica (as EPLB does, DeepSeek-AI 2025). Then the heaviest
    comes first to the GPU with least load and a free slot (longest processing time, Graham 1969), and experts are
    exchanged with the busiest GPU as long as that lowers the peak. Where slots are few, one replica at a time is
    given to another expert and all is packed anew, as long as that lowers the peak.
    """
    copies = replicas_of(shares, redundant, gpus)
    found = arranged(shares, copies, gpus)
    few = redundant and gpus > 1 and shares.shape[1] + redundant <= FEW_SLOTS
    return _other_replicas(found, shares, copies, gpus) if few else found


def greedy(shares: Shares, gpus: int, redundant: int) -> Ints:
    """Slots (rows, gpus, slots) as EPLB's planner fills them: replicas, then the heaviest first; nothing exchanged."""
    copies = replicas_of(shares, redundant, gpus)
    return _packed(shares / copies, copies, gpus)


def replicas_of(shares: Shares, redundant: int, gpus: int) -> Ints:
    """How many slots each expert gets, at most one on each GPU, shape (rows, experts)."""
    copies, each, rows = np.ones(shares.shape, np.int64), shares.copy(), np.arange(len(shares))
    for _ in range(redundant):
        hot = each.argmax(axis=1)
        copies[rows, hot] += 1
        each[rows, hot] = np.where(copies[rows, hot] < gpus, shares[rows, hot] / copies[rows, hot], -1)
    return copies


def arranged(shares: Shares, copies: Ints, gpus: int) -> Packing:
    """Experts of *shares* (rows, experts) in as many slots as *copies* says: packed, then exchanged."""
    weight = shares / copies
    return exchanged(Packing(_packed(weight, copies, gpus), weight))


def _packed(weight: Shares, copies: Ints, gpus: int) -> Ints:
    """Heaviest first to the GPU with least load that has a free slot and no replica of it."""
    rows, total = np.arange(len(weight)), int(copies[0].sum())
    heaviest = np.argsort(-weight, axis=1, kind="stable")
    items = np.repeat(heaviest.ravel(), _of(copies, heaviest).ravel()).reshape(len(weight), total)
    heavy, again = _of(weight, items), np.zeros(items.shape, bool)
    again[:, 1:] = items[:, 1:] == items[:, :-1]
    slots = np.full((len(weight), gpus, total // gpus), -1, np.int64)
    load, filled = np.zeros((len(weight), gpus)), np.zeros((len(weight), gpus), np.int64)
    taken = np.zeros((len(weight), gpus), bool)  # holds a replica of the item whose turn it is, or is full
    for turn in range(total):
        first = ~again[:, turn]
        if first.any():
            taken[first] = filled[first] == slots.shape[2]
        gpu = np.where(taken, np.inf, load).argmin(axis=1)
        for row in np.flatnonzero(taken[rows, gpu]):
            gpu[row] = _make_room(slots[row], filled[row], load[row], weight[row], items[row, turn])
        slots[rows, gpu, filled[rows, gpu]] = items[:, turn]
        filled[rows, gpu] += 1
        load[rows, gpu] += heavy[:, turn]
        taken[rows, gpu] = True
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


def exchanged(packing: Packing, until: Shares | None = None) -> Packing:
    """Experts exchanged between the busiest GPU and another, the best pair at a time, while the peak falls.

    Until every peak is at most *until* (rows,), or even.
    """
    slots, gpus = packing.slots.copy(), packing.slots.shape[1]
    load = packing.loads
    enough = load.mean(axis=1) * (1 + EVEN) if until is None else until
    for partners in dict.fromkeys(min(few, gpus - 1) for few in (*PARTNERS, gpus)):
        rows = np.flatnonzero(load.max(axis=1) > enough)
        while len(rows):
            kept = _exchange(slots, packing.weight, load, rows, partners)
            rows = rows[kept]
            rows = rows[load[rows].max(axis=1) > enough[rows]]
    return Packing(slots, packing.weight)


def exchange(packing: Packing) -> Ints | None:
    """The slots (gpus, slots) of a packing of one row after its best exchange, None where none lowers the peak."""
    slots, row = packing.slots.copy(), np.zeros(1, np.int64)
    done = _exchange(slots, packing.weight, packing.loads, row, slots.shape[1] - 1)
    return slots[0] if done[0] else None


def _exchange(slots: Ints, weight: Shares, load: Shares, rows: Ints, partners: int) -> NDArray[np.bool_]:
    """The best exchange of each of *rows* with one of so many *partners*, made in place; whether there was one."""
    own, at, n, size = load[rows], np.arange(len(rows)), len(rows), slots.shape[2]
    order = np.argpartition(own, partners - 1, axis=1)[:, :partners] if partners < load.shape[1] - 1 else None
    peak = own.argmax(axis=1)
    others = _others(peak, load.shape[1]) if order is None else order
    ours, theirs = slots[rows, peak], slots[rows[:, None], others]  # (n, size), (n, partners, size)
    our_weight, their_weight = weight[rows[:, None], ours], weight[rows[:, None, None], theirs]
    less = our_weight[:, None, None, :] - their_weight[:, :, :, None]  # (n, partners, theirs, ours)
    high, low = own[at, peak][:, None, None, None], own[at[:, None], others][:, :, None, None]
    worst = np.maximum(high - less, low + less)
    if slots.shape[1] * size > weight.shape[1]:  # no second replica on one GPU
        row, partner, other, mine = np.nonzero(theirs[:, :, :, None] == ours[:, None, None, :])
        worst[row, partner, other, :] = np.inf
        worst[row, partner, :, mine] = np.inf
    best = worst.reshape(n, -1).argmin(axis=1)
    gain: NDArray[np.bool_] = worst.reshape(n, -1)[at, best] < own[at, peak] * (1 - LEAST_GAIN)
    partner, other, mine = np.unravel_index(best[gain], worst.shape[1:])
    at, rows = at[gain], rows[gain]
    other_gpu, apart = others[at, partner], less[at, partner, other, mine]
    slots[rows, peak[at], mine], slots[rows, other_gpu, other] = theirs[at, partner, other], ours[at, mine]
    load[rows, peak[at]] -= apart
    load[rows, other_gpu] += apart
    return gain


def _others(peak: Ints, gpus: int) -> Ints:
    """All GPUs but the busiest, shape (rows, gpus - 1)."""
    every = np.arange(gpus - 1)[None]
    return every + (every >= peak[:, None])


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


def _of(values: NDArray[Any], index: Ints) -> NDArray[Any]:
    """The *values* (rows, n) at *index* (rows, ...)."""
    return np.take_along_axis(values, index.reshape(len(values), -1), axis=1).reshape(index.shape)
