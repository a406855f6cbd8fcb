"""Caches against plain loops that move one expert at a time, and Belady's against every cache there is."""

from itertools import combinations
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moetrace.residency import sets
from moetrace.residency.sets import belady, lfu, lru, refreshed

TRACES = arrays(np.int64, st.tuples(st.integers(1, 14), st.integers(1, 6)), elements=st.sampled_from([0, 0, 1, 2, 5]))


def replay(counts, slots, keep):
    """Tokens and active experts that were resident at each step; *keep* says what a cache has after one."""
    resident, found = [], []
    for step, row in enumerate(counts):
        found.append([sum(row[e] for e in resident), sum(row[e] > 0 for e in resident)])
        resident = keep(step, [e for e in range(len(row)) if e in resident or row[e] > 0])[:slots]
    return np.array(found)


def by_lru(counts, slots):
    """The experts of a list that is moved to the front with each use, the busiest of a step last."""
    recent = []

    def keep(step, _known):
        for e in sorted(np.flatnonzero(counts[step]), key=lambda e: (counts[step, e], -e)):
            recent[:] = [e, *(old for old in recent if old != e)]
        return recent

    return replay(counts, slots, keep)


def by_lfu(counts, slots):
    """Of what was resident or used, the experts with the most tokens so far."""
    return replay(counts, slots, lambda step, known: sorted(known, key=lambda e: (-counts[: step + 1, e].sum(), e)))


def by_belady(counts, slots):
    """Of what was resident or used, the experts that are used again first, then by their tokens there."""

    def keep(step, known):
        nexts = {e: [t for t in range(step + 1, len(counts)) if counts[t, e]] for e in known}
        again = [e for e in known if nexts[e]]
        return sorted(again, key=lambda e: (nexts[e][0], -counts[nexts[e][0], e], e))

    return replay(counts, slots, keep)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Traces of a few steps have several blocks, so that their joins are tested, too."""
    with patch.object(sets, "BLOCK", 4):
        yield


@pytest.mark.parametrize(("cache", "loop"), [(lru, by_lru), (lfu, by_lfu), (belady, by_belady)])
@settings(max_examples=60)
@given(counts=TRACES)
@pytest.mark.slow
def test_caches_equal_a_plain_loop(cache, loop, counts):
    """At every step, for every number of slots."""
    sizes = range(1, counts.shape[1] + 1)
    found = cache(counts, sizes)

    for i, slots in enumerate(sizes):
        assert loop(counts, slots).tolist() == np.stack([found.tokens[:, i], found.active[:, i]], axis=1).tolist()
    assert not found.entered.any()


@settings(max_examples=60)
@given(counts=TRACES.filter(lambda counts: counts.shape[1] > 1), every=st.integers(1, 4), window=st.integers(1, 5))
def test_refreshed_sets_equal_a_plain_loop(counts, every, window):
    """The most tokens of the last rows, chosen anew after every so many."""
    slots, resident, expected, entered = 2, [], [], []
    for step, row in enumerate(counts):
        expected.append([sum(row[e] for e in resident), sum(row[e] > 0 for e in resident)])
        entered.append(0)
        if (step + 1) % every == 0:
            sums = counts[max(0, step + 1 - window) : step + 1].sum(axis=0)
            chosen = sorted(np.flatnonzero(sums), key=lambda e: (-sums[e], e))[:slots]
            entered[-1] = sum(row[e] == 0 for e in chosen if e not in resident)
            resident = chosen
    found = refreshed(counts, [slots], every, window)

    assert expected == np.concatenate([found.tokens, found.active], axis=1).tolist()
    assert entered == found.entered[:, 0].tolist()


def best_of_all(counts, slots):
    """The most active experts that any cache can have resident, by trying all that it can keep after each step."""
    experts = range(counts.shape[1])
    best = {frozenset(): 0}
    for row in counts:
        used, after = {e for e in experts if row[e]}, {}
        for held, hits in best.items():
            now = hits + len(used & held)
            for size in range(slots + 1):
                for kept in combinations(sorted(held | used), size):
                    after[frozenset(kept)] = max(after.get(frozenset(kept), 0), now)
        best = after
    return max(best.values())


@settings(max_examples=40)
@given(counts=arrays(np.int64, st.tuples(st.integers(1, 7), st.just(4)), elements=st.sampled_from([0, 0, 1, 3])))
def test_no_cache_has_more_hits_than_belady(counts):
    """As many as the best of all caches."""
    for slots in (1, 2, 3):
        assert best_of_all(counts, slots) == belady(counts, [slots]).active.sum()


@pytest.mark.parametrize("cache", [lru, lfu, belady])
def test_huge_counts_do_not_overflow(cache):
    """The keys of steps and counts fit 64 bits: the result is that of counts a millionth as large."""
    counts = np.random.default_rng(0).integers(0, 3, (50, 6)) * 10
    small, huge = cache(counts, [2, 3]), cache(counts << 52, [2, 3])

    assert small.active.tolist() == huge.active.tolist()
    assert (small.tokens << 52).tolist() == huge.tokens.tolist()
