"""Plans of experts on GPUs: how good, how even, how much they move, and what the command says."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace import LoadTrace, SettingError, evaluate, predictor, state_at
from moetrace.placement import planner
from moetrace.placement.dispatch import Dispatch
from moetrace.placement.plan import Plan, default_plan, evenness, place, replan, slots_of
from moetrace.placement.planning import Planning
from moetrace.placement.step_peak import StepLoad
from moetrace.placement.study import best_strategy, ending_states, placement_summary, plans_frame, simulate
from moetrace.synthetic import settling, synthetic_trace


def lowest_peak(shares, gpus):
    """The load of the busiest GPU under the best of all plans without copies, by trying them."""
    slots = len(shares) // gpus

    def rest(left, peak):
        if not left:
            return peak
        first, *others = left
        return min(
            rest([e for e in others if e not in chosen], max(peak, shares[[first, *chosen]].sum()))
            for chosen in itertools.combinations(others, slots - 1)
        )

    return rest(list(range(len(shares))), 0.0)


@pytest.mark.parametrize(("experts", "gpus"), [(8, 2), (8, 4), (6, 3), (9, 3)])
@pytest.mark.slow
def test_a_plan_is_hardly_worse_than_the_best_of_all(experts, gpus):
    """On 150 fixed loads: 0.3 % on average, 8 % at worst; never better, which would be a wrong count."""
    rng = np.random.default_rng(0)
    loads = [rng.dirichlet(np.full(experts, 1.5)) for _ in range(150)]

    ratios = [(place(shares, gpus).parts @ shares).max() / lowest_peak(shares, gpus) for shares in loads]

    assert min(ratios) >= 1 - 1e-12
    assert max(ratios) <= 1.08
    assert sum(ratios) / 150 <= 1.003


@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, 2, 0), (8, 4, 0), (9, 3, 0), (6, 3, 3), (7, 4, 5)]))
@pytest.mark.slow
def test_no_exchange_would_lower_the_peak_of_a_plan(seed, shape):
    """Of two experts between any two GPUs, unless one of the GPUs then held an expert twice."""
    experts, gpus, redundant = shape
    shares = np.random.default_rng(seed).dirichlet(np.full(experts, 1.5))

    plan = place(shares, gpus, redundant)

    peak = (plan.parts @ shares).max()
    for one, other in itertools.permutations(range(gpus), 2):
        for gone, come in itertools.product(plan.experts[one], plan.experts[other]):
            if come not in plan.experts[one] and gone not in plan.experts[other]:
                held = plan.held.copy()
                held[one, gone], held[one, come], held[other, gone], held[other, come] = 0, 1, 1, 0
                assert (Plan(held).parts @ shares).max() > peak * (1 - 1e-8)


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(1, 6), st.integers(0, 3))
@pytest.mark.slow
def test_slots_are_filled_evenly_and_no_expert_is_forgotten(seed, gpus, slots, copies):
    """Every GPU has the same number, every expert is somewhere, and on no more GPUs than there are."""
    redundant = min(copies * gpus, gpus * slots - gpus)
    experts = gpus * slots - redundant
    redundant = min(redundant, experts * (gpus - 1) // gpus * gpus)
    experts = gpus * slots - redundant
    shares = np.random.default_rng(seed).dirichlet(np.ones(experts))

    held = place(shares, gpus, redundant).held

    assert (gpus, experts) == held.shape
    assert [slots] * gpus == held.sum(axis=1).tolist()
    assert held.sum(axis=0).min() >= 1
    assert held.sum(axis=0).max() <= gpus


def naive_place(shares, gpus, redundant):
    """The experts of each GPU: copied, packed and exchanged in plain loops, one slot at a time."""
    experts, slots = range(len(shares)), (len(shares) + redundant) // gpus
    copies = [1 for _ in experts]
    for _ in range(redundant):
        copies[max((e for e in experts if copies[e] < gpus), key=lambda e: shares[e] / copies[e])] += 1
    weight = [shares[e] / copies[e] for e in experts]
    held = [[] for _ in range(gpus)]

    def load(gpu):
        return sum(weight[e] for e in held[gpu])

    for expert in sorted(experts, key=lambda e: -weight[e]):
        for _ in range(copies[expert]):
            free = [gpu for gpu in range(gpus) if len(held[gpu]) < slots]
            held[min((gpu for gpu in free if expert not in held[gpu]), key=load)].append(expert)
    # One expert for another with any GPU, then two for two with the emptiest, then with the three emptiest.
    for number, partners in [(1, gpus), *((2, few) for few in (1, 3) if slots > 3)]:
        while True:
            *others, busiest = sorted(range(gpus), key=load)
            swaps = []
            for gpu in others[:partners]:
                sets = (
                    itertools.combinations(sorted(set(held[a]) - set(held[b])), number)
                    for a, b in ((busiest, gpu), (gpu, busiest))
                )
                for ours, theirs in itertools.product(*sets):
                    more = sum(weight[e] for e in theirs) - sum(weight[e] for e in ours)
                    swaps.append((max(load(busiest) + more, load(gpu) - more), ours, gpu, theirs))
            peak, ours, gpu, theirs = min(swaps, default=(np.inf, None, None, None))
            even = load(busiest) <= sum(map(load, range(gpus))) / gpus * (1 + planner.EVEN)
            if even or peak >= load(busiest) * (1 - 1e-9):
                break
            held[busiest] = [*(set(held[busiest]) - set(ours)), *theirs]
            held[gpu] = [*(set(held[gpu]) - set(theirs)), *ours]
    return [sorted(own) for own in held]


@pytest.mark.parametrize(
    ("experts", "gpus", "redundant"), [(12, 4, 0), (16, 4, 4), (5, 3, 4), (4, 4, 12), (13, 4, 7), (3, 2, 1)]
)
def test_a_plan_equals_its_naive_twin(experts, gpus, redundant, monkeypatch):
    """On 30 fixed loads, some of them with a hot expert, where replicas are not tried once more.

    But for the names of GPUs: to exchange two of four is to exchange the other two, and the names.
    """
    monkeypatch.setattr(planner, "_choices", lambda _load, copies, *_: copies[None])
    rng = np.random.default_rng(experts)
    for concentration in np.repeat([0.3, 1.0, 3.0], 10):
        shares = rng.dirichlet(np.full(experts, concentration))
        plan = place(shares, gpus, redundant)

        assert sorted(naive_place(shares, gpus, redundant)) == sorted(plan.experts)
        assert 1 == plan.held.max()


def test_a_copy_weighs_its_part_of_the_expert():
    """Of four experts the smallest has three: a third of its tokens is on each GPU."""
    shares = np.array([0.3, 0.3, 0.3, 0.1])
    plan = Plan.of(np.array([[0, 3], [1, 3], [2, 3]]), 4)

    assert plan.parts @ shares == pytest.approx([1 / 3] * 3)
    assert 1 == pytest.approx(plan.peak_over_mean(shares))
    assert 1 == pytest.approx(place(shares, 3, 2).peak_over_mean(shares))


def test_what_moved_is_a_part_of_the_slots():
    """Two GPUs that exchange one of four experts each have half of the slots changed, without the exchange none."""
    before = Plan(np.array([[1, 1, 0, 0], [0, 0, 1, 1]]))
    after = Plan(np.array([[1, 0, 1, 0], [0, 1, 0, 1]]))

    assert (0.5, 0.0) == (after.moved(before), before.moved(before))


def test_copies_go_to_the_busiest():
    """Half of the load on one expert of eight: alone it is twice the mean, in four copies the load is even."""
    shares = np.array([0.5, *[0.5 / 7] * 7])

    alone, copied = (evenness(place(shares, 4, redundant), 1000 * shares[None]) for redundant in (0, 4))

    assert alone.peak_over_mean == pytest.approx(4 * (0.5 + 0.5 / 7))
    assert copied.peak_over_mean < 1.2


def test_evenness_is_what_counting_token_by_token_gives(settled):
    """A naive twin: the load of each GPU in each step, one slot after the other."""
    counts = settled.layer(0).counts[:50]
    plan = place(counts.sum(axis=0) / counts.sum(), 4, 4)
    loads = np.zeros((50, 4))
    for gpu, experts in enumerate(plan.experts):
        for expert in experts:
            loads[:, gpu] += counts[:, expert] / sum(held.count(expert) for held in plan.experts)

    found = evenness(plan, counts)

    assert found.peak_over_mean == pytest.approx(loads.sum(axis=0).max() / loads.sum(axis=0).mean())
    assert found.balance == pytest.approx(sum(step.mean() for step in loads) / sum(step.max() for step in loads))


@settings(deadline=None)  # the first of them imports scipy
@given(st.integers(0, 2**32 - 1))
def test_renaming_moves_as_few_as_can_be(seed):
    """Against every order of the GPUs; the plan itself stays the same."""
    rng = np.random.default_rng(seed)
    before, plan = (place(rng.dirichlet(np.ones(12)), 4) for _ in range(2))

    found = plan.aligned(before)

    assert sorted(map(tuple, plan.held.tolist())) == sorted(map(tuple, found.held.tolist()))
    assert found.moved(before) == min(Plan(plan.held[list(o)]).moved(before) for o in itertools.permutations(range(4)))
    assert 0 == plan.aligned(plan).moved(plan)


def test_a_plan_is_kept_unless_a_new_one_gains_enough():
    """None is made for nothing; where slots are added, a new one is always made."""
    before = place(np.array([0.3, 0.3, 0.1, 0.1, 0.1, 0.1]), 3)
    hot = np.full(6, 0.1)
    hot[before.experts[0]] = 0.3  # both of one GPU
    new = replan(before, hot)
    gain = before.peak_over_mean(hot) - new.peak_over_mean(hot)

    assert place(hot, 3).peak_over_mean(hot) == pytest.approx(new.peak_over_mean(hot))
    assert np.array_equal(new.held, replan(before, hot, least_gain=gain / 2).held)
    assert replan(before, hot, least_gain=2 * gain) is before
    assert replan(before, hot, least_gain=gain) is before
    assert replan(before, hot, tolerance=2 * gain) is before
    assert replan(before, before.parts.sum(axis=0) / 6) is before
    assert 9 == replan(before, hot, redundant=3, least_gain=9.0).held.sum()


def test_a_changed_plan_is_as_good_as_one_from_scratch():
    """To the tolerance: where few changes do not lead there, the one from scratch is taken."""
    rng, before = np.random.default_rng(0), default_plan(12, 4)
    for _ in range(60):
        share = rng.dirichlet(np.full(12, 0.7))
        found, fresh = replan(before, share, tolerance=0.01), place(share, 4)
        assert found.peak_over_mean(share) <= fresh.peak_over_mean(share) + 0.01


def test_a_plan_with_other_slots_is_made_for_the_dispatch():
    """From scratch, its GPUs renamed so that few experts move."""
    rng, before, best_split = np.random.default_rng(0), default_plan(12, 4), Dispatch("lp")
    load = StepLoad.of(rng.integers(1, 100, (50, 12)) * rng.integers(1, 9, 12))

    found = replan(before, load, 4, dispatch=best_split)

    assert np.array_equal(place(load, 4, 4, best_split).aligned(before).held, found.held)
    assert not np.array_equal(place(load, 4, 4).aligned(before).held, found.held)


@pytest.mark.parametrize(
    ("experts", "gpus", "redundant", "said"),
    [
        (8, 3, 0, "try --redundant 1"),
        (8, 16, 0, "try --redundant 8"),
        (8, 4, 28, "more than one of each"),
        (8, 4, 999, "more than one of each"),
    ],
)
def test_slots_that_do_not_fit_are_refused(experts, gpus, redundant, said):
    """With what would fit."""
    with pytest.raises(SettingError, match=said):
        slots_of(experts, gpus, redundant)


@pytest.fixture(scope="module")
def scored():
    """Scores of plans on a synthetic layer that settles at step 1,500, and the trace."""
    trace = synthetic_trace([settling(1500, steps=4000, tokens=8000)], name="made", seed=5)
    test = evaluate(trace, [predictor("sw_avg"), predictor("window_mean")], [500], [1000, 2000, 3000])
    return trace, test, simulate(trace, test, Planning(4))


def test_every_strategy_is_scored_at_every_cutoff(scored):
    """In order, by each forecast, and by what came; a plan that knew the load is the most even one."""
    _, _, scores = scored
    peaks = scores.pivot_table(index="cutoff", columns="strategy", values="peak_over_mean")

    assert ["default", "sw_avg", "window_mean", "oracle"] == scores["strategy"].unique().tolist()
    assert not peaks.isna().any(axis=None)
    assert (peaks["oracle"] <= peaks[["default", "sw_avg", "window_mean"]].min(axis=1) + 0.01).all()
    assert 0 == scores[scores["strategy"] == "default"]["moved"].max()


@pytest.mark.slow
def test_layers_are_planned_in_any_order():
    """Whoever runs the tasks, the rows are by layer, and what is done is counted."""
    trace = synthetic_trace([settling(at, steps=2000) for at in (500, 900, 1300)])
    test, told = evaluate(trace, [predictor("ema")], [500], [1000, 1500]), []

    def backwards(tasks):
        return (task.run() for task in reversed(tasks))

    scores = simulate(trace, test, Planning(4), run=backwards, progress=lambda *at: told.append(at))

    pd.testing.assert_frame_equal(simulate(trace, test, Planning(4)), scores)
    assert list(trace.layers) == scores["layer"].unique().tolist()
    assert [(1, 3), (2, 3), (3, 3)] == told


def test_the_window_mean_is_there_whoever_was_asked(scored):
    """Computed from the trace where it is no predictor of the backtest, it is the same."""
    trace, _, scores = scored
    alone = simulate(trace, evaluate(trace, [predictor("sw_avg")], [500], [1000, 2000, 3000]), Planning(4))

    for column in ("peak_over_mean", "balance", "moved"):
        own, other = (frame[frame["strategy"] == "window_mean"][column].tolist() for frame in (scores, alone))
        assert own == pytest.approx(other)


def test_a_forecast_that_came_late_is_scored_from_there_on(scored):
    """Where it was too short at the first cutoff, its first plan is a change of the default placement."""
    trace, test, _ = scored
    own = test.shares["predictor"] == "sw_avg"
    late = SimpleNamespace(scores=test.scores, shares=test.shares[~own | (test.shares["cutoff"] > 1000)])

    found = simulate(trace, late, Planning(4))
    found = found[found["strategy"] == "sw_avg"]

    seen, default = trace.layer(0).until(2000).last(1000).counts, default_plan(8, 4)
    wanted = Planning(4).load(seen, test.shares[own & (test.shares["cutoff"] == 2000)]["forecast"].to_numpy())
    assert [2000, 3000] == found["cutoff"].tolist()
    assert found["moved"].iloc[0] == Planning(4).replan(default, wanted).moved(default) > 0


def test_a_plan_knows_nothing_of_what_comes(scored):
    """It is the one made from the history alone, also where load and totals turn around after the cutoff."""
    trace, test, _ = scored
    counts = trace.counts.copy()
    counts[trace.steps > 3000] = counts[trace.steps > 3000][..., ::-1]
    counts[trace.steps > 3300] *= 50
    other = LoadTrace.from_counts(counts, name="made", steps=trace.steps)
    turned = evaluate(other, [predictor("sw_avg")], [500], [3000])
    scores = simulate(other, turned, Planning(4)).set_index("strategy")
    before = test.shares[(test.shares["predictor"] == "sw_avg") & (test.shares["cutoff"] == 3000)]
    known = {
        "sw_avg": before["forecast"].to_numpy(),
        "window_mean": trace.layer(0).until(3000).last(1000).mean_shares,
    }

    for strategy, shares in known.items():
        expected = evenness(replan(default_plan(8, 4), shares), other.layer(0).after(3000, 500).counts)
        assert scores.loc[strategy, "peak_over_mean"] == pytest.approx(expected.peak_over_mean)
    assert scores.loc["oracle", "peak_over_mean"] < scores.loc["window_mean", "peak_over_mean"]


def test_the_summary_is_relative_to_the_window_mean(scored):
    """Which differs from itself by nothing, and from the oracle by what stands above it."""
    _, _, scores = scored
    summary = placement_summary(scores).set_index(["strategy", "state"])

    assert 0 == summary.loc[("window_mean", "all"), "difference"]
    assert summary.loc[("oracle", "all"), "difference"] == pytest.approx(
        -summary.loc[("window_mean", "all"), "above_oracle"]
    )
    assert 3 == summary.loc[("oracle", "all"), "cutoffs"]


@pytest.mark.slow
def test_the_command_scores_plans_and_writes_one(moetrace, settled, tmp_path):
    """JSON with the fields other programs rely on, and a map as vllm-ascend and MindIE read it."""
    from moetrace import save_trace

    save_trace(settled, tmp_path / "settled.parquet")
    moetrace("ingest", tmp_path / "settled.parquet")
    argv = ("place", "--gpus", "4", "--redundant", "4", "--predictor", "sw_avg", "--cutoffs", "1000,2000")

    found = moetrace(*argv, "--json").json
    path = next(own["path"] for own in found["deploy"] if own["system"] == "MindIE")
    written = json.loads((tmp_path / "cwd" / path).read_text())

    assert {"trace", "layer", "cutoff", "strategy", "balance", "peak_over_mean"} <= set(found["scores"][0])
    assert {"default", "sw_avg", "window_mean", "oracle"} == {row["strategy"] for row in found["scores"]}
    assert settled.experts == len({e for row in found["plans"] if row["layer"] == 0 for e in row["experts"]})
    assert [2, 4] == [written["moe_layer_count"], written["layer_list"][0]["device_count"]]
    assert 1 == pytest.approx(sum(row["expected"] for row in found["plans"] if row["layer"] == 0))
    assert "Worth it on 4 GPUs. The recommended policy is" in moetrace(*argv).out


@pytest.mark.slow
def test_no_expert_moves_where_no_plan_gains_enough(moetrace, settled, tmp_path):
    """With --least-gain, and some without it."""
    from moetrace import save_trace

    save_trace(settled, tmp_path / "settled.parquet")
    argv = ("place", tmp_path / "settled.parquet", "--gpus", "4", "--predictor", "window_mean", "--first", "300")

    always, never = (
        sum(row["moved"] for row in moetrace(*argv, "--least-gain", gain, "--json").json["scores"])
        for gain in ("0", "9")
    )

    assert 0 == never < always


def test_the_best_is_judged_where_all_were_scored():
    """A predictor that was too short where it is hard does not win by that."""
    import pandas as pd

    rows = [("level", 500, 0.5), ("level", 1000, 0.9), ("arima", 1000, 0.8)]
    scores = pd.DataFrame([{"layer": 0, "horizon": 100, "cutoff": c, "strategy": s, "balance": b} for s, c, b in rows])

    assert "level" == best_strategy(scores, ["arima", "level"])
    assert "arima" == best_strategy(scores[:0], ["arima", "level"])
    tied = scores.assign(balance=[0.1, 0.9, 0.9 + 1e-12])
    assert ["level", "arima"] == [best_strategy(tied, names) for names in (["level", "arima"], ["arima", "level"])]


@pytest.mark.thorough
def test_a_plan_stays_in_the_workspace(moetrace, settled, tmp_path):
    """Whatever a trace is called; two traces of one name have plans of their own, and part of the layers is no plan."""
    from dataclasses import replace

    from moetrace import save_trace

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_trace(replace(settled, info=replace(settled.info, name="../../x")), tmp_path / folder / "run.parquet")
    argv = ("--gpus", "4", "--predictor", "window_mean", "--cutoffs", "2000")

    both = moetrace("place", tmp_path / "a/run.parquet", tmp_path / "b/run.parquet", *argv, "--json")
    some = moetrace("place", tmp_path / "a/run.parquet", *argv, "--layers", "1", "--json")

    assert {"a/run", "b/run"} == {row["trace"] for row in both.json["scores"]}
    assert 2 == len({Path(file).parent for file in both.json["files"]})
    assert all(Path(file).resolve().is_relative_to(Path("moetrace-out").resolve()) for file in both.json["files"])
    assert [] == some.json["files"]
    assert "leave out --layers" in some.err


def test_gpus_that_do_not_fit_are_one_line(moetrace, settled, tmp_path):
    """A mistake in how it was called, said before anything is computed."""
    from moetrace import save_trace

    save_trace(settled, tmp_path / "settled.parquet")
    moetrace("ingest", tmp_path / "settled.parquet")

    done = moetrace("place", "--gpus", "3")

    assert (2, 1) == (done.code, done.err.count("\n"))
    assert "8 experts and 0 replicas do not fill 3 GPUs evenly" in done.err


def test_plans_of_nothing_are_an_empty_frame(small):
    """With the columns of one."""
    means = pd.DataFrame({"trace": ["other"], "predictor": ["window_mean"], "layer": [3], "share": [1.0]})
    found = plans_frame(small, means, "window_mean", Planning(2))

    assert ([], ["trace", "layer", "predictor", "gpu", "experts", "expected"]) == (
        found.to_dict("records"),
        list(found),
    )


def test_in_order_keeps_neighbours_together():
    """As frameworks do; what is left over goes to the first ones, and replicas are of the first experts."""
    assert [[0, 1], [2], [3]] == default_plan(4, 3).experts
    assert [[0, 1], [2, 3], [0, 1]] == default_plan(4, 3, 2).experts


def test_the_best_is_judged_in_the_state_that_each_layer_ends_in():
    """What was best while transient plans no layer that is stable; where no plan was made in that state, all count."""
    import pandas as pd

    peaks = {
        (0, 500, "transient"): {"level": 1.1, "ema": 1.9},
        (0, 1000, "stable"): {"level": 1.3, "ema": 1.2},
        (1, 500, "transient"): {"level": 1.4, "ema": 1.3},
        (1, 1000, "stable"): {"level": 1.0, "ema": 1.9},
    }
    scores = pd.DataFrame(
        [
            {"layer": layer, "horizon": 9, "cutoff": cutoff, "state": state, "strategy": by, "balance": 1 / peak}
            for (layer, cutoff, state), own in peaks.items()
            for by, peak in own.items()
        ]
    )

    assert "level" == best_strategy(scores, ["ema", "level"])
    assert "ema" == best_strategy(scores, ["ema", "level"], {0: "stable", 1: "transient"})
    assert "level" == best_strategy(scores, ["ema", "level"], {0: "transient", 1: "stable"})
    assert "level" == best_strategy(scores, ["ema", "level"], {0: "unknown", 1: "unknown"})


def test_states_that_a_trace_ends_in_are_those_at_its_last_step(settled):
    """Of every layer."""
    expected = {load.layer: state_at(load, 4000) for load in settled.by_layer()}

    assert expected == ending_states(settled)
    assert {"stable", "transient"} == set(expected.values())
