"""The outlook: how far the load may be from a good forecast of it, by plain formulas and from the last steps alone."""

import numpy as np
import pytest

from moetrace import LoadTrace, expected_movement
from moetrace.analysis.variogram import NoiseDrift, Outlook, gain_of, noise_and_drift, since_jump, total_error
from moetrace.synthetic import QUIET, Course, synthetic_trace

EARLY, LATE = [0.5, 0.3, 0.2, 0.0], [0.2, 0.1, 0.7, 0.0]


def drawn(*parts, seed=0):
    """A layer that stands still for so many steps with such shares, part after part; its last expert is dead."""
    rng = np.random.default_rng(seed)
    counts = np.concatenate([rng.multinomial(5000, share, size=steps) for steps, share in parts])
    return LoadTrace.from_counts(counts[:, None]).layer(0)


@pytest.mark.parametrize(("horizon", "stride"), [(1000, 1), (1000, 10), (1, 10)])
def test_the_deviation_equals_its_naive_twin(horizon, stride):
    """Sampling, the error of the level and the walk over the rows ahead; the geometric mean over all memories."""
    known, share, block = (NoiseDrift(0.02, 1e-6), NoiseDrift(0.05, 4e-6)), np.array([0.7, 0.2, 0.1]), 50
    rows = max(1, horizon // stride)
    expected = []
    for p in share:
        product = 1.0
        for one in known:
            level = one.gain(block) * one.noise / block
            product *= p * (1 - p) * one.noise / 2 / rows + p * (level + one.drift * rows / 3) / 3
        expected.append(product ** (1 / 2 / 2))

    assert expected == pytest.approx(Outlook(known, share, block, stride).deviation(horizon).tolist())


def test_the_total_error_is_the_mean_of_normal_draws():
    """Of the absolute errors of all experts together."""
    deviation = np.array([0.1, 0.3])
    draws = np.random.default_rng(0).normal(0, deviation, (200_000, 2))

    assert np.abs(draws).sum(axis=1).mean() == pytest.approx(total_error(deviation), rel=0.01)


def test_noise_and_drift_are_asked_of_three_memories():
    """Lines over at most 20 blocks and half of the memory; a dead expert counts as a hundredth of the mean one."""
    load = drawn((6000, EARLY))
    found = Outlook.of(load)
    expected = [noise_and_drift(load.last(n), lags=lags) for n, lags in ((2500, 20), (1000, 10), (500, 5))]

    assert expected == list(found.estimates)
    assert [*load.last(500).mean_shares[:3], 0.01 / 4] == pytest.approx(found.share.tolist())
    assert (50, 1) == (found.block, found.stride)
    assert total_error(found.deviation(700)) == expected_movement(load, 700)


@pytest.mark.parametrize(("last", "first"), [(1000, 1051), (1010, 1051), (1049, 1101), (1050, 1101)])
def test_the_load_after_a_jump_begins_with_the_next_whole_block(last, first):
    """A block of 50 steps that holds the jump, or begins with it, may hold some of what came before."""
    counts = np.repeat([[5000, 5000], [9000, 1000]], [last, 3000 - last], axis=0)
    load = LoadTrace.from_counts(counts[:, None]).layer(0)

    assert [first] * 2 == [since_jump(load.until(end)).steps[0] for end in (1250, 3000)]


def test_after_a_jump_the_load_since_then_is_known_by_ten_blocks():
    """Noise and drift are those of all of the history until then; the shares are always the present ones."""
    load = drawn((2000, EARLY), (2000, LATE))
    for after, known in ((500, load.until(2500)), (550, load.between(2051, 2550))):
        found = Outlook.of(load.until(2000 + after))

        assert noise_and_drift(known.last(1000), lags=10) == found.estimates[1]
        assert np.abs(found.share[:3] - LATE[:3]).max() < 0.01


def test_a_new_block_weighs_no_less_than_a_fiftieth():
    """By noise and drift of the last 2,500 steps; a load that stands still weighs no block alone."""
    moving = synthetic_trace([Course(steps=4000, changes=((1, QUIET),))]).layer(0)
    expected = noise_and_drift(moving.last(2500), lags=20).gain(50)

    assert 0.02 < expected < 1
    assert expected == gain_of(moving)
    assert noise_and_drift(moving.last(1000), lags=20).gain(50) == gain_of(moving, 1000)
    assert 0.02 == gain_of(LoadTrace.from_counts(np.full((4000, 1, 2), 7)).layer(0))
