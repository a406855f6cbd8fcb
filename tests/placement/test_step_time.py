"""How long experts take: the roofline, measured curves, and loads, plans and verdicts by time."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrace import LoadTrace, save_trace
from moetrace.errors import SettingError, TraceError
from moetrace.placement.dispatch import DISPATCHES, Dispatch
from moetrace.placement.plan import Plan, default_plan
from moetrace.placement.planner import greedy
from moetrace.placement.planning import Planning
from moetrace.placement.step_time import GPUS, HIGHEST_RIDGE, StepTime, read_curve
from moetrace.placement.verdict import RATIOS, _judged, at_most, knee_frame, tokens_per_expert, worth_from
from moetrace.reporting.answers import first_answer, regime, worth

CURVE = StepTime(curve=((1, 10.0), (4, 10.0), (8, 20.0)))


def plain_cost(tokens, time):
    """The cost of one expert as the docstring has it."""
    each = tokens / time.passes
    if time.linear:
        return tokens
    if time.curve is None:
        full = max(each, 1, time.ridge)
    else:
        full = np.interp(each, *np.array(time.curve).T) * max(each / time.curve[-1][0], 1)
    return min(each, 1) * full * time.passes


@pytest.mark.parametrize(
    ("time", "tokens", "cost"),
    [
        (StepTime(), 7, 7),
        (StepTime(ridge=0), 7, 7),
        (StepTime(ridge=5), 0, 0),
        (StepTime(ridge=5), 0.5, 2.5),
        (StepTime(ridge=5), 1, 5),
        (StepTime(ridge=5), 7, 7),
        (StepTime(ridge=5, passes=4), 2, 10),
        (StepTime(ridge=5, passes=4), 8, 20),
        (StepTime(ridge=0.5), 0.5, 0.5),
        (CURVE, 0, 0),
        (CURVE, 2, 10),
        (CURVE, 6, 15),
        (CURVE, 16, 40),
        (replace(CURVE, passes=2), 16, 40),
    ],
)
def test_an_expert_takes_the_longer_of_reading_and_computing(time, tokens, cost):
    """Nothing for no token, the ridge below it, one unit for each token above; a curve as measured, then in proportion."""
    assert cost == time.cost(np.array([tokens]))[0]
    assert cost == plain_cost(tokens, time)


@given(st.lists(st.integers(0, 500), min_size=1), st.floats(0, 300), st.integers(1, 5))
def test_costs_are_those_of_a_loop(tokens, ridge, passes):
    """At all ridges, with several passes."""
    time = StepTime(ridge, passes=passes)

    assert [plain_cost(n, time) for n in tokens] == pytest.approx(time.cost(np.array(tokens)).tolist())


@pytest.mark.parametrize(
    ("name", "ridge"), [("a100", 153), ("H20", 37), ("h100", 295), ("H200", 206), ("b-200", 281), ("mi300x", 247)]
)
def test_the_ridge_of_a_gpu_is_flops_over_bandwidth(name, ridge):
    """As published: bf16 peak over memory bandwidth, in tokens."""
    assert ridge == round(StepTime.of(name).ridge)
    assert ridge <= HIGHEST_RIDGE


def test_every_gpu_has_a_source():
    """A number without one is a guess."""
    assert all(gpu.source and gpu.teraflops > 0 < gpu.terabytes for gpu in GPUS.values())


def test_bytes_of_an_expert_make_microseconds():
    """An expert of 48 MB is read by an H200 in 10 microseconds, which is what a ridge of tokens costs."""
    time = StepTime.of("h200", expert_bytes=48e6)

    assert 10 == pytest.approx(time.microseconds(float(time.cost(np.array([1]))[0])))
    assert 20 == pytest.approx(time.microseconds(2 * time.ridge))
    assert StepTime.of("h200").microseconds(1.0) is None
    assert 3.0 == CURVE.microseconds(3.0)


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ({"hardware": "h201"}, "unknown hardware 'h201' (choose a100"),
        ({"hardware": "h200", "ridge": 3}, "either the hardware or its ridge"),
        ({"ridge": -1}, "a number of tokens, 0 or more, not -1"),
        ({"ridge": float("nan")}, "not nan"),
        ({"passes": 0}, "one pass or more, not 0"),
    ],
)
def test_what_is_no_hardware_is_refused(given_, told):
    """In one line that says what is."""
    with pytest.raises(SettingError) as caught:
        StepTime.of(**given_)
    assert told in str(caught.value)


def test_a_curve_is_read_as_it_was_written(tmp_path):
    """Its memory-bound part ends where the lines of few and of many tokens meet."""
    path = tmp_path / "curve.csv"
    path.write_text("tokens,microseconds\n1,10\n4,10.0\n8,20\n")

    assert replace(CURVE, passes=3) == read_curve(path, 3)
    assert 4 == read_curve(path).bound


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is not a CSV file"),
        ("tokens,ms\n1,2\n", "has no column microseconds"),
        ("tokens,microseconds\n", "the file is no point"),
        ("tokens,microseconds\n1,2\n1,3\n", "row 3 is no point"),
        ("tokens,microseconds\n1,2\nx,3\n", "row 3 is no point"),
        ("tokens,microseconds\n1,-2\n", "row 2 is no point"),
        ("tokens,microseconds\n0,2\n", "row 2 is no point"),
        (None, "No such file"),
    ],
)
def test_what_is_no_curve_is_refused(tmp_path, text, told):
    """With the file, the first bad row and the way out."""
    path = tmp_path / "curve.csv"
    if text is not None:
        path.write_text(text)

    with pytest.raises(TraceError) as caught:
        read_curve(path)

    assert told in str(caught.value)
    assert "moetrace.placement.measure" in str(caught.value)


def plain_loads(held, counts, dispatch):
    """The load of each GPU, one step, expert and replica after the other."""
    time = dispatch.time
    loads = np.zeros((len(counts), len(held)))
    for step, row in enumerate(counts):
        single = [expert for expert in range(len(row)) if (held[:, expert] > 0).sum() == 1]
        shared = [expert for expert in np.argsort(-counts.sum(axis=0), kind="stable") if expert not in single]
        for expert in [*single, *shared]:
            own = np.flatnonzero(held[:, expert])
            if dispatch.kind == "even" or len(own) == 1:
                for gpu in own:
                    loads[step, gpu] += plain_cost(row[expert] / len(own), time)
                continue
            order = sorted(own, key=lambda gpu: loads[step, gpu])
            best = None
            for number in range(1, min(len(own), max(row[expert], 1)) + 1):
                each = plain_cost(row[expert] / number, time)
                peak = max(loads[step].max(), loads[step, order[number - 1]] + each)
                if best is None or peak < best[0] * (1 - 1e-6):
                    best = peak, number, each
            for gpu in order[: best[1]]:
                loads[step, gpu] += best[2]
    return loads


def some_load(experts=8, gpus=4, redundant=4, seed=0):
    """Counts (steps, experts) and an EPLB plan of them."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(60, rng.dirichlet(np.full(experts, 0.7)), size=40)
    return counts, Plan.of(greedy((counts.sum(axis=0) / counts.sum())[None], gpus, redundant)[0], experts)


