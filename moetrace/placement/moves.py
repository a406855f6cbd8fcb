"""A plan changed step by step: from the one in force to one that is even enough, with few experts moved."""

from __future__ import annotations

import numpy as np

from moetrace.placement.planner import LEAST_GAIN, Ints, Packing, exchange, replicas_of
from moetrace.trace import Shares


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
    gives its slot to another of an expert of the busiest GPU.
    """
    while True:
        packing = _packing(slots, shares)
        peak = packing.peaks[0]
        if peak <= enough:
            return slots
        swapped, given = exchange(packing), _replica_given(slots, shares)
        new = min((swapped, given), key=lambda way: np.inf if way is None else _packing(way, shares).peaks[0])
        if new is None or not _packing(new, shares).peaks[0] < peak * (1 - LEAST_GAIN):
            return slots
        slots = new


def _packing(slots: Ints, shares: Shares) -> Packing:
    copies = np.bincount(slots.ravel(), minlength=len(shares))
    return Packing(slots[None], (shares / copies)[None])


def _replica_given(slots: Ints, shares: Shares) -> Ints | None:
    """The best change of one slot: it gets an expert of the busiest GPU instead of one that has other replicas."""
    gpus, experts = len(slots), len(shares)
    held = np.zeros((gpus, experts))
    held[np.arange(gpus)[:, None], slots] = 1
    copies = held.sum(axis=0)
    load = held @ (shares / copies)
    gpu, slot = np.nonzero(copies[slots] > 1)
    taking = slots[load.argmax()]
    if not len(gpu):
        return None
    giving = slots[gpu, slot]
    lighter, heavier = shares / (copies + 1), shares / np.maximum(copies - 1, 1)
    less = held[:, taking].T * (lighter - shares / copies)[taking][:, None]  # (taking, gpus)
    more = held[:, giving].T * (heavier - shares / copies)[giving][:, None]  # (giving, gpus)
    after = load + less[:, None] + more[None]
    after[:, np.arange(len(gpu)), gpu] += lighter[taking][:, None] - heavier[giving]
    worst = np.where(held[gpu][:, taking].T > 0, np.inf, after.max(axis=2))
    mine, other = np.unravel_index(worst.argmin(), worst.shape)
    if worst[mine, other] == np.inf:
        return None
    changed = slots.copy()
    changed[gpu[other], slot[other]] = taking[mine]
    return changed
