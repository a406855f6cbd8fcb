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

from moetrace.placement.planner import Ints
from moetrace.trace import Counts, Shares

# The bound is lowered with half of the sharpness first: measured on the sample traces, plans are then better than
# with the whole alone, and without replicas on 4 GPUs better than with the mean alone.
SHARPNESS = (0.5, 1.0)
# GPUs whose experts are given away in search of the best change: those with the largest terms.
HOTTEST = 4
# A change that lowers the peak of a step by no more than this part of the mean GPU's load is not made.
LEAST_CHANGE = 1e-4
# Where loads scatter less than this part of the mean GPU's load, they are taken to scatter so much.
LEAST_SCATTER = 1e-3
MOST_EXPONENT = 600.0  # sums of terms beyond would not fit in a float


@dataclass(frozen=True, eq=False)
class StepLoad:
    """The load of single *steps* (steps, experts), in parts of all of it."""

    steps: Shares

    @classmethod
    def of(cls, counts: Counts, mean: Shares | None = None) -> StepLoad:
        """Of *counts* (steps, experts), scaled so that they have the *mean* (experts,) that is forecast."""
        steps = counts / counts.sum()
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

    def peak(self, parts: Shares) -> float:
        """What the busiest GPU of each step has, added up, where GPUs have *parts* (gpus, experts)."""
        return float((self.steps @ parts.T).max(axis=1).sum())


@dataclass(frozen=True, eq=False)
class StepPeak:
    """The busiest GPU of a step with experts in *slots* (gpus, slots), none twice on one; *sharpness* is b above."""

    slots: Ints
    load: StepLoad
    sharpness: float

    @classmethod
    def of(cls, slots: Ints, load: StepLoad, factor: float = 1.0) -> StepPeak:
        """With the sharpness that suits GPUs alike, times *factor*."""
        gpus, least = len(slots), LEAST_SCATTER * float(load.mean.sum()) / len(slots)
        variance = float(cls(slots, load, 1.0).variances.mean())
        return cls(slots, load, factor * float(np.sqrt(2 * np.log(gpus) / max(variance, least**2))))

    @cached_property
    def held(self) -> Shares:
        """1 where a GPU holds an expert, shape (gpus, experts)."""
        held = np.zeros((len(self.slots), len(self.load.mean)))
        held[np.arange(len(self.slots))[:, None], self.slots] = 1
        return held

    @cached_property
    def each(self) -> Shares:
        """The part of its expert that one replica has, shape (experts,)."""
        each: Shares = 1 / self.held.sum(axis=0)
        return each

    @cached_property
    def with_experts(self) -> Shares:
        """The covariance of the load of each GPU with the share of each expert, shape (gpus, experts)."""
        found: Shares = (self.held * self.each) @ self.load.covariance
        return found

    @cached_property
    def variances(self) -> Shares:
        """The variance of the load of each GPU, shape (gpus,)."""
        found: Shares = (self.with_experts * self.held * self.each).sum(axis=1)
        return found

    @cached_property
    def exponents(self) -> Shares:
        """What is summed in the bound, its logarithm, shape (gpus,)."""
        return self.exponent(self.held @ (self.load.mean * self.each), self.variances)

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
        return StepPeak(slots, self.load, self.sharpness)


def lowered(slots: Ints, load: StepLoad, least: float = LEAST_CHANGE) -> Iterator[Ints]:
    """*slots* (gpus, slots) as changed, one exchange or one replica at a time, while that lowers the peak of a step.

    Each time by more than *least*, a part of the mean GPU's load; first bluntly, then as sharply as can be.
    """
    enough = least * float(load.mean.sum()) / len(slots)
    for factor in SHARPNESS:
        slots = _settled(StepPeak.of(slots, load, factor), enough).slots
        yield slots


def _settled(now: StepPeak, enough: float) -> StepPeak:
    """After all changes that lower the peak by more than *enough*; replicas are changed where exchanges end."""
    while True:
        for change in (_exchanged, _given):
            new = change(now)
            if new is not None and new.peak < now.peak - enough:
                now = new
                break
        else:
            return now


