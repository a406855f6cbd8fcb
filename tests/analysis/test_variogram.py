"""Noise and drift: right on loads whose noise and drift are known."""

import numpy as np
import pytest

from moetrace import LoadTrace
from moetrace.analysis.variogram import (
    NoiseDrift,
    block_means,
    noise_and_drift,
    step_scatter,
    variogram,
    weights,
)
from moetrace.synthetic import Course, synthetic_trace


def still(tokens=5000, experts=8, steps=20_000, seed=0):
    """A load that stands still, multinomially sampled."""
    share = np.arange(1, experts + 1) / np.arange(1, experts + 1).sum()
    counts = np.random.default_rng(seed).multinomial(tokens, share, size=steps)
    return LoadTrace.from_counts(counts[:, None]).layer(0), share


def test_multinomial_noise_is_experts_less_one_over_tokens():
    """The chi-square scatter of a still load does not depend on its shares."""
    load, _ = still()

    assert pytest.approx(noise_and_drift(load).noise, rel=0.1) == 7 / 5000


@pytest.mark.slow
def test_drift_is_that_of_a_random_walk():
    """A wandering load moves by what its volatility says, and its noise stays that of sampling."""
    course = Course(steps=20_000, experts=64, tokens=50_000, changes=((1, 0.003),))
    load = synthetic_trace([course], seed=1).layer(0)
    found = noise_and_drift(load)

    assert pytest.approx(found.drift, rel=0.15) == 0.003**2
    assert pytest.approx(found.noise, rel=0.25) == 63 / 50_000


