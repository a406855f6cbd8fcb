"""Intervals: they hold as often as they say, and are scaled by what was missed before."""

import numpy as np
import pytest
from scipy.stats import norm

from moetrace import LoadTrace, evaluate, predictor
from moetrace.analysis.variogram import motion
from moetrace.forecasting.intervals import bounds, scale, spread, squared_miss
from moetrace.synthetic import Course, synthetic_trace


def wandering(seed, experts, tokens, volatility, concentration):
    """A synthetic layer that moves as lively all along."""
    changes = ((1, volatility),)
    course = Course(steps=7000, experts=experts, tokens=tokens, changes=changes, concentration=concentration)
    return synthetic_trace([course], seed=seed)


def test_intervals_cover_as_often_as_they_say():
    """Within 3 points of 80 and 95 % over many synthetic series of different noise and drift."""
    kinds = [(8, 2000, 0.001, None), (16, 50_000, 0.001, None), (64, 20_000, 0.0005, None), (32, 4096, 0.001, 200)]
    held = []
    for seed in range(12):
        trace = wandering(seed, *kinds[seed % len(kinds)])
        held.append(evaluate(trace, [predictor("level")], [1000], [2500, 3500, 4500, 5500]).scores)
    found = [np.mean([part[name].mean() for part in held]) for name in ("coverage_80", "coverage_95")]

    assert 0.80 == pytest.approx(found[0], abs=0.03)
    assert 0.95 == pytest.approx(found[1], abs=0.03)


def test_the_deviation_equals_its_naive_twin_where_the_load_stands_still():
    """It is at least the sampling of the horizon's mean, and not twice as much for not knowing the level."""
    share = np.array([0.5, 0.3, 0.2])
    counts = np.random.default_rng(0).multinomial(1000, share, size=20_000)
    load = LoadTrace.from_counts(counts[:, None]).layer(0)
    sampling = np.sqrt(share * (1 - share) / 1000 / 1000)

    found = spread(load, 1000)

    assert (sampling <= found).all()
    assert (found < 2 * sampling).all()


def test_the_longer_the_horizon_the_less_is_known_of_a_moving_load():
    """And hardly the less of a still one."""
    moving = wandering(0, 8, 50_000, 0.003, None).layer(0)
    still = wandering(0, 8, 2000, 0.00001, None).layer(0)

    assert (spread(moving, 4000) > 1.5 * spread(moving, 500)).all()
    assert (spread(still, 4000) < 1.2 * spread(still, 500)).all()


