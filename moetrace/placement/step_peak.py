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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.placement.dispatch import EVENLY, FEWEST, LP, NEAREST, Dispatch, Held, Tokens, least_peaks
from moetrace.placement.planner import Ints, in_units
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
MOST_EXPONENT = 80.0  # sums of terms beyond would not fit in a 32-bit float
LEAST_TERM = 1e-300  # a sum of terms so small, over the largest as it was, has a logarithm
# A load of single steps is made of so many units: sums of them are exact in 64-bit floats.
STEP_UNITS = 2.0**48


def comparable(values: Any) -> Any:
    """*values* to the precision of a 32-bit float, in which two that differ only by rounding are the same.

    What is compared in a search is compared so, and ties go to the first: the search then takes the same way under
    every BLAS kernel, whose sums differ in the last of their 53 bits.
    """
    return values.astype(np.float32)


@dataclass(frozen=True, eq=False)
class StepLoad:
    """The load of single *steps* (steps, experts), whole numbers that add up to about `STEP_UNITS`.

    Each is so many *tokens*. Make one with `StepLoad.of`; shares alone are a load of one step.
    """

    steps: Shares
    tokens: float = 1.0

    @classmethod
    def of(cls, counts: Tokens, mean: Shares | None = None) -> StepLoad:
        """Of *counts* (steps, experts), scaled so that they have the *mean* (experts,) that is forecast."""
        kept = counts[counts.sum(axis=1) > 0]
        if not len(kept):
            kept = (np.ones(counts.shape[1]) if mean is None else mean)[None]
        steps, tokens = kept / kept.sum(), float(kept.sum())
        if mean is not None:
            own, wanted = steps.sum(axis=0), in_units(mean[None])[0]
            idle = np.where(own > 0, 0, wanted) * steps.sum(axis=1, keepdims=True)
            steps = steps * np.divide(wanted, own, out=np.zeros_like(own), where=own > 0) + idle
            steps /= wanted.sum()
        return cls(np.rint(steps * STEP_UNITS), tokens / STEP_UNITS)

    def of_experts(self, experts: Ints) -> StepLoad:
        """The load of these *experts* alone."""
        return StepLoad(self.steps[:, experts], self.tokens)

    @cached_property
    def mean(self) -> Shares:
        """The share of each expert of the whole load, shape (experts,)."""
        return self.steps.sum(axis=0) / self.steps.sum()

    @cached_property
    def covariance(self) -> Shares:
        """The covariance of the experts' shares over the steps, each step by its load, shape (experts, experts)."""
        weight = self.steps.sum(axis=1, keepdims=True)
        apart = (self.steps / weight - self.mean) * np.sqrt(weight / weight.sum())
        return apart.T @ apart

    def peak(self, held: Held, dispatch: Dispatch = EVENLY) -> float:
        """The load of the busiest GPU of each step, added up, as a part of all of it; see `comparable`.

        GPUs hold experts as in *held* (gpus, experts). All of it is what all experts take that have one replica.
        """
        if not dispatch.time.linear:
            tokens = self.steps * self.tokens
            part = dispatch.peaks(held, tokens).sum() / dispatch.time.cost(tokens).sum()
        elif dispatch.kind == FEWEST:
            part = np.rint(dispatch.peaks(held, self.steps)).sum() / self.steps.sum()
        elif dispatch.kind != LP:
            part = np.rint(self.steps @ dispatch.expected_parts(held).T).max(axis=1).sum() / self.steps.sum()
        else:
            few = self.steps[:: -(-len(self.steps) // MOST_SPLIT)]
            part = np.rint(least_peaks(held, few)).sum() / few.sum()
        return float(comparable(part))


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
        gpus, least = len(slots), LEAST_SCATTER / len(slots)
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
        return self.parts @ self.load.covariance

    @cached_property
    def variances(self) -> Shares:
        """The variance of the load of each GPU, shape (gpus,)."""
        return (self.with_experts * self.parts).sum(axis=1)

    @cached_property
    def exponents(self) -> Shares:
        """The logarithms of what is summed in the bound, shape (gpus,)."""
        return self.exponent(self.parts @ self.load.mean, self.variances)

    def hottest(self, number: int) -> Ints:
        """So many GPUs, those with the largest terms."""
        return np.argsort(comparable(-self.exponents), kind="stable")[:number]

    def exponent(self, mean: Shares, variance: Shares) -> Shares:
        """b m + b^2 v / 2."""
        return self.sharpness * mean + self.sharpness**2 / 2 * variance

    @property
    def peak(self) -> float:
        """What the busiest GPU of a step has, at most, on average."""
        return self.peak_of(self.terms(self.exponents).sum())

    def peak_of(self, total: float) -> float:
        """The same where the terms, over the largest as it is now, have that *total*."""
        return float((np.log(max(total, LEAST_TERM)) + self.exponents.max()) / self.sharpness)

    def terms(self, exponents: Shares) -> Shares:
        """What is summed in the bound for *exponents*, over its largest term as it is now."""
        return np.exp(np.minimum(exponents - self.exponents.max(), MOST_EXPONENT))

    def changed(self, slots: Ints) -> StepPeak:
        """The same with experts in other *slots*."""
        return StepPeak(slots, self.load, self.sharpness, self.dispatch)


def lowered(slots: Ints, load: StepLoad, least: float = LEAST_CHANGE, dispatch: Dispatch = EVENLY) -> Iterator[Ints]:
    """*slots* (gpus, slots) as changed, one exchange or one replica at a time, while that lowers the peak of a step.

    Each time by more than *least*, a part of the mean GPU's load; first bluntly, then as sharply as can be. Where time
    does not follow tokens, experts are only exchanged: another number of replicas would change what all of them take.
    """
    if not dispatch.time.linear:  # the load is the time that all replicas of an expert take, which they share evenly
        copies = np.bincount(slots.ravel(), minlength=len(load.mean))
        load = StepLoad.of(dispatch.alone(copies, load.steps * load.tokens))
    for factor in SHARPNESS:
        slots = _settled(StepPeak.of(slots, load, dispatch, factor), least / len(slots)).slots
        yield slots


def _settled(now: StepPeak, enough: float) -> StepPeak:
    """After all changes that lower the peak by more than *enough*; replicas are changed where exchanges end."""
    far = now.dispatch.kind == NEAREST and now.dispatch.nodes > 1
    changes = (_exchanged_far if far else _exchanged, *([_given] if now.dispatch.time.linear else []))
    while True:
        for change in changes:
            new = change(now, enough)
            if new is not None:
                now = new
                break
        else:
            return now


def _exchanged(now: StepPeak, enough: float) -> StepPeak | None:
    """After the best exchanges of experts of the busiest GPUs, where all replicas have the same part."""
    gpus, size = now.slots.shape
    hot = now.hottest(HOTTEST)
    ours, theirs, each = now.slots[hot].ravel(), now.slots.ravel(), 1 / now.held.sum(axis=0)
    # The exponent of a GPU after an exchange is a sum of what it gives, of what it gets, and of what these two share:
    # so only three operations on each exponent are done for all pairs of slots.
    square = now.sharpness**2
    mean, alone = now.sharpness * now.load.mean * each, square / 2 * np.diagonal(now.load.covariance) * each**2
    reach = square * now.with_experts * each
    gives, gets = now.exponents[:, None] - mean + alone - reach, mean + alone + reach  # (gpus, experts)
    both = ((square * each[ours])[:, None] * now.load.covariance[ours] * each)[:, theirs]
    here = gives[hot[:, None], now.slots[hot]][:, :, None] + gets[hot][:, None, theirs]
    there = gets.T[ours, :, None] + gives[np.arange(gpus)[:, None], now.slots]
    terms = now.terms(now.exponents)
    change = now.terms(here.reshape(both.shape) - both) + now.terms(there.reshape(both.shape) - both)
    change -= np.repeat(terms[hot], size)[:, None] + np.repeat(terms, size)
    return _swapped(now, hot, change, enough)


def _exchanged_far(now: StepPeak, enough: float) -> StepPeak | None:
    """After the best exchange of an expert of the busiest GPU, where an exchange changes the parts of all replicas."""
    gpus, size = now.slots.shape
    gpu, expert = np.repeat(np.arange(gpus), size), now.slots.ravel()
    hot = now.hottest(1)
    ours = now.slots[hot[0]]
    leaving = np.repeat(now.held[:, ours][:, :, None], gpus, axis=2)  # (gpus, ours, to which GPU)
    leaving[hot[0]] = False
    leaving[np.arange(gpus), :, np.arange(gpus)] = True
    coming = now.held[:, expert]
    coming[gpu, np.arange(len(expert))] = False
    coming[hot[0]] = True
    less = now.dispatch.expected_parts(leaving.reshape(gpus, -1)).reshape(leaving.shape) - now.parts[:, ours, None]
    more = now.dispatch.expected_parts(coming) - now.parts[:, expert]
    after = _after(now, ours, np.moveaxis(less, 0, 2)[:, gpu], expert, more.T[None])
    return _swapped(now, hot, after - now.terms(now.exponents).sum(), enough)


def _swapped(now: StepPeak, hot: Ints, change: Shares, enough: float) -> StepPeak | None:
    """After those exchanges that lower the peak most, each by more than *enough*; None where none does.

    *change* (slots of the *hot* GPUs, slots) is that of the sum of terms. No GPU takes part in two exchanges: each then
    changes the sum as if it was alone.
    """
    gpus, size = now.slots.shape
    twice = np.repeat(now.held[hot][:, now.slots.ravel()], size, axis=0)
    twice |= np.repeat(now.held[:, now.slots[hot].ravel()].T, size, axis=1)
    sums = comparable(np.where(twice, np.inf, change)).reshape(len(hot), size, gpus, size)
    worth = comparable(now.terms(now.exponents).sum() * np.expm1(-now.sharpness * enough))
    slots = now.slots.copy()
    for _ in hot:
        ours, one, gpu, other = np.unravel_index(sums.argmin(), sums.shape)
        if not sums[ours, one, gpu, other] < worth:
            break
        slots[hot[ours], one], slots[gpu, other] = now.slots[gpu, other], now.slots[hot[ours], one]
        for taken in (hot[ours], gpu):
            sums[hot == taken], sums[:, :, taken] = np.inf, np.inf
    return now.changed(slots) if (slots != now.slots).any() else None


def _given(now: StepPeak, enough: float) -> StepPeak | None:
    """After the best change of one slot, which gets an expert of one of the busiest GPUs.

    None where no slot can, or where that does not lower the peak by more than *enough*.
    """
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
    one, other = np.unravel_index(comparable(after).argmin(), after.shape)
    if not np.float32(now.peak_of(float(after[one, other]))) < np.float32(now.peak - enough):
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
    return now.terms(now.exponents + now.exponent(means, variances)).sum(axis=2)
