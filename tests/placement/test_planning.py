"""GPUs on nodes: whole groups on one, never less even than EPLB, and the nodes of a token by what is assumed.

And the arrays of EPLB: what is in them, that groups stay on nodes, and that few experts move from a plan in force.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import loads, optimum

from moetrace import LoadTrace, SettingError, TraceInfo, evaluate, predictor, rebalance_experts, save_trace, simulate
from moetrace.placement.plan import Plan, default_plan, place
from moetrace.placement.planning import Planning, homes_of, nodes_per_token
from moetrace.placement.step_peak import StepLoad


def whole_groups(plan, groups, nodes):
    """Whether each group is on one node, with all its replicas."""
    size = plan.held.shape[1] // groups
    homes = [{e // size for own in node for e in own} for node in np.array(plan.experts).reshape(nodes, -1, plan.slots.shape[1]).tolist()]  # fmt: skip
    return sum(len(home) for home in homes) == groups == len(set.union(*homes))


def step_counts(experts, steps=60, seed=0):
    """Counts of steps whose experts scatter."""
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.lognormal(4, 1, experts) * np.exp(rng.normal(0, 0.4, (steps, experts)))) + 1


@pytest.mark.parametrize("dispatch", ["even", "nearest", "lp"])
@pytest.mark.slow
def test_whole_groups_stay_on_nodes(dispatch):
    """From nothing, changed from experts in order, and changed again; no expert is twice on a GPU."""
    planning = Planning(8, 8, nodes=4, groups=8, dispatch=dispatch)
    counts = step_counts(16)
    first, second = (planning.load(part, part.sum(axis=0) / part.sum()) for part in (counts, counts[:, ::-1]))

    fresh = planning.place(first, planning.default(16))
    start = planning.replan(planning.default(16), first)
    changed = planning.replan(fresh, second)

    for plan in (fresh, start, changed):
        assert whole_groups(plan, 8, 4)
        assert (1, [3] * 8) == (plan.held.max(), plan.held.sum(axis=1).tolist())
    assert planning.replan(fresh, first).moved(fresh) <= 0.1
    assert not whole_groups(place(counts.sum(axis=0) / counts.sum(), 8, 8), 8, 4)


@pytest.mark.slow
def test_a_plan_on_nodes_is_never_less_even_than_that_of_eplb():
    """Its hierarchical mode, layer by layer; the busiest node is as heavy as whole groups make it."""
    for weight in loads(5, 64):
        plan = Planning(16, 16, nodes=4, groups=8).place(StepLoad.of(weight[None], weight))
        assert plan.peak_over_mean(weight) <= optimum.published(weight, 80, 8, 4, 16) + 1e-9

        own = weight.reshape(8, 8).sum(axis=1)
        best = min(
            max(sum(own[list(pair)]) for pair in pairs)
            for order in itertools.permutations(range(8))
            for pairs in [[order[i : i + 2] for i in (0, 2, 4, 6)]]
            if pairs[0][0] == 0
        )
        heaviest = weight[homes_of(StepLoad.of(weight[None], weight), 8, 4)].sum(axis=1).max()
        assert best - 1e-12 <= heaviest <= 1.05 * best


def test_groups_that_are_busy_in_the_same_steps_are_put_on_other_nodes():
    """Groups are alike in the mean; the mean alone cannot tell which of them go together."""
    rng = np.random.default_rng(0)
    swing = rng.uniform(-0.8, 0.8, (400, 2))
    groups = np.concatenate([1 + swing, 1 - swing[:, ::-1]], axis=1)
    counts = np.repeat(groups, 2, axis=1) * 1000

    homes = homes_of(StepLoad.of(counts), 4, 2)

    assert [[0, 1, 6, 7], [2, 3, 4, 5]] == sorted(homes.tolist())


def test_a_plan_on_nodes_with_more_slots_is_made_from_scratch():
    """Its GPUs are renamed, so that few experts move."""
    load, few, more = StepLoad.of(step_counts(8)), Planning(4, nodes=2, groups=4), Planning(4, 4, nodes=2, groups=4)
    before = few.place(load, few.default(8))

    found = more.replan(before, load)

    assert 12 == found.held.sum()
    assert np.array_equal(more.place(load, before).held, found.held)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(4, 2), (6, 3), (8, 4)]))
@pytest.mark.slow
def test_gpus_are_renamed_within_nodes(seed, shape):
    """As few slots move as can be when nodes stay together, against every way; with one node any GPU may be any."""
    gpus, nodes = shape
    rng = np.random.default_rng(seed)
    plan, before = (place(rng.dirichlet(np.ones(2 * gpus)), gpus) for _ in range(2))

    found = plan.aligned(before, nodes)

    size = gpus // nodes
    own = plan.held.reshape(nodes, size, -1)
    assert {frozenset(map(tuple, node)) for node in own.tolist()} == {
        frozenset(map(tuple, node)) for node in found.held.reshape(nodes, size, -1).tolist()
    }
    if nodes <= 3:
        ways = itertools.product(
            itertools.permutations(range(nodes)), *[list(itertools.permutations(range(size)))] * nodes
        )
        moved = [
            Plan(np.concatenate([own[node][list(order)] for node, order in zip(way, orders)])).moved(before)
            for way, *orders in ways
        ]
        assert found.moved(before) == pytest.approx(min(moved))
    assert 0 == plan.aligned(plan, nodes).moved(plan)


@pytest.mark.slow
def test_nodes_of_a_token_are_those_of_drawing_it():
    """A naive twin: tokens drawn one by one, groups first and then experts, replicas by an even split."""
    rng = np.random.default_rng(3)
    shares = rng.dirichlet(np.ones(16))
    held = Planning(8, 8, nodes=4).place(StepLoad.of(shares[None], shares)).held
    seen = []
    for _ in range(4000):
        weight = shares.reshape(4, 4).sum(axis=1)
        taken = rng.choice(4, 2, replace=False, p=weight)
        nodes = set()
        for group in taken:
            within = shares[group * 4 : group * 4 + 4]
            for expert in group * 4 + rng.choice(4, 3, p=within / within.sum()):
                nodes.add(rng.choice(np.flatnonzero(held[:, expert])) // 2)
        seen.append(len(nodes))

    found = nodes_per_token(held, shares, 4, top_k=6, groups=4, top_groups=2)

    assert found == pytest.approx(np.mean(seen), abs=0.05)


def test_nodes_of_a_token_are_few_where_groups_stay_together():
    """Of 8 nodes with a group each, a token of 4 groups is on 4; on 5.3 where experts are anywhere (DeepSeek-V3)."""
    shares = loads(1, 256, 0.5)[0]
    whole, flat = (Planning(32, nodes=8, groups=groups).place(StepLoad.of(shares[None], shares)) for groups in (8, 1))

    assert nodes_per_token(whole.held, shares, 8, 8, 8, 4) == pytest.approx(4)
    assert nodes_per_token(flat.held, shares, 8, 8, 8, 4) == pytest.approx(5.3, abs=0.1)
    assert np.isnan(nodes_per_token(flat.held, shares, 8, None, 8, 4))
    assert 1 == nodes_per_token(flat.held, shares, 1, 8)
    assert 1.75 == pytest.approx(nodes_per_token(np.eye(8), np.full(8, 1 / 8), 4, 2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpus": -4}, "one GPU or more, not on -4"),
        ({"nodes": 4, "groups": 6}, "6 groups are not the same number on each of 4 nodes"),
        ({"nodes": 1, "groups": 3}, "16 experts are not the same number in each of 3 groups"),
        ({"nodes": 4, "groups": 4, "redundant": 8, "top_groups": 5}, "cannot take 5 of 4 groups"),
        ({"nodes": 8, "groups": 8, "gpus": 16, "redundant": 16}, None),
        ({"nodes": 2, "groups": 2, "gpus": 6, "redundant": 2}, None),
        ({"nodes": 4, "groups": 4, "gpus": 4, "redundant": 2}, "try --redundant 4"),
    ],
)
def test_groups_that_do_not_fit_are_refused(settings, said):
    """With what does not."""
    given = {"gpus": 8} | settings

    if said is None:
        Planning(**given).check(16)
        return
    with pytest.raises(SettingError, match=said):
        Planning(**given).check(16)


def test_scores_tell_of_nodes():
    """The busiest of them, and those of a token: of half of the groups by default, if it is known how many it takes."""
    counts = step_counts(16, 900)[:, None]
    trace = LoadTrace.from_counts(counts, info=TraceInfo("made", top_k=4))
    test = evaluate(trace, [predictor("window_mean")], [300], [500])

    found = simulate(trace, test, Planning(8, nodes=4, groups=4, top_groups=2)).set_index("strategy")

    after = trace.layer(0).after(500, 300).counts.sum(axis=0)
    on = (default_plan(16, 8).held @ after).reshape(4, 2).sum(axis=1)
    assert found.loc["default", "node_peak_over_mean"] == pytest.approx(on.max() / on.mean())
    assert found["nodes_per_token"].tolist() == pytest.approx([2.0] * 3)
    by_default = simulate(trace, test, Planning(8, nodes=4, groups=4))
    assert by_default["nodes_per_token"].tolist() == pytest.approx([2.0] * 3)
    assert (found["node_peak_over_mean"] <= found["peak_over_mean"] + 1e-12).all()
    unknown = simulate(LoadTrace.from_counts(counts), test, Planning(8, nodes=4))
    assert unknown["nodes_per_token"].isna().all()


def test_the_arrays_are_planned_for_single_steps():
    """Of (steps, layers, experts), with groups on nodes and from a plan in force; the sum alone knows less."""
    rng = np.random.default_rng(1)
    swing = rng.uniform(-0.9, 0.9, (300, 1, 4))
    weight = np.concatenate([1 + swing, 1 - swing[..., ::-1]], axis=2)

    steps, _, _ = rebalance_experts(weight, 8, 1, 1, 4)
    again, _, _ = rebalance_experts(weight, 8, 1, 1, 4, before=steps)
    whole, _, logcnt = rebalance_experts(np.concatenate([weight] * 2, axis=2), 20, 4, 2, 4)
    idle, _, _ = rebalance_experts(np.zeros((3, 1, 4)), 4, 1, 1, 2)

    assert [[0, 7], [1, 6], [2, 5], [3, 4]] == sorted(map(sorted, steps[0].reshape(4, 2).tolist()))
    assert np.array_equal(steps, again)
    assert all(2 == len(set((node // 4).tolist())) for node in whole[0].reshape(2, -1))
    assert ([20], [0, 1, 2, 3]) == (logcnt.sum(axis=1).tolist(), sorted(idle[0].tolist()))
    with pytest.raises(SettingError, match="expert 1 in layer 0 is -1"):
        rebalance_experts([[[1, 2]], [[1, -1]]], 2, 1, 1, 2)


@pytest.mark.slow
def test_the_command_plans_on_nodes(moetrace, tmp_path):
    """--nodes, --groups and --top-groups; what does not fit is one line before anything is computed."""
    trace = LoadTrace.from_counts(step_counts(16, 900)[:, None], info=TraceInfo("nodes", top_k=4))
    save_trace(trace, tmp_path / "nodes.parquet")
    argv = ("place", tmp_path / "nodes.parquet", "--gpus", "8", "--predictor", "window_mean", "--cutoffs", "400")
    argv = (*argv, "--horizon", "300", "--nodes", "4")

    found = moetrace(*argv, "--groups", "4", "--top-groups", "1", "--json").json
    bad = moetrace(*argv, "--groups", "6")

    slots = [row["experts"] for row in found["plans"]]
    assert all(
        1 == len({expert // 4 for own in node for expert in own}) for node in (slots[i : i + 2] for i in (0, 2, 4, 6))
    )
    assert (4, 4) == (found["nodes"], found["groups"])
    best = next(row for row in found["summary"] if row["strategy"] == "window_mean" and row["state"] == "all")
    assert 1 == pytest.approx(best["nodes_per_token"])
    assert (2, 1) == (bad.code, bad.err.count("\n"))
    assert "6 groups are not the same number" in bad.err


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
