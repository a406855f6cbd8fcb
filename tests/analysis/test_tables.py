"""Frames of traces, layers and experts: what each column is."""

import numpy as np
import pandas as pd
import pytest

from moetrace import Finding, LoadTrace, TraceInfo, classify, fluctuation
from moetrace.analysis.about import traces_frame
from moetrace.analysis.imbalance import IMBALANCE, health
from moetrace.analysis.states import Rule, classify_expert, rank_runs
from moetrace.analysis.tables import (
    COURSES,
    _agree,
    depth_frame,
    fluctuation_frame,
    imbalance_frame,
    layer_row,
    states_tables,
)
from moetrace.analysis.variogram import mean_noise
from moetrace.synthetic import LOUD, QUIET, Course, settling, synthetic_trace


def test_state_frames_tell_before_from_after(settled):
    """Movement, variance and range are smaller after settling; a layer that never settles has no after."""
    layers = states_tables(settled)["layers"].set_index("layer")

    assert layers["movement_before"][0] > 3 * layers["movement_after"][0]
    assert layers["variance_100_before"][0] > layers["variance_100_after"][0]
    assert np.isnan(layers["movement_after"][1])
    assert pd.isna(layers["settle_step"][1])


@pytest.mark.parametrize("last", [4000, 3999, 3949])  # windows of 100 steps end where "before" ends, or not
def test_a_layers_row_says_what_its_parts_say(settled, last):
    """Each column by its name, for a layer that settles: fluctuation and movement up to the step before, and from it on."""
    load = settled.layer(0).until(last)
    states, settle = classify(load), classify(load).settle_step
    before, after = (fluctuation(load.between(*part), [10, 100])[1] for part in ((1, settle - 1), (settle, last)))
    expected = {
        "trace": "settled",
        "layer": 0,
        "settle_step": settle,
        "settle_step_low": states.settle_interval[0],
        "settle_step_high": states.settle_interval[1],
        "state": "stable",
        "outcome": "settled",
        "unsettled_step": None,
        "unsettled_step_low": None,
        "unsettled_step_high": None,
        "rank_settle_step": rank_runs(load)[-1].from_step,
        "detectors": "agree",
        "movement_before": states.movement_in(1, settle - 1),
        "movement_after": states.movement_in(settle, last),
        "variance_100_before": before.variance.mean(),
        "variance_100_after": after.variance.mean(),
        "range_100_before": before.range.mean(),
        "range_100_after": after.range.mean(),
        "step_noise": mean_noise(load, 1),
    } | health(load)._asdict()

    (row,) = states_tables(settled.select(layers=[0], last=last))["layers"].astype(object).to_dict("records")

    assert expected == {name: None if value is pd.NA else value for name, value in row.items()}


def test_windows_of_the_layers_table_slide():
    """A jump counts the same wherever it falls between two multiples of the window."""
    rows = []
    for after in (3000, 3050):
        trace = LoadTrace.from_counts(np.repeat([[[400, 100]], [[100, 400]]], [after, 6000 - after], axis=0))
        rows.append(fluctuation(trace.layer(0), [10, 100])[1].variance.mean())

    assert rows[0] == pytest.approx(rows[1])
    found = layer_row(trace.layer(0), classify(trace.layer(0)))
    assert found["variance_100_before"] == fluctuation(trace.layer(0).until(3050), [10, 100])[1].variance.mean()


@pytest.mark.slow
def test_a_layer_that_never_settles_has_no_after(settled):
    """All of its steps are before; whole numbers stay whole numbers where some are missing."""
    load = settled.layer(1)
    row = states_tables(settled)["layers"].iloc[1]

    assert fluctuation(load, [10, 100])[1].variance.mean() == row["variance_100_before"]
    assert classify(load).movement_in(1, 4000) == row["movement_before"]
    assert all(np.isnan(row[name]) for name in ("movement_after", "variance_100_after", "range_100_after"))
    whole = ["settle_step", "settle_step_low", "settle_step_high", "unsettled_step", "rank_settle_step"]
    assert ["Int64"] * 5 == [str(states_tables(settled)["layers"].dtypes[name]) for name in whole]


def test_detectors_that_disagree_are_said_to_differ():
    """Almost equal experts that keep changing places move little, but their order does not last."""
    rng = np.random.default_rng(0)
    swing = 0.001 * np.sign(np.sin(np.arange(6000) / 250))
    shares = np.stack([0.25 + swing, 0.25 - swing, 0.25 + swing / 2, 0.25 - swing / 2], axis=1)
    trace = LoadTrace.from_counts(rng.multinomial(10**7, shares)[:, None])

    row = states_tables(trace)["layers"].iloc[0]

    assert ("stable", "differ") == (row["state"], row["detectors"])