def test_tokens_per_step_change_the_noise_not_the_drift():
    """The same walk seen through fewer tokens is noisier and drifts as much."""
    few, many = (
        noise_and_drift(
            synthetic_trace([Course(steps=8000, experts=32, tokens=n, changes=((1, 0.003),))], seed=2).layer(0)
        )
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


def layer_of(*means, rows=2):
    """A layer of two experts whose first has the share of one of *means* for so many *rows* each."""
    first = np.repeat(np.rint(np.array(means) * 1000), rows)
    return LoadTrace.from_counts(np.stack([first, 1000 - first], axis=1)[:, None]).layer(0)


def chi_square(*changes):
    """The mean squared change of two shares that mirror each other around one half, each divided by its share."""
    return float(np.mean(np.square(changes)) * 4)


def test_blocks_end_with_the_last_step():
    """The steps before the first whole block are left out."""
    load = LoadTrace.from_counts(np.array([[9, 1], [1, 9], [3, 7], [2, 8], [4, 6]])[:, None]).layer(0)

    assert np.allclose([[0.2, 0.8], [0.3, 0.7]], block_means(load, 2))


def test_the_smallest_shares_weigh_as_a_hundredth_of_the_mean_one():
    """An expert that is all but dead has no relative change to speak of."""
    assert [1 / 0.9, 1 / 0.09, 400, 400] == pytest.approx(weights(np.array([0.9, 0.09, 0.0025, 0.0])).tolist())


def test_a_dead_expert_leaves_noise_and_drift_finite():
    """One that never gets a token adds nothing to either."""
    counts = np.random.default_rng(0).multinomial(1000, [0.6, 0.4, 0.0], size=2000)
    load, alone = (LoadTrace.from_counts(part[:, None]).layer(0) for part in (counts, counts[:, :2]))

    assert noise_and_drift(alone).noise == pytest.approx(noise_and_drift(load).noise)
    assert noise_and_drift(alone).drift == pytest.approx(noise_and_drift(load).drift)


def test_noise_and_drift_are_those_of_a_straight_line():
    """Least squares over distances of 1 to 3 blocks, read at distance 0 and a third of a block later for the mean over it."""
    means = (0.5, 0.6, 0.55, 0.45, 0.5, 0.4)
    load = layer_of(*means)
    distances = [chi_square(*(b - a for a, b in zip(means, means[k:]))) for k in (1, 2, 3)]
    centre, mean = 2 - 1 / 3, sum(distances) / 3
    slope = (distances[2] - distances[0]) / 2

    found = noise_and_drift(load, block=2, lags=3)

    assert pytest.approx(found.drift) == slope / 2
    assert pytest.approx(found.noise, rel=0.01) == (mean - slope * centre) / 2 * 2
    assert 0 < slope


def test_a_falling_variogram_is_noise_alone():
    """A load that swings between two values has no drift, and as noise half of the mean distance."""
    found = noise_and_drift(layer_of(0.4, 0.6, 0.4, 0.6, 0.4, 0.6), block=2, lags=2)

    assert (0.0, pytest.approx((chi_square(0.2) + 0) / 2 / 2 * 2)) == (found.drift, found.noise)


def test_noise_is_never_below_0():
    """A load that speeds up has a line that meets distance 0 below it."""
    found = noise_and_drift(layer_of(0.5, 0.5, 0.5, 0.5, 0.52, 0.54, 0.56, 0.58), block=2, lags=4)

    assert 0.0 == found.noise
    assert found.drift > 0


def test_one_distance_tells_noise_and_no_drift():
    """Half of it, for one row: of three rows, or where no more distances are asked for."""
    three, asked = (
        noise_and_drift(layer_of(0.45, 0.55, 0.5, rows=1)),
        noise_and_drift(layer_of(0.4, 0.6, 0.5, 0.5), block=2, lags=1),
    )

    assert (0.0, pytest.approx(chi_square(0.1, 0.05) / 2)) == (three.drift, three.noise)
    assert (0.0, pytest.approx(chi_square(0.2, 0.1, 0) / 2 * 2)) == (asked.drift, asked.noise)


def test_two_blocks_tell_nothing():
    """Neither noise nor drift."""
    assert NoiseDrift(0.0, 0.0) == noise_and_drift(layer_of(0.4, 0.6, rows=1))


def test_a_short_load_has_four_blocks():
    """Of a quarter of its steps each, if these are fewer than asked for."""
    load = layer_of(0.5, 0.4, 0.55, 0.5, rows=3)

    assert noise_and_drift(load, block=3) == noise_and_drift(load, block=50)


def test_steps_logged_now_and_then_make_shorter_blocks():
    """Blocks are as many steps, noise and drift are for one logged row."""
    load, _ = still(steps=2000)
    sparse = LoadTrace.from_counts(load.counts[:, None], steps=np.arange(0, 20_000, 10)).layer(0)

    assert noise_and_drift(load, block=5) == noise_and_drift(sparse, block=50)


def test_the_default_is_a_line_over_250_steps():
    """Five distances of blocks of 50 steps."""
    load = synthetic_trace([Course(steps=2000, changes=((1, 0.003),))]).layer(0)

    assert noise_and_drift(load, block=50, lags=5) == noise_and_drift(load)


@pytest.mark.parametrize(
    ("noise", "drift", "rows"), [(1e-3, 1e-5, 50), (1e-3, 1e-8, 50), (1e-4, 1e-3, 5), (0.0, 1e-3, 5)]
)
def test_the_gain_is_where_the_filter_settles(noise, drift, rows):
    """A naive twin: the recursion of the Kalman filter for a local level, over many blocks."""
    variance = 1.0
    for _ in range(100_000):
        predicted = variance + drift * rows
        gain = predicted / (predicted + noise / rows)
        variance = gain * noise / rows

    assert pytest.approx(NoiseDrift(noise, drift).gain(rows)) == gain


def test_without_drift_new_blocks_weigh_nothing():
    """Nor without either."""
    assert [0, 0] == [NoiseDrift(noise, 0.0).gain(50) for noise in (1e-3, 0.0)]


@pytest.mark.parametrize(("steps", "every"), [(12, 1), (7, 1), (2, 1), (60, 4), (60, 50)])
def test_the_scatter_of_a_step_equals_its_naive_twin(steps, every):
    """From differences between rows 10 steps apart, or as near to that as there are."""
    load, _ = still(steps=steps)
    load = LoadTrace.from_counts(load.counts[:, None], steps=np.arange(steps) * every).layer(0)
    lag = min({1: 10, 4: 2, 50: 1}[every], steps - 1)
    pairs = [(load.shares[t], load.shares[t + lag]) for t in range(steps - lag)]

    assert sum((b - a) ** 2 for a, b in pairs) / len(pairs) / 2 == pytest.approx(step_scatter(load))


def test_a_single_step_scatters_by_nothing_known():
    """There is no other to compare it with."""
    load, _ = still(steps=1)

    assert [0.0] * 8 == step_scatter(load).tolist()