@pytest.mark.parametrize(("experts", "every"), [(8, 1), (8, 10), (2, 1), (1, 1)])
def test_the_deviation_equals_its_naive_twin(experts, every):
    """Sampling, then not knowing the level, then its walk: the formula expert by expert, the filter step by step."""
    counts = wandering(0, 9, 2000, 0.003, None).layer(0).counts[::every, :experts] + (experts == 1)
    load = LoadTrace.from_counts(counts[:, None], steps=np.arange(0, 7000, every)).layer(0)
    history = load.last(2500)
    variogram = motion(history, lags=20)
    rows, ahead = 50 // every, 1000 // every
    level = 1.0
    for _ in range(10_000):
        predicted = level + variogram.drift * rows
        level = predicted * variogram.noise / rows / (predicted + variogram.noise / rows) if predicted else 0.0
    expected = []
    for e in range(experts):
        p = max(counts[-500 // every :, e].sum() / counts[-500 // every :].sum(), 0.01 / experts)
        sampling = p * (1 - p) * variogram.noise / (experts - 1 or 1) / ahead
        expected.append((sampling + p * (level + variogram.drift * ahead / 3) / experts) ** 0.5)

    assert expected == pytest.approx(spread(load, 1000).tolist())
    assert (spread(load, 1) == spread(load, every)).all()  # less than a logged row is one


def test_an_expert_that_is_all_but_dead_has_an_interval():
    """As if it had a hundredth of the mean share."""
    share = np.array([0.6, 0.4, 0.0])
    counts = np.random.default_rng(0).multinomial(1000, share, size=4000)
    found = spread(LoadTrace.from_counts(counts[:, None]).layer(0), 1000)

    assert 0 < found[2] < found[1] / 5


def test_a_load_that_never_moves_is_known():
    """Without noise and drift there is nothing that it may be off by."""
    load = LoadTrace.from_counts(np.tile([3, 1], (1000, 1, 1))).layer(0)

    assert [0.0, 0.0] == spread(load, 1).tolist()


def test_intervals_see_nothing_after_the_cutoff():
    """A load that turns around in every later step changes neither forecast nor interval."""
    trace = wandering(1, 8, 2000, 0.001, None)
    counts = np.where(trace.steps[:, None, None] > 3000, trace.counts[..., ::-1], trace.counts)
    seen, spoiled = (
        evaluate(made, [predictor("level")], [1000], [2000, 3000]).shares.query("cutoff == 3000")
        for made in (trace, LoadTrace.from_counts(counts, name=trace.name))
    )
    known = ["forecast", "predicted", "low_80", "high_80", "low_95", "high_95"]

    assert seen[known].to_dict() == spoiled[known].to_dict()
    assert not np.allclose(seen["actual"], spoiled["actual"])


def test_misses_of_earlier_cutoffs_scale_the_formula():
    """None leaves it alone; many outweigh it; those that are not known yet do not count."""
    assert 1.0 == scale([])
    assert ((2 + 4.0 + 9.0) / (2 + 2)) ** 0.5 == pytest.approx(scale([4.0, 9.0]))
    assert 3.0 == pytest.approx(scale([9.0] * 1000), rel=0.01)
    assert scale([4.0]) == scale([4.0, float("nan")])
    assert 1.0 < scale([4.0]) < 2.0


def test_a_squared_miss_of_the_right_size_is_one():
    """Errors of one deviation each; an expert without deviation is left out."""
    assert 1.0 == pytest.approx(
        squared_miss(np.array([0.5, 0.5, 0.0]), np.array([0.4, 0.7, 0.0]), np.array([0.1, 0.2, 0.0]))
    )
    assert (9 + 1) / 2 == pytest.approx(squared_miss(np.array([0.6, 0.4]), np.array([0.3, 0.5]), np.array([0.1, 0.1])))
    assert 0.0 == squared_miss(np.array([1.0]), np.array([1.0]), np.array([0.0]))


@pytest.mark.parametrize("percent", [80, 95])
def test_bounds_are_quantiles_of_the_normal_distribution(percent):
    """The low one leaves half of the rest below it, the high one above it."""
    predicted, deviation = np.array([0.3, 0.5]), np.array([0.01, 0.02])
    ends = bounds(predicted, deviation)

    for side, quantile in (("low", 0.5 - percent / 200), ("high", 0.5 + percent / 200)):
        assert norm.ppf(quantile, predicted, deviation) == pytest.approx(ends[f"{side}_{percent}"], abs=1e-5)
    assert {"low_80", "high_80", "low_95", "high_95"} == set(ends)


def test_bounds_stay_within_0_and_1():
    """No share is below or above."""
    ends = bounds(np.array([0.01, 0.99]), np.array([0.1, 0.1]))

    assert [0, 0] == [ends["low_80"][0], ends["low_95"][0]]
    assert [1, 1] == [ends["high_80"][1], ends["high_95"][1]]


def test_the_scale_uses_only_cutoffs_whose_horizon_has_passed():
    """A trace cut after the horizon of the last cutoff has the same intervals there."""
    trace = wandering(2, 8, 2000, 0.001, None)
    whole = evaluate(trace, [predictor("ema")], [1000], [2000, 2500, 3500]).shares
    alone = evaluate(trace.select(last=3500), [predictor("ema")], [1000], [2000, 2500]).shares

    assert whole[whole["cutoff"] == 2500].to_dict("list") == alone[alone["cutoff"] == 2500].to_dict("list")


def test_the_forecast_after_the_end_is_as_uncertain_as_the_scores_taught():
    """A predictor that missed by far has a wider interval."""
    trace = wandering(3, 8, 2000, 0.001, None)
    made = [predictor("ema")]
    (naive,) = evaluate(trace, made, [500], [], ahead=True).forecasts()
    (taught,) = evaluate(trace, made, [500], ahead=True).forecasts()

    assert (taught.forecast_std > naive.forecast_std).all()
