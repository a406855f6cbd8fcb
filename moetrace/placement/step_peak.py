"""Plans judged on single steps: what the busiest GPU of a step has, by mean and covariance of the experts' shares.

A step waits for its own busiest GPU, and the loads of experts go together. If the load of each GPU is about normal,
with mean m and variance v, then for every b > 0 what the busiest has on average is at most
``log(sum over GPUs of exp(b m + b^2 v / 2)) / b`` (Jensen), which is lowest near b = sqrt(2 log GPUs / v) for GPUs that
are alike. That bound is what is searched: a change of the plan touches few terms of the sum, all steps count at the
price of one, and there is less to learn by heart than in the steps. The plans found are judged on the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moetrace.placement.dispatch import EVENLY, LP, NEAREST, Dispatch, Held, Tokens, least_loads
from moetrace.placement.planner import Ints
from moetrace.trace import Shares

# The bound is lowered with half of the sharpness first: measured on the sample traces, plans are then better than
# with the whole alone, and without replicas on 4 GPUs better than with the mean alone.
SHARPNESS = (0.5, 1.0)
# GPUs whose experts are given away in search of the best change: those with the largest terms.
HOTTEST = 4
# A change that lowers the peak of a step by no more than this part of the mean GPU's load is not made.
LEAST_CHANGE = 1e-4
# Where loads scatter less than this part of the mean GPU's load, they are taken to scatter so much.
LEAST_SCATTER = 1e-3
# Steps whose tokens are split by a linear programme to judge a plan.
MOST_SPLIT = 200
MOST_EXPONENT = 600.0  # sums of terms beyond would not fit in a float


@dataclass(frozen=True, eq=False)
class StepLoad:
    """The load of single *steps* (steps, experts), in parts of all of it."""

    steps: Shares

    @classmethod
    def of(cls, counts: Tokens, mean: Shares | None = None) -> StepLoad:
        """Of *counts* (steps, experts), scaled so that they have the *mean* (experts,) that is forecast."""
        kept = counts[counts.sum(axis=1) > 0]
        if not len(kept):
            return cls((np.full(counts.shape[1], 1 / counts.shape[1]) if mean is None else mean)[None])
        steps = kept / kept.sum()
        if mean is None:
            return cls(steps)
        own = steps.sum(axis=0)
        idle = np.where(own > 0, 0, mean) * steps.sum(axis=1, keepdims=True)
        return cls(steps * np.divide(mean, own, out=np.zeros_like(own), where=own > 0) + idle)

    @cached_property
    def mean(self) -> Shares:
        """The share of each expert of the whole load, shape (experts,)."""
        mean: Shares = self.steps.sum(axis=0)
        return mean

    @cached_property
    def covariance(self) -> Shares:
        """The covariance of the experts' shares over the steps, each step by its load, shape (experts, experts)."""
        weight = self.steps.sum(axis=1, keepdims=True)
        apart = (self.steps / weight - self.mean / weight.sum()) * np.sqrt(weight / weight.sum())
        found: Shares = apart.T @ apart
        return found

    def peak(self, held: Held, dispatch: Dispatch = EVENLY) -> float:
        """What the busiest GPU of each step has, added up, where GPUs have experts as in *held* (gpus, experts)."""
        if dispatch.kind != LP:
            return float((self.steps @ dispatch.expected_parts(held).T).max(axis=1).sum())
        few = self.steps[:: -(-len(self.steps) // MOST_SPLIT)]
        return float(least_loads(held, few).max(axis=1).sum() * self.steps.sum() / few.sum())


@dataclass(frozen=True, eq=False)
class StepPeak:
    """The busiest GPU of a step with experts in *slots* (gpus, slots), none twice on one; *sharpness* is b above."""

    slots: Ints
    load: StepLoad
    sharpness: float
    dispatch: Dispatch = EVENLY

    @classmethod
    def of(cls, slots: Ints, load: StepLoad, dispatch: Dispatch = EVENLY, factor: float = 1.0) -> StepPeak:
        """With the sharpness that suits GPUs alike, times *factor*."""
        gpus, least = len(slots), LEAST_SCATTER * float(load.mean.sum()) / len(slots)
        variance = float(cls(slots, load, 1.0, dispatch).variances.mean())
        sharpness = float(np.sqrt(2 * np.log(gpus) / max(variance, least**2)))
        return cls(slots, load, factor * sharpness, dispatch)

    @cached_property
    def held(self) -> NDArray[np.bool_]:
        """Whether a GPU holds an expert, shape (gpus, experts)."""
        held = np.zeros((len(self.slots), len(self.load.mean)), bool)
        held[np.arange(len(self.slots))[:, None], self.slots] = True
        return held

    @cached_property
    def parts(self) -> Shares:
        """The part of each expert's tokens that each GPU works on, shape (gpus, experts)."""
        return self.dispatch.expected_parts(self.held)

    @cached_property
    def with_experts(self) -> Shares:
        """The covariance of the load of each GPU with the share of each expert, shape (gpus, experts)."""
        found: Shares = self.parts @ self.load.covariance
        return found

    @cached_property
    def variances(self) -> Shares:
        """The variance of the load of each GPU, shape (gpus,)."""
        found: Shares = (self.with_experts * self.parts).sum(axis=1)
        return found

    @cached_property
    def exponents(self) -> Shares:
        """The logarithms of what is summed in the bound, shape (gpus,)."""
        return self.exponent(self.parts @ self.load.mean, self.variances)

    def hottest(self, number: int) -> Ints:
        """So many GPUs, those with the largest terms."""
        return np.argsort(-self.exponents)[:number]

    def exponent(self, mean: Shares, variance: Shares) -> Shares:
        """b m + b^2 v / 2."""
        found: Shares = self.sharpness * mean + self.sharpness**2 / 2 * variance
        return found

    @property
    def peak(self) -> float:
        """What the busiest GPU of a step has, at most, on average."""
        return float((np.log(self.terms(self.exponents).sum()) + self.exponents.max()) / self.sharpness)

    def terms(self, exponents: Shares) -> Shares:
        """What is summed in the bound for *exponents*, over its largest term as it is now."""
        terms: Shares = np.exp(np.minimum(exponents - self.exponents.max(), MOST_EXPONENT))
        return terms

    def changed(self, slots: Ints) -> StepPeak:
        """The same with experts in other *slots*."""
        return StepPeak(slots, self.load, self.sharpness, self.dispatch)


def lowered(slots: Ints, load: StepLoad, least: float = LEAST_CHANGE, dispatch: Dispatch = EVENLY) -> Iterator[Ints]:
    """*slots* (gpus, slots) as changed, one exchange or one replica at a time, while that lowers the peak of a step.

    Each time by more than *least*, a part of the mean GPU's load; first bluntly, then as sharply as can be.
    """
    enough = least * float(load.mean.sum()) / len(slots)
    for factor in SHARPNESS:
        slots = _settled(StepPeak.of(slots, load, dispatch, factor), enough).slots
        yield slots


def _settled(now: StepPeak, enough: float) -> StepPeak:
    """After all changes that lower the peak by more than *enough*; replicas are changed where exchanges end."""
    far = now.dispatch.kind == NEAREST and now.dispatch.nodes > 1
    while True:
        for change in (_exchanged_far if far else _exchanged, _given):
            new = change(now)
            if new is not None and new.peak < now.peak - enough:
                now = new
                break
        else:
            return now


def _exchanged(now: StepPeak) -> StepPeak | None:
    """After the best exchange of an expert of one of the busiest GPUs, where all replicas have the same part."""
    gpus, size = now.slots.shape
    gpu, expert = np.repeat(np.arange(gpus), size), now.slots.ravel()
    mine = (now.hottest(HOTTEST)[:, None] * size + np.arange(size)).ravel()
    our_gpu, ours, each = gpu[mine], expert[mine], 1 / now.held.sum(axis=0)
    mean, alone = now.load.mean * each, np.diagonal(now.load.covariance) * each**2
    both = now.load.covariance[np.ix_(ours, expert)] * each[ours][:, None] * each[expert]
    apart = alone[ours][:, None] + alone[expert] - 2 * both  # the variance of what an exchange changes
    more, reach = mean[expert] - mean[ours][:, None], now.with_experts * each
    here = 2 * (reach[our_gpu][:, expert] - reach[our_gpu, ours][:, None]) + apart
    there = 2 * (reach[gpu][:, ours].T - reach[gpu, expert]) + apart
    terms = now.terms(now.exponents)
    change = now.terms(now.exponents[our_gpu][:, None] + now.exponent(more, here)) - terms[our_gpu][:, None]
    change += now.terms(now.exponents[gpu] + now.exponent(-more, there)) - terms[gpu]
    return _swapped(now, mine, change)


def _exchanged_far(now: StepPeak) -> StepPeak | None:
    """After the best exchange of an expert of the busiest GPU, where an exchange changes the parts of all replicas."""
    gpus, size = now.slots.shape
    gpu, expert = np.repeat(np.arange(gpus), size), now.slots.ravel()
    hot = int(now.hottest(1)[0])
    mine = hot * size + np.arange(size)
    ours = expert[mine]
    leaving = np.repeat(now.held[:, ours][:, :, None], gpus, axis=2)  # (gpus, ours, to which GPU)
    leaving[hot] = False
    leaving[np.arange(gpus), :, np.arange(gpus)] = True
    coming = now.held[:, expert]
    coming[gpu, np.arange(len(expert))] = False
    coming[hot] = True
    less = now.dispatch.expected_parts(leaving.reshape(gpus, -1)).reshape(leaving.shape) - now.parts[:, ours, None]
    more = now.dispatch.expected_parts(coming) - now.parts[:, expert]
    after = _after(now, ours, np.moveaxis(less, 0, 2)[:, gpu], expert, more.T[None])
    return _swapped(now, mine, after - now.terms(now.exponents).sum())


def _swapped(now: StepPeak, mine: Ints, change: Shares) -> StepPeak | None:
    """After the exchange of one of the slots *mine* with another that *change* (mine, slots) lowers most, if any."""
    gpu, expert = np.repeat(np.arange(len(now.slots)), now.slots.shape[1]), now.slots.ravel()
    twice = now.held[gpu[mine]][:, expert] | now.held[gpu][:, expert[mine]].T
    change = np.where(twice, np.inf, change)
    one, other = np.unravel_index(change.argmin(), change.shape)
    if not change[one, other] < 0:
        return None
    changed = expert.copy()
    changed[[mine[one], other]] = expert[[other, mine[one]]]
    return now.changed(changed.reshape(now.slots.shape))


def _given(now: StepPeak) -> StepPeak | None:
    """After the best change of one slot, which gets an expert of one of the busiest GPUs; None where no slot can."""
    gpu, slot = np.nonzero(now.held.sum(axis=0)[now.slots] > 1)
    if not len(gpu):
        return None
    giving, taking = now.slots[gpu, slot], np.unique(now.slots[now.hottest(HOTTEST)])
    fewer, at = now.held[:, giving], np.arange(len(gpu))
    fewer[gpu, at] = False
    further = np.repeat(now.held[:, None, taking], len(gpu), axis=1)  # (gpus, giving, taking)
    further[gpu, at] = True
    less = now.dispatch.expected_parts(fewer) - now.parts[:, giving]
    more = now.dispatch.expected_parts(further.reshape(len(fewer), -1)).reshape(further.shape)
    more -= now.parts[:, None, taking]
    after = _after(now, giving, less.T[:, None], taking, np.moveaxis(more, 0, 2))
    after[now.held[gpu][:, taking]] = np.inf
    one, other = np.unravel_index(after.argmin(), after.shape)
    if after[one, other] == np.inf:
        return None
    changed = now.slots.copy()
    changed[gpu[one], slot[one]] = taking[other]
    return now.changed(changed)


def _after(now: StepPeak, first: Ints, less: Shares, second: Ints, more: Shares) -> Shares:
    """The sum of the bound where parts of *first* (n,) experts change by *less*, those of *second* (m,) by *more*.

    Both changes have shape (n, m, gpus), or 1 instead of n or m; the sums (n, m).
    """
    mean, covariance, reach = now.load.mean, now.load.covariance, now.with_experts.T
    alone = np.diagonal(covariance)[:, None]
    means = less * mean[first][:, None, None] + more * mean[second][:, None]
    variances = less * (2 * reach[first][:, None] + less * alone[first][:, None])
    variances = variances + more * (2 * reach[second] + more * alone[second])
    variances += 2 * less * more * covariance[np.ix_(first, second)][:, :, None]
    found: Shares = now.terms(now.exponents + now.exponent(means, variances)).sum(axis=2)
    return found