@pytest.mark.parametrize("kind", ["even", "fewest"])
@pytest.mark.parametrize("ridge", [0.0, 3.0, 12.0, 200.0])
def test_loads_by_time_are_those_of_a_loop(kind, ridge):
    """Split evenly, and to the fewest replicas."""
    for seed in range(5):
        counts, plan = some_load(seed=seed)
        dispatch = Dispatch(kind, time=StepTime(ridge))

        assert np.allclose(plain_loads(plan.held, counts, dispatch), dispatch.loads(plan.held, counts))


@pytest.mark.parametrize("kind", DISPATCHES)
def test_at_no_ridge_time_is_tokens(kind):
    """A ridge of 0 has the loads of tokens; a tiny one nearly; a curve in proportion to tokens the same but for units."""
    counts, plan = some_load()
    tokens = Dispatch(kind).loads(plan.held, counts)

    assert np.array_equal(tokens, Dispatch(kind, time=StepTime(0.0)).loads(plan.held, counts))
    linear = StepTime(curve=((1, 2.0), (1000, 2000.0)))
    if kind != "lp":  # which leaves replicas with less than a token, of which a whole one is then read
        whole = counts * plan.held.sum(axis=0)
        assert np.allclose(
            2 * Dispatch(kind).loads(plan.held, whole), Dispatch(kind, time=linear).loads(plan.held, whole)
        )


