"""Experts on GPUs: a plan made from predicted shares, and how even it left the load that then came.

A plan is for one layer. Every GPU has the same number of slots, each slot holds one expert, and an
expert in several slots shares its tokens evenly among them. A plan is made to keep the load of the
busiest GPU low, because the others wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetrace.analysis.imbalance import max_over_mean
from moetrace.errors import SettingError
from moetrace.trace import Counts, Shares

# A swap or a new plan has to lower the peak by more than rounding, or two could undo each other for ever.
LEAST_GAIN = 1e-9


@dataclass(frozen=True, eq=False)
class Plan:
    """*held* (gpus, experts): how many slots of each GPU hold each expert."""

    held: NDArray[np.int64]

    @property
    def parts(self) -> Shares:
        """The part of each expert's tokens that each GPU works on, shape (gpus, experts)."""
        parts: Shares = self.held / self.held.sum(axis=0)
        return parts

    @property
    def experts(self) -> list[list[int]]:
        """The experts in the slots of each GPU, in order."""
        return [np.repeat(np.arange(len(row)), row).tolist() for row in self.held]

    def peak_over_mean(self, shares: Shares) -> float:
        """The load of the busiest GPU over that of the mean one, for a load of *shares* (experts,)."""
        return max_over_mean(self.parts @ shares)

    def aligned(self, before: Plan) -> Plan:
        """The same plan with its GPUs renamed so that as few slots as possible differ from *before*."""
        from scipy.optimize import linear_sum_assignment

        common = np.minimum(self.held, 1) @ np.minimum(before.held, 1).T  # (gpus, gpus)
        mine, theirs = linear_sum_assignment(common, maximize=True)
        held = np.empty_like(self.held)
        held[theirs] = self.held[mine]
        return Plan(held)

    def moved(self, before: Plan) -> float:
        """The part of the slots that hold an expert which *before* did not have on that GPU."""
        return float(np.maximum(self.held - before.held, 0).sum() / self.held.sum())


class Evenness(NamedTuple):
    """How even a plan left the load of some steps.

    *peak_over_mean* divides the load of the busiest GPU, over all steps together, by that of the mean GPU: what
    a plan can change. *balance* is ``sum_t mean_g / sum_t max_g``, where every step waits for its own busiest
    GPU; it includes the scatter of single steps, which no plan can change.
    """

    peak_over_mean: float
    balance: float


def in_order(experts: int, gpus: int) -> Plan:
    """Experts where frameworks put them if nobody asks: neighbours together, no expert twice."""
    held = np.zeros((gpus, experts), np.int64)
    for gpu, own in enumerate(np.array_split(np.arange(experts), gpus)):
        held[gpu, own] = 1
    return Plan(held)


def place(shares: Shares, gpus: int, redundant: int = 0) -> Plan:
    """The experts of *shares* (experts,) on *gpus*, with *redundant* further slots for copies of the busiest.

    Copies go one by one to the expert with most load a copy, as EPLB does (DeepSeek-AI 2025). Then the
    heaviest comes first to the GPU with least load and a free slot (longest processing time, Graham
    1969), and experts are exchanged with the busiest GPU as long as that lowers the peak.
    Raises `SettingError` where the slots are not as many on every GPU, or are too many.
    """
    slots = slots_of(len(shares), gpus, redundant)
    copies = _copies(shares, redundant, gpus)
    weight = shares / copies
    return Plan(_exchanged(_packed(weight, copies, gpus, slots), weight))


def replan(before: Plan, shares: Shares, redundant: int = 0, least_gain: float = 0.0) -> Plan:
    """A new plan for *shares*, with as few experts moved as possible, or *before* where that is good enough.

    It is good enough where the new plan would not lower the peak by more than *least_gain*, as a fraction of the
    mean GPU's load, and has the same number of slots. Raises `SettingError` as `place` does.
    """
    plan = place(shares, len(before.held), redundant).aligned(before)
    same = plan.held.sum() == before.held.sum()
    gain = before.peak_over_mean(shares) - plan.peak_over_mean(shares)
    return before if same and gain <= max(least_gain, LEAST_GAIN) else plan


def slots_of(experts: int, gpus: int, redundant: int) -> int:
    """The slots of each GPU; raises `SettingError` where they are not as many on every one, or are too many."""
    if redundant > experts * (gpus - 1):
        raise SettingError(f"{redundant} copies are more than one of each of {experts} experts on each of {gpus} GPUs")
    slots, left = divmod(experts + redundant, gpus)
    if left:
        more = f"--redundant {redundant + gpus - left}"
        raise SettingError(f"{experts} experts and {redundant} copies do not fill {gpus} GPUs evenly: try {more}")
    return slots


def evenness(plan: Plan, counts: Counts) -> Evenness:
    """How even *plan* leaves *counts* (steps, experts)."""
    loads = counts @ plan.parts.T  # (steps, gpus)
    return Evenness(max_over_mean(loads.sum(axis=0)), float(loads.mean(axis=1).sum() / loads.max(axis=1).sum()))


def _copies(shares: Shares, redundant: int, gpus: int) -> NDArray[np.int64]:
    """How many slots each expert gets, at most one on each GPU, shape (experts,)."""
    copies = np.ones(len(shares), np.int64)
    for _ in range(redundant):
        copies[np.argmax(np.where(copies < gpus, shares / copies, -1))] += 1
    return copies


def _packed(weight: Shares, copies: NDArray[np.int64], gpus: int, slots: int) -> NDArray[np.int64]:
    """Heaviest first to the GPU with least load that has a free slot, and no copy of it if that can be."""
    held = np.zeros((gpus, len(weight)), np.int64)
    load = np.zeros(gpus)
    heaviest = np.argsort(-weight, kind="stable")
    for expert in np.repeat(heaviest, copies[heaviest]):
        free = held.sum(axis=1) < slots
        new = free & (held[:, expert] == 0)
        gpu = int(np.argmin(np.where(new if new.any() else free, load, np.inf)))
        held[gpu, expert] += 1
        load[gpu] += weight[expert]
    return held


def _exchanged(held: NDArray[np.int64], weight: Shares) -> NDArray[np.int64]:
    """Experts exchanged between the busiest GPU and another, the best pair at a time, while the peak falls."""
    held = held.copy()
    while True:
        load = held @ weight
        peak = int(np.argmax(load))
        ours, (theirs_gpu, theirs) = np.flatnonzero(held[peak]), np.nonzero(held)
        less = weight[ours][:, None] - weight[theirs]  # (ours, theirs)
        worst = np.maximum(load[peak] - less, load[theirs_gpu] + less)
        # No second copy on one GPU.
        twice = (held[theirs_gpu][:, ours].T > 0) | (held[peak][theirs] > 0)
        worst = np.where(twice | (theirs_gpu == peak), np.inf, worst)
        i, j = np.unravel_index(np.argmin(worst), worst.shape)
        if not worst[i, j] < load[peak] * (1 - LEAST_GAIN):
            return held
        for gpu, gone, come in ((peak, ours[i], theirs[j]), (theirs_gpu[j], theirs[j], ours[i])):
            held[gpu, gone] -= 1
            held[gpu, come] += 1
