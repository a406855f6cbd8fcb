"""The states: settle steps that are known are found, and nothing after the cutoff is seen."""

from dataclasses import replace

import numpy as np
import pytest

from moetrace import LoadTrace, classify, fluctuation, state_at
from moetrace.analysis.states import (
    AGAIN,
    FROM_START,
    NEVER,
    SETTLED,
    STABLE,
    TRANSIENT,
    Rule,
    classify_expert,
    rank_runs,
)
from moetrace.synthetic import LOUD, QUIET, Course, settling, synthetic_trace


def only(course, seed=0):
    """The states of a trace with one layer."""
    return classify(synthetic_trace([course], seed=seed).layer(0))


@pytest.mark.parametrize("tokens", [2000, 500_000])
@pytest.mark.parametrize("experts", [8, 64])
def test_a_known_settle_step_is_found(experts, tokens):
    """Within 200 steps, whatever the number of experts and tokens."""
    found = only(settling(3000, experts=experts, tokens=tokens))

    assert pytest.approx(found.settle_step, abs=200) == 3000
    assert [run.state for run in found.runs] == [TRANSIENT, STABLE]


def test_topics_that_sequences_share_do_not_move_the_answer():
    """Over-dispersed sampling is noise, not fluctuation."""
    found = only(settling(3000, tokens=2048, concentration=200))

    assert pytest.approx(found.settle_step, abs=250) == 3000


def test_a_layer_that_never_settles_has_no_settle_step():
    """Loud to the end is transient throughout."""
    found = only(Course(changes=((1, LOUD),)))

    assert (found.settle_step, found.state, len(found.runs)) == (None, TRANSIENT, 1)


def test_a_layer_can_be_stable_from_the_start():
    """Quiet throughout is stable from the first step."""
    found = only(Course(changes=((1, QUIET),)))

    assert (found.settle_step, found.state, len(found.runs)) == (1, STABLE, 1)


def test_a_layer_can_be_unsettled_again():
    """Loud, quiet, loud are three windows, and it has not settled."""
    found = only(Course(changes=((1, LOUD), (1500, QUIET), (4000, LOUD))))

    assert [run.state for run in found.runs] == [TRANSIENT, STABLE, TRANSIENT]
    assert found.settle_step is None
    assert pytest.approx(found.runs[-1].from_step, abs=500) == 4000


def test_windows_cover_every_step_once():
    """Runs follow each other without gap or overlap."""
    found = only(Course(changes=((1, LOUD), (1500, QUIET), (4000, LOUD))))

    assert (found.runs[0].from_step, found.runs[-1].to_step) == (1, 6000)
    assert [run.to_step + 1 for run in found.runs[:-1]] == [run.from_step for run in found.runs[1:]]


def test_the_state_at_a_cutoff_sees_nothing_after_it(settled):
    """NaN in every later step changes nothing."""
    load = settled.layer(0)
    blind = replace(load, counts=np.where(load.steps[:, None] > 2500, np.nan, load.counts))

    for cutoff in (500, 1500, 2000, 2500):
        assert state_at(load, cutoff) == state_at(blind, cutoff)
    assert (state_at(load, 1000), state_at(load, 2500)) == (TRANSIENT, STABLE)


@pytest.mark.parametrize("steps", [1, 2, 30, 450])
def test_what_is_too_short_to_judge_is_transient(steps):
    """Stable is what has been shown to be."""
    found = only(Course(steps=steps, changes=((1, QUIET),)))

    assert (found.settle_step, found.state) == (None, TRANSIENT)


def test_steps_logged_every_tenth_time_settle_at_the_same_step():
    """Windows count steps, not rows."""
    load = synthetic_trace([settling(6000, steps=12_000, tokens=100_000)]).layer(0)
    sparse = replace(load, steps=load.steps[::10], counts=load.counts[::10])

    assert classify(load).settle_step == pytest.approx(classify(sparse).settle_step, abs=200)


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        (((1, LOUD), (3000, QUIET)), SETTLED),
        (((1, QUIET),), FROM_START),
        (((1, LOUD),), NEVER),
        (((1, LOUD), (1500, QUIET), (4000, LOUD)), AGAIN),
    ],
)
def test_the_outcome_says_it_in_words(changes, outcome):
    """And a layer that is unsettled again says since when."""
    found = only(Course(changes=changes))

    assert outcome == found.outcome
    assert (found.unsettled_step is None) == (outcome != AGAIN)
    assert outcome != AGAIN or 4000 == pytest.approx(found.unsettled_step, abs=500)


