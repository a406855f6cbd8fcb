"""How tokens are split among replicas: SGLang's table, a linear programme's loads, and plans made for either."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moetrace import LoadTrace, SettingError, evaluate, predictor, save_trace, simulate
from moetrace.placement import dispatch
from moetrace.placement.dispatch import EVENLY, Dispatch, least_loads, least_peaks, nearest_table
from moetrace.placement.plan import Plan, default_plan, evenness, place, replan
from moetrace.placement.planner import planned
from moetrace.placement.planning import Planning
from moetrace.placement.step_peak import StepLoad, StepPeak, lowered

# 8 experts in 16 slots of 8 GPUs, two layers, and what SGLang 0.5.23 sends where once each rank has read the map.
PHY2LOG = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 2, 1, 0, 7], [7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 0, 1, 1, 2, 3, 4]])
SGLANG = [
    [[0, 1, 10, 11, 4, 5, 6, 15], [7, 11, 5, 4, 15, 2, 1, 0]], [[8, 1, 2, 3, 4, 5, 6, 7], [10, 6, 5, 14, 3, 2, 1, 0]],
    [[14, 9, 12, 11, 4, 5, 6, 15], [7, 11, 5, 4, 15, 2, 1, 0]], [[0, 13, 12, 3, 4, 5, 6, 7], [7, 6, 13, 4, 3, 2, 1, 0]],
    [[8, 9, 12, 3, 4, 5, 6, 7], [8, 11, 5, 4, 3, 2, 1, 0]], [[14, 1, 10, 11, 4, 5, 6, 15], [10, 11, 13, 4, 3, 2, 1, 0]],
    [[0, 13, 12, 3, 4, 5, 6, 7], [8, 12, 13, 14, 15, 2, 1, 0]], [[14, 1, 12, 3, 4, 5, 6, 15], [7, 11, 13, 14, 15, 2, 1, 0]],
]  # fmt: skip


def shares_of(rows, experts, spread=1.0, seed=0):
    """Lognormal shares of so many layers."""
    found = np.random.default_rng(seed).lognormal(0, spread, (rows, experts))
    return found / found.sum(axis=1, keepdims=True)


def slow_row(phy2log, rank, gpus, nodes):
    """Where *rank* sends each expert, in loops over layers, experts and ranks, with the candidates a rank keeps."""
    draw, size, row = random.Random(42), phy2log.shape[1] // gpus, []

    def near(candidates, gpu):
        if len(candidates) == 1:
            return candidates[0]
        for slot in candidates:
            if slot // size == gpu:
                return slot
        mates = [slot for slot in candidates if slot // (size * (gpus // nodes)) == gpu // (gpus // nodes)]
        return mates[0] if mates and len(mates) < len(candidates) else None

    for layer in phy2log.tolist():
        row.append([])
        for expert in range(max(layer) + 1):
            candidates = [slot for slot, held in enumerate(layer) if held == expert]
            if near(candidates, rank) is not None:
                candidates = [near(candidates, rank)]
            chosen = [near(candidates, gpu) for gpu in range(gpus)]
            left = chosen.count(None)
            if left:
                choices = candidates * (left // len(candidates)) + draw.sample(candidates, k=left % len(candidates))
                draw.shuffle(choices)
                chosen = [choices.pop(0) if slot is None else slot for slot in chosen]
            row[-1].append(chosen[rank])
    return row


def test_the_table_is_that_of_sglang():
    """As its own functions gave it (`compute_logical_to_rank_dispatch_physical_map`, seed 42, one node)."""
    assert nearest_table(PHY2LOG, 8).tolist() == SGLANG


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(4, 1, 8, 4), (4, 2, 8, 8), (8, 4, 16, 8)]))
@pytest.mark.slow
def test_the_table_equals_its_slow_twin(seed, shape):
    """Rank by rank, on one node and on several."""
    gpus, nodes, experts, redundant = shape
    phy2log = planned(shares_of(3, experts, seed=seed), gpus, redundant).slots.reshape(3, -1)

    table = nearest_table(phy2log, gpus, nodes)

    for rank in range(gpus):
        assert table[rank].tolist() == slow_row(phy2log, rank, gpus, nodes)


def test_expected_parts_are_the_mean_over_seeds():
    """What is chosen once is drawn 400 times; parts of an expert sum to 1 however tokens are split."""
    plan = place(shares_of(1, 12)[0], 8, 12)
    parts = Dispatch("nearest", 4).expected_parts(plan.held)
    slots = plan.slots.reshape(1, -1)
    drawn = np.zeros(parts.shape)
    for seed in range(400):
        table = nearest_table(slots, 8, 4, seed=seed)[:, 0]
        np.add.at(drawn, (table // 3, np.arange(12)), 1 / 8 / 400)

    assert parts == pytest.approx(drawn, abs=0.03)
    assert np.ones(12) == pytest.approx(parts.sum(axis=0))
    for kind, nodes in (("even", 1), ("nearest", 1), ("nearest", 4), ("lp", 1)):
        counts = np.random.default_rng(0).integers(0, 99, (5, 12))
        loads = Dispatch(kind, nodes).loads(plan.held, counts)
        assert counts.sum(axis=1) == pytest.approx(loads.sum(axis=1))
        assert np.ones(12) == pytest.approx(Dispatch(kind, nodes).expected_parts(plan.held).sum(axis=0))


def test_the_first_replica_of_a_node_serves_its_node():
    """Expert 0 on GPUs 1 and 3 of node 0 and on GPU 4 of node 1: each GPU works for those without one."""
    held = np.zeros((8, 1), int)
    held[[1, 3, 4]] = 1

    parts = Dispatch("nearest", 2).expected_parts(held)[:, 0]

    assert [0, 3 / 8, 0, 1 / 8, 4 / 8, 0, 0, 0] == pytest.approx(parts.tolist())


def lowest(held, tokens):
    """The load of the busiest GPU by SciPy's linear programme."""
    gpus, experts = held.shape
    pairs = [(gpu, expert) for gpu in range(gpus) for expert in range(experts) if held[gpu, expert]]
    on, of = np.zeros((gpus, len(pairs) + 1)), np.zeros((experts, len(pairs) + 1))
    on[:, -1] = -1
    for at, (gpu, expert) in enumerate(pairs):
        on[gpu, at] = of[expert, at] = 1
    return linprog([0] * len(pairs) + [1], on, np.zeros(gpus), of, tokens).fun


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, 4, 4), (6, 3, 6), (16, 8, 8), (5, 5, 10)]))
@pytest.mark.slow
def test_loads_are_as_low_as_those_of_a_linear_programme(seed, shape):
    """In every step; and without the GPUs that are busiest, those of the rest, as no share can be moved down."""
    experts, gpus, redundant = shape
    rng = np.random.default_rng(seed)
    plan = place(rng.dirichlet(np.ones(experts)), gpus, redundant)
    counts = rng.poisson(rng.lognormal(4, 1, experts), (3, experts))

    loads = least_loads(plan.held, counts)

    assert [lowest(plan.held, row) for row in counts] == pytest.approx(loads.max(axis=1).tolist(), rel=1e-3)
    peaks = least_peaks(plan.held, counts)
    assert [lowest(plan.held, row) for row in counts] == pytest.approx(peaks.tolist(), rel=1e-9)
    assert Dispatch("lp").peaks(plan.held, counts).tolist() == peaks.tolist()
    assert counts.sum(axis=1) == pytest.approx(loads.sum(axis=1))
    assert (loads.max(axis=1) <= EVENLY.loads(plan.held, counts).max(axis=1) + 1e-9).all()


