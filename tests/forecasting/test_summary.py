"""Summaries of scores: what they average, and what the interval of a difference means."""

import numpy as np
import pandas as pd
import pytest

from moetrace import evaluate, predictor, study
from moetrace.forecasting.evaluation import InMemory
from moetrace.forecasting.summary import paired_interval, score_frames, summarise, summary_frame


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
        "expected_error",
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


@pytest.mark.thorough
def test_the_interval_covers_as_often_as_it_says():
    """About 95 % of the intervals over many cutoffs hold the true difference of 0."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        baseline = rng.random((40, 12)) + 1
        row = summary_frame(scores_of(baseline + rng.normal(0, 0.2, baseline.shape), baseline)).iloc[-1]
        held += row["difference_low"] <= 0 <= row["difference_high"]

    assert held >= 90


def test_the_interval_is_that_of_a_plain_bootstrap():
    """Cutoffs and layers drawn one by one, cells that are missing left out."""
    rng = np.random.default_rng(3)
    table = rng.normal(0, 1, (6, 4))
    table[2, 1] = np.nan
    rows = [(c, layer, table[c, layer]) for c in range(6) for layer in range(4)]
    low, middle, high = paired_interval(pd.DataFrame(rows, columns=["cutoff", "layer", "apart"]), seed=7)

    drawn = np.random.default_rng(7)
    cutoffs, layers = drawn.integers(0, 6, (2000, 6)), drawn.integers(0, 4, (2000, 4))
    means = [np.nanmean([[table[c, layer] for layer in ls] for c in cs]) for cs, ls in zip(cutoffs, layers)]
    assert [*np.quantile(means, [0.025, 0.975]), np.nanmean(table)] == pytest.approx([low, high, middle])


def test_two_cutoffs_have_no_interval():
    """They say nothing about the scatter over cutoffs."""
    row = summary_frame(scores_of([[1.0], [2.0]], [[1.5], [1.5]])).iloc[-1]

    assert 0 == row["difference"]
    assert np.isnan(row["difference_low"])


def test_predictors_keep_the_order_they_were_asked_for():
    """Not that of the alphabet."""
    both = pd.concat([scores_of([[1.0]], [[1.0]], predictor="z"), scores_of([[1.0]], [[1.0]], predictor="a")])
    other = summarise(both.assign(apart=0.0), ["predictor", "state"], [], lambda *_: {}, 0, order=["a", "z"])

    assert ["z", "z", "a", "a"] == summary_frame(both)["predictor"].tolist()
    assert ["a", "a", "z", "z"] == other["predictor"].tolist()


@pytest.mark.slow
def test_score_frames_of_no_scores_are_empty(settled):
    """And have all their columns."""
    frames = score_frames(evaluate(settled, [predictor("ema")], [99_999]))

    assert {"summary", "scores", "course", "shares", "last_shares"} == set(frames)
    assert [0] * 5 == [len(frame) for frame in frames.values()]


@pytest.mark.slow
def test_a_study_keeps_the_results_of_all_that_it_evaluates(small):
    """Scores, what errors depend on, the states and the trace itself; nothing is computed twice."""
    kept = InMemory()

    found, again = (study(small, [predictor("window_mean")], [5], [20], results=kept) for _ in range(2))

    assert [5, 5] == found.frames["scores"]["horizon"].tolist()
    assert {"about", "layers", "by_horizon", "by_history"} <= set(found.frames)
    assert [(2, 0), (0, 2)] == [(done.computed, done.reused) for done in (found, again)]
