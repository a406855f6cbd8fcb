"""Noise and drift, the noise floor, how far the load may move, and what is computed once of a layer.

Right on loads whose noise and drift are known, and equal to plain formulas.
"""

from dataclasses import replace

import numpy as np
import pytest
import scipy  # its modules are loaded when they are used

from moetrace import LoadTrace, expected_movement, horizon_noise
from moetrace.analysis.variogram import (
    SHARE_FLOOR,
    NoiseDrift,
    Outlook,
    _scatter,
    block_means,
    cache_block_means,
    cached_per_layer,
    gain_of,
    mean_noise,
    noise_and_drift,
    pooled_shares,
    since_jump,
    step_scatter,
    total_error,
    variogram,
    weights,
)
from moetrace.synthetic import QUIET, Course, settling, synthetic_trace


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


SHARE = np.arange(1, 33) / np.arange(1, 33).sum()


def sampled(kind, stride, rows, *, varying=False, seed=0):
    """A load that stands still, sampled token by token, in topics, or in topics that last for about 5 steps."""
    rng = np.random.default_rng(seed)
    tokens = (4096 * np.exp(rng.normal(0, 0.6 * varying, rows))).astype(int) + 50
    shares = SHARE
    if kind == "topics":
        shares = rng.dirichlet(SHARE * 640, size=rows)
    if kind == "lasting":
        keep = np.exp(-stride / 5)
        topics = scipy.signal.lfilter([(1 - keep**2) ** 0.5], [1, -keep], rng.normal(size=(rows, len(SHARE))), axis=0)
        shares = SHARE * np.maximum(0, 1 + 0.2 * topics)
        shares = shares / shares.sum(axis=1, keepdims=True)
    counts = rng.multinomial(tokens, shares)
    return LoadTrace.from_counts(counts[:, None], steps=np.arange(rows) * stride).layer(0)


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("stride", [1, 10, 100, 1000])
@pytest.mark.parametrize("kind", ["tokens", "topics", "lasting"])
@pytest.mark.thorough
def test_noise_is_the_error_of_a_forecast_that_knows_the_load(kind, stride, varying):
    """Within 5 % at horizons of 1 to 4,000 steps, each the mean over many cutoffs and seeds."""
    found, known = {}, {}
    for seed in range(4):
        load = sampled(kind, stride, 30_000 if stride == 1 else 6000, varying=varying, seed=seed)
        for horizon in (h for h in (1, 10, 100, 1000, 4000) if h >= stride):
            rows = horizon // stride
            errors = np.abs(pooled_shares(load.counts, rows) - SHARE).sum(axis=1)
            cutoffs = np.linspace(60 * stride + 1100, load.steps[-1] - horizon - 1, 6).astype(int) // stride * stride
            found.setdefault(horizon, []).extend(horizon_noise(load, int(at), horizon) for at in cutoffs)
            known.setdefault(horizon, []).append((np.abs(load.shares - SHARE).sum(axis=1).mean(), errors.mean()))

    for horizon, values in found.items():
        assert np.mean(known[horizon], axis=0) == pytest.approx(np.nanmean(values, axis=0), rel=0.05), horizon


def test_movement_is_no_noise():
    """A load that wanders as far in 100 steps as noise scatters its mean has the noise of one that stands still."""
    calm, wild = (
        synthetic_trace([Course(steps=4000, experts=32, tokens=20_000, changes=((1, v),))], seed=1).layer(0)
        for v in (1e-6, 0.002)
    )

    for horizon, least in ((1, 0.9), (1000, 0.8)):
        noise, with_movement = (horizon_noise(load, 2500, horizon)[1] for load in (calm, wild))
        assert least < with_movement / noise < 1.15


@pytest.mark.parametrize("stride", [300, 1000])
@pytest.mark.slow
def test_rows_that_the_load_moves_between_tell_nothing(stride):
    """Neither the noise of a step nor that of a mean: what differs there is movement above all."""
    course = Course(steps=60 * stride, experts=32, tokens=50_000, changes=((1, 0.003),))
    load = synthetic_trace([course]).layer(0)
    sparse = replace(load, steps=load.steps[::stride], counts=load.counts[::stride])

    assert np.isnan(horizon_noise(sparse, 40 * stride, 10 * stride)).all()
    assert 0 < mean_noise(load, 1) < 0.05


@pytest.mark.parametrize("rows", [1, 2, 30, 49])
def test_too_few_rows_tell_nothing(rows):
    """50 rows side by side are the fewest, for 10 pairs of rows 20 and 40 steps apart."""
    assert np.isnan(horizon_noise(sampled("tokens", 1, rows), -1, rows)).all()
    assert not np.isnan(horizon_noise(sampled("tokens", 1, 50), -1, 50)).any()


def test_a_load_without_noise_has_none():
    """Counts that are always the same."""
    load = LoadTrace.from_counts(np.tile([3, 1], (500, 1, 1))).layer(0)

    assert (0.0, 0.0) == horizon_noise(load, 300, 100)


