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
from moetrace.placement.planner import Ints, arranged, greedy, in_units, planned, replicas_of
from moetrace.placement.step_peak import LEAST_CHANGE, StepLoad, comparable, lowered
from moetrace.trace import Counts, Shares

# The deployed plan is changed until the predicted peak is within so much of what can be had: forecasts of 1,000 steps
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
# With more slots, only the best start is lowered, by changes of so much: on 256 experts with 0, 8 or 32 replicas
# on 8 GPUs the balance is the same to 0.0004, in an eighth of the time.
MOST_STARTED, WIDE_CHANGE = 200, 5e-4
# Parts of the redundant slots that go to the experts whose replica takes longest; the rest where they cost least.
PARTS = (1.0, 0.75, 0.5, 0.25, 0.0)
# Steps from which the mean time of an expert with so many replicas is computed.
MOST_TIMED = 200

Load = Shares | StepLoad
"""What is planned for: single steps, or shares (experts,), which are a load of one step."""


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
        size = len(common) // nodes
        pairs = common.reshape(nodes, size, nodes, size).swapaxes(1, 2)  # (new node, old node, new, old)
        ways = np.array([[matched(pair) for pair in row] for row in pairs])  # (new node, old node, old in it)
        shared = np.take_along_axis(pairs, ways[:, :, None], axis=2).sum(axis=(2, 3))
        new = matched(shared)  # of each old node
        return Plan(self.held[(new[:, None] * size + ways[new, np.arange(nodes)]).ravel()])

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


def default_plan(experts: int, gpus: int, redundant: int = 0) -> Plan:
    """The default placement of frameworks: neighbours together, and after the last expert the first again."""
    held = np.zeros((gpus, experts), np.int64)
    for gpu, own in enumerate(np.array_split(np.arange(experts + redundant) % experts, gpus)):
        np.add.at(held[gpu], own, 1)
    return Plan(held)


def place(load: Load, gpus: int, redundant: int = 0, dispatch: Dispatch = EVENLY) -> Plan:
    """The experts of *load* on *gpus*, with *redundant* further slots for replicas of the busiest.

    Planned from scratch: a single step as `planner.planned` does, several as `lowered` does from there, also from
    replicas by mean and scatter; the best is taken where tokens are split as *dispatch* does. Where its time does not
    follow tokens, that plan, EPLB's and the default placement compete with plans by time, see `_by_time`.
    Raises `SettingError` if the GPUs have unequal numbers of slots, or too many.
    """
    wanted = _in_steps(load)
    experts = len(wanted.mean)
    slots_of(experts, gpus, redundant)
    slots = planned(wanted.mean[None], gpus, redundant).slots
    if gpus == 1 or (len(wanted.steps) == 1 and dispatch == EVENLY):
        return Plan.of(slots[0], experts)
    if redundant:
        times = np.array(SPLIT_SCATTER if dispatch.kind == LP else SCATTER)[:, None]
        copies = replicas_of(in_units(wanted.mean + times * np.sqrt(np.diagonal(wanted.covariance))), redundant, gpus)
        same = np.repeat(in_units(wanted.mean[None]), len(copies), axis=0)
        slots = np.concatenate([slots, arranged(same, copies, gpus).slots])
    tokens = dispatch.by_tokens
    least = LEAST_CHANGE
    if experts + redundant > MOST_STARTED:
        slots, least = _best(slots, wanted, tokens).slots[None], WIDE_CHANGE
    every = [own for start in slots for own in (start, *lowered(start, wanted, least, tokens))]
    plan = _best(every, wanted, tokens)
    return plan if dispatch.time.linear else _by_time(plan, wanted, redundant, dispatch)


def _in_steps(load: Load) -> StepLoad:
    """What is planned for, as single steps: shares are one."""
    return load if isinstance(load, StepLoad) else StepLoad.of(load[None], load)


