"""Frames: what the summaries average, and what the interval of a difference means."""

import numpy as np
import pandas as pd
import pytest

from moetrace import LoadTrace, evaluate, predictor
from moetrace.analysis.tables import _agree, course_frames, states_tables
from moetrace.forecasting.summary import score_frames, summary_frame
from moetrace.synthetic import settling, synthetic_trace
from moetrace.workspace.traces import traces_frame


def scores_of(errors, baseline, states=None, predictor="p"):
    """A scores frame with errors of shape (cutoffs, layers)."""
    errors, baseline = np.asarray(errors, float), np.asarray(baseline, float)
    cutoff, layer = np.indices(errors.shape)
    n = errors.size
    frame = pd.DataFrame(
        {
            "trace": "t", "predictor": predictor, "layer": layer.ravel(), "horizon": 10, "cutoff": cutoff.ravel(),
            "state": "stable" if states is None else np.asarray(states).ravel(), "error_rate": errors.ravel(),
            "window_mean_error_rate": baseline.ravel(), "status": np.where(np.isnan(errors.ravel()), "too_short", "ok"),
        }
    )  # fmt: skip
    constants = [
        "error_noise",
        "step_error_rate",
        "step_noise",
        "mape",
        "abs_points",
        "coverage_80",
        "coverage_95",
        "fit_seconds",
        "forecast_seconds",
    ]
    return frame.assign(**dict.fromkeys(constants, np.ones(n)))


def test_a_summary_is_the_mean_over_layers_and_cutoffs():
    """One row per state and one for all; what was too short is counted, not averaged."""
    scores = scores_of([[1, 3], [5, np.nan]], [[2, 2], [2, 2]], [["transient", "transient"], ["stable", "stable"]])
    rows = summary_frame(scores).set_index("state")

    assert ["transient", "stable", "all"] == list(rows.index)
    assert [2, 5, 3] == rows["error_rate"].tolist()
    assert [0, 1, 1] == rows["too_short"].tolist()
    assert [2, 1, 3] == rows["scored"].tolist()
    assert [1, 1, 2] == rows["cutoffs"].tolist()
    assert 1 - 9 / 6 == pytest.approx(rows["skill"]["all"])


def test_the_interval_of_a_clear_difference_excludes_zero():
    """The same difference everywhere has an interval of no width."""
    rng = np.random.default_rng(0)
    baseline = rng.random((8, 4)) + 1
    row = summary_frame(scores_of(baseline - 0.5, baseline)).iloc[-1]

    assert [-0.5] * 3 == pytest.approx([row["difference_low"], row["difference"], row["difference_high"]])


def test_the_interval_covers_as_often_as_it_says():
    """About 95 % of the intervals over many cutoffs hold the true difference of 0."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        baseline = rng.random((40, 12)) + 1
        row = summary_frame(scores_of(baseline + rng.normal(0, 0.2, baseline.shape), baseline)).iloc[-1]
        held += row["difference_low"] <= 0 <= row["difference_high"]

    assert held >= 90


def test_two_cutoffs_have_no_interval():
    """They say nothing about the scatter over cutoffs."""
    row = summary_frame(scores_of([[1.0], [2.0]], [[1.5], [1.5]])).iloc[-1]

    assert 0 == row["difference"]
    assert np.isnan(row["difference_low"])


def test_predictors_keep_the_order_they_were_asked_for():
    """Not that of the alphabet."""
    both = pd.concat([scores_of([[1.0]], [[1.0]], predictor="z"), scores_of([[1.0]], [[1.0]], predictor="a")])

    assert ["z", "z", "a", "a"] == summary_frame(both)["predictor"].tolist()


def test_state_frames_tell_before_from_after(settled):
    """Movement, variance and range are smaller after settling; a layer that never settles has no after."""
    layers = states_tables(settled)["layers"].set_index("layer")

    assert layers["movement_before"][0] > 3 * layers["movement_after"][0]
    assert layers["variance_100_before"][0] > layers["variance_100_after"][0]
    assert np.isnan(layers["movement_after"][1])
    assert pd.isna(layers["settle_step"][1])


def test_fluctuation_of_every_expert_on_request(settled):
    """One row for each expert, window and layer."""
    experts = states_tables(settled.select(layers=[0]), experts=True)["experts"]

    assert 8 * 3 == len(experts)
    assert {10, 100, 200} == set(experts["window"])


def test_sensitivity_has_a_row_for_every_window_and_threshold(settled):
    """A higher threshold never settles a layer later, at the same window."""
    frame = states_tables(settled.select(layers=[0]), sensitivity=True)["sensitivity"]

    assert 3 * 5 == len(frame)
    assert frame.dropna().groupby("window")["settle_step"].apply(lambda s: s.is_monotonic_decreasing).all()


def test_depth_has_thirds_of_the_layers():
    """Shallow, middle and deep, from the layers' numbers; a trace with one layer has one."""
    layers = states_tables(synthetic_trace([settling(500, steps=1500)] * 5))["depth"]

    assert [("shallow", "0 to 1"), ("middle", "2 to 3"), ("deep", "4")] == list(zip(layers["depth"], layers["layers"]))
    assert 1 == len(states_tables(synthetic_trace([settling(500, steps=1500)]))["depth"])


def test_detectors_that_are_far_apart_differ():
    """Within 1,000 steps, or neither settling, they agree."""
    assert [True, True, False, False] == [_agree(*pair) for pair in [(500, 1500), (None, None), (500, 1501), (None, 3)]]


def test_course_frames_are_thin_enough_to_draw(settled):
    """At most 600 moments a curve; every definition of imbalance for every layer."""
    frames = course_frames(settled)

    assert frames["load"].groupby(["layer", "expert"]).size().max() <= 600
    assert frames["fluctuation"].groupby(["layer", "window"]).size().max() <= 600
    assert 2 * 7 == len(frames["imbalance"])
    assert 2 * len(frames["load"]["step"].unique()) == pytest.approx(frames["load"]["share"].sum())


def test_noise_levels_are_those_of_a_load_that_stands_still():
    """Variance and range of a still load lie at their noise levels, in every window; the threshold lies above."""
    counts = np.random.default_rng(0).multinomial(5000, [0.4, 0.3, 0.2, 0.1], size=4000)
    course = course_frames(LoadTrace.from_counts(counts[:, None]))["fluctuation"]
    means = course.groupby("window").mean(numeric_only=True)

    assert means["noise_range"].tolist() == pytest.approx(means["range"].tolist(), rel=0.05)
    # Within a window the mean is the window's own: one degree of freedom less.
    unbiased = (means["variance"] * means.index / (means.index - 1)).tolist()
    assert means["noise_variance"].tolist() == pytest.approx(unbiased, rel=0.05)
    assert (means["threshold_variance"] > means["noise_variance"]).all()


def test_score_frames_of_no_scores_are_empty(settled):
    """And have all their columns."""
    frames = score_frames(evaluate(settled, [predictor("ema")], [99_999]))

    assert {"summary", "scores", "course", "shares", "last_shares"} == set(frames)
    assert [0] * 5 == [len(frame) for frame in frames.values()]


def test_the_traces_frame_of_nothing_is_empty():
    """Nothing ingested yet is no error."""
    assert traces_frame([]).empty
