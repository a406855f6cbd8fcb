"""Experts on GPUs: a plan made from predicted shares, and how even it left the load that then came.

A plan is for one layer. Every GPU has the same number of slots, each slot holds one expert, and an
expert in several slots shares its tokens among them, evenly where nothing else is said. A plan is made
to keep the load of the busiest GPU low, because the others wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetrace.analysis.imbalance import max_over_mean
from moetrace.errors import SettingError
from moetrace.placement.dispatch import EVENLY, LP, Dispatch
from moetrace.placement.moves import improved, lowest_bound
from moetrace.placement.packing import LEAST_GAIN, Ints
from moetrace.placement.planner import arranged, planned, replicas_of
from moetrace.placement.step_peak import LEAST_CHANGE, StepLoad, lowered
from moetrace.trace import Counts, Shares

# A plan in force is changed until the predicted peak is within so much of what can be had: forecasts of 1,000 steps
# are wrong by more, and every further change moves experts.
TOLERANCE = 0.01
# Of a plan for single steps, the part of the tolerance that each change has to gain: at stable cutoffs of
# gpt-moe-32e-d, 7 % of the slots move for a balance within 0.001 of planning from nothing, which moves half.
EACH = 0.05
# Replicas for single steps are also given by the mean share and so many standard deviations.
SCATTER = (1.0, 2.0)
# Where a linear programme splits the tokens, replicas of experts that scatter help more: measured on the sample traces,
# 8 experts with 4 replicas on 4 GPUs go from 0.985 to 0.9998, 32 with 8 on 8 from 0.971 to 0.996.
SPLIT_SCATTER = (0.5, 1.0, 2.0, 3.0, 4.0)

Load = Shares | StepLoad
"""What is planned for: shares (experts,), or single steps."""


def mean_of(load: Load) -> Shares:
    """The share of each expert of the whole *load*, shape (experts,)."""
    return load.mean if isinstance(load, StepLoad) else load


@dataclass(frozen=True, eq=False)
class Plan:
    """*held* (gpus, experts): how many slots of each GPU hold each expert."""

    held: NDArray[np.int64]

    @property
    def parts(self) -> Shares:
        """The part of each expert's tokens that each GPU works on, shape (gpus, experts)."""
        return EVENLY.expected_parts(self.held)

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

    def aligned(self, before: Plan, nodes: int = 1) -> Plan:
        """The same plan with its GPUs renamed so that as few slots as possible differ from *before*.

        Where they are on several *nodes*, those stay together that are on one.
        """
        common = np.minimum(self.held, 1) @ np.minimum(before.held, 1).T  # (gpus, gpus)
        return Plan(self.held[matched_on_nodes(common, nodes)])

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


def place(load: Load, gpus: int, redundant: int = 0, dispatch: Dispatch = EVENLY) -> Plan:
    """The experts of *load* on *gpus*, with *redundant* further slots for replicas of the busiest.

    Planned from nothing: by shares (experts,) alone as `planner.planned` does, for single steps as `lowered` does from
    there, also from replicas by mean and scatter; the best is taken where tokens are split as *dispatch* does.
    Raises `SettingError` where the slots are not as many on every GPU, or are too many.
    """
    shares = mean_of(load)
    slots_of(len(shares), gpus, redundant)
    slots = planned(shares[None], gpus, redundant).slots
    if not isinstance(load, StepLoad) or gpus == 1:
        return Plan.of(slots[0], len(shares))
    if redundant:
        times = np.array(SPLIT_SCATTER if dispatch.kind == LP else SCATTER)
        copies = replicas_of(shares + times[:, None] * np.sqrt(np.diagonal(load.covariance)), redundant, gpus)
        slots = np.concatenate([slots, arranged(np.repeat(shares[None], len(copies), axis=0), copies, gpus).slots])
    ways = [plan for start in slots for plan in (start, *lowered(start, load, dispatch=dispatch))]
    return _best(ways, load, dispatch)


def _best(plans: Iterable[Ints], load: StepLoad, dispatch: Dispatch) -> Plan:
    """The one of the *plans*, slots (gpus, slots), with the lowest peak of a step."""
    apart = {slots.tobytes(): slots for slots in plans}.values()  # many end alike, and to judge one takes time
    return min((Plan.of(slots, len(load.mean)) for slots in apart), key=lambda plan: load.peak(plan.held, dispatch))


