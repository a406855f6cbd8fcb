"""Synthetic traces: seeded, as asked for, and named for what they are."""

import numpy as np
import pytest

from moetrace import SettingError
from moetrace.synthetic import LOUD, QUIET, Course, layer_counts, settling, synthetic_blocks, synthetic_trace


def test_the_same_seed_gives_the_same_trace():
    """Another seed gives another; reading twice gives the same."""
    course = settling(100, steps=200)
    first, again, other = (synthetic_trace([course], seed=seed) for seed in (1, 1, 2))

    assert np.array_equal(first.counts, again.counts)
    assert np.array_equal(first.counts, first.counts)
    assert not np.array_equal(first.counts, other.counts)


@pytest.mark.parametrize("concentration", [None, 50.0])
def test_pieces_of_any_length_make_the_same_counts(concentration):
    """How a layer is cut into pieces does not change it."""
    course = Course(steps=100, concentration=concentration)
    whole = np.concatenate(list(layer_counts(course, (0, 0), 100)))
    pieces = np.concatenate(list(layer_counts(course, (0, 0), 7)))

    assert np.array_equal(whole, pieces)


def test_every_step_has_the_tokens_asked_for():
    """Collapsed experts get almost none of them."""
    load = synthetic_trace([Course(steps=50, tokens=1000, collapsed=2)]).layer(0)

    assert {1000} == set(load.totals.tolist())
    assert load.mean_shares[-2:].max() < 0.001


def test_the_settle_step_of_a_course_is_that_of_its_last_change():
    """None for a course that ends loud."""
    assert settling(700).settle_step == 700
    assert Course(changes=((1, QUIET),)).settle_step == 1
    assert Course(changes=((1, QUIET), (9, LOUD))).settle_step is None


def test_a_slow_change_is_half_done_at_its_step():
    """The volatility falls geometrically over the width, centred on the step."""
    volatility = settling(500, steps=1000, width=200).volatility()

    assert pytest.approx(volatility[499]) == (LOUD * QUIET) ** 0.5
    assert pytest.approx((volatility[398], volatility[601])) == (LOUD, QUIET)


def test_a_trace_says_that_it_is_synthetic():
    """In its format and model, and so wherever it is listed."""
    info = synthetic_trace([Course(steps=10)]).info

    assert (info.format, info.model) == ("synthetic", "synthetic")


def test_layers_of_one_trace_have_one_shape():
    """Courses of different lengths are refused."""
    with pytest.raises(SettingError):
        synthetic_trace([Course(steps=10), Course(steps=20)])


def test_blocks_in_the_order_of_steps_are_the_same_trace():
    """Whatever their length; the last one may be shorter."""
    courses = [settling(40, steps=100), Course(steps=100)]
    steps, counts = (np.concatenate(parts) for parts in zip(*synthetic_blocks(courses, seed=3, block=33)))

    assert np.array_equal(np.arange(1, 101), steps)
    assert np.array_equal(synthetic_trace(courses, seed=3).counts, counts)
