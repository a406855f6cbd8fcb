"""Caches of the experts of one layer, replayed step by step: what each had when a step began.

A step is the set of its active experts. The order of the tokens within it is not known, so hits are counted against
what was resident when it began; every other active expert has to be loaded then, whatever the cache keeps of it.
Which experts a cache keeps after a step is a question of ranks for LRU, LFU and sets that are chosen anew: the
experts with the highest keys, which are computed for all steps at once. Belady's cache alone goes step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moetrace.trace import Counts

# A step that never comes: what is not used again.
NEVER = np.iinfo(np.int64).max
# Steps that are worked on at a time, which bounds memory.
BLOCK = 1024


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
    coming, active = _next_uses(counts), counts > 0
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


def _next_uses(counts: Counts) -> Counts:
    """A key of the next use of each expert after each step, in their order; `NEVER` without one. Shape as *counts*."""
    steps, experts = counts.shape
    keys, span = _capped(counts, steps)
    np.subtract(span - 1 + span * np.arange(steps)[:, None], keys, out=keys)
    keys *= experts
    keys += np.arange(experts)
    keys[counts == 0] = NEVER
    coming = np.full_like(keys, NEVER)
    np.minimum.accumulate(keys[:0:-1], axis=0, out=coming[-2::-1])
    return coming


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
