"""The backtest: what it shows a predictor, when it fits, and what it makes of the answers."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from moetrace import LoadTrace, SettingError, TooShortError, evaluate, predictor
from moetrace.forecasting.backtest import check_able
from moetrace.forecasting.evaluation import FIT, InMemory
from moetrace.forecasting.layers import matched, predicted_shares, repaired, step_errors
from moetrace.forecasting.predictors import PREDICTORS, base
from moetrace.forecasting.windows import (
    checked_cutoffs,
    cutoffs_apart,
    default_cutoffs,
    longest_scorable,
    scorable,
    thinned,
)
from moetrace.synthetic import settling, synthetic_trace
from moetrace.trace import LayerLoad, TraceInfo


@dataclass(frozen=True)
class Saying(base.Predictor, base.Fitted):
    """Always forecasts the same shares."""

    name = "saying"
    shares: tuple[float, ...] = (0.5, 0.5)

    def fit(self, histories: Sequence[LayerLoad]) -> base.Fitted:  # noqa: ARG002 - nothing to learn
        return self

    def forecast(self, history: LayerLoad, horizon: int) -> base.Forecast:  # noqa: ARG002 - it has made up its mind
        return base.Forecast(base.constant(np.array(self.shares), horizon))


SEEN: list[tuple[str, int, int]] = []


@dataclass(frozen=True)
class Watching(Saying):
    """Notes what it is shown."""

    name = "watching"
    pools_layers = False

    def fit(self, histories: Sequence[LayerLoad]) -> base.Fitted:
        SEEN.extend(("fit", load.layer, int(load.steps[-1])) for load in histories)
        return self

    def forecast(self, history: LayerLoad, horizon: int) -> base.Forecast:
        SEEN.append(("forecast", history.layer, int(history.steps[-1])))
        return base.Forecast(base.constant(history.mean_shares, horizon))


class WatchingAll(Watching):
    """Notes the same, with one fit for all layers."""

    name = "watching_all"
    pools_layers = True


class Seldom(Watching):
    """Is fitted anew when its history has doubled."""

    name = "seldom"
    refit_growth = 2.0


class Demanding(Watching):
    """Needs 40 steps of history."""

    name = "demanding"
    needs = 40


@pytest.fixture
def even():
    """Two layers of two experts, 50 tokens each, over 100 steps from step 1."""
    return LoadTrace.from_counts(np.full((100, 2, 2), 50), name="even")


@pytest.fixture(autouse=True)
def _nothing_seen():
    SEEN.clear()


def test_known_forecasts_have_known_scores(even):
    """A forecast of 0.6 and 0.4 of an even load errs by 0.2 in sum, 0.1 on average, 20 % of each."""
    scores = evaluate(even, [Saying((0.6, 0.4))], [10], [50]).scores

    assert [1, 0] == sorted(scores["layer"], reverse=True)
    for name, expected in {"error_rate": 0.2, "step_error_rate": 0.2, "mape": 0.2, "abs_points": 0.1}.items():
        assert expected == pytest.approx(scores[name])


def test_the_forecast_is_repaired_before_it_is_scored(even):
    """Negative shares are cut and the rest scaled to 1."""
    scores = evaluate(even, [Saying((1.2, -0.2))], [10], [50]).scores

    assert 1.0 == pytest.approx(scores["error_rate"])


def test_nothing_left_after_the_repair_is_an_even_forecast():
    """Shares of nothing, or not a number, become equal ones."""
    found = repaired(base.Forecast(np.array([[-1.0, 0.0], [np.nan, np.nan], [1.0, 3.0]])))

    assert np.array_equal([[0.5, 0.5], [0.5, 0.5], [0.25, 0.75]], found.shares)


@pytest.mark.parametrize("made", [Watching(), WatchingAll()])
def test_a_predictor_is_shown_nothing_after_the_cutoff(even, made):
    """Fits and forecasts at a cutoff end with it, layer by layer."""
    evaluate(even, [made], [10], [30, 60])

    assert {("fit", 0, 30), ("forecast", 0, 30), ("fit", 1, 60), ("forecast", 1, 60)} <= set(SEEN)
    assert {30, 60} == {last for _, _, last in SEEN}


@pytest.mark.parametrize("name", PREDICTORS)
@pytest.mark.slow
def test_scores_at_a_cutoff_do_not_depend_on_what_comes_after_the_horizon(name):
    """A trace whose load turns around right behind the horizon has the same scores, state and noise included."""
    spec = {"lstm": "lstm:updates=3"}.get(name, name)
    trace = synthetic_trace([settling(800, steps=2600, tokens=3000)], seed=4)
    counts = np.where(trace.steps[:, None, None] > 2000, trace.counts[..., ::-1], trace.counts)
    spoiled = LoadTrace.from_counts(counts, name=trace.name)
    known, found = (evaluate(made, [predictor(spec)], [500], [1500]).scores for made in (trace, spoiled))

    seconds = ["fit_seconds", "forecast_seconds"]
    assert known.drop(columns=seconds).to_dict() == found.drop(columns=seconds).to_dict()


def test_the_state_at_a_cutoff_does_not_depend_on_what_comes_after_it():
    """A load that never rests from the cutoff on is stable up to it, and its scores are worse."""
    trace = synthetic_trace([settling(800, steps=2600, tokens=3000)], seed=4)
    swinging = np.where((trace.steps // 200 % 2 == 1)[:, None, None], trace.counts[..., ::-1], trace.counts)
    counts = np.where(trace.steps[:, None, None] > 2000, swinging, trace.counts)
    spoiled = LoadTrace.from_counts(counts, name=trace.name)
    known, found = (evaluate(made, [predictor("window_mean")], [500], [2000]).scores for made in (trace, spoiled))

    assert ["stable"] == known["state"].tolist() == found["state"].tolist()
    assert found["step_error_rate"].tolist() != known["step_error_rate"].tolist()


def test_a_predictor_is_fitted_as_seldom_as_it_says(even):
    """Refitted when the history has doubled, moved forward in between."""
    evaluate(even.select(layers=[0]), [Seldom()], [5], [10, 15, 20, 30, 45])

    assert [10, 20, 45] == [last for what, _, last in SEEN if what == "fit"]
    assert [10, 15, 20, 30, 45] == [last for what, _, last in SEEN if what == "forecast"]


def test_too_short_a_history_is_a_status_without_a_score(even):
    """Nothing is fitted, and the row says why it is empty."""
    scores = evaluate(even.select(layers=[0]), [Demanding()], [10], [20, 50]).scores

    assert ["too_short", "ok"] == scores["status"].tolist()
    assert [True, False] == scores["error_rate"].isna().tolist()
    assert [50] == [last for what, _, last in SEEN if what == "fit"]


def test_skill_is_measured_against_window_mean(even):
    """window_mean has none; a worse forecast has less than none."""
    counts = np.full((100, 1, 2), 50)
    counts[60:, 0, 0] += 10
    moved = LoadTrace.from_counts(counts)
    scores = evaluate(moved, [predictor("window_mean"), Saying((0.2, 0.8))], [20], [60]).scores

    assert 0 == scores["skill"][0]
    assert scores["skill"][1] < 0
    assert scores["window_mean_error_rate"][1] == scores["error_rate"][0]


def test_horizons_the_trace_does_not_cover_are_left_out(even):
    """A cutoff is scored for the horizons that were recorded after it, and only those."""
    scores = evaluate(even.select(layers=[0]), [Saying()], [10, 60], [30, 85, 95]).scores

    assert [(30, 10), (30, 60), (85, 10)] == list(zip(scores["cutoff"], scores["horizon"]))


def test_steps_logged_now_and_then_are_matched_by_number():
    """A forecast for every step is compared with the steps that were logged."""
    counts = np.full((20, 1, 2), 5)
    sparse = LoadTrace.from_counts(counts, steps=np.arange(0, 200, 10))
    scores = evaluate(sparse, [Saying((0.7, 0.3))], [50], [100]).scores

    assert 0.4 == pytest.approx(scores["error_rate"][0])


def test_default_cutoffs_are_500_and_every_thousand():
    """Counted from the last thousand before the start."""

    def trace(first, last):
        return LoadTrace.from_counts(np.ones((last - first + 1, 1, 2)), steps=np.arange(first, last + 1))

    assert [500, 1000, 2000, 3000] == default_cutoffs(trace(0, 3500))
    assert [100_500, 101_000, 102_000] == default_cutoffs(trace(100_000, 102_500))
    assert [200, 300, 400] == default_cutoffs(trace(1, 450), first=200, every=100)


def test_which_horizons_can_be_scored(even):
    """What was recorded after the cutoff decides."""
    assert [30, 50] == scorable(even, [0, 30, 50, 60, 99], 50)
    assert 60 == longest_scorable(even, first=40)


def test_a_horizon_without_a_logged_step_cannot_be_scored():
    """A gap, or a stride, may be longer than the horizon."""
    counts = np.random.default_rng(0).integers(1, 9, (200, 1, 4))
    gap = LoadTrace.from_counts(counts, steps=np.r_[0:100, 300:400])
    sparse = LoadTrace.from_counts(counts, steps=np.arange(0, 2000, 10))

    assert [90, 250] == scorable(gap, [90, 99, 150, 250], 100)
    assert [25] == scorable(sparse, [20, 25], 5)
    assert [310] == evaluate(gap, [predictor("window_mean")], [50], [99, 150, 310]).scores["cutoff"].tolist()


@pytest.mark.parametrize(
    ("rows", "stride", "horizon", "said"),
    [
        (1500, 1, 5000, "cutoffs from 500 on: the longest horizon is 1,000$"),
        (11, 540, 1000, "few steps were logged; cutoffs from 540 to 5,400 can be given$"),
        (400, 10**6, 1000, "steps were logged 1,000,000 apart, which is the shortest horizon$"),
        (2, 1, 1000, "record more steps, or choose an earlier cutoff$"),
    ],
)
def test_a_horizon_that_cannot_be_scored_is_refused_with_what_can_be(rows, stride, horizon, said):
    """And what is named can be scored."""
    trace = LoadTrace.from_counts(np.ones((rows, 1, 2), int), steps=stride * np.arange(1, rows + 1))
    with pytest.raises(SettingError, match=said):
        checked_cutoffs(trace, [horizon], default_cutoffs(trace) or [500])

    if "can be given" in said:
        assert [540, 5400] == checked_cutoffs(trace, [horizon], [540, 5400], explicit=True)
    if "shortest" in said:
        assert checked_cutoffs(trace, [stride], default_cutoffs(trace))


def test_a_trace_too_short_to_score_has_no_scores(even):
    """Empty frames with all their columns."""
    found = evaluate(even, [Saying()], [1000])

    assert (0, 0) == (len(found.scores), len(found.shares))
    assert "error_rate" in found.scores.columns


def test_the_forecast_after_the_end_starts_with_the_next_step(even):
    """One per predictor and layer, repaired."""
    found = list(evaluate(even, [Saying((3.0, 1.0)), Watching()], [7], [], ahead=True).forecasts())

    said = "saying:shares=3.0,1.0"
    assert [(said, 0), ("watching", 0), (said, 1), ("watching", 1)] == [(f.predictor, f.layer) for f in found]
    assert {101} == {f.first_step for f in found}
    assert np.allclose([[0.75, 0.25]] * 7, found[0].shares)


def test_the_forecast_after_the_end_is_by_one_fit_of_all_layers(even):
    """Each layer is learned from once."""
    assert 2 == len(list(evaluate(even, [WatchingAll()], [5], [], ahead=True).forecasts()))
    assert [("fit", 0, 100), ("fit", 1, 100)] == [seen for seen in SEEN if seen[0] == "fit"]


@pytest.mark.parametrize("intervals", [True, False])
def test_results_that_are_there_are_not_computed_again(even, intervals):
    """And without intervals no shares are missed."""
    kept = InMemory()
    found = [evaluate(even, [Saying()], [5], [50], intervals=intervals, results=kept) for _ in range(2)]

    assert [(2, 0), (0, 2)] == [(test.computed, test.reused) for test in found]


def test_layers_share_the_seconds_of_their_fit(even):
    """All cutoffs of all layers together take as long as the fits did."""
    kept = InMemory()
    scores = evaluate(even, [WatchingAll()], [5], [50, 90], results=kept).scores
    seconds = [fit.seconds for (kind, _), fit in kept.cached.items() if kind == FIT.name]

    assert len(seconds) >= 1
    assert sum(seconds) == pytest.approx(scores["fit_seconds"].sum())


def test_a_trace_too_short_for_every_predictor_is_an_error(even):
    """With what is needed; one that can do it is enough."""
    short = even.select(last=20)

    check_able(even, [Demanding()])
    with pytest.raises(TooShortError, match="needs 40"):
        evaluate(short, [Demanding()], [5], [], ahead=True)
    assert 2 == len(list(evaluate(short, [Demanding(), Saying()], [5], [], ahead=True).forecasts()))


@pytest.mark.parametrize("name", ["level", "sw_avg"])
@pytest.mark.slow
def test_without_intervals_the_errors_are_the_same(name):
    """And nothing is told before, or of single experts."""
    trace = synthetic_trace([settling(500, steps=2500)])
    whole, alone = (
        evaluate(trace, [predictor(name)], [100, 500], [1000, 1500], intervals=asked) for asked in (True, False)
    )
    told = ["expected_error", "coverage_80", "coverage_95"]
    seconds = ["fit_seconds", "forecast_seconds"]

    assert whole.scores.drop(columns=told + seconds).equals(alone.scores.drop(columns=told + seconds))
    assert whole.scores[told].notna().all().all()
    assert alone.scores[told].isna().all().all()
    assert not len(alone.shares)
    assert not {r.key for r in whole.evaluation.scored} & {r.key for r in alone.evaluation.scored}


@pytest.mark.parametrize("rows", [1, 3])
def test_a_constant_forecast_is_scored_like_any_other(rows):
    """Held as one row, or as many that are the same."""
    load = synthetic_trace([settling(500, steps=600)]).layer(0)
    shares = base.constant(load.mean_shares, rows)
    after = load.after(500, rows)
    both = (matched(repaired(base.Forecast(own)).shares, 500, after) for own in (shares, np.array(shares)))
    once, often = ((predicted_shares(own, after.totals), step_errors(own, after.shares)) for own in both)

    assert base.is_constant(shares) == (rows > 1)
    assert not base.is_constant(np.array(shares))
    assert once[0] == pytest.approx(often[0])
    assert np.array_equal(once[1], often[1])


@pytest.mark.parametrize("name", ["level", "level:trend=0.2", "auto", "sw_avg"])
@pytest.mark.slow
def test_horizons_scored_together_are_those_scored_alone(name):
    """Also where steps are missing, and where a shorter forecast is not the beginning of a longer one."""
    trace = synthetic_trace([settling(500, steps=2500)])
    kept = np.random.default_rng(0).random(len(trace.steps)) > 0.3
    sparse = LoadTrace.from_counts(trace.counts[kept], steps=trace.steps[kept])
    together = evaluate(sparse, [predictor(name)], [100, 300, 500], [1000, 1500]).scores
    alone = [evaluate(sparse, [predictor(name)], [horizon], [1000, 1500]).scores for horizon in (100, 300, 500)]
    columns = ["error_rate", "step_error_rate", "mape", "abs_points"]

    for own in alone:
        same = together[together["horizon"] == own["horizon"].iloc[0]]
        assert np.array_equal(own[columns], same[columns])


def test_progress_ends_with_all_done(even):
    """Pooled fits and layers are the pieces of work."""
    told = []
    evaluate(even, [WatchingAll(), Saying()], [10], [30, 60], lambda done, total: told.append((done, total)))

    assert [(1, 4), (2, 4), (3, 4), (4, 4)] == told


def test_nonsense_is_refused(even):
    """A horizon of no steps, and the same predictor twice."""
    with pytest.raises(SettingError, match="horizon"):
        evaluate(even, [Saying()], [0])
    with pytest.raises(SettingError, match="given twice"):
        evaluate(even, [Saying(), Saying()], [10])


def test_a_layer_read_twice_is_the_same(even):
    """The predictor is handed the trace's own counts, unchanged."""
    before = even.counts.copy()
    evaluate(even, [Watching()], [10], [30])

    assert np.array_equal(before, even.counts)