def test_runs_of_a_state_are_the_windows(settled):
    """One row each, layer after layer."""
    expected = [
        {
            "trace": "settled",
            "layer": load.layer,
            "from_step": run.from_step,
            "to_step": run.to_step,
            "state": run.state,
        }
        for load in settled.by_layer()
        for run in classify(load).runs
    ]

    assert expected == states_tables(settled)["windows"].to_dict("records")


def test_only_what_is_asked_for_is_made(settled):
    """Experts and sensitivity take long; progress tells of every layer."""
    told = []

    found = states_tables(settled, progress=lambda *done: told.append(done))

    assert {"layers", "windows", "movement", "depth"} == set(found)
    assert [(1, 2), (2, 2)] == told


def test_the_movement_frame_is_what_the_rule_judges(settled):
    """With its thresholds."""
    states = classify(settled.layer(0))
    frame = states_tables(settled.select(layers=[0]))["movement"]

    assert ["trace", "layer", "step", "movement", "settle_below", "unsettle_above"] == list(frame)
    assert states.steps[: len(states.judged)].tolist() == frame["step"].tolist()
    assert states.judged.tolist() == frame["movement"].tolist()
    assert {("settled", 0, 0.04, 0.06)} == {
        *zip(*(frame[c] for c in ("trace", "layer", "settle_below", "unsettle_above")))
    }


@pytest.mark.slow
def test_curves_of_long_traces_are_thinned_evenly():
    """At most 600 moments, each so many after the one before, from the first on."""
    counts = np.random.default_rng(0).multinomial(100, [0.6, 0.4], size=(31_000, 1))
    trace = LoadTrace.from_counts(counts)
    states = classify(trace.layer(0))

    movement = states_tables(trace)["movement"]
    curves = states_tables(trace, COURSES)
    fluctuations, load = curves["fluctuation"], curves["load"]

    assert states.judged[::2].tolist() == movement["movement"].tolist()
    assert states.steps[: len(states.judged)][::2].tolist() == movement["step"].tolist()
    for found in fluctuation(trace.layer(0)):
        part = fluctuations[fluctuations["window"] == found.window]
        assert found.steps[::6].tolist() == part["step"].tolist()
        assert found.variance[::6].mean(axis=1).tolist() == part["variance"].tolist()
        assert found.range[::6].mean(axis=1).tolist() == part["range"].tolist()
    # 52 steps to a point, the first 8 steps left out.
    assert list(range(60, 31_001, 52)) == load[load["expert"] == 1]["step"].tolist()
    assert trace.layer(0).shares[8:60, 1].mean() == pytest.approx(load[load["expert"] == 1]["share"].iloc[0])


def test_the_hottest_frame_has_five_experts_and_what_lies_among_the_others():
    """The hottest of the last 1,000 steps first; of the others the tenth, middle and ninetieth percentile of a block."""
    share = np.array([2, 5, 4, 1, 3, 8, 7, 6]) / 36
    counts = np.concatenate([np.full((1000, 8), 9), np.rint(np.tile(share * 3600, (1000, 1)))])
    load = LoadTrace.from_counts(counts[:, None]).layer(0)

    frame = states_tables(LoadTrace.from_counts(counts[:, None]), COURSES)["hottest"]

    assert ["5", "6", "7", "1", "2", "low", "middle", "high"] == list(dict.fromkeys(frame["series"]))
    for name, own in frame.groupby("series"):
        assert list(range(50, 2001, 50)) == own["step"].tolist()
        few = np.array([1, 2, 3]) / 36
        late = {"low": few[0] * 0.8 + few[1] * 0.2, "middle": few[1], "high": few[1] * 0.2 + few[2] * 0.8}
        last = late[name] if name in late else load.last(1000).mean_shares[int(name)]
        assert [1 / 8, last] == pytest.approx(own["share"].iloc[[0, -1]].tolist())


def test_the_load_frame_has_the_mean_of_every_block(small, settled):
    """Of 50 steps, or half of a shorter trace; one row per expert and moment."""
    frame = states_tables(settled.select(layers=[0]), COURSES)["load"]
    shares = settled.layer(0).shares
    short = states_tables(small, COURSES)["load"]

    assert ["trace", "layer", "expert", "step", "share"] == list(frame)
    assert [(e, step) for step in range(50, 4001, 50) for e in range(8)] == [*zip(frame["expert"], frame["step"])]
    assert [shares[a : a + 50, e].mean() for a in range(0, 4000, 50) for e in range(8)] == pytest.approx(
        frame["share"].tolist()
    )
    assert [39, 69] == sorted(set(short["step"]))
    assert [1, 2, 3] == sorted(set(states_tables(LoadTrace.from_counts(np.ones((3, 1, 2))), COURSES)["load"]["step"]))
    assert {("small", 3), ("small", 5)} == {*zip(short["trace"], short["layer"])}


