"""The states: settle steps that are known are found, and nothing after the cutoff is seen."""

from dataclasses import replace

import numpy as np
import pytest

from moetrace import LoadTrace, classify, fluctuation, state_at
from moetrace.states import STABLE, TRANSIENT
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


def naive_fluctuation(shares, window, every):
    """Variance and range of each whole window, in a loop."""
    ends = [end for end in range(window, len(shares) + 1) if end % every == 0]
    parts = [shares[end - window : end] for end in ends]
    return np.array([part.var(axis=0) for part in parts]), np.array([np.ptp(part, axis=0) for part in parts])


@pytest.mark.parametrize("spike", [0, 10**9])
def test_fluctuation_equals_its_naive_twin(spike):
    """To 1e-9, also after a spike that a cumulative sum would not forget."""
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
