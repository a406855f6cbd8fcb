"""What can be predicted: tables that follow from the scores."""

from dataclasses import asdict

import pandas as pd
import pytest

from moetrace import predictor
from moetrace.forecasting.backtest import evaluate_all
from moetrace.forecasting.evaluation import evaluation
from moetrace.forecasting.study import (
    MEASURES,
    _means,
    predictability_evaluations,
    predictability_frames,
    worst_experts_frame,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def frames(settled):
    """Of the synthetic trace with one layer that settles and one that never does."""
    asked = evaluation(settled, [predictor("window_mean"), predictor("level")], [500, 1000])
    return predictability_frames(*evaluate_all([asked, *predictability_evaluations(settled)]))


def test_errors_are_compared_by_horizon(frames):
    """One row per horizon and state; the noise of the mean falls as the horizon grows."""
    stable = frames["by_horizon"][frames["by_horizon"]["state"] == "stable"].set_index("horizon")

    assert [10, 30, 100, 300, 1000] == [h for h in stable.index if h <= 1000]
    assert stable["error_noise"].is_monotonic_decreasing
    assert (stable["step_noise"] / stable["step_error_rate"]).tolist() == pytest.approx(stable["noise_part"].tolist())


def test_several_evaluations_at_once_are_those_one_by_one(settled):
    """Each layer read once, with the same scores and counts of results."""
    asked = [evaluation(settled, [predictor("window_mean")], [500, 1000]), *predictability_evaluations(settled)]
    told = []
    together = evaluate_all(asked, lambda done, total: told.append((done, total)))

    assert [(1, 2), (2, 2)] == told
    for own, found in zip(asked, together):
        (alone,) = evaluate_all([own])
        seconds = ["fit_seconds", "forecast_seconds"]
        assert alone.scores.drop(columns=seconds).equals(found.scores.drop(columns=seconds))
        assert (alone.computed, 0) == (found.computed, found.reused)


def test_histories_are_compared_at_the_same_cutoffs(frames):
    """Every length is scored as often as the others of its state."""
    by_history = frames["by_history"]

    assert {100, 200, 500, 1000, 2000} == set(by_history["history"])
    assert all(part["scored"].nunique() == 1 for _, part in by_history.groupby("state"))


def test_only_histories_that_a_cutoff_has_before_it_are_evaluated(settled):
    """The longest of them decides at which cutoffs all are compared; without any there is nothing to compare."""
    asked = {cutoffs: predictability_evaluations(settled, cutoffs)[1] for cutoffs in ((50,), (500, 999, 1000, 1500))}
    none, some = asked.values()

    assert 0 == len(none.predictors)
    assert [100, 200, 500, 1000] == [asdict(own)["window"] for own in some.predictors]
    assert {1000: [1000], 1500: [1000]} == some.windows


def test_layers_are_told_apart(frames):
    """Only those that were stable at some cutoff, by the preferred predictor."""
    assert {0} == set(frames["by_layer"]["layer"])
    assert {"level"} == set(frames["by_layer"]["predictor"])


def test_the_experts_that_cause_the_error_are_named():
    """By the mean of their absolute error; the parts of a layer sum to 1."""
    rows = [
        ("t", "level", 1, 1000, cutoff, expert, 0.5, 0.5 + error)
        for cutoff in (1, 2)
        for expert, error in enumerate([0.0, 0.1, -0.3])
    ]
    shares = pd.DataFrame(
        rows, columns=["trace", "predictor", "layer", "horizon", "cutoff", "expert", "predicted", "actual"]
    )
    worst = worst_experts_frame(shares)

    assert [2, 1, 0] == worst["expert"].tolist()
    assert [0.75, 0.25, 0.0] == pytest.approx(worst["part_of_error"])


def test_the_part_that_is_noise_is_that_of_scores_whose_noise_is_told():
    """A score without it counts for the error, and not for the part."""
    rows = [("t", 10, "stable", 0.1, 0.05, 0.3, 0.2), ("t", 10, "stable", 0.3, 0.05, 0.9, float("nan"))]
    found = _means(
        pd.DataFrame(rows, columns=["trace", "horizon", "state", *MEASURES]), ["trace", "horizon", "state"]
    ).iloc[0]

    assert [0.2, 0.6, 0.2] == pytest.approx([found["error_rate"], found["step_error_rate"], found["step_noise"]])
    assert 0.2 / 0.3 == pytest.approx(found["noise_part"])
    assert 2 == found["scored"]