def test_few_replicas_are_awake_where_memory_decides():
    """Every expert with a token is on one GPU alone, and the busiest GPU has fewer experts awake than by an even split."""
    counts, plan = some_load(16, 4, 8)
    awake = {kind: Dispatch(kind, time=StepTime(1000.0)).loads(plan.held, counts) / 1000 for kind in ("even", "fewest")}

    assert np.array_equal(awake["fewest"].sum(axis=1), (counts > 0).sum(axis=1))
    assert (awake["fewest"].max(axis=1) <= awake["even"].max(axis=1) + 1e-9).all()
    assert awake["fewest"].max(axis=1).sum() < 0.9 * awake["even"].max(axis=1).sum()


@settings(max_examples=15)
@given(
    st.integers(0, 1000), st.sampled_from([0.5, 2.0, 8.0]), st.sampled_from([0, 4]), st.sampled_from(["even", "fewest"])
)
@pytest.mark.slow
def test_a_plan_by_time_is_never_worse_where_it_was_made(seed, ratio, redundant, kind):
    """Than the plan by tokens, EPLB's and the default placement, for the steps that it was made from."""
    counts, _ = some_load(16, 4, redundant, seed)
    ridge = ratio * counts.mean()
    planning = Planning(4, redundant, dispatch=kind, time=StepTime(ridge))
    load = planning.load(counts, counts.sum(axis=0) / counts.sum())
    mean = load.mean[None]
    rivals = [
        Planning(4, redundant, dispatch=kind).place(load),
        Plan.of(greedy(mean, 4, redundant)[0], 16),
        default_plan(16, 4, redundant),
    ]

    peak = load.peak(planning.place(load).held, planning.split)

    assert all(peak <= load.peak(rival.held, planning.split) for rival in rivals)


def test_where_memory_decides_idle_experts_are_replicated():
    """A replica that gets no token costs nothing; one of a busy expert costs what the expert does."""
    counts = np.tile([50, 40, 30, 20, 0, 0, 0, 0], (100, 1))
    planning = Planning(4, 4, time=StepTime(500.0))

    plan = planning.place(planning.load(counts, counts[0] / counts[0].sum()))

    assert (plan.held.sum(axis=0)[:4] == 1).all()
    assert 500 == planning.split.peaks(plan.held, counts)[0]


def test_a_plan_is_changed_by_time():
    """A plan whose busiest GPU has two long experts is changed; by tokens it would be even enough."""
    counts = np.tile([10, 10, 10, 10, 40, 0, 0, 0], (100, 1))
    before = Plan.of(np.array([[0, 1], [2, 5], [3, 6], [4, 7]]), 8)
    by_time = Planning(4, time=StepTime(500.0))
    load = by_time.load(counts, counts[0] / counts[0].sum())

    assert Planning(4).replan(before, load) is before
    assert 1000 == by_time.split.peaks(by_time.replan(before, load).held, counts)[0]
    assert 2 == (by_time.split.peaks(before.held, counts)[0]) / 500