def test_the_interval_holds_the_settle_step_and_the_truth():
    """For a sudden change and for a slow one; a layer that never settles has none."""
    for course in (settling(3000), settling(3000, width=800)):
        found = only(course, seed=3)
        low, high = found.settle_interval

        assert low <= found.settle_step <= high
        assert low <= 3000 <= high
        assert high - low < 2000
    assert only(Course(changes=((1, LOUD),))).settle_interval is None
    assert (1, 1) == only(Course(changes=((1, QUIET),))).settle_interval


def test_the_order_of_the_experts_is_a_second_opinion():
    """It settles near the known step, and sees nothing after the end of its history."""
    load = synthetic_trace([settling(3000, experts=64, tokens=100_000)]).layer(0)
    blind = replace(load, counts=np.where(load.steps[:, None] > 4500, np.nan, load.counts))
    runs = rank_runs(load)

    assert [TRANSIENT, STABLE] == [run.state for run in runs]
    assert 3000 == pytest.approx(runs[-1].from_step, abs=500)
    assert rank_runs(load.until(4500)) == rank_runs(blind.until(4500))


def test_ranks_alone_do_not_settle_a_single_expert():
    """There is no order to look at."""
    load = LoadTrace.from_counts(np.ones((2000, 1, 1))).layer(0)

    assert [TRANSIENT] == [run.state for run in rank_runs(load)]


def test_one_expert_can_be_restless_in_a_settled_layer():
    """Its own state is that of its share against all the others."""
    rng = np.random.default_rng(0)
    walk = np.exp(np.cumsum(rng.normal(0, 0.02, 6000))) * 0.3
    shares = np.stack([walk, *[np.ones(6000)] * 7], axis=1)
    counts = rng.multinomial(20_000, shares / shares.sum(axis=1, keepdims=True))
    load = LoadTrace.from_counts(counts[:, None]).layer(0)

    assert TRANSIENT == classify_expert(load, 0).state
    assert STABLE == classify_expert(load, 5).state
    assert STABLE == classify(load).state


def test_the_rule_can_be_given_other_numbers():
    """A layer that moves by 2 % a window is stable at 4 % and transient at 1 %."""
    load = synthetic_trace([Course(changes=((1, 0.02 / 133**0.5),), tokens=100_000)]).layer(0)

    assert STABLE == classify(load).state
    assert TRANSIENT == classify(load, Rule(settle_below=0.01, unsettle_above=0.015)).state


def naive_fluctuation(shares, window, every):
    """Variance and range of each whole window, in a loop."""
    ends = [end for end in range(window, len(shares) + 1) if end % every == 0]
    parts = [shares[end - window : end] for end in ends]
    return np.array([part.var(axis=0) for part in parts]), np.array([np.ptp(part, axis=0) for part in parts])


@pytest.mark.parametrize("at_a_time", [1, 60, 1 << 15])
@pytest.mark.parametrize("spike", [0, 10**9])
def test_fluctuation_equals_its_naive_twin(spike, at_a_time, monkeypatch):
    """To 1e-9, also after a spike that a cumulative sum would not forget, however much is done at a time."""
    monkeypatch.setattr("moetrace.analysis.fluctuation.VALUES_AT_A_TIME", at_a_time)
    counts = np.random.default_rng(0).multinomial(10_000, [0.5, 0.3, 0.2], size=503)
    counts[100, 0] += spike
    load = LoadTrace.from_counts(counts[:, None]).layer(0)

    for found in fluctuation(load, (10, 100, 200)):
        variance, reach = naive_fluctuation(load.shares, found.window, 10)
        assert np.allclose(variance, found.variance, rtol=1e-9, atol=0)
        assert np.allclose(reach, found.range, rtol=1e-12, atol=0)
        assert found.window == found.steps[0]


def test_fluctuation_leaves_out_windows_longer_than_the_trace():
    """A trace of 60 steps has no window of 100."""
    load = LoadTrace.from_counts(np.ones((60, 1, 2))).layer(0)

    assert [found.window for found in fluctuation(load)] == [10]