def _by_time(plan: Plan, load: StepLoad, redundant: int, dispatch: Dispatch) -> Plan:
    """The *plan* by tokens, or one with a lower peak by time.

    A replica of an expert that is memory-bound takes as long as the expert. So a part of the *redundant* slots has
    replicas of those whose replica takes longest, the rest of those that take least together with one more; several
    parts are tried. What is packed is the mean time of a replica; then experts are exchanged as `lowered` does.
    """
    gpus, experts = plan.held.shape
    few = load.steps[:: -(-len(load.steps) // MOST_TIMED)] * load.tokens
    most = min(gpus, redundant + 1)
    ones = np.ones(experts, np.int64)
    together = np.array([dispatch.alone(n * ones, few).mean(axis=0) for n in range(1, most + 1)])  # (replicas, experts)
    ways = {copies.tobytes(): copies for part in PARTS for copies in [_copies(together, redundant, part)]}
    copies = np.array(list(ways.values()))
    times = in_units(together[copies - 1, np.arange(experts)])
    starts = [plan.slots, *arranged(times, copies, gpus).slots]
    eplb = greedy(load.mean[None], gpus, redundant)[0]
    found = [default_plan(experts, gpus, redundant).slots, eplb, *starts]
    best = _best(starts, load, dispatch).slots
    return _best([*found, *lowered(best, load, dispatch=dispatch)], load, dispatch)


def _copies(together: Shares, redundant: int, part: float) -> Ints:
    """Replicas of each expert (experts,), from what so many of an expert take *together* (replicas, experts).

    So great a *part* of the *redundant* slots goes to the experts whose replica takes longest.
    """
    most, experts = together.shape
    copies, every = np.ones(experts, np.int64), np.arange(experts)
    each = together / np.arange(1, most + 1)[:, None]
    for number in range(redundant):
        now, more = copies - 1, np.minimum(copies, most - 1)
        if number < round(part * redundant):
            worth = np.where(each[more, every] < each[now, every], each[now, every], 0.0)
        else:
            worth = together[now, every] - together[more, every]
        copies[comparable(np.where(copies < most, worth, -np.inf)).argmax()] += 1
    return copies


def _best(plans: Iterable[Ints], load: StepLoad, dispatch: Dispatch) -> Plan:
    """The one of the *plans*, slots (gpus, slots), with the lowest peak of a step; the first of several."""
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

    It is good enough where changes that do not raise the peak of a step lower neither that nor the peak of the mean
    load by more than half of *tolerance*, or *least_gain*; each change must gain more than `EACH` of *tolerance*.
    Steps scatter, so that their peak hardly shows a mean load that has become uneven: both peaks count.
    Where single changes do not lead there and a plan from scratch is better by more than *tolerance*, or has another
    number of slots, that one is taken, its GPUs renamed so that few experts move. *least_gain* and *tolerance* are in
    parts of the mean GPU's load. Raises `SettingError` as `place` does.
    """
    wanted = _in_steps(load)
    gpus, experts = before.held.shape
    if before.held.sum() != slots_of(experts, gpus, redundant) * gpus or before.held.max() > 1:
        return place(wanted, gpus, redundant, dispatch).aligned(before, dispatch.nodes)
    if gpus == 1:
        return before
    worth = max(tolerance / 2, least_gain, LEAST_CHANGE) / gpus
    mean = StepLoad(wanted.steps.sum(axis=0, keepdims=True), wanted.tokens / len(wanted.steps))
    views = (wanted,) if len(wanted.steps) == 1 else (wanted, mean)
    now = [view.peak(before.held, dispatch) for view in views]
    if dispatch.time.linear and max(now) - 1 / gpus <= worth:
        return before  # no plan is below the mean GPU

    def pays(plan: Plan) -> bool:
        gains = [peak - view.peak(plan.held, dispatch) for peak, view in zip(now, views)]
        return gains[0] > worth or (gains[0] >= 0 and max(gains) > worth)

    changed = lowered(before.slots, wanted, max(tolerance * EACH, LEAST_CHANGE), dispatch)
    plan = _best((before.slots, *changed), wanted, dispatch)
    if pays(plan) or not tolerance:
        fresh = place(wanted, gpus, redundant, dispatch).aligned(before, dispatch.nodes)
        better = wanted.peak(plan.held, dispatch) - wanted.peak(fresh.held, dispatch)
        plan = fresh if better > max(tolerance, LEAST_CHANGE) / gpus else plan
    return plan if pays(plan) else before


def matched(common: Ints) -> Ints:
    """For each of the old ones which new one takes its name, so that as much as can be is *common* (new, old)."""
    from scipy.optimize import linear_sum_assignment

    new, old = linear_sum_assignment(common, maximize=True)
    return new[np.argsort(old, kind="stable")]


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


def lowest_peak(shares: Shares, gpus: int, redundant: int) -> float:
    """A peak that no plan of *shares* (experts,) is below: the mean, or what the hottest expert brings with it."""
    hottest = float((shares / replicas_of(shares[None], redundant, gpus)[0]).max())
    if not redundant:
        hottest += float(np.sort(shares)[: len(shares) // gpus - 1].sum())
    return max(float(shares.sum()) / gpus, hottest)


def least_redundant(experts: int, gpus: int) -> int:
    """As few slots for replicas as fill the *gpus* evenly: none where the *experts* do."""
    return -experts % gpus


def evenness(plan: Plan, counts: Counts, dispatch: Dispatch = EVENLY) -> Evenness:
    """How even *plan* leaves *counts* (steps, experts), where tokens are split as *dispatch* does.

    The mean GPU's load is that without replicas, which may add to what experts take.
    """
    loads = dispatch.loads(plan.held, counts)  # (steps, gpus)
    if dispatch.time.linear:
        return Evenness(max_over_mean(loads.sum(axis=0)), float(loads.mean(axis=1).sum() / loads.max(axis=1).sum()))
    mean = float(dispatch.time.cost(counts).sum()) / len(plan.held)
    return Evenness(float(loads.sum(axis=0).max()) / mean, mean / float(loads.max(axis=1).sum()))