def test_the_busiest_of_many_gpus_is_that_of_their_loads(monkeypatch):
    """All sets of GPUs are tried where they are few; the others are found by the loads of all."""
    counts = np.random.default_rng(0).poisson(50, (20, 12)) * np.arange(1, 13)
    plan = place(np.full(12, 1 / 12), 6, 6)
    peaks = least_peaks(plan.held, counts)

    monkeypatch.setattr(dispatch, "MOST_TRIED", 5)

    assert least_peaks(plan.held, counts) == pytest.approx(peaks, rel=1e-4)
    assert least_peaks(plan.held, counts).tolist() == least_loads(plan.held, counts).max(axis=1).tolist()


def test_where_nothing_is_replicated_all_dispatches_are_one():
    """There is nothing to split."""
    counts = np.random.default_rng(0).integers(1, 99, (20, 8))
    plan = default_plan(8, 4)

    for kind, nodes in (("nearest", 1), ("nearest", 2), ("lp", 1)):
        assert evenness(plan, counts) == pytest.approx(evenness(plan, counts, Dispatch(kind, nodes)))


def test_even_plans_are_less_even_under_nearest():
    """256 experts and 32 replicas on 32 GPUs: 1.0003 becomes 1.1 to 1.25 on the mean, on one node and on four."""
    peaks = []
    for seed in range(5):
        shares = shares_of(1, 256, seed=seed)
        plan = place(shares[0], 32, 32)
        assert plan.peak_over_mean(shares[0]) < 1.0003
        peaks.append([evenness(plan, shares, Dispatch("nearest", nodes)).peak_over_mean for nodes in (1, 4)])

    assert np.min(peaks) > 1.05
    assert ((np.mean(peaks, axis=0) > 1.1) & (np.mean(peaks, axis=0) < 1.25)).all()