def test_noise_and_threshold_of_the_fluctuation_frame():
    """From the last 1,000 steps: noise, the drift that the rule allows on top, and the range of so many normal draws."""
    trace = synthetic_trace([Course(steps=3000, changes=((1, LOUD), (1500, QUIET)))])
    late = trace.layer(0).between(2001, 3000)
    scatter = [np.mean((late.shares[10:, e] - late.shares[:-10, e]) ** 2) / 2 for e in range(8)]
    drift = 0.04**2 * np.mean(late.mean_shares**2) / (2 / 3 * 200)

    frame = states_tables(trace, COURSES)["fluctuation"]

    assert {("synthetic", 0)} == {*zip(frame["trace"], frame["layer"])}
    assert list(range(len(frame))) == fluctuation_frame(trace.layer(0)).index.tolist()
    for window, draws in ((10, 3.078), (100, 5.015), (200, 5.492)):
        row = frame[frame["window"] == window].iloc[-1]
        assert np.mean(scatter) == pytest.approx(row["noise_variance"])
        assert np.mean(scatter) + drift * window / 6 == pytest.approx(row["threshold_variance"])
        assert np.mean(np.sqrt(scatter)) * draws == pytest.approx(row["noise_range"])


def test_a_trace_shorter_than_every_window_has_no_fluctuation():
    """An empty frame with all its columns."""
    short = states_tables(LoadTrace.from_counts(np.ones((5, 1, 2))), COURSES)["fluctuation"]
    long = states_tables(LoadTrace.from_counts(np.ones((50, 1, 2))), COURSES)["fluctuation"]

    assert 0 == len(short)
    assert list(long) == list(short)
    assert 0 == len(states_tables(LoadTrace.from_counts(np.ones((5, 1, 2))), ["experts"])["experts"])


def test_the_imbalance_frame_measures_the_last_thousand_steps(settled):
    """In every definition, with whose it is."""
    load = settled.layer(1)
    share = load.counts[-1000:].sum(axis=0) / load.counts[-1000:].sum()
    expected = [
        {"trace": "settled", "layer": 1, "definition": name, "of": whose, "value": measure(share)}
        for name, (measure, whose) in IMBALANCE.items()
    ]

    assert expected == imbalance_frame(load).to_dict("records")


def test_the_experts_frame_says_what_its_parts_say(settled):
    """Mean variance and range of every expert and window, its share, and its own state."""
    load = settled.layer(0)
    expected = [
        {
            "trace": "settled",
            "layer": 0,
            "expert": expert,
            "window": found.window,
            "share": load.mean_shares[expert],
            "variance": found.variance[:, expert].mean(),
            "range": found.range[:, expert].mean(),
            "settle_step": classify_expert(load, expert).settle_step,
            "state": classify_expert(load, expert).state,
        }
        for found in fluctuation(load)
        for expert in range(8)
    ]

    frame = states_tables(settled.select(layers=[0]), ["experts"])["experts"]

    pd.testing.assert_frame_equal(pd.DataFrame(expected).astype({"settle_step": "Int64"}), frame, rtol=1e-12)


def test_the_sensitivity_frame_varies_window_and_threshold():
    """The upper threshold half as high again as the lower one."""
    trace = synthetic_trace([Course(changes=((1, LOUD), (1500, QUIET), (4000, 0.005)))])
    load = trace.layer(0)
    expected = []
    for window in (100, 200, 400):
        for threshold in (0.02, 0.03, 0.04, 0.06, 0.08):
            found = classify(load, Rule(window, 500, threshold, 1.5 * threshold))
            row = {"trace": "synthetic", "layer": 0, "window": window, "settle_below": threshold}
            expected.append(row | {"settle_step": found.settle_step, "outcome": found.outcome})

    frame = states_tables(trace, ["sensitivity"])["sensitivity"]

    pd.testing.assert_frame_equal(pd.DataFrame(expected).astype({"settle_step": "Int64"}), frame, rtol=1e-12)


