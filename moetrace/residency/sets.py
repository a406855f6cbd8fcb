"""Resident sets and caches: which experts they have.

A set has the most loaded experts, as many in every layer or as a layer's load deserves. Caches of the experts of one
layer are replayed step by step. A step is the set of its active experts. The order of the tokens within it is not
known, so hits are counted against what was resident when it began; every other active expert has to be loaded then,
whatever the cache keeps of it. Which experts a cache keeps after a step is a question of ranks for LRU, LFU and sets
that are chosen anew: the experts with the highest keys, which are computed for all steps at once. Belady's cache alone
goes step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import SettingError
from moetrace.trace import Counts, Shares

# Shares are compared to so many digits, so that a set does not depend on the processor.
DIGITS = 12

# How slots are divided over the layers: as many for each, or where they cover most.
EQUAL, BY_LOAD = "equal", "by_load"

Slots = NDArray[np.int64]
"""Resident experts of each layer."""
# A step that never comes: what is not used again.
NEVER = np.iinfo(np.int64).max
# Steps that are worked on at a time, which bounds memory.
BLOCK = 1024


@dataclass(frozen=True)
class Budget:
    """How many experts may be resident: *slots* in every layer, *total* over all layers, or as few as *cover* a share.

    At most one of them; none is the knee, up to which every expert has more than the mean load.
    """

    slots: int | None = None
    total: int | None = None
    cover: float | None = None

    def check(self, layers: int, experts: int) -> None:
        """Raise `SettingError` where so many *layers* of so many *experts* do not allow it."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            raise SettingError(f"{' and '.join(given)} exclude each other: give one of them")
        for name, value in given.items():
            most = {"slots": experts, "total": layers * experts, "cover": 1}[name]
            if not 0 < value <= most:
                of = (
                    f"{layers:,} layers of {experts:,} experts"
                    if name == "total"
                    else f"{experts:,} experts in a layer"
                )
                among = "a share of the load" if name == "cover" else of
                raise SettingError(f"{name} must be above 0 and at most {most:,} ({among}), got {value:,}")

    @property
    def allocation(self) -> str:
        """How slots are divided over the layers: `EQUAL` where they were given for each, or not at all."""
        return EQUAL if self.total is None and self.cover is None else BY_LOAD

    def size(self, shares: Shares) -> int:
        """Resident experts over all layers, for forecast *shares* (layers, experts)."""
        layers, experts = shares.shape
        if self.cover is not None:
            gains = np.sort(shares, axis=None)[::-1]
            # The last digits of a sum must not ask for one expert more.
            enough = np.cumsum(gains) / layers >= self.cover - 10.0**-DIGITS
            return int(np.argmax(enough)) + 1 if enough.any() else layers * experts
        if self.total is not None:
            return self.total
        return int(layers * (knee(shares) if self.slots is None else self.slots))


def ranked(shares: Shares) -> NDArray[np.int64]:
    """The experts from the most to the least loaded along the last axis of *shares*; the first of equal ones first."""
    return np.argsort(-shares.round(DIGITS), axis=-1, kind="stable")


def knee(shares: Shares) -> int:
    """Experts of a layer up to which one more covers above the mean load of an expert, for *shares* (layers, experts).

    There the mean curve of coverage is furthest above that of experts taken at random.
    """
    experts = shares.shape[-1]
    curve = np.cumsum(-np.sort(-shares, axis=-1), axis=-1).mean(axis=0)
    above = curve - np.arange(1, experts + 1) / experts
    return int(np.argmax(above.round(DIGITS))) + 1


