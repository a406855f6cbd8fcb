"""The arrays of EPLB: what is in them, that groups stay on nodes, and that few experts move from a plan in force."""

import numpy as np
import pytest
from test_planner import loads, optimum

from moetrace import SettingError, rebalance_experts


def peaks(phy2log, weight, gpus):
    """Peak over mean of each layer, counted slot by slot."""
    found = []
    for row, load in zip(phy2log, weight):
        parts = [load[e] / list(row).count(e) for e in row]
        on = [sum(own) for own in np.split(np.array(parts), gpus)]
        found.append(max(on) * gpus / load.sum())
    return np.array(found)


@pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (4, 2), (3, 2)])
def test_the_three_arrays_say_the_same(groups, nodes):
    """Each slot is in the list of its expert, which is padded with -1."""
    phy2log, log2phy, logcnt = rebalance_experts(loads(3, 24), 32, groups, nodes, 8)

    assert ((3, 32), (3, 24, logcnt.max()), (3, 24)) == (phy2log.shape, log2phy.shape, logcnt.shape)
    for slots, where, counts in zip(phy2log, log2phy, logcnt):
        for expert in range(24):
            own = np.flatnonzero(slots == expert).tolist()
            assert (len(own), own) == (counts[expert], sorted(where[expert][where[expert] >= 0].tolist()))
        assert (np.diff(np.sort(slots.reshape(8, 4), axis=1), axis=1) > 0).all()


def test_groups_stay_on_a_node():
    """And no plan is less even than the hierarchical one of EPLB."""
    weight = loads(6, 64)

    phy2log, _, _ = rebalance_experts(weight, 80, 8, 4, 16)

    for row in phy2log:
        homes = [set((node // 8).tolist()) for node in np.split(row, 4)]
        assert [2] * 4 == [len(home) for home in homes]
        assert 8 == len(set.union(*homes))
    theirs = [optimum.published(row, 80, 8, 4, 16) for row in weight]
    assert (peaks(phy2log, weight, 16) <= np.array(theirs) + 1e-9).all()


@pytest.mark.parametrize(("groups", "nodes"), [(1, 1), (8, 4)])
@pytest.mark.slow
def test_few_slots_change_from_a_plan_in_force(groups, nodes):
    """None where the load is the same; an expert that stays on its GPU stays in its slot."""
    weight = loads(4, 64)
    moved = weight * np.random.default_rng(2).lognormal(0, 0.05, weight.shape)
    before, _, _ = rebalance_experts(weight, 80, groups, nodes, 16)

    same, _, _ = rebalance_experts(weight, 80, groups, nodes, 16, before=before)
    after, _, _ = rebalance_experts(moved, 80, groups, nodes, 16, before=before)
    fresh, _, _ = rebalance_experts(moved, 80, groups, nodes, 16)

    assert np.array_equal(before, same)
    assert 0 < (after != before).mean() < 0.5 * (fresh != before).mean()
    assert (peaks(after, moved, 16) <= peaks(fresh, moved, 16) + 0.03).all()
    kept, _, _ = rebalance_experts(moved, 80, groups, nodes, 16, before=before, tolerance=9.0)
    assert np.array_equal(before, kept)


def test_a_plan_in_force_that_knows_no_nodes_is_left_for_whole_groups():
    """One that mixes groups is planned anew, its nodes and GPUs named after those that hold most of the same."""
    weight = loads(2, 16)
    flat, _, _ = rebalance_experts(weight, 16, 1, 1, 4)

    after, _, _ = rebalance_experts(weight, 16, 4, 2, 4, before=flat)

    assert all(2 == len(set((node // 4).tolist())) for row in after for node in np.split(row, 2))


@pytest.mark.parametrize(("tolerance", "homes"), [(0.03, [[0, 1], [2, 3]]), (0.015, [[0, 3], [1, 2]])])
def test_groups_stay_where_they_are_even_enough(tolerance, homes):
    """The busiest node has 2 % more than the mean: it keeps its groups within that tolerance of the mean node."""
    weight = np.repeat([0.26, 0.25, 0.25, 0.24], 2)[None] / 2

    after, _, _ = rebalance_experts(weight, 8, 4, 2, 2, before=[[*range(8)]], tolerance=tolerance)

    assert homes == sorted(sorted(set((node // 2).tolist())) for node in np.split(after[0], 2))


def test_a_layer_without_load_is_planned():
    """Every expert alike."""
    phy2log, _, _ = rebalance_experts(np.zeros((1, 4)), 4, 1, 1, 2)

    assert [0, 1, 2, 3] == sorted(phy2log[0].tolist())


@pytest.mark.parametrize(
    ("weight", "numbers", "before", "said"),
    [
        ([1, 2], (2, 1, 1, 2), None, "(layers, experts) is needed"),
        ([[1, -2]], (2, 1, 1, 2), None, "expert 1 in layer 0 is -2"),
        ([[1, float("nan")]], (2, 1, 1, 2), None, "is nan"),
        ([[1, 2, 3]], (3, 1, 1, 2), None, "try --redundant 1"),
        ([[1, 2, 3, 4]], (3, 1, 1, 1), None, "do not hold 4 experts"),
        ([[1, 2, 3, 4]], (5, 2, 2, 2), None, "5 replicas do not hold 4 experts evenly on 2 nodes"),
        ([[1, 2, 3, 4]], (4, 2, 2, 3), None, "not the same number on each of 2 nodes"),
        ([[1, 2, 3, 4, 5, 6]], (6, 4, 2, 2), None, "in each of 4 groups"),
        ([[1, 2]], (2, 1, 1, 2), [[0, 0]], "layer 0 does not hold every expert"),
        ([[1, 2]], (2, 1, 1, 2), [[0, 1, 1]], "shape (1, 2) are needed"),
    ],
)
def test_what_does_not_fit_is_refused(weight, numbers, before, said):
    """With the place."""
    with pytest.raises(SettingError) as error:
        rebalance_experts(weight, *numbers, before=before)

    assert said in str(error.value)