def test_the_verdict_of_two_ends():
    """Worth it at both, at none, or as the hardware has it; an interval that holds the threshold shows nothing."""

    def judged(tokens, memory):
        ends = dict(zip(("saved_low", "saved_high"), tokens))
        ends |= dict(zip(("saved_memory_bound_low", "saved_memory_bound_high"), memory))
        return _judged(ends | {"saved_memory_bound": memory[0]})

    assert "worth it" == judged((0.10, 0.20), (0.03, 0.04))
    assert "not worth it" == judged((0.001, 0.01), (-0.1, 0.0))
    assert "depends on the hardware" == judged((0.10, 0.20), (0.0, 0.01))
    assert "not enough evidence" == judged((0.10, 0.20), (0.01, 0.03))
    assert "worth it" == judged((0.10, 0.20), (float("nan"), float("nan")))


def test_the_most_that_can_be_saved_is_that_of_even_gpus():
    """By tokens, where memory decides, and at a ridge that is given."""
    trace = LoadTrace.from_counts(np.tile([30, 30, 10, 10, 0, 0, 0, 0], (60, 1))[:, None])

    unknown, known = at_most(trace, Planning(4)), at_most(trace, Planning(4, time=StepTime(20.0)))

    assert 1 - 20 / 60 == pytest.approx(unknown.saved)
    assert 1 - 1 / 2 == pytest.approx(unknown.saved_memory_bound)
    assert 1 - (30 + 30 + 20 + 20) / 4 / 60 == pytest.approx(known.saved)
    assert np.isnan(known.saved_memory_bound)
    assert (10, 5) == (tokens_per_expert(trace), tokens_per_expert(trace, 2))
    assert "10 tokens per pass. Perfectly even GPUs would cut expert time per step by 66.7%" in first_answer(
        "t", unknown
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A file of a synthetic load of few tokens, two experts of 16 much busier than the others."""
    shares = np.array([8, 8, *np.ones(14)]) / 30
    counts = np.random.default_rng(5).multinomial(320, shares, size=3000)[:, None]
    path = tmp_path_factory.mktemp("served") / "served.parquet"
    save_trace(LoadTrace.from_counts(counts), path)
    return path


ARGV = ("--gpus", "4", "--predictor", "window_mean", "--cutoffs", "2000", "-q")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.thorough
def test_without_hardware_the_answer_has_both_ends(moetrace, served):
    """It asks for the hardware and never prints one saving; with it, one saving and the regime; report says the same."""
    unknown, tokens, known, curve = (
        moetrace("place", served, *ARGV, *options, "--json").json["verdict"]
        for options in ((), ("--ridge", "0"), ("--hardware", "h200", "--expert-bytes", "48MB"), ("--ridge", "5"))
    )

    assert "depends on the hardware" == unknown["verdict"]
    assert (tokens["saved"], HIGHEST_RIDGE) == (unknown["saved"], unknown["memory_bound_ridge"])
    assert ("worth it", "not worth it") == (tokens["verdict"], known["verdict"])
    assert 20 == pytest.approx(unknown["tokens_per_expert"])
    assert known["saved"] < 0.02 < curve["saved"] < tokens["saved"]
    assert (None, None) == (tokens["saved_memory_bound"], tokens["microseconds"])
    assert known["microseconds"] == pytest.approx(0.0, abs=1.0)
    sentence = worth(unknown | {"gpus": 4}).sentence
    assert "Whether balancing is worth it on 4 GPUs depends on the hardware. The recommended policy is" in sentence
    assert "Add --hardware to decide." in sentence
    assert sentence in " ".join(moetrace("place", served, *ARGV).out.split())
    card = worth(known | {"gpus": 4})
    assert "experts are memory-bound on H200" in card.sentence
    shown = moetrace("report", served, *ARGV[:4], "--cutoffs", "2000", "--horizons", "1000", "--hardware", "h200", "-q")
    assert f"Not worth it on 4 GPUs: {regime(known)}" in " ".join(shown.out.split())


@pytest.mark.slow
def test_the_command_reads_a_curve(moetrace, served, tmp_path):
    """And refuses it beside other hardware."""
    path = tmp_path / "curve.csv"
    path.write_text("tokens,microseconds\n1,100\n50,100\n100,200\n")

    found = moetrace("place", served, *ARGV, "--expert-time", path, "--json").json["verdict"]
    both = moetrace("place", served, *ARGV, "--expert-time", path, "--ridge", "3")

    assert 50 == found["ridge"]
    assert found["saved"] == pytest.approx(found["microseconds"] / 600, abs=0.05)
    assert (2, 1) == (both.code, both.err.count("\n"))
    assert 2 == moetrace("place", served, *ARGV, "--hardware", "abacus").code


@pytest.mark.thorough
def test_numbers_of_redundant_experts_are_compared(moetrace, served):
    """A saving for each that was asked for."""
    found = moetrace("place", served, *ARGV, "--redundant", "0,4", "--ridge", "0", "--json").json

    tried = found["verdict"]["by_redundant"]
    assert [0, 4] == [row["redundant"] for row in tried]
    assert tried[0]["saved"] < tried[1]["saved"]
    assert json.dumps(tried)
    assert "0 save" in " ".join(moetrace("place", served, *ARGV, "--redundant", "0,4", "--ridge", "0").out.split())


def test_the_knee_is_where_a_plan_begins_to_save():
    """Nothing where every GPU has as many busy experts; as by tokens where all experts are compute-bound."""
    rng = np.random.default_rng(1)
    trace = LoadTrace.from_counts(rng.multinomial(1600, np.array([6, 6, *np.ones(14)]) / 26, size=200)[:, None])

    found = knee_frame(trace, Planning(4))

    by_tokens = 1 - Planning(4).split.peaks(balanced_plan(trace), trace.layer(0).counts[100:]).sum() / (
        Planning(4).split.peaks(default_plan(16, 4).held, trace.layer(0).counts[100:]).sum()
    )
    assert (list(RATIOS), 0) == (found["tokens_over_ridge"].tolist(), pytest.approx(found["saved"].iloc[0], abs=0.01))
    assert by_tokens == pytest.approx(found["saved"].iloc[-1], abs=0.02)
    assert 0.25 < worth_from(found, 0.05) < 2
    assert worth_from(found, 0.9) is None
    assert 0 == worth_from(found, -0.5)
    assert knee_frame(LoadTrace.from_counts(np.ones((3, 1, 16), int)), Planning(4)).empty


def balanced_plan(trace):
    """The plan by tokens of the first half."""
    counts = trace.layer(0).counts[:100]
    return Planning(4).place(Planning(4).load(counts, counts.sum(axis=0) / counts.sum())).held


@pytest.mark.slow
def test_decode_alone_is_judged_beside_the_passes(moetrace):
    """Where a trace of that name lies beside it: its tokens per pass, what even GPUs save, and the command for more."""
    counts = np.random.default_rng(5).multinomial(320, np.array([8, 8, *np.ones(14)]) / 30, size=(60, 2))
    (folder := Path("moetrace-out", "traces")).mkdir(parents=True)
    save_trace(LoadTrace.from_counts(counts), folder / "run.parquet")
    save_trace(LoadTrace.from_counts(counts // 4), folder / "run-decode.parquet")
    argv = ("--gpus", 4, "--predictor", "window_mean", "--hardware", "h20", "--layers", 1)
    said = [line for line in moetrace("place", "run", *argv).err.splitlines() if line.startswith("run-decode:")]
    (alone,) = [own for own in moetrace("place", "run-decode", *argv).err.splitlines() if "Perfectly even" in own]

    assert [f"{alone} That is decode alone; `moetrace place run-decode` has its verdict."] == said
    assert "decode" not in moetrace("place", folder / "run.parquet", *argv, "-w", "elsewhere").err
