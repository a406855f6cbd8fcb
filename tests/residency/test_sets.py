"""Which experts a set has, against trying all that there are; caches against plain loops.

The loops move one expert at a time; Belady's cache is compared with every cache there is.
"""

from itertools import combinations, product
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moetrace import SettingError
from moetrace.residency import sets
from moetrace.residency.sets import Budget, belady, divided, knee, lfu, lru, ranked, refreshed

SHARES = st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any), min_size=1, max_size=3).map(
    lambda rows: np.array([[n / sum(row) for n in row] for row in rows])
)


def covered(shares, slots):
    """Share of the load of all layers that so many of the most loaded experts of each cover."""
    return sum(sum(sorted(row)[::-1][:n]) for row, n in zip(shares, slots)) / len(shares)


@settings(max_examples=60)
@given(shares=SHARES, part=st.floats(0, 1))
def test_no_division_of_slots_covers_more(shares, part):
    """Than the greedy one, of all with the same total."""
    total = round(part * shares.size)
    slots = divided(shares, total)
    every = [own for own in product(range(5), repeat=len(shares)) if sum(own) == total]

    assert total == slots.sum()
    assert covered(shares, slots) == pytest.approx(max(covered(shares, own) for own in every))


def test_a_layer_may_get_no_slot():
    """Also the last one."""
    assert [2, 0] == divided(np.array([[0.5, 0.5, 0.0], [0.4, 0.3, 0.3]]), 2).tolist()


@settings(max_examples=60)
@given(shares=SHARES, cover=st.sampled_from([0.2, 0.5, 0.9, 1.0]))
def test_no_smaller_set_covers_the_share(shares, cover):
    """Of all ways to divide one slot fewer, and the set itself does."""
    total = Budget(cover=cover).size(shares)
    fewer = [own for own in product(range(5), repeat=len(shares)) if sum(own) == total - 1]

    assert covered(shares, divided(shares, total)) >= cover - 1e-9
    assert max(covered(shares, own) for own in fewer) < cover


def test_the_knee_is_where_experts_fall_below_the_mean_load():
    """Three experts have more than a fifth of the load, of the second case two on average over the layers."""
    assert 3 == knee(np.array([[0.3, 0.1, 0.22, 0.21, 0.17]]))
    assert 2 == knee(np.array([[0.9, 0.025, 0.025, 0.025, 0.025], *[[0.3, 0.1, 0.22, 0.21, 0.17]] * 9]))
    assert 3 * 2 == Budget().size(np.array([[0.3, 0.1, 0.22, 0.21, 0.17]] * 2))


def test_equal_shares_are_ranked_by_number():
    """Also where they differ in a digit that depends on the processor."""
    assert [1, 0, 2, 3] == ranked(np.array([0.2, 0.4, 0.2 + 1e-16, 0.2 - 1e-16])).tolist()


def test_a_budget_is_what_it_says():
    """Slots are those of each layer, a total that of all."""
    shares = np.full((3, 4), 0.25)

    assert [6, 7] == [Budget(slots=2).size(shares), Budget(total=7).size(shares)]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(slots=9), "slots must be above 0 and at most 8 (8 experts in a layer), got 9"),
        (Budget(slots=0), "slots must be above 0"),
        (Budget(total=17), "total must be above 0 and at most 16 (2 layers of 8 experts), got 17"),
        (Budget(cover=1.5), "cover must be above 0 and at most 1 (a share of the load), got 1.5"),
        (Budget(slots=1, cover=0.5), "slots and cover exclude each other"),
    ],
)
def test_a_budget_beyond_the_model_is_refused(budget, message):
    """With what would be possible."""
    with pytest.raises(SettingError) as error:
        budget.check(2, 8)

    assert message in str(error.value)


@pytest.mark.parametrize("budget", [Budget(slots=8), Budget(total=16), Budget(cover=1.0), Budget(slots=1)])
def test_all_experts_may_be_resident(budget):
    """The most is allowed, as one is."""
    budget.check(layers=2, experts=8)


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