def replan(
    before: Plan,
    load: Load,
    redundant: int = 0,
    least_gain: float = 0.0,
    tolerance: float = TOLERANCE,
    dispatch: Dispatch = EVENLY,
) -> Plan:
    """The plan *before*, changed for *load* with few experts moved, or itself where that is good enough.

    For shares (experts,), it is good enough where its predicted peak is within *tolerance* of the lowest that can be.
    Otherwise it is changed step by step until it is within half of that, so that the next small move of the load does
    not change it again. For single steps it is good enough where changes that do not raise their peak lower neither
    that nor the predicted peak by more than half of *tolerance*; each must lower it by more than `EACH` of that.
    Where steps do not lead there and a plan from nothing is better by more than *tolerance*, or has another number of
    slots, that one is taken, its GPUs renamed so that few experts move. Nothing is changed where that would not lower
    the peak by more than *least_gain*. Both are in parts of the mean GPU's load. Raises `SettingError` as `place` does.
    """
    gpus, experts = before.held.shape
    if before.held.sum() != slots_of(experts, gpus, redundant) * gpus or before.held.max() > 1:
        return place(load, gpus, redundant, dispatch).aligned(before, dispatch.nodes)
    if gpus == 1:
        return before
    if isinstance(load, StepLoad):
        return _replanned(before, load, redundant, least_gain, tolerance, dispatch)
    mean = load.sum() / gpus
    lowest = lowest_bound(load, gpus, redundant)
    peak = (before.parts @ load).max()
    if peak <= lowest + max(tolerance, LEAST_GAIN) * mean:
        return before
    enough = lowest + tolerance / 2 * mean
    plan = Plan.of(improved(before.slots, load, enough), experts)
    if (plan.parts @ load).max() > enough + LEAST_GAIN * mean:
        fresh = place(load, gpus, redundant)
        better = (plan.parts @ load).max() - (fresh.parts @ load).max()
        plan = fresh.aligned(before, dispatch.nodes) if better > max(tolerance, LEAST_GAIN) * mean else plan
    gain = peak - (plan.parts @ load).max()
    return before if gain <= max(least_gain, LEAST_GAIN) * mean else plan


def _replanned(
    before: Plan, load: StepLoad, redundant: int, least_gain: float, tolerance: float, dispatch: Dispatch
) -> Plan:
    """The plan *before*, changed for single steps.

    Steps scatter, so that their peak hardly shows a mean load that has become uneven: that counts, too.
    """
    mean = load.mean.sum() / len(before.held)
    worth = max(tolerance / 2, least_gain, LEAST_GAIN) * mean
    looks = load, StepLoad(load.mean[None])
    now = [look.peak(before.held, dispatch) for look in looks]

    def pays(plan: Plan) -> bool:
        step, whole = (peak - look.peak(plan.held, dispatch) for peak, look in zip(now, looks))
        return step > worth or (step >= 0 and whole > worth)

    plan = _best(lowered(before.slots, load, max(tolerance * EACH, LEAST_CHANGE), dispatch), load, dispatch)
    if pays(plan) or not tolerance:
        fresh = place(load, len(before.held), redundant, dispatch).aligned(before, dispatch.nodes)
        better = load.peak(plan.held, dispatch) - load.peak(fresh.held, dispatch)
        plan = fresh if better > max(tolerance, LEAST_GAIN) * mean else plan
    return plan if pays(plan) else before


def matched(common: Ints) -> Ints:
    """For each of the old ones which new one takes its name, so that as much as can be is *common* (new, old)."""
    from scipy.optimize import linear_sum_assignment

    new, old = linear_sum_assignment(common, maximize=True)
    found: Ints = new[np.argsort(old)]
    return found


def matched_on_nodes(common: Ints, nodes: int) -> Ints:
    """The same where the new ones of a node take the names of one of the *nodes*."""
    size = len(common) // nodes
    pairs = common.reshape(nodes, size, nodes, size).swapaxes(1, 2)  # (new node, old node, new, old)
    ways = np.array([[matched(pair) for pair in row] for row in pairs])  # (new node, old node, old in it)
    shared = np.take_along_axis(pairs, ways[:, :, None], axis=2).sum(axis=(2, 3))
    new = matched(shared)  # of each old node
    found: Ints = (new[:, None] * size + ways[new, np.arange(nodes)]).ravel()
    return found


def slots_of(experts: int, gpus: int, redundant: int) -> int:
    """The slots of each GPU; raises `SettingError` where they are not as many on every one, or are too many."""
    if redundant > experts * (gpus - 1):
        raise SettingError(
            f"{redundant} replicas are more than one of each of {experts} experts on each of {gpus} GPUs"
        )
    slots, left = divmod(experts + redundant, gpus)
    if left:
        more = f"--redundant {redundant + gpus - left}"
        raise SettingError(f"{experts} experts and {redundant} replicas do not fill {gpus} GPUs evenly: try {more}")
    return slots


def least_redundant(experts: int, gpus: int) -> int:
    """As few slots for replicas as fill the *gpus* evenly: none where the *experts* do."""
    return -experts % gpus


def evenness(plan: Plan, counts: Counts, dispatch: Dispatch = EVENLY) -> Evenness:
    """How even *plan* leaves *counts* (steps, experts), where tokens are split as *dispatch* does."""
    loads = dispatch.loads(plan.held, counts)  # (steps, gpus)
    return Evenness(max_over_mean(loads.sum(axis=0)), float(loads.mean(axis=1).sum() / loads.max(axis=1).sum()))
