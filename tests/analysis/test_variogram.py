"""Noise and drift: right on loads whose noise and drift are known."""

import numpy as np
import pytest

from moetrace import LoadTrace
from moetrace.analysis.variogram import block_means, horizon_noise, motion, step_noise, variogram
from moetrace.synthetic import Course, synthetic_trace


def still(tokens=5000, experts=8, steps=20_000, seed=0):
    """A load that stands still, multinomially sampled."""
    share = np.arange(1, experts + 1) / np.arange(1, experts + 1).sum()
    counts = np.random.default_rng(seed).multinomial(tokens, share, size=steps)
    return LoadTrace.from_counts(counts[:, None]).layer(0), share


def test_step_noise_is_the_error_of_knowing_the_load():
    """For a still load it is the mean scatter around the true shares."""
    load, share = still()
    scatter = np.abs(load.shares - share).sum(axis=1).mean()

    assert scatter == pytest.approx(step_noise(load), rel=0.01)


def test_multinomial_noise_is_experts_less_one_over_tokens():
    """The chi-square scatter of a still load does not depend on its shares."""
    load, _ = still()

    assert pytest.approx(motion(load).noise, rel=0.1) == 7 / 5000


def test_error_noise_is_the_error_of_the_horizon_mean():
    """Over many horizons of a still load, the mean error of knowing it."""
    load, share = still(steps=60_000)
    means = block_means(load, 1000)
    scatter = np.abs(means - share).sum(axis=1).mean()
    found = [horizon_noise(load, cutoff, 1000)[1] for cutoff in range(1000, 59_000, 1000)]

    assert scatter == pytest.approx(np.mean(found), rel=0.15)


def test_drift_is_that_of_a_random_walk():
    """A wandering load moves by what its volatility says, and its noise stays that of sampling."""
    course = Course(steps=20_000, experts=64, tokens=50_000, changes=((1, 0.003),))
    load = synthetic_trace([course], seed=1).layer(0)
    found = motion(load)

    assert pytest.approx(found.drift, rel=0.15) == 0.003**2
    assert pytest.approx(found.noise, rel=0.25) == 63 / 50_000


def test_tokens_per_step_change_the_noise_not_the_drift():
    """The same walk seen through fewer tokens is noisier and drifts as much."""
    few, many = (
        motion(synthetic_trace([Course(steps=8000, experts=32, tokens=n, changes=((1, 0.003),))], seed=2).layer(0))
        for n in (4000, 64_000)
    )

    assert few.noise > 5 * many.noise
    assert many.drift == pytest.approx(few.drift, rel=0.2)


def test_the_variogram_equals_its_naive_twin():
    """Vectorised and looped agree."""
    values = np.random.default_rng(0).random((12, 3))
    weight = np.array([1.0, 2.0, 3.0])
    expected = [
        sum(weight[e] * np.mean([(values[i + k][e] - values[i][e]) ** 2 for i in range(12 - k)]) for e in range(3))
        for k in (1, 2, 3, 4)
    ]

    assert expected == pytest.approx(variogram(values, weight, 4))


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_short_loads_have_finite_noise(steps):
    """A few steps are enough not to fail."""
    load, _ = still(steps=steps)

    assert np.isfinite([*horizon_noise(load, 0, steps), motion(load).drift]).all()
