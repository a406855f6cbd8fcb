"""Policies of serving systems: when they plan, from what, and what is said of them."""

import dataclasses
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from conftest import SAMPLE

from moetrace import LoadTrace, WindowMean, read_trace
from moetrace.forecasting.backtest import in_turn
from moetrace.placement import replay as room
from moetrace.placement import study
from moetrace.placement.plan import default_plan, place
from moetrace.placement.planning import Planning
from moetrace.placement.policies import (
    LOOKED_BACK,
    SETTINGS,
    Observed,
    Policy,
    plan_from_scratch,
    replan_by_state,
    replan_by_steps,
    utilisation,
)
from moetrace.placement.replay import BLOCK, REPLAY_COLUMNS, replayed
from moetrace.placement.study import place as place_trace
from moetrace.placement.systems import SYSTEMS, launch, policies
from moetrace.placement.verdict import POLICY, _holds, policies_frame, verdict
from moetrace.reporting.answers import worth


def trace_of(shares, steps, tokens=20_000, seed=0):
    """One layer whose load is *shares*, or turns from one to the next of them."""
    rng = np.random.default_rng(seed)
    parts = [rng.multinomial(tokens, share, size=(steps // len(shares), 1)) for share in shares]
    return LoadTrace.from_counts(np.concatenate(parts), name="made")


UNEVEN = np.array([0.3, 0.25, 0.12, 0.1, 0.08, 0.06, 0.05, 0.04])
# The first and the last of a plan for the load before share a GPU.
TURNED = UNEVEN[[0, 2, 4, 5, 6, 7, 3, 1]]


@pytest.fixture(scope="module")
def replay():
    """A load that is uneven, and from half of the trace on uneven in another way."""
    trace = trace_of([UNEVEN, TURNED], 6000)
    return trace, replayed(trace, Planning(4), [0], 500)


def rows_of_policy(frame, system, interval):
    """The rows of one policy."""
    return frame[(frame["system"] == system) & (frame["interval"] == interval)]


def looked(load, policy):
    """What the policy sees of the layer, from step 500 on."""
    due = policy.due(load.steps[load.steps >= 500])
    shares = [load.until(step).last(policy.window or 1).mean_shares for step in due]
    return Observed(load, due, policy.window, np.array(shares).reshape(-1, load.experts))


# Systems whose planners know of no nodes.
FLAT = ("vllm-ascend", "TensorRT-LLM")
ALL = [policy for policy in policies(3) if policy.interval != 0]


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: "-".join(map(str, policy.settings)))
@pytest.mark.parametrize("planning", [Planning(4), Planning(4, 4), Planning(4, 4, nodes=2, groups=4)])
@pytest.mark.slow
def test_every_policy_fills_every_slot_and_no_gpu_twice(policy, planning):
    """A plan after each look, for all experts, as many slots on each GPU and no two replicas of an expert on one."""
    load = trace_of([UNEVEN, TURNED], 3000).layer(0)
    looks = looked(load, policy)

    plans = [*policy.plans(looks, default_plan(8, 4, planning.redundant), planning)]

    assert len(looks.steps) == len(plans) > 0
    for plan in plans:
        assert {(8 + planning.redundant) // 4} == set(plan.held.sum(axis=1).tolist())
        assert 1 == plan.held.max()
        assert plan.held.sum(axis=0).min() > 0
        if planning.on_nodes and policy.system not in FLAT:
            groups = plan.held.reshape(2, 2, 4, 2).sum(axis=(1, 3)) > 0  # (nodes, groups)
            assert (groups.sum(axis=0) == 1).all()


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: "-".join(map(str, policy.settings)))
@pytest.mark.slow
def test_no_policy_sees_a_step_after_its_look(policy):
    """Another future changes no plan made before it."""
    load = trace_of([UNEVEN, TURNED], 3000).layer(0)
    future = load.counts.copy()
    future[2000:] = future[2000:, ::-1]
    plain = default_plan(8, 4, 4)

    plans, others = (
        policy.plans(looked(own, policy), plain, Planning(4, 4))
        for own in (load, dataclasses.replace(load, counts=future))
    )

    past = [step <= 2000 for step in looked(load, policy).steps]
    assert all(np.array_equal(a.held, b.held) for a, b, before in zip(plans, others, past) if before)


@pytest.mark.parametrize("policy", policies(1), ids=lambda policy: "-".join(map(str, policy.settings)))
@pytest.mark.slow
def test_moves_are_those_from_each_plan_to_the_next(policy, replay):
    """Whatever the policy; the first plan is made before anything counts."""
    trace, frame = replay
    load = trace.layer(0)
    due = policy.due(load.steps[(load.steps >= 500) & (load.steps < 6000)])
    shares = np.array([load.until(step).last(policy.window).mean_shares for step in due]).reshape(-1, 8)
    alone = layers_of(trace, policy)[0]
    plans = [*alone._plans(policy, Observed(load, due, policy.window, shares), Planning(4))][1:] if due else []
    moves = [round(new.moved(old) * 8) for old, new in pairwise(plans)]
    scored = [move for move, step in zip(moves, due[1:]) if step + policy.late < 500 + 5500 // BLOCK * BLOCK]

    own = frame[[row == policy.settings for row in rows_of_settings(frame)]]

    assert sum(scored) == own["moved"].sum()


def layers_of(trace, policy):
    """The tasks that replay the layers under that policy alone, from step 500 on 4 GPUs without replicas."""
    replay = room._Replay(trace, [policy], [Planning(4)], (0,), 500)
    gates = room._gates([room._Utilisation(replay, number) for number in trace.layers], in_turn)
    return [room._Layer(replay, number, gates) for number in trace.layers]


def rows_of_settings(frame):
    """The settings of each row, as a policy has them."""
    settings = frame[list(SETTINGS)].astype(object)
    return [tuple(None if value is pd.NA else value for value in row) for row in settings.itertuples(index=False)]


def test_every_policy_is_scored_on_the_same_blocks(replay):
    """From the first steps on; the mean load is the same whatever the plan, and never above the peak."""
    trace, frame = replay
    sizes = frame.groupby(list(SETTINGS), dropna=False).size()

    assert {len(range(500, 6000 - BLOCK + 1, BLOCK))} == set(sizes)
    assert len(policies(len(trace.layers))) == len(sizes)
    assert (frame["mean_load"] <= frame["block_peak"] / 1 + 1e-9).all()
    assert (frame["block_peak"] <= frame["peak_load"] + 1e-9).all()
    assert 1 == frame.groupby("step")["mean_load"].nunique().max()


def test_a_policy_is_what_replaying_it_step_by_step_gives(replay):
    """A naive twin of vLLM's defaults, planned every 3,000 steps by the last 1,000."""
    trace, frame = replay
    load, plan = trace.layer(0), default_plan(8, 4)
    peaks, moves = [], []
    for step in range(500, 6000):
        if (step - 500) % 3000 == 0:
            shares = load.until(step).last(1000).mean_shares[None]
            new = next(plan_from_scratch(Observed(load, [step], 1000, shares), plan, Planning(4)))
            moves.append((step, int(np.maximum(new.held - plan.held, 0).sum())))
            plan = new
        peaks.append(max(plan.parts @ load.counts[np.searchsorted(load.steps, step + 1)]))
    own = rows_of_policy(frame, "vLLM", 3000)
    own = own[own["window"] == 1000]

    assert own["peak_load"].tolist() == pytest.approx(np.add.reduceat(peaks, np.arange(0, len(peaks), BLOCK)).tolist())
    assert own["moved"].sum() == moves[1][1]


def test_who_never_plans_moves_nothing_and_who_plans_once_moves_before_it_counts(replay):
    """The first plan is that of the start."""
    _, frame = replay

    assert 0 == frame[frame["system"].isin(["none", "static"])]["moved"].sum()
    assert 0 < rows_of_policy(frame, "moetrace", 500)["moved"].sum()


def test_a_late_plan_is_in_force_late(monkeypatch):
    """The load of the steps between is that of the plan before."""

    trace = trace_of([UNEVEN], 2500)
    soon = Policy("soon", 1000, None, replan_by_steps)
    late = dataclasses.replace(soon, system="late", late=BLOCK)
    monkeypatch.setattr(room, "policies", lambda *_: [soon, late, Policy("none", 0, 0, replan_by_steps)])

    frame = replayed(trace, Planning(4), [0], 500).pivot_table(index="step", columns="system", values="peak_load")

    assert frame["late"].iloc[0] == frame["none"].iloc[0] > frame["soon"].iloc[0]
    assert frame["late"].iloc[1] == frame["soon"].iloc[1]


def test_plans_from_nothing_do_not_know_of_each_other():
    """Those in steps do: what is even enough stays."""
    before = place(UNEVEN, 4)
    looks = Observed(trace_of([UNEVEN], 3).layer(0), [1, 2, 3], 1, np.array([UNEVEN, TURNED, UNEVEN]))

    anew, changed = ([*planner(looks, before, Planning(4))] for planner in (plan_from_scratch, replan_by_steps))

    assert np.array_equal(anew[0].held, anew[2].held)
    assert np.array_equal(changed[0].held, before.held)
    assert all(one.moved(other) <= 1 for one, other in pairwise(changed))


@pytest.mark.parametrize("system", ["static", "moetrace", "moetrace by state"])
def test_our_policies_keep_apart_what_is_busy_in_the_same_steps(system):
    """By the mean load alone all plans are alike."""
    busy = np.array([[40, 40, 10, 10], [10, 10, 40, 40]])
    load = LoadTrace.from_counts(np.tile(busy, (1000, 1))[:, None]).layer(0)
    policy = SYSTEMS[system].policies(1)[0]

    plan = next(policy.plans(looked(load, policy), default_plan(4, 2), Planning(2)))

    assert (plan.parts @ busy.T == 50).all()


def test_one_policy_is_recommended_by_the_first_half(replay):
    """The one that moves least among those whose balance is near the best there."""
    trace, frame = replay
    found = policies_frame(frame, trace)
    half = frame[frame["step"] < np.sort(frame["step"].unique())[frame["step"].nunique() // 2]]
    balance = half.groupby(list(SETTINGS), dropna=False)[["mean_load", "peak_load"]].sum()
    balance = balance["mean_load"] / balance["peak_load"]

    (best,) = found[found["recommended"]].to_dict("records")

    assert sorted(found["chosen_by"]) == pytest.approx(sorted(balance))
    assert best["chosen_by"] >= found[found["moved_per_1000"] <= 1]["chosen_by"].max() - 0.01
    (stock,) = found[found["stock"]].to_dict("records")
    assert stock["system"] not in {"moetrace", "moetrace by state"}
    assert {"none", "static"}.isdisjoint(found[found["balance"] > found["balance"].max() - 0.001]["system"])


def test_who_moves_all_the_time_is_not_recommended():
    """More than every slot in 1,000 steps is too much, however even; of the others nearly as even ones the calmest."""
    trace, blocks = trace_of([UNEVEN], 400), range(0, 8 * BLOCK, BLOCK)
    rows = [
        (trace.name, system, 1, 1, None, 0, "even", 0, step, 100.0, peak, peak, moved, peak)
        for system, peak, moved in (("SGLang", 101, 3), ("vLLM", 110, 2), ("static", 110.5, 1), ("none", 150, 0))
        for step in blocks
    ]

    found = policies_frame(pd.DataFrame(rows, columns=REPLAY_COLUMNS), trace, 10.0).set_index("system")

    assert [1.5, 1, 0.5, 0] == found["moved_per_1000"].tolist()
    assert [120, 80, 40, 0] == found["moved_bytes"].tolist()
    assert ["static"] == found.index[found["recommended"]].tolist()
    assert found.loc["static", "balance"] == pytest.approx(100 / 110.5)


@pytest.mark.slow
def test_what_is_worth_it_and_what_is_not():
    """An uneven load is, an even one is not, a short trace says nothing."""
    said = {}
    for name, share, steps in (("uneven", UNEVEN, 4000), ("even", np.full(8, 1 / 8), 4000), ("short", UNEVEN, 1500)):
        trace = trace_of([share], steps, tokens=200_000)
        frame = replayed(trace, Planning(4), [0], 500)
        said[name] = verdict(trace, frame, policies_frame(frame, trace, 1e6), Planning(4))

    assert {"uneven": "worth it", "even": "not worth it", "short": "not enough evidence"} == {
        name: own.verdict for name, own in said.items()
    }
    uneven = said["uneven"]
    assert uneven.saved_low <= uneven.saved <= uneven.saved_high
    assert uneven.saved == pytest.approx(1 - 0.34 / 0.55, abs=0.01)
    assert 4 * 0.34 == pytest.approx(uneven.floor, abs=0.01)
    assert (0, 0) == (uneven.redundant, uneven.plain_redundant)
    short = said["short"].as_row() | {"gpus": 4}
    sentence = worth(short).sentence
    assert sentence.startswith(
        "Not enough evidence on 4 GPUs (a verdict needs 2,500 steps, this trace has 1,500). On this short"
    )
    assert short["saved"] == pytest.approx(uneven.saved, abs=0.02)


def test_a_load_that_turns_around_ends_what_a_plan_holds(replay):
    """The plan made at the start holds until the turn at step 3,000, give or take a block."""
    trace, frame = replay

    found = verdict(trace, frame, policies_frame(frame, trace), Planning(4))

    assert 2500 - BLOCK <= found.holds <= 2500
    assert 4 <= found.enough_redundant


def test_what_needs_a_change_of_the_system_is_told_beside_what_does_not():
    """Where ours is recommended; a file's flags start what reads one."""
    trace = trace_of([UNEVEN], 3000)
    settings = {"none": (0, 0, 200.0), "static": (1000, None, 160.0), "vLLM": (1000, 3000, 150.0)}
    rows = [
        (trace.name, system, window, interval, None, 0, "even", 0, step, 100.0, peak, peak, 0, peak)
        for system, (window, interval, peak) in (settings | {"moetrace": (1000, 1000, 120.0)}).items()
        for step in range(0, 8 * BLOCK, BLOCK)
    ]
    frame = pd.DataFrame(rows, columns=REPLAY_COLUMNS).astype({"interval": "Int64", "threshold": "Float64"})
    found = verdict(trace, frame, policies_frame(frame, trace), Planning(4))

    assert ("moetrace", 0.4) == (found.system, pytest.approx(found.saved))
    assert ("vLLM", 0.25) == (found.stock["system"], pytest.approx(found.stock["saved"]))
    assert set(found.stock) < set(found.as_row())
    assert "--enable-eplb" in found.stock["launch"]
    told = found.launched("FLAGS")
    assert ("FLAGS", found.stock) == (told.launch, told.stock)
    static = dataclasses.replace(found, stock=found.stock | {"start": "file"}).launched("FLAGS")
    assert "FLAGS" == static.stock["launch"]


@pytest.mark.slow
def test_what_is_saved_is_beside_experts_in_order_without_replicas():
    """Also where only policies with replicas were asked for."""
    trace = trace_of([UNEVEN], 4000)
    frame = replayed(trace, Planning(4), [4], 500)
    found = verdict(trace, frame, policies_frame(frame, trace), Planning(4))
    peaks = frame.groupby(["system", "redundant"])["peak_load"].sum()

    assert {("none", 0), ("none", 4)} == {key for key in peaks.index if key[0] == "none" or key[1] == 0}
    assert (4, 0) == (found.redundant, found.plain_redundant)
    assert found.saved == pytest.approx(1 - peaks[found.system, 4] / peaks["none", 0], abs=0.01)
    assert peaks["none", 4] < 0.9 * peaks["none", 0]


@pytest.mark.parametrize("steps", [250, 251])
def test_a_trace_without_two_blocks_has_no_policy(steps):
    """The frame has its columns all the same."""
    trace = trace_of([UNEVEN], steps)
    found = policies_frame(replayed(trace, Planning(4), [0], 250), trace)

    assert (0, True) == (len(found), "recommended" in found.columns)


@pytest.mark.thorough
def test_steps_far_apart_are_replayed_by_the_rows_that_there_are():
    """Time stamps for steps, and a gap of a thousand million of them, take no longer and say something."""
    counts = trace_of([UNEVEN], 400).counts
    steps = {"times": 1_700_000_000_000 + 997 * np.arange(400), "gap": np.r_[np.arange(200), 10**9 + np.arange(200)]}

    found = {
        name: replayed(LoadTrace.from_counts(counts, name=name, steps=at), Planning(4), [0], 100)
        for name, at in steps.items()
    }

    assert 350 <= found["times"]["step"].nunique() <= 400
    assert 1 <= found["gap"]["step"].nunique() <= 3


@pytest.mark.parametrize(
    ("system", "part"),
    [
        ("vLLM", '"window_size": 1000, "step_interval": 3000, "num_redundant_experts": 32'),
        (
            "SGLang",
            "--eplb-rebalance-num-iterations 1000 --ep-size 8 --ep-num-redundant-experts 32 --ep-dispatch-algorithm dynamic",
        ),
        ("vllm-ascend", '"expert_heat_collection_interval": 600'),
        ("TensorRT-LLM", "{num_slots: 160, layer_updates_per_iter: 1}"),
        ("static", ""),
        ("moetrace by state", ""),
    ],
)
def test_systems_are_started_with_what_was_replayed(system, part):
    """In their own words; their defaults come first."""
    said = launch(SYSTEMS[system].policies(12)[0], Planning(8, 32), 128)

    assert part in said
    assert bool(part) == bool(said)


def test_every_system_has_policies_of_its_own_name():
    """No two are the same, and what starts one with a gate names it."""
    known = policies(12)

    assert len(known) == len({policy.settings for policy in known})
    assert all(policy.system == name for name, system in SYSTEMS.items() for policy in system.policies(12))
    gate = next(policy for policy in known if policy.threshold)
    started = launch(gate, Planning(8), 128)
    assert "--eplb-min-rebalancing-utilization-threshold 0.9 --expert-balancedness-report-mode server_log" in started


def test_vllm_ascend_plans_50_passes_after_it_collected_loads():
    """Then it changes a layer in each pass, and collects loads again when all are changed."""
    found = SYSTEMS["vllm-ascend"].policies(12)

    assert [(600, 662, 62), (200, 262, 62)] == [(policy.window, policy.interval, policy.late) for policy in found]
    assert '"algorithm_execution_interval": 50' in launch(found[0], Planning(8), 128)


@pytest.mark.slow
def test_systems_that_have_a_choice_split_tokens_as_they_are_told():
    """The others evenly; what starts SGLang says how, and without replicas there is nothing to split."""
    trace = trace_of([UNEVEN], 1500)
    frame = replayed(trace, Planning(4, dispatch="nearest"), [0, 4], 500).groupby(["system", "redundant"])
    even = replayed(trace, Planning(4), [0, 4], 500).groupby(["system", "redundant"])

    told = frame["dispatch"].first().unstack()[4].to_dict()
    assert {"even"} == {told[name] for name in ("vLLM", "vllm-ascend", "TensorRT-LLM")}
    assert {"nearest"} == {told[name] for name in ("none", "static", "SGLang", "moetrace", "moetrace by state")}
    assert frame["peak_load"].sum()["vLLM", 4] == even["peak_load"].sum()["vLLM", 4]
    assert frame["peak_load"].sum()["SGLang", 4] > even["peak_load"].sum()["SGLang", 4]
    assert frame["peak_load"].sum()["SGLang", 0] == even["peak_load"].sum()["SGLang", 0]
    policy = SYSTEMS["SGLang"].policies(1)[0]
    assert "--ep-dispatch-algorithm static" in launch(policy, Planning(8, 32, dispatch="nearest"), 128)
    assert "--ep-dispatch" not in launch(policy, Planning(8, dispatch="nearest"), 128)
    assert "--ep-dispatch" not in launch(policy, Planning(8, 32, dispatch="fewest"), 128)  # SGLang has no such way


def test_a_gate_keeps_all_plans_while_gpus_are_busy_on_average():
    """A naive twin step by step: utilisation is the mean over layers of what came since the last look."""
    turned, steady = (trace_of(shares, 6000).counts for shares in ([UNEVEN, TURNED], [np.full(8, 1 / 8)]))
    trace = LoadTrace.from_counts(np.concatenate([turned, steady], axis=1))
    policy = next(own for own in policies(2) if own.threshold)
    policy = dataclasses.replace(policy, threshold=0.85)
    looks = [looked(load, policy) for load in trace.by_layer()]
    fresh = [[default_plan(8, 4), *policy.plans(own, default_plan(8, 4), Planning(4))] for own in looks]
    now, expected = 0, []
    for look in range(len(looks[0].steps)):
        since = [own.load.between(own.steps[look - 1] + 1 if look else 1, own.steps[look]).counts for own in looks]
        loads = [counts @ plans[now].parts.T for counts, plans in zip(since, fresh)]
        rates = [[row.mean() / row.max() for row in layer] for layer in loads]
        now = now if np.mean(rates) > 0.85 else look + 1
        expected.append(now)

    first = layers_of(trace, policy)[0]

    assert expected == first.gates[policy, 0]
    assert 1 < len(set(expected)) < len(expected)
    assert first.gates != layers_of(trace.select(layers=[0]), policy)[0].gates
    plans = first._plans(policy, looks[0], Planning(4))[1:]
    assert all(np.array_equal(plan.held, fresh[0][i].held) for plan, i in zip(plans, expected, strict=True))


def test_utilisation_is_that_of_sglang():
    """The mean over passes of mean over busiest; a pass without tokens counts as even, as its 1e-5 has it."""
    assert utilisation(np.array([2, 2]), np.array([3, 2])) == pytest.approx((2 / 3 + 1) / 2)
    assert utilisation(np.array([2, 0]), np.array([3, 0])) == pytest.approx((2 / 3 + 1) / 2)
    assert utilisation(np.array([0.5e-5]), np.array([1e-5])) == pytest.approx(0.75)


def test_a_layer_that_stands_still_is_planned_once_and_again_after_a_jump():
    """While it moves at every look; the plan after the jump is for the load after it."""
    load = trace_of([UNEVEN, TURNED], 8000, tokens=200_000).layer(0)
    looks = looked(load, Policy("by state", 1000, 250, replan_by_state))

    plans = [*replan_by_state(looks, default_plan(8, 4), Planning(4))]
    changed = [step for step, old, new in zip(looks.steps[1:], plans, plans[1:]) if new is not old]

    assert changed
    assert all(4000 < step < 6000 for step in changed)
    assert plans[-1].peak_over_mean(TURNED) < 1.05 * place(TURNED, 4).peak_over_mean(TURNED)
    assert plans[0].peak_over_mean(UNEVEN) < 1.05 * place(UNEVEN, 4).peak_over_mean(UNEVEN)


def test_a_layer_that_moves_is_planned_by_its_last_steps():
    """And not by those of its window."""
    load = trace_of([UNEVEN, TURNED], 2000, tokens=200_000).layer(0)
    looks = Observed(load, [1300], 1000, load.until(1300).last(1000).mean_shares[None])

    (plan,) = replan_by_state(looks, default_plan(8, 4), Planning(4))

    assert not looks.settled[0][0]
    assert plan.peak_over_mean(TURNED) < 1.05 * place(TURNED, 4).peak_over_mean(TURNED)


@pytest.mark.thorough
def test_the_command_judges(moetrace, settled, tmp_path):
    """A verdict, the policies with several numbers of replicas, and notes on the screen."""
    from moetrace import save_trace

    save_trace(settled, tmp_path / "settled.parquet")
    argv = ("place", tmp_path / "settled.parquet", "--gpus", "4", "--predictor", "window_mean", "--cutoffs", "3000")

    found = moetrace(*argv, "--redundant", "0,4", "--json").json

    assert {0, 4} == {row["redundant"] for row in found["policies"]}
    assert 1 == sum(row["recommended"] for row in found["policies"])
    assert "worth it" == found["verdict"]["verdict"]
    assert "Worth it on 4 GPUs. The recommended policy is" in moetrace(*argv).out
    assert (2, 1) == ((bad := moetrace(*argv, "--redundant", "0,3")).code, bad.err.count("\n"))


def test_how_long_a_plan_holds_is_told_beside_another_policy():
    """Where the plan made once is itself the best, beside the most even of those that plan anew; never beside itself."""
    rows = [
        ("t", system, window, 250, None, 0, "even", step, peak, 1.0)
        for system, window, peaks in (("static", 1000, (1.0, 1.0, 1.3)), ("vllm", 250, (1.0, 1.0, 1.0)))
        for step, peak in zip((500, 750, 1000), peaks)
    ]
    replay = pd.DataFrame(rows, columns=[*POLICY, "step", "peak_load", "mean_load"])
    best = replay[replay["system"] == "static"].iloc[0]

    assert 500 == _holds(replay, best) == _holds(replay, replay[replay["system"] == "vllm"].iloc[0])
    assert _holds(replay[replay["system"] == "static"], best) is None


def test_policies_are_scored_after_the_first_steps_of_what_is_replayed(monkeypatch):
    """Of a longer trace only the last logged steps are scored; steps are counted by their numbers."""
    monkeypatch.setattr(room, "MOST_REPLAYED", 100)
    whole = LoadTrace.from_counts(np.ones((100, 1, 2), int), steps=10 * np.arange(1, 101))
    longer = LoadTrace.from_counts(np.ones((101, 1, 2), int), steps=10 * np.arange(1, 102))

    assert [9, 209] == [room.replayed_from(whole, first) for first in (0, 200)]
    assert [10, 209] == [room.replayed_from(longer, first) for first in (0, 200)]


@pytest.mark.slow
@pytest.mark.slow
def test_of_a_long_trace_the_end_is_replayed(replay, monkeypatch):
    """As from that step on, and it is said; of a shorter one all."""
    trace, _ = replay
    placed = place_trace(trace, [WindowMean()], Planning(4))
    monkeypatch.setattr(room, "MOST_REPLAYED", 2000)
    monkeypatch.setattr(study, "MOST_REPLAYED", 2000)

    cut, told = replayed(trace, Planning(4), [0], 500), place_trace(trace, [WindowMean()], Planning(4)).notes

    pd.testing.assert_frame_equal(cut, replayed(trace, Planning(4), [0], 4000))
    assert (4000, 5750) == (cut["step"].min(), cut["step"].max())
    assert (("policies are replayed on the last 2,000 of 6,000 logged steps",), ()) == (told, placed.notes)


@pytest.mark.slow
def test_what_policies_never_look_at_changes_nothing(monkeypatch):
    """Steps before the longest look back are not kept in memory."""
    trace = trace_of([UNEVEN, TURNED], 12_000)
    cut = replayed(trace, Planning(4), [0], 9000)
    load, _ = room._Replay(trace, policies(1), [Planning(4)], (0,), 9000).observed(0)
    assert 12_000 - 9000 + LOOKED_BACK == len(load.steps)

    monkeypatch.setattr(room, "LOOKED_BACK", 12_000)

    pd.testing.assert_frame_equal(cut, replayed(trace, Planning(4), [0], 9000))


def test_plans_in_parts_are_the_same_plans(monkeypatch):
    """However many are made in one go."""
    load, policy = trace_of([UNEVEN, TURNED], 3000).layer(0), SYSTEMS["TensorRT-LLM"].policies(3)[0]
    looks, plain = looked(load, policy), default_plan(8, 4)
    whole = [plan.experts for plan in policy.plans(looks, plain, Planning(4))]

    monkeypatch.setattr("moetrace.placement.policies.AT_ONCE", 24)

    assert whole == [plan.experts for plan in policy.plans(looks, plain, Planning(4))]
    assert 626 == len(whole)


@pytest.mark.slow
def test_layers_are_replayed_in_any_order(replay):
    """Whoever runs the tasks, the rows are by layer, equal to the bit, and the gate is that of the mean over layers."""
    counts = np.concatenate([replay[0].counts[:2000] * factor for factor in (1, 3, 7)], axis=1)
    trace = LoadTrace.from_counts(counts)

    def backwards(tasks):
        return (task.run() for task in reversed(tasks))

    pd.testing.assert_frame_equal(
        replayed(trace, Planning(4), [0], 500), replayed(trace, Planning(4), [0], 500, run=backwards)
    )


@pytest.mark.slow
def test_progress_is_percent_of_the_whole(replay):
    """The layers that are replayed, then the results, then the layers that are planned."""
    counts = np.concatenate([replay[0].counts[:2000]] * 3, axis=1)
    told = []

    place_trace(LoadTrace.from_counts(counts), [WindowMean()], Planning(4), progress=lambda *at: told.append(at))

    assert [(20, 100), (40, 100), (60, 100)] == told[:3]
    assert told == sorted(told)
    assert [(90, 100), (95, 100), (100, 100)] == told[-3:]


@pytest.mark.slow
def test_a_policy_that_moves_nothing_in_the_second_half_keeps_its_name():
    """It is not called a single plan: it may have changed its plan in the first half."""
    trace = read_trace(SAMPLE)

    found = place_trace(trace, [WindowMean()], Planning(4), cutoffs=[5000], systems=["vllm-ascend"]).verdict

    assert ("vllm-ascend", 0.0) == (found.system, found.moved_per_1000)
    assert "vllm-ascend's policy, a plan every 254 steps from the last 200 steps," == found.policy