def test_what_is_trained_on_another_run_never_sees_this_one(even):
    """One fit, on every layer of the other run, applied at every cutoff."""
    other = LoadTrace.from_counts(np.full((77, 3, 2), 9), name="other")
    evaluate(even, [WatchingAll(), Watching()], [10], [30, 60], train_on=[other])

    assert [("fit", 0, 77), ("fit", 1, 77), ("fit", 2, 77)] == SEEN[:3]
    assert {30, 60, 77} == {last for _, _, last in SEEN}


def test_a_run_is_not_predicted_by_what_was_trained_on_it(even):
    """That would be no test."""
    with pytest.raises(SettingError, match="even itself"):
        evaluate(even, [WatchingAll()], [10], [30], train_on=[even])


@pytest.mark.parametrize(("steps", "apart"), [(12_000, 1000), (50_000, 1000), (50_001, 2000), (10_000_000, 200_000)])
def test_a_long_trace_has_no_more_cutoffs_than_others(steps, apart):
    """Fifty after the first, thousands of steps apart; as many as were asked for where they were."""
    trace = LoadTrace(TraceInfo("long"), np.arange(steps), (0,), 2, dict)
    found = default_cutoffs(trace)

    assert 500 == found[0]
    assert apart == found[1] == cutoffs_apart(trace)
    assert (apart > 1000) == thinned(trace)
    assert {apart} == set(np.diff(found[1:]).tolist())
    assert len(found) <= 51
    assert (steps - 1) // 1000 + 1 == len(default_cutoffs(trace, every=1000))


def test_a_long_sparse_trace_has_no_more_cutoffs_than_others():
    """However few of its steps were logged."""
    for rows in (100, 1250, 1300, 100_000):
        trace = LoadTrace(TraceInfo("sparse"), 10_000 * np.arange(1, rows + 1), (0,), 2, dict)

        assert len(default_cutoffs(trace)) <= 51


def test_results_are_handed_out_while_others_come_in():
    """What is pickled is a copy, so that a merge in another thread does not change it on its way."""
    results = InMemory({("a", 1): 2})

    state = results.__getstate__()
    results.merge(InMemory({("a", 2): 3}))

    assert {"cached": {("a", 1): 2}} == state
    assert results.cached == pickle.loads(pickle.dumps(results)).cached
