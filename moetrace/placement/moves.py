"""A plan changed step by step: from the one in force to one that is even enough, with few experts moved."""

from __future__ import annotations

import numpy as np

from moetrace.placement.packing import LEAST_GAIN, Ints, Packing, exchange
from moetrace.placement.planner import replicas_of
from moetrace.trace import Shares

# After so many changes a plan is taken as it is: at 10,000 experts on 64 GPUs, 100 to 300 lead to the end.
MOST_CHANGES = 1000
# Of experts of the busiest GPU that could get a replica those are looked at that would leave it most, and of slots that
# could be given to them those whose other replicas would get least: all where a layer has not more.
MOST_TAKING, MOST_GIVING = 32, 256


def lowest_bound(shares: Shares, gpus: int, redundant: int) -> float:
    """A peak that no plan of *shares* (experts,) is below: the mean, or what the hottest expert brings with it."""
    copies = replicas_of(shares[None], redundant, gpus)[0]
    hottest = float((shares / copies).max())
    if not redundant:
        hottest += float(np.sort(shares)[: len(shares) // gpus - 1].sum())
    return max(float(shares.sum()) / gpus, hottest)


def improved(slots: Ints, shares: Shares, enough: float) -> Ints:
    """*slots* (gpus, slots) changed until no GPU has more than *enough*, or no single change lowers the peak.

    A change is the best of two: two experts exchanged between the busiest GPU and another, or one replica that
    gives its slot to another of an expert of the busiest GPU. There are no more than `MOST_CHANGES`.
    """
    for _ in range(MOST_CHANGES):
        packing = _packing(slots, shares)
        peak = packing.peaks[0]
        if peak <= enough:
            return slots
        swapped, given = exchange(packing), _replica_given(slots, shares)
        new = min((swapped, given), key=lambda way: np.inf if way is None else _packing(way, shares).peaks[0])
        if new is None or not _packing(new, shares).peaks[0] < peak * (1 - LEAST_GAIN):
            return slots
        slots = new
    return slots


def _packing(slots: Ints, shares: Shares) -> Packing:
    copies = np.bincount(slots.ravel(), minlength=len(shares))
    return Packing(slots[None], (shares / copies)[None])


def _replica_given(slots: Ints, shares: Shares) -> Ints | None:
    """The best change of one slot: it gets an expert of the busiest GPU instead of one that has other replicas.

    The best of those looked at, see `MOST_TAKING`.
    """
    gpus, experts = len(slots), len(shares)
    held = np.zeros((gpus, experts), bool)
    held[np.arange(gpus)[:, None], slots] = True
    copies = np.bincount(slots.ravel(), minlength=experts)
    each = shares / copies
    # What each replica gets more where there is one more of them, and one less.
    lighter, heavier = shares / (copies + 1) - each, shares / np.maximum(copies - 1, 1) - each
    load = each[slots].sum(axis=1)
    gpu, slot = np.nonzero(copies[slots] > 1)
    taking, giving = slots[load.argmax()], slots[gpu, slot]
    if not len(giving):
        return None
    taking = taking[np.argsort(lighter[taking], kind="stable")[:MOST_TAKING]]
    least = np.argsort(heavier[giving], kind="stable")[:MOST_GIVING]
    gpu, slot, giving = gpu[least], slot[least], giving[least]
    less = held[:, taking].T * lighter[taking][:, None]  # (taking, gpus)
    more = held[:, giving].T * heavier[giving][:, None]  # (giving, gpus)
    after = load + less[:, None] + more[None]
    after[:, np.arange(len(gpu)), gpu] += (each + lighter)[taking][:, None] - (each + heavier)[giving]
    worst = np.where(held[gpu[:, None], taking].T, np.inf, after.max(axis=2))
    mine, other = np.unravel_index(worst.argmin(), worst.shape)
    if worst[mine, other] == np.inf:
        return None
    changed = slots.copy()
    changed[gpu[other], slot[other]] = taking[mine]
    return changed