@pytest.mark.parametrize(("length", "spacing", "stride"), [(1, 1, 1), (7, 1, 1), (30, 6, 1), (3, 1, 10), (2, 1, 50)])
@pytest.mark.parametrize(("first", "last"), [(0, 240), (13, 221)])
def test_the_scatter_equals_its_naive_twin(length, spacing, stride, first, last):
    """Means with a gap of 20 steps between them, and as far again; relative to the share of all three."""
    load = sampled("topics", stride, 240, varying=True)
    gap = {1: 20, 10: 2, 50: 1}[stride]
    near = -(-(length - 1 + gap) // spacing) * spacing
    distances, once, twice = [], [], []
    for t in range(-(-first // spacing) * spacing, last - near - length + 1, spacing):
        a, b, c = (load.counts[at : at + length].sum(axis=0) for at in (t, t + near, t + 2 * near))
        a, b = a / a.sum(), b / b.sum()
        distances.append(abs(b - a).sum() / 2**0.5)
        if t + 2 * near + length <= last:
            c = c / c.sum()
            share = np.maximum((a + b + c) / 3, SHARE_FLOOR / load.experts)
            once.append(sum((b - a) ** 2 / share))
            twice.append(sum((c - a) ** 2 / share))

    found = _scatter(load, first, last, length, gap)

    assert found == pytest.approx((np.mean(distances), sum(twice) / sum(once)))


def test_long_layers_are_measured_in_parts(monkeypatch):
    """With the same result, whatever the parts and however few experts at a time."""
    load, again = sampled("topics", 1, 1000), sampled("topics", 1, 1000)
    whole = [_scatter(load, 30, 930, length, 20) for length in (1, 30)]
    monkeypatch.setattr("moetrace.analysis.variogram.PART", 7)
    monkeypatch.setattr("moetrace.analysis.variogram.VALUES_AT_A_TIME", 50)

    assert whole == [pytest.approx(_scatter(again, 30, 930, length, 20)) for length in (1, 30)]


def test_the_line_through_both_distances_is_followed_to_0():
    """Of squared distances v and g v the noise is v (2 - g); longer means scatter by the root of their length less."""
    load = sampled("topics", 1, 1000)
    for rows, measured in ((1, 1), (64, 64), (400, 100)):
        scatter, growth = _scatter(load, 0, 1000, measured, 20)
        if growth <= 1.3:
            assert scatter * (2 - growth) ** 0.5 * (measured / rows) ** 0.5 == pytest.approx(mean_noise(load, rows))


def test_noise_is_that_of_the_steps_up_to_the_end_of_the_horizon():
    """A long horizon is looked at alone, a short one with the steps before it, and never what comes after."""
    load = sampled("topics", 1, 3000)
    for horizon, seen in ((1500, 1500), (300, 1000), (100, 1000), (50, 500), (10, 200), (1, 200)):
        expected = mean_noise(load.between(1000 + horizon - seen, 999 + horizon), horizon)
        assert expected == horizon_noise(load, 999, horizon)[1]


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


@pytest.fixture
def load():
    """A layer of 2,000 steps."""
    return synthetic_trace([settling(500, steps=2000)]).layer(0)


@pytest.mark.parametrize(("first", "last"), [(1, 2000), (1, 1950), (1, 1951), (300, 1500), (987, 1000), (1960, 1970)])
def test_cached_blocks_are_those_that_are_computed(load, first, last):
    """Whatever was cut from the layer, and whether or not it ends where a block does."""
    fresh = replace(load).between(first, last)
    cache_block_means(load, 50)

    found = block_means(load.between(first, last), 50)

    assert np.array_equal(block_means(fresh, 50), found)
    assert not len(found) or np.shares_memory(found, load.cache.block_means[50]) == (last % 50 == 0)
    assert 25 not in load.cache.block_means


def test_an_answer_is_cached_for_the_same_rows_and_settings(load):
    """And for no others, however the rows were cut."""
    asked = []

    @cached_per_layer
    def total(part, factor=1):
        asked.append((int(part.steps[0]), int(part.steps[-1]), factor))
        return factor * int(part.counts.sum())

    for part in (load, load.until(500), load.until(500), load.until(700).until(500), load.after(500, 100)):
        total(part)
    total(load.until(500), 2)

    assert [(1, 2000, 1), (1, 500, 1), (501, 600, 1), (1, 500, 2)] == asked
    assert 2 * total(load.until(500)) == total(load.until(500), 2)


def test_what_is_cached_belongs_to_the_counts(load):
    """A load with other counts knows nothing of them."""
    cache_block_means(load, 50)
    other = replace(load, counts=load.counts[::-1])

    assert {} == other.cache.block_means
    assert noise_and_drift(load) != noise_and_drift(other)
    assert since_jump(load) is load