def test_depth_averages_the_layers_of_each_third():
    """By the numbers of the layers, in whatever order they come; traces in the order they come."""
    measures = ["movement_before", "movement_after", "variance_100_after", "range_100_after"]
    layers = pd.DataFrame(
        {"trace": ["z"] * 4 + ["a"] * 2, "layer": [7, 1, 3, 5, 0, 1], "settle_step": [10, 20, None, 40, 1, 2]}
    )
    layers = layers.astype({"settle_step": "Int64"}).assign(**{m: [8.0, 2, 4, 6, 1, 1] for m in measures})
    expected = [
        {
            "trace": "z",
            "depth": "shallow",
            "layers": "1 to 3",
            "settled": 1,
            "settle_step": 20,
            **dict.fromkeys(measures, 3.0),
        },
        {
            "trace": "z",
            "depth": "middle",
            "layers": "5",
            "settled": 1,
            "settle_step": 40,
            **dict.fromkeys(measures, 6.0),
        },
        {"trace": "z", "depth": "deep", "layers": "7", "settled": 1, "settle_step": 10, **dict.fromkeys(measures, 8.0)},
        {
            "trace": "a",
            "depth": "shallow",
            "layers": "0",
            "settled": 1,
            "settle_step": 1,
            **dict.fromkeys(measures, 1.0),
        },
        {"trace": "a", "depth": "deep", "layers": "1", "settled": 1, "settle_step": 2, **dict.fromkeys(measures, 1.0)},
    ]

    assert expected == depth_frame(layers).to_dict("records")


def test_fluctuation_of_every_expert_on_request(settled):
    """One row for each expert, window and layer."""
    experts = states_tables(settled.select(layers=[0]), ["experts"])["experts"]

    assert 8 * 3 == len(experts)
    assert {10, 100, 200} == set(experts["window"])


def test_sensitivity_has_a_row_for_every_window_and_threshold(settled):
    """A higher threshold never settles a layer later, at the same window, by more than a block."""
    frame = states_tables(settled.select(layers=[0]), ["sensitivity"])["sensitivity"]

    assert 3 * 5 == len(frame)
    assert frame.dropna().groupby("window")["settle_step"].apply(lambda s: s.diff().max() <= 50).all()


def test_depth_has_thirds_of_the_layers():
    """Shallow, middle and deep, from the layers' numbers; a trace with one layer has one."""
    layers = states_tables(synthetic_trace([settling(500, steps=1500)] * 5))["depth"]

    assert [("shallow", "0 to 1"), ("middle", "2 to 3"), ("deep", "4")] == list(zip(layers["depth"], layers["layers"]))
    assert 1 == len(states_tables(synthetic_trace([settling(500, steps=1500)]))["depth"])


def test_detectors_that_are_far_apart_differ():
    """Within 1,000 steps, or neither settling, they agree."""
    assert [True, True, False, False] == [_agree(*pair) for pair in [(500, 1500), (None, None), (500, 1501), (None, 3)]]


def test_courses_are_thin_enough_to_draw(settled):
    """At most 600 moments a curve; every definition of imbalance for every layer."""
    frames = states_tables(settled, COURSES)

    assert frames["load"].groupby(["layer", "expert"]).size().max() <= 600
    assert frames["fluctuation"].groupby(["layer", "window"]).size().max() <= 600
    assert 2 * 7 == len(frames["imbalance"])
    assert 2 * len(frames["load"]["step"].unique()) == pytest.approx(frames["load"]["share"].sum())


def test_noise_levels_are_those_of_a_load_that_stands_still():
    """Variance and range of a still load lie at their noise levels, in every window; the threshold lies above."""
    counts = np.random.default_rng(0).multinomial(5000, [0.4, 0.3, 0.2, 0.1], size=4000)
    course = states_tables(LoadTrace.from_counts(counts[:, None]), COURSES)["fluctuation"]
    means = course.groupby("window").mean(numeric_only=True)

    assert means["noise_range"].tolist() == pytest.approx(means["range"].tolist(), rel=0.05)
    # Within a window the mean is the window's own: one degree of freedom less.
    unbiased = (means["variance"] * means.index / (means.index - 1)).tolist()
    assert means["noise_variance"].tolist() == pytest.approx(unbiased, rel=0.05)
    assert (means["threshold_variance"] > means["noise_variance"]).all()


def test_the_traces_frame_says_how_large_a_trace_is(small):
    """And from which step to which it goes."""
    (row,) = traces_frame([small]).to_dict("records")

    assert (60, 10, 69, 1, 2, 4) == tuple(
        row[k] for k in ("steps", "first_step", "last_step", "stride", "layers", "experts")
    )


def test_the_traces_frame_of_nothing_is_empty():
    """Nothing ingested yet is no error."""
    assert traces_frame([]).empty


def test_a_finding_that_is_there_twice_is_listed_once():
    """Two restarts are two findings and one word in the row of the trace."""
    found = [
        Finding(name, "note", f"step {step}", "", "") for name, step in zip(["restart", "cut", "restart"], range(3))
    ]
    trace = LoadTrace.from_counts(np.ones((3, 1, 2), int), info=TraceInfo("t", findings=tuple(found)))

    assert ["restart, cut"] == traces_frame([trace])["findings"].tolist()