def _exchanged(now: StepPeak) -> StepPeak | None:
    """After the best exchange of an expert of one of the busiest GPUs, None where none lowers the peak."""
    gpus, size = now.slots.shape
    gpu, expert = np.repeat(np.arange(gpus), size), now.slots.ravel()
    mine = (np.argsort(-now.exponents)[:HOTTEST, None] * size + np.arange(size)).ravel()
    our_gpu, ours = gpu[mine], expert[mine]
    mean, alone = now.load.mean * now.each, np.diagonal(now.load.covariance) * now.each**2
    both = now.load.covariance[np.ix_(ours, expert)] * now.each[ours][:, None] * now.each[expert]
    apart = alone[ours][:, None] + alone[expert] - 2 * both  # the variance of what an exchange changes
    more, reach = mean[expert] - mean[ours][:, None], now.with_experts * now.each
    here = 2 * (reach[our_gpu][:, expert] - reach[our_gpu, ours][:, None]) + apart
    there = 2 * (reach[gpu][:, ours].T - reach[gpu, expert]) + apart
    terms = now.terms(now.exponents)
    change = now.terms(now.exponents[our_gpu][:, None] + now.exponent(more, here)) - terms[our_gpu][:, None]
    change += now.terms(now.exponents[gpu] + now.exponent(-more, there)) - terms[gpu]
    change[(now.held[our_gpu][:, expert] > 0) | (now.held[gpu][:, ours].T > 0)] = np.inf
    one, other = np.unravel_index(change.argmin(), change.shape)
    if not change[one, other] < 0:
        return None
    changed = expert.copy()
    changed[[mine[one], other]] = expert[[other, mine[one]]]
    return now.changed(changed.reshape(now.slots.shape))


def _given(now: StepPeak) -> StepPeak | None:
    """After the best change of one slot, which gets an expert of one of the busiest GPUs; None where no slot can."""
    copies = now.held.sum(axis=0)
    gpu, slot = np.nonzero(copies[now.slots] > 1)
    if not len(gpu):
        return None
    giving, taking = now.slots[gpu, slot], np.unique(now.slots[np.argsort(-now.exponents)[:HOTTEST]])
    less, more = _parts_given(now.held, gpu, giving, taking)
    mean, covariance, reach = now.load.mean, now.load.covariance, now.with_experts.T
    alone = np.diagonal(covariance)[:, None]
    means = more * mean[taking][:, None] + (less * mean[giving][:, None])[:, None]
    variances = more * (2 * reach[taking] + more * alone[taking])
    variances += (less * (2 * reach[giving] + less * alone[giving]))[:, None]
    variances += 2 * more * less[:, None] * covariance[np.ix_(giving, taking)][:, :, None]
    after = now.terms(now.exponents + now.exponent(means, variances)).sum(axis=2)
    after[now.held[gpu][:, taking] > 0] = np.inf
    one, other = np.unravel_index(after.argmin(), after.shape)
    if after[one, other] == np.inf:
        return None
    changed = now.slots.copy()
    changed[gpu[one], slot[one]] = taking[other]
    return now.changed(changed)


def _parts_given(held: Shares, gpu: Ints, giving: Ints, taking: Ints) -> tuple[Shares, Shares]:
    """How the parts change of the experts *giving* a slot on *gpu* and *taking* it.

    Shapes (giving, gpus) and (giving, taking, gpus).
    """
    copies, at = held.sum(axis=0), np.arange(len(gpu))
    less = held[:, giving].T * (1 / (copies[giving] - 1) - 1 / copies[giving])[:, None]
    less[at, gpu] = -1 / copies[giving]
    more = held[:, taking].T * (1 / (copies[taking] + 1) - 1 / copies[taking])[:, None]
    more = np.repeat(more[None], len(at), axis=0)
    more[at, :, gpu] += 1 / (copies[taking] + 1)
    return less, more