def divided(shares: Shares, total: int) -> Slots:
    """*total* slots over layers so that resident experts cover most of *shares* (layers, experts): shape (layers,).

    The next slot goes to the expert with the largest share anywhere. Within a layer shares only fall from the first
    expert on, so that no exchange of two slots covers more: for a sum of concave curves this is the optimum
    (Gross 1956, marginal allocation). All layers count the same, as all route the same tokens.
    """
    layers, experts = shares.shape
    best = np.argsort(-shares.round(DIGITS), axis=None, kind="stable")[:total]
    return np.bincount(best // experts, minlength=layers)


# --- caches ------------------------------------------------------------------------------------


class Hits(NamedTuple):
    """By step and number of slots, each of shape (steps, sizes).

    *tokens* are token choices whose expert was resident, *active* the active experts that were, and *entered* the
    experts that became resident without being used: a cache has none, a set that is chosen anew loads them.
    """

    tokens: Counts
    active: Counts
    entered: Counts


def lru(counts: Counts, slots: Sequence[int]) -> Hits:
    """The most recently used experts; of those of one step the ones with more tokens count as more recent.

    With the tokens of a step in random order, that is the likelier order of their last uses.
    *counts* (steps, experts); a cache has so many *slots*, and is empty at first.
    """
    steps, experts = counts.shape
    keys, span = _capped(counts, steps)
    keys += span * np.arange(1, steps + 1)[:, None]
    keys *= experts
    keys[counts == 0] = 0
    return _by_keys(counts, np.maximum.accumulate(keys, axis=0, out=keys), slots)


def lfu(counts: Counts, slots: Sequence[int]) -> Hits:
    """The experts with the most tokens since the first step, see `lru`: a cache that counts and never forgets."""
    return _by_keys(counts, _scaled(np.cumsum(counts, axis=0)), slots)


def refreshed(counts: Counts, slots: Sequence[int], every: int, window: int) -> Hits:
    """The experts with the most tokens in the last *window* rows, chosen anew after *every* rows, see `lru`."""
    rows = np.arange(every - 1, len(counts), every)
    total = np.concatenate([np.zeros((1, counts.shape[1]), np.int64), np.cumsum(counts, axis=0)])
    return _by_keys(counts, _scaled(total[rows + 1] - total[np.maximum(rows + 1 - window, 0)]), slots, every)


def belady(counts: Counts, slots: Sequence[int]) -> Hits:
    """The experts that are used again first, which only someone who knows the future can keep, see `lru`.

    Of those used again in the same step, the ones with more tokens there. No cache that loads what a step needs, and
    nothing else, has more active experts resident (Belady 1966; as intervals between two uses of an expert, of which
    so many may overlap as there are slots, the greedy choice is optimal: Carlisle and Lloyd 1995).
    """
    steps, experts = counts.shape
    # A key of the next use of each expert after each step, in their order; `NEVER` without one.
    uses, span = _capped(counts, steps)
    np.subtract(span - 1 + span * np.arange(steps)[:, None], uses, out=uses)
    uses *= experts
    uses += np.arange(experts)
    uses[counts == 0] = NEVER
    coming, active = np.full_like(uses, NEVER), counts > 0
    np.minimum.accumulate(uses[:0:-1], axis=0, out=coming[-2::-1])
    rows, last = np.arange(len(slots)), np.array(slots) - 1
    # The key of what is resident; that of an expert changes only when it is used.
    keys = np.full((len(slots), counts.shape[1]), NEVER)
    tokens, hits = np.zeros((2, len(counts), len(slots)), np.int64)
    for first in range(0, len(counts), BLOCK):
        block = slice(first, first + BLOCK)
        before = np.empty((len(counts[block]), *keys.shape), np.int64)
        for i, (at, used) in enumerate(zip(coming[block], active[block])):
            before[i] = keys
            np.copyto(keys, at, where=used)
            np.putmask(keys, keys > np.sort(keys, axis=1)[rows, last][:, None], NEVER)
        held = before < NEVER
        tokens[block] = np.einsum("te,tke->tk", counts[block], held)
        hits[block] = (held & active[block, None]).sum(axis=2)
    return Hits(tokens, hits, np.zeros_like(hits))


def _by_keys(counts: Counts, keys: Counts, slots: Sequence[int], every: int = 1) -> Hits:
    """Hits where the experts with the highest of *keys* are resident: a row after *every* rows of *counts*.

    Keys, which are changed, are multiples of the number of experts, 0 for one that was never used; of equal ones the
    first is higher.
    """
    steps, experts = counts.shape
    keys += np.arange(experts)[::-1]
    tokens, active, entered = np.zeros((3, steps, len(slots)), np.int64)
    before = np.zeros((len(slots), experts), bool)
    for first in range(0, len(keys), BLOCK):
        own = keys[first : first + BLOCK]
        ordered = np.sort(own, axis=1)
        rows = slice((first + 1) * every - 1, (first + len(own)) * every, every)
        after = slice(rows.start + 1, rows.stop + every)
        served, used = counts[after], counts[after] > 0
        for i, size in enumerate(slots):
            resident = own >= np.maximum(ordered[:, experts - size], experts)[:, None]
            unused = resident & (counts[rows] == 0)
            unused[0] &= ~before[i]
            unused[1:] &= ~resident[:-1]
            entered[rows, i] = unused.sum(axis=1)
            before[i] = resident[-1]
            held = np.repeat(resident, every, axis=0)[: len(served)]
            tokens[after, i] = np.einsum("te,te->t", served, held)
            active[after, i] = (used & held).sum(axis=1)
    return Hits(tokens, active, entered)


def _capped(counts: Counts, steps: int) -> tuple[Counts, int]:
    """A copy of *counts* for keys of steps and counts, and what is above all: halved until keys fit 64 bits."""
    span = int(counts.max(initial=0)) + 1
    shift = max(0, (span * (steps + 1) * counts.shape[1]).bit_length() - 62)
    return counts >> shift, (span >> shift) + 1


def _scaled(sums: Counts) -> Counts:
    """*sums* as keys, in their place: times the number of experts, halved until that fits 64 bits."""
    experts = sums.shape[1]
    shift = max(0, (int(sums.max(initial=0)) * experts).bit_length() - 62)
    sums >>= shift
    sums *= experts
    return sums


def replayed(counts: Counts, slots: Sequence[int], every: int, window: int) -> dict[str, Hits]:
    """Every cache by method, and the set that is refreshed after *every* rows from the last *window*, see `lru`."""
    return {
        "refreshed": refreshed(counts, slots, every, window),
        "lru": lru(counts, slots),
        "lfu": lfu(counts, slots),
        "oracle": belady(counts, slots),
    }
