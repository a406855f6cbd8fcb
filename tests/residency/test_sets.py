"""Which experts a set has, against trying all that there are."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace import SettingError
from moetrace.residency.sets import Budget, divided, knee, ranked

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
