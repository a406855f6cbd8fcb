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
from moetrace.placement.moves import improved, lowest_bound
from moetrace.placement.planner import LEAST_GAIN, Ints, planned
from moetrace.trace import Counts, Shares

# A plan in force is changed until the predicted peak is within so much of what can be had: forecasts of 1,000 steps
# are wrong by more, and every further change moves experts.
TOLERANCE = 0.01


@dataclass(frozen=True, eq=False)
class Plan:
    """*held* (gpus, experts): how many slots of each GPU hold each expert."""

    held: NDArray[np.int64]

    @property
    def parts(self) -> Shares:
        """The part of each expert's tokens that each GPU works on, shape (gpus, experts)."""
        parts: Shares = self.held / self.held.sum(axis=0)
        return parts

    @classmethod
    def of(cls, slots: Ints, experts: int) -> Plan:
        """From the experts in *slots* (gpus, slots), of so many *experts*."""
        held = np.zeros((len(slots), experts), np.int64)
        np.add.at(held, (np.arange(len(slots))[:, None], slots), 1)
        return cls(held)

    @property
    def slots(self) -> Ints:
        """The experts in the slots of each GPU, in order, shape (gpus, slots)."""
        return np.array(self.experts, np.int64)

    @property
    def experts(self) -> list[list[int]]:
        """The experts in the slots of each GPU, in order."""
        return [np.repeat(np.arange(len(row)), row).tolist() for row in self.held]

    def peak_over_mean(self, shares: Shares) -> float:
        """The load of the busiest GPU over that of the mean one, for a load of *shares* (experts,)."""
        return max_over_mean(self.parts @ shares)

    def aligned(self, before: Plan) -> Plan:
        """The same plan with its GPUs renamed so that as few slots as possible differ from *before*."""
        common = np.minimum(self.held, 1) @ np.minimum(before.held, 1).T  # (gpus, gpus)
        return Plan(self.held[matched(common)])

    def moved(self, before: Plan) -> float:
        """The part of the slots that hold an expert which *before* did not have on that GPU."""
        return float(np.maximum(self.held - before.held, 0).sum() / self.held.sum())


class Evenness(NamedTuple):
    """How even a plan left the load of some steps.

    *peak_over_mean* divides the load of the busiest GPU, over all steps together, by that of the mean GPU. *balance*
    is ``sum_t mean_g / sum_t max_g``, where every step waits for its own busiest GPU.
    """

    peak_over_mean: float
    balance: float


def in_order(experts: int, gpus: int, redundant: int = 0) -> Plan:
    """Experts where frameworks put them if nobody asks: neighbours together, and after the last the first again."""
    held = np.zeros((gpus, experts), np.int64)
    for gpu, own in enumerate(np.array_split(np.arange(experts + redundant) % experts, gpus)):
        np.add.at(held[gpu], own, 1)
    return Plan(held)


def place(shares: Shares, gpus: int, redundant: int = 0) -> Plan:
    """The experts of *shares* (experts,) on *gpus*, with *redundant* further slots for replicas of the busiest.

    Planned from nothing, see `planner.planned`.
    Raises `SettingError` where the slots are not as many on every GPU, or are too many.
    """
    slots_of(len(shares), gpus, redundant)
    return Plan.of(planned(shares[None], gpus, redundant).slots[0], len(shares))


def replan(
    before: Plan, shares: Shares, redundant: int = 0, least_gain: float = 0.0, tolerance: float = TOLERANCE
) -> Plan:
    """The plan *before*, changed for *shares* with few experts moved, or itself where that is good enough.

    It is good enough where its predicted peak is within *tolerance* of the lowest that can be. Otherwise it is changed
    step by step until it is within half of that, so that the next small move of the load does not change it again.
    Where steps do not lead there and a plan from nothing is better by more than *tolerance*, or has another number of
    slots, that one is taken, its GPUs renamed so that few experts move. Nothing is changed where that would not lower
    the peak by more than *least_gain*. Both are in parts of the mean GPU's load. Raises `SettingError` as `place` does.
    """
    gpus, experts = before.held.shape
    if before.held.sum() != slots_of(experts, gpus, redundant) * gpus or before.held.max() > 1:
        return place(shares, gpus, redundant).aligned(before)
    mean = shares.sum() / gpus
    lowest = lowest_bound(shares, gpus, redundant)
    peak = (before.parts @ shares).max()
    if peak <= lowest + max(tolerance, LEAST_GAIN) * mean:
        return before
    enough = lowest + tolerance / 2 * mean
    plan = Plan.of(improved(before.slots, shares, enough), experts)
    if (plan.parts @ shares).max() > enough + LEAST_GAIN * mean:
        fresh = place(shares, gpus, redundant)
        better = (plan.parts @ shares).max() - (fresh.parts @ shares).max()
        plan = fresh.aligned(before) if better > max(tolerance, LEAST_GAIN) * mean else plan
    gain = peak - (plan.parts @ shares).max()
    return before if gain <= max(least_gain, LEAST_GAIN) * mean else plan


def matched(common: Ints) -> Ints:
    """For each of the old ones which new one takes its name, so that as much as can be is *common* (new, old)."""
    from scipy.optimize import linear_sum_assignment

    new, old = linear_sum_assignment(common, maximize=True)
    found: Ints = new[np.argsort(old)]
    return found


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