@pytest.mark.parametrize("nodes", [2, 4])
def test_plans_for_nearest_are_even_there(nodes):
    """As far as a plan can know: those made for an even split are 5 % and more above the mean, with the same slots."""
    shares, split = shares_of(1, 32, 1.0, 3)[0], Dispatch("nearest", nodes)

    def peak(plan):
        return (split.expected_parts(plan.held) @ shares).max() * 8

    even, nearest = place(shares, 8, 16), place(StepLoad.of(shares[None], shares), 8, 16, split)
    changed = replan(even, StepLoad.of(shares[None], shares), 16, dispatch=split)

    assert peak(even) > 1.05
    assert peak(nearest) < 1.01
    assert peak(changed) < 1.02
    for plan in (nearest, changed):
        assert (1, [6] * 8) == (plan.held.max(), plan.held.sum(axis=1).tolist())


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_no_single_exchange_lowers_the_bound_of_a_plan_for_nearest(seed):
    """Of a slot of the busiest GPU with any other, tried one after the other; parts of replicas elsewhere change too."""
    rng = np.random.default_rng(seed)
    load, split = StepLoad.of(rng.lognormal(0, 1, (20, 6))), Dispatch("nearest", 2)

    *_, found = lowered(default_plan(6, 4, 2).slots, load, 1e-7, split)

    blunt = next(lowered(default_plan(6, 4, 2).slots, load, 1e-7, split))
    now = StepPeak(found, load, StepPeak.of(blunt, load, split).sharpness, split)
    gpu, enough = int(now.hottest(1)[0]), 1e-6 * load.mean.sum()
    for mine, other in ((m, o) for m in range(2) for o in range(8) if o // 2 != gpu):
        changed = found.ravel().copy()
        changed[[gpu * 2 + mine, other]] = changed[[other, gpu * 2 + mine]]
        changed = changed.reshape(4, 2)
        if (changed[:, 0] != changed[:, 1]).all():
            assert now.changed(changed).peak > now.peak - enough


def test_plans_for_a_linear_programme_are_better_there():
    """Replicas go where single steps need them: on steps that were not seen, and never with an expert twice."""
    rng = np.random.default_rng(5)
    size, swing = rng.lognormal(4, 0.7, 16), rng.normal(0, 0.7, (900, 16))
    counts, split = rng.poisson(size * np.exp(swing)) + 1, Dispatch("lp")
    shares = counts[:600].sum(axis=0) / counts[:600].sum()

    even = place(shares, 8, 8)
    plan = place(StepLoad.of(counts[:600]), 8, 8, split)

    assert evenness(plan, counts[600:], split).balance > evenness(even, counts[600:], split).balance + 0.01
    assert (1, [3] * 8) == (plan.held.max(), plan.held.sum(axis=1).tolist())


def test_settings_that_there_are_not_are_refused():
    """Another split, and GPUs that do not fill the nodes."""
    with pytest.raises(SettingError, match="tokens are split even, nearest, lp or fewest, not 'static'"):
        Planning(4, dispatch="static")
    with pytest.raises(SettingError, match="4 GPUs are not the same number on each of 3 nodes"):
        Planning(4, nodes=3)


def test_plans_are_scored_as_tokens_are_split():
    """Also the mean alone is planned for as it is split; in order, no replica helps but under a linear programme."""
    counts = np.random.default_rng(2).multinomial(4000, shares_of(1, 8)[0], size=(900, 1))
    trace = LoadTrace.from_counts(counts, name="split")
    test = evaluate(trace, [predictor("window_mean")], [300], [500])

    found = {
        kind: simulate(trace, test, Planning(4, 4, dispatch=kind)).set_index("strategy")["balance"]
        for kind in ("even", "nearest", "lp")
    }

    after = trace.layer(0).after(500, 300).counts
    for kind in found:
        assert found[kind]["default"] == pytest.approx(evenness(default_plan(8, 4, 4), after, Dispatch(kind)).balance)
    assert found["lp"]["window_mean"] > max(found["even"]["window_mean"], found["nearest"]["window_mean"])
    assert isinstance(Planning(4, dispatch="lp").load(after, after[0] / after[0].sum()), StepLoad)


@pytest.mark.thorough
def test_the_command_splits_tokens_as_told(moetrace, tmp_path):
    """--dispatch and --nodes; what does not fit is one line before anything is computed."""
    rng = np.random.default_rng(2)
    counts = rng.poisson(200 * np.exp(rng.normal(0, 0.5, (900, 1, 8)))) + 1
    save_trace(LoadTrace.from_counts(counts, name="split"), tmp_path / "split.parquet")
    argv = ("place", tmp_path / "split.parquet", "--gpus", "4", "--redundant", "4", "--predictor", "window_mean")
    argv = (*argv, "--cutoffs", "400", "--horizon", "300", "--json")

    even, lp = (moetrace(*argv, "--dispatch", kind).json for kind in ("even", "lp"))

    assert ("even", "lp") == (even["dispatch"], lp["dispatch"])
    assert all(
        mine["balance"] > theirs["balance"]
        for mine, theirs in zip(lp["scores"], even["scores"])
        if mine["strategy"] == "window_mean"
    )
    assert 1 == pytest.approx(sum(row["expected"] for row in lp["plans"]))
    bad = moetrace(*argv, "--nodes", "3")
    assert (2, 1) == (bad.code, bad.err.count("\n"))
    assert 0 == moetrace(*argv, "--nodes", "2", "--dispatch", "nearest").code


def test_a_plan_where_a_gpu_holds_an_expert_twice_is_scored():
    """As a system may run it: the first of both slots is as near as the other."""
    doubled = Plan(np.array([[2, 0], [0, 2]]))

    assert [[6.0, 4.0]] == Dispatch("nearest").loads(doubled.held, np.array([[6, 4]])).tolist()
    assert [[6.0, 4.0]] == Dispatch("lp").loads(doubled.held, np.array([[6, 4]])).tolist()


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
@pytest.mark.slow
def test_tokens_fill_the_emptiest_gpus_up_to_one_level(seed, gpus):
    """A naive twin: a drop at a time on the emptiest; of two GPUs and of more the same."""
    rng = np.random.default_rng(seed)
    loads, tokens = rng.integers(0, 40, (gpus, 5)) / 1.0, rng.integers(0, 90, 5) / 1.0

    held = np.hstack([np.eye(gpus), np.ones((gpus, 1))])  # an expert on each GPU alone, and one on all of them
    found = least_loads(held, np.vstack([loads, tokens]).T).T

    for own, number, mine in zip(loads.T, tokens, found.T):
        drops = own.copy()
        for _ in range(int(number) * 20):
            drops[drops.argmin()] += 0.05
        assert mine == pytest.approx(drops, abs=0.11)
