"""Intervals: they hold as often as they say, and are scaled by what was missed before."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy.stats import foldnorm, norm

from moetrace import LoadTrace, evaluate, means_frame, predictor
from moetrace.analysis.variogram import Outlook, noise_and_drift
from moetrace.forecasting import intervals
from moetrace.forecasting.intervals import ErrorCalibration, Expectation, _halves, bounds
from moetrace.synthetic import Course, synthetic_trace


def wandering(seed, experts, tokens, volatility, concentration):
    """A synthetic layer that moves as lively all along."""
    changes = ((1, volatility),)
    course = Course(steps=7000, experts=experts, tokens=tokens, changes=changes, concentration=concentration)
    return synthetic_trace([course], seed=seed)


def spread(load, horizon):
    """What the variogram of all of the load expects."""
    return Outlook.of(load).deviation(horizon)


@pytest.mark.thorough
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
    rows, ahead, expected = 50 // every, 1000 // every, []
    for e in range(experts):
        p = max(counts[-500 // every :, e].sum() / counts[-500 // every :].sum(), 0.01 / experts)
        product = 1.0
        for memory, lags in ((2500, 20), (1000, 10), (500, 5)):
            variogram = noise_and_drift(load.last(memory), lags=lags)
            level = 1.0
            for _ in range(10_000):
                predicted = level + variogram.drift * rows
                level = predicted * variogram.noise / rows / (predicted + variogram.noise / rows) if predicted else 0.0
            sampling = p * (1 - p) * variogram.noise / (experts - 1 or 1) / ahead
            product *= sampling + p * (level + variogram.drift * ahead / 3) / experts
        expected.append(product ** (1 / 6))

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


@pytest.mark.slow
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


def naive_weight(cutoff, back):
    """Half after a tenth of the steps so far, at most 800."""
    return 0.5 ** (back / min(0.1 * (cutoff - 1), 800))


def naive_told(load, cutoff, horizon):
    """What is told at looks 100 steps apart and at the cutoff, weighted, none more than 0.7 off the last."""
    now = np.log((2 / np.pi) ** 0.5 * spread(load.until(cutoff), horizon).sum())
    total, logs = 1, now
    for step in range(500, cutoff, 100):
        then = np.log((2 / np.pi) ** 0.5 * spread(load.until(step), horizon).sum())
        weight = naive_weight(cutoff, cutoff - 1 - step)
        total, logs = total + weight, logs + weight * np.clip(then, now - 0.7, now + 0.7)
    return logs / total


def naive_deviation(load, cutoff, horizon):
    """What is told, times found over told at looks 100 steps apart from step 500 on, weighted, in loops."""

    @cache
    def found_over_told(step, ahead):
        level = predictor("level").fit([]).forecast(load.until(step), 1).shares[0]
        found = np.log(abs(level - load.after(step, ahead).mean_shares).sum())
        return np.clip(found - naive_told(load, step, ahead), -1.5, 1.5)

    total, logs = 1, np.log(0.5)
    for shorter in {horizon, horizon // 2, horizon // 4, horizon // 8} if horizon >= 400 else {horizon, horizon // 2}:
        known, missing = 10, 0
        for step in range(500, cutoff - horizon + 1, 100):
            weight = naive_weight(cutoff, cutoff - step - horizon)
            apart = found_over_told(step, horizon) - found_over_told(step, shorter)
            known, missing = known + weight, missing + weight * np.clip(apart, -0.7, 0.7)
        for step in range(500, cutoff - shorter + 1, 100):
            weight = naive_weight(cutoff, cutoff - step - shorter)
            total, logs = total + weight, logs + weight * (found_over_told(step, shorter) + missing / known)
    spreads = spread(load.until(cutoff), horizon)
    return spreads / spreads.sum() / (2 / np.pi) ** 0.5 * np.exp(naive_told(load, cutoff, horizon) + logs / total)


@pytest.mark.parametrize(("cutoff", "horizon"), [(3000, 1000), (1750, 100), (600, 400), (3480, 800)])
@pytest.mark.slow
def test_what_was_found_scales_what_is_told(cutoff, horizon):
    """The deviation equals its naive twin, and the level is the forecast of `level`; in a load that grows lively."""
    course = Course(steps=4000, experts=8, tokens=2000, changes=((1, 0.002), (2400, 0.02)))
    load = synthetic_trace([course], seed=4).layer(0)
    found = ErrorCalibration(load).expectation(cutoff, horizon)

    assert naive_deviation(load, cutoff, horizon).tolist() == pytest.approx(found.deviation.tolist())
    assert predictor("level").fit([]).forecast(load.until(cutoff), 1).shares[0] == pytest.approx(found.level)


@pytest.mark.slow
def test_what_is_told_of_a_load_that_goes_on_as_before_hardly_changes():
    """Half as much from one cutoff to the next as the variogram of that moment says."""
    experience = ErrorCalibration(wandering(8, 8, 2000, 0.001, None).layer(0))
    cutoffs = range(3000, 7000, 200)
    told = np.log([experience.expectation(cutoff, 1000).deviation.sum() for cutoff in cutoffs])
    alone = np.log([spread(experience.load.until(cutoff), 1000).sum() for cutoff in cutoffs])

    assert np.diff(told).std() < np.diff(alone).std() / 2


def test_horizons_are_halved_down_to_a_block():
    """The one asked for is always there."""
    assert [[1000, 500, 250, 125], [100, 50], [99], [10], [400, 200, 100, 50]] == [
        _halves(h, 50) for h in (1000, 100, 99, 10, 400)
    ]


@pytest.mark.slow
def test_an_interval_grows_by_a_step_for_each_look_that_missed():
    """Adaptive conformal inference: by 0.15 and 0.3 of how much more was missed than promised, in the logarithm."""
    load = wandering(5, 8, 2000, 0.002, None).layer(0)
    experience, log = ErrorCalibration(load), {80: [0.0], 95: [0.25]}
    for step in range(500, 3000 - 500 + 1, 100):
        before = len(range(500, step - 500 + 1, 100))
        told = ErrorCalibration(load).expectation(step, 500)
        apart = abs(told.level - load.after(step, 500).mean_shares)
        for percent, quantile, by in ((80, 1.2816, 0.15), (95, 1.96, 0.3)):
            if before < 5:
                log[percent].append(log[percent][-1])
                continue
            missed = (apart > told.deviation * quantile * np.exp(log[percent][before])).mean()
            log[percent].append(log[percent][-1] + by * (missed - 1 + percent / 100))

    reach = experience.expectation(3000, 500).reach

    assert [1.2816 * np.exp(log[80][-1]), 1.96 * np.exp(log[95][-1])] == pytest.approx([reach[80], reach[95]])


@pytest.mark.slow
def test_expectations_see_nothing_after_the_cutoff():
    """Also where later ones were asked for before, and where the load turns around in every later step."""
    load = wandering(1, 8, 2000, 0.002, None).layer(0)
    spoiled = replace(load, counts=np.where(load.steps[:, None] > 3000, load.counts[:, ::-1], load.counts))
    used = ErrorCalibration(load)
    used.expectation(6000, 500)

    for experience in (used, ErrorCalibration(spoiled), ErrorCalibration(load.until(3000))):
        found = experience.expectation(3000, 500)
        expected = ErrorCalibration(load).expectation(3000, 500)
        assert (expected.reach, expected.deviation.tolist()) == (found.reach, found.deviation.tolist())


@pytest.mark.slow
def test_one_shock_does_not_spoil_what_follows():
    """3,000 steps after a jump intervals are no more than twice as wide as without it."""
    load = wandering(2, 8, 20_000, 0.0005, None).layer(0)
    shocked = replace(load, counts=np.where(load.steps[:, None] > 3000, load.counts[:, ::-1], load.counts))
    calm, after = (ErrorCalibration(made).expectation(6500, 500) for made in (load, shocked))
    widths = [found.half_widths(found.level)[80].sum() for found in (calm, after)]

    assert 0.5 < widths[1] / widths[0] < 2


def test_a_forecast_expects_to_be_wrong_by_its_distance_from_the_level():
    """The mean and the quantiles of a folded normal distribution, expert by expert."""
    expected = Expectation(np.array([0.3, 0.4, 0.3]), np.array([0.01, 0.02, 0.0]), {80: 1.2816, 95: 2 * 1.96})
    forecast = np.array([0.3, 0.35, 0.31])
    folded = [(0.0, 0.01), (0.05, 0.02)]
    halves = expected.half_widths(forecast)

    assert sum(foldnorm.mean(d / s, scale=s) for d, s in folded) + 0.01 == pytest.approx(expected.error(forecast))
    assert [foldnorm.ppf(0.8, d / s, scale=s) for d, s in folded] == pytest.approx(halves[80][:2].tolist(), rel=1e-3)
    assert [foldnorm.ppf(0.95, d / s / 2, scale=2 * s) for d, s in folded] == pytest.approx(
        halves[95][:2].tolist(), rel=1e-3
    )
    assert 0.01 == pytest.approx(halves[80][2])


@pytest.mark.thorough
def test_the_expected_error_is_the_error_found():
    """Within a fifth, over many synthetic series that stand still, wander and jump about; lively ones expect more."""
    kinds = [(8, 2000, 0.0003, None), (16, 50_000, 0.002, None), (64, 20_000, 0.0005, None), (32, 4096, 0.005, 200)]
    found = []
    for seed in range(8):
        trace = wandering(seed, *kinds[seed % 4])
        scores = evaluate(trace, [predictor("level"), predictor("ema")], [1000], range(2500, 6000, 250)).scores
        found.append(scores.assign(seed=seed))
    for name, scores in ((name, [part[part["predictor"] == name] for part in found]) for name in ("level", "ema")):
        told = [part["expected_error"].mean() for part in scores]
        errors = [part["error_rate"].mean() for part in scores]
        assert 1 == pytest.approx(np.exp(np.mean(np.log(errors) - np.log(told))), abs=0.2), name
        assert np.corrcoef(np.log(told), np.log(errors))[0, 1] > 0.9


def test_bounds_reach_as_far_on_both_sides():
    """By percent."""
    ends = bounds(np.array([0.3, 0.5]), {80: np.array([0.01, 0.02]), 95: np.array([0.02, 0.03])})

    assert {"low_80", "high_80", "low_95", "high_95"} == set(ends)
    assert [0.29, 0.48] == pytest.approx(ends["low_80"].tolist())
    assert [0.32, 0.53] == pytest.approx(ends["high_95"].tolist())
    assert norm.ppf(0.9) == pytest.approx(1.2816, abs=1e-4)
    assert norm.ppf(0.975) == pytest.approx(1.96, abs=1e-4)


def test_bounds_stay_within_0_and_1():
    """No share is below or above."""
    ends = bounds(np.array([0.01, 0.99]), {80: np.array([0.1, 0.1]), 95: np.array([0.2, 0.2])})

    assert [0, 0] == [ends["low_80"][0], ends["low_95"][0]]
    assert [1, 1] == [ends["high_80"][1], ends["high_95"][1]]


@pytest.mark.slow
def test_the_forecast_after_the_end_expects_what_a_score_there_would():
    """Error and intervals, whether cutoffs were scored before or not; in the frame of the means, too."""
    trace = wandering(3, 8, 2000, 0.001, None)
    made = [predictor("ema")]
    (alone,) = evaluate(trace.select(last=5000), made, [500], [], ahead=True).forecasts()
    scored = evaluate(trace, made, [500], [5000])
    means = means_frame([alone], 500)

    assert scored.scores["expected_error"].tolist() == pytest.approx([alone.expected_error])
    assert scored.shares["low_80"].tolist() == pytest.approx(means["low_80"].tolist())
    assert alone.expected_error > 0


@pytest.mark.slow
def test_looks_that_are_not_remembered_change_nothing_in_a_trace_as_long_as_the_samples(monkeypatch):
    """The reach to the last bit, the deviation to one part in a hundred, at the end of 12,000 steps."""
    load = replace(wandering(6, 8, 2000, 0.002, None).layer(0), steps=np.arange(7000) * 2)  # 14,000 steps
    found = [ErrorCalibration(load).expectation(12_000, horizon) for horizon in (100, 1000, 4000)]
    monkeypatch.setattr(intervals, "MAX_LOOKS", 10**6)

    for horizon, some in zip((100, 1000, 4000), found):
        every = ErrorCalibration(load).expectation(12_000, horizon)
        assert every.reach == pytest.approx(some.reach, rel=0.01)
        assert every.deviation == pytest.approx(some.deviation, rel=0.01)


@pytest.mark.slow
def test_a_long_past_is_not_looked_at(monkeypatch):
    """The looks of a cutoff are bounded wherever it lies, and without what came before them it expects the same."""
    monkeypatch.setattr(intervals, "MAX_LOOKS", 20)
    counts = np.random.default_rng(7).multinomial(2000, [0.4, 0.3, 0.2, 0.1], size=60_000)
    load = LoadTrace.from_counts(counts[:, None]).layer(0)
    remembered = 100 * (20 + 500 // 100)  # steps
    experience = ErrorCalibration(load)
    found = experience.expectation(59_000, 500)
    late = ErrorCalibration(load.between(1 + 4 * remembered, 60_000)).expectation(59_000, 500)

    assert len(experience._looks) <= 4 * 25 + 1
    assert min(experience._looks) > 59_000 - 4 * remembered - 500
    assert (found.reach, found.deviation.tolist()) == (late.reach, late.deviation.tolist())


def test_after_a_gap_beyond_all_memory_what_was_assumed_stands():
    """No weight is left to divide by: a warning would be an error."""
    counts = np.random.default_rng(0).multinomial(500, [0.6, 0.4], size=1500)
    steps = np.where(np.arange(1500) < 700, 1, 10**7) + np.arange(1500)
    load = LoadTrace.from_counts(counts[:, None], steps=steps).layer(0)
    cutoff = int(steps[705])

    told = spread(load.until(cutoff), 1000)
    found = ErrorCalibration(load).expectation(cutoff, 1000)

    assert (told / 2).tolist() == pytest.approx(found.deviation.tolist())
    assert predictor("level").fit([]).forecast(load.until(cutoff), 1).shares[0] == pytest.approx(found.level)
    assert (found.level > 0).all()
