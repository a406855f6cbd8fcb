"""Plans for single steps: the bound and its changes against plain loops, and better than the mean where experts go together."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moetrace import LoadTrace, SettingError, evaluate, predictor
from moetrace.placement import step_peak
from moetrace.placement.plan import Plan, default_plan, evenness, place, replan
from moetrace.placement.planning import FEWEST_STEPS, MOST_EXPERTS, Planning
from moetrace.placement.step_peak import STEP_UNITS, StepLoad, StepPeak, lowered
from moetrace.placement.study import LayerPlans, forecasts_of, simulate


def counts_of(steps, experts, seed=0, spread=1.0):
    """Counts of steps whose experts go together in pairs, and are of unlike size."""
    rng = np.random.default_rng(seed)
    size = rng.lognormal(5, spread, experts)
    together = np.repeat(rng.normal(0, 0.4, (steps, (experts + 1) // 2)), 2, axis=1)[:, :experts]
    return rng.poisson(size * np.exp(together)) + 1


def pairs(steps=400, experts=8):
    """Counts of experts that are alike in the mean; where the first has much load, the last has little, and so on."""
    half = np.random.default_rng(1).uniform(-0.9, 0.9, (steps // 2, experts // 2))
    swing = np.stack([half, -half], axis=1).reshape(steps, -1)
    return (1000 * np.concatenate([1 + swing, 1 - swing[:, ::-1]], axis=1)).round().astype(int)


def bound(counts, slots, sharpness, mean=None):
    """What `StepPeak.peak` says, in plain loops over steps, GPUs and experts."""
    shares = [[n / sum(row) for n in row] for row in counts.tolist()]
    weight = [sum(row) for row in counts.tolist()]
    experts = range(counts.shape[1])
    copies = [sum(e in own for own in slots) for e in experts]
    total = 0.0
    for own in slots:
        loads = [sum(row[e] / copies[e] for e in own) for row in shares]
        middle = sum(w * load for w, load in zip(weight, loads)) / sum(weight)
        variance = sum(w * (load - middle) ** 2 for w, load in zip(weight, loads)) / sum(weight)
        total += np.exp(sharpness * middle + sharpness**2 * variance / 2)
    return np.log(total) / sharpness


@given(st.integers(0, 2**32 - 1), st.sampled_from([(8, 4, 0), (8, 4, 4), (9, 3, 6)]), st.floats(0.5, 60))
@pytest.mark.slow
def test_the_bound_equals_its_naive_twin(seed, shape, sharpness):
    """Mean, variance and covariance of every GPU, also with replicas."""
    experts, gpus, redundant = shape
    counts = counts_of(12, experts, seed)
    slots = place(counts.sum(axis=0) / counts.sum(), gpus, redundant).slots

    found = StepPeak(slots, StepLoad.of(counts), sharpness).peak

    assert found == pytest.approx(bound(counts, slots.tolist(), sharpness))


@given(st.integers(0, 2**32 - 1))
def test_the_bound_is_above_normal_loads(seed):
    """What the busiest of GPUs with normal loads has on average is below it, and not by much where they are alike."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(1, 0.05, (4000, 4))
    load = StepLoad.of(steps / steps.sum(axis=1, keepdims=True))

    found = StepPeak.of(np.arange(4)[:, None], load)

    exact = load.peak(np.eye(4))
    assert exact < found.peak < exact + 0.05


def neighbours(slots, experts):
    """All plans that one exchange or one changed slot leads to, no expert twice on a GPU and none left out."""
    gpus, size = slots.shape
    for cell in range(slots.size):
        for other in range(cell):
            changed = slots.ravel().copy()
            changed[[cell, other]] = changed[[other, cell]]
            yield changed.reshape(gpus, size)
        for expert in range(experts):
            changed = slots.ravel().copy()
            changed[cell] = expert
            yield changed.reshape(gpus, size)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(6, 3, 0), (6, 3, 3), (5, 4, 3)]))
@pytest.mark.slow
def test_no_single_change_lowers_the_bound_of_a_plan(seed, shape):
    """Against every exchange and every changed slot, one after the other."""
    experts, gpus, redundant = shape
    load = StepLoad.of(counts_of(30, experts, seed))
    start = default_plan(experts, gpus, redundant).slots

    *_, found = lowered(start, load, least=1e-7)

    blunt = next(lowered(start, load, least=1e-7))
    now = StepPeak.of(blunt, load).changed(found)
    for other in neighbours(found, experts):
        allowed = all(len(set(own)) == len(own) for own in other.tolist()) and len(np.unique(other)) == experts
        if allowed:
            assert now.changed(other).peak > now.peak - 2e-7


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
@example(5337)
def test_exchanges_made_together_are_worth_it_alone(seed):
    """No GPU takes part in two, each alone lowers the peak by more than was asked, and together by all of it."""
    now = StepPeak.of(default_plan(24, 8, 8).slots, StepLoad.of(counts_of(40, 24, seed)))
    together = step_peak._exchanged(now, 1e-3)

    gpus, slots = np.nonzero(together.slots != now.slots) if together else ((), ())
    assert len(set(gpus)) == len(gpus) <= 2 * step_peak.HOTTEST
    left, total, gains = dict(zip(gpus, slots)), now.terms(now.exponents).sum(), []
    while left:
        gpu, slot = left.popitem()
        crossed = now.slots[gpu, slot], together.slots[gpu, slot]
        other, at = next(cell for cell in left.items() if (together.slots[cell], now.slots[cell]) == crossed)
        del left[other]
        alone = now.slots.copy()
        alone[gpu, slot], alone[other, at] = alone[other, at], alone[gpu, slot]
        gains.append(now.peak - now.changed(alone).peak)
    sums = [total * -np.expm1(-now.sharpness * gain) for gain in gains]
    assert not gains or together.peak == pytest.approx(now.peak_of(total - sum(sums)))
    assert all(gain > 1e-3 for gain in gains)
    assert not gains or step_peak._exchanged(now, max(gains) * 1.001) is None


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(1, 5), st.integers(0, 20))
@pytest.mark.slow
def test_no_gpu_holds_an_expert_twice_and_none_is_left_out(seed, gpus, slots, redundant):
    """Whatever the load, from nothing and from the plan in force."""
    redundant = min(redundant, gpus * slots - max(slots, 1))
    counts = counts_of(25, gpus * slots - redundant, seed)
    load = StepLoad.of(counts)

    plan = place(load, gpus, redundant)
    after = replan(plan, StepLoad.of(counts[:, ::-1]), redundant)

    for found in (plan, after):
        assert [slots] * gpus == found.held.sum(axis=1).tolist()
        assert (1, True) == (found.held.max(), bool(found.held.sum(axis=0).min() >= 1))


def test_experts_that_make_up_for_one_another_are_put_together():
    """All are alike in the mean, so that the mean alone knows no better plan than any; single steps do."""
    counts = pairs()
    shares = counts.sum(axis=0) / counts.sum()

    by_mean, by_steps = (place(load, 4) for load in (shares, StepLoad.of(counts)))

    later = pairs(500)[400:]
    assert evenness(by_steps, later).balance > evenness(by_mean, later).balance + 0.1
    assert [[0, 7], [1, 6], [2, 5], [3, 4]] == sorted(by_steps.experts)


def test_steps_are_scaled_to_the_mean_that_is_forecast():
    """Each expert's share of all of it is the forecast one, its ups and downs are those of the steps; idle ones too."""
    counts = np.array([[10, 30, 0], [30, 10, 0]])

    load = StepLoad.of(counts, np.array([0.2, 0.6, 0.2]))

    assert [0.2, 0.6, 0.2] == pytest.approx(load.mean.tolist())
    parts = load.steps / STEP_UNITS, StepLoad.of(counts).steps / STEP_UNITS
    assert parts[0] == pytest.approx(np.array([[0.05, 0.45, 0.1], [0.15, 0.15, 0.1]]), rel=1e-6)
    assert parts[1] == pytest.approx(counts / 80)


def test_the_peak_of_steps_is_that_of_balance():
    """Tokens of the busiest GPU, added up step by step, over all tokens: 1 over balance and the GPUs."""
    counts = counts_of(50, 8)
    plan = default_plan(8, 4, 4)

    assert StepLoad.of(counts).peak(plan.held) * 4 == pytest.approx(1 / evenness(plan, counts).balance)


def test_a_plan_for_steps_is_kept_where_changes_gain_little():
    """Within half of the tolerance, or the least gain; beyond it few experts move, and the peak falls."""
    load, other = StepLoad.of(counts_of(200, 16, 1)), StepLoad.of(counts_of(200, 16, 2, 0.8))
    before = place(load, 4)

    assert replan(before, load) is before
    assert replan(before, other, tolerance=9.0) is before
    assert replan(before, other, least_gain=9.0) is before
    after = replan(before, other)
    assert other.peak(after.held) < other.peak(before.held)
    assert after.moved(before) < place(other, 4).moved(before)
    gain = max(
        4 * (other.peak(before.held) - other.peak(after.held)),
        before.peak_over_mean(other.mean) - after.peak_over_mean(other.mean),
    )
    assert replan(before, other, least_gain=gain + 1e-6) is before
    assert replan(before, other, least_gain=gain - 1e-6) is not before
    once = replan(before, load, tolerance=0.0)
    assert load.peak(once.held) <= load.peak(before.held)


def uneven(seed, steps, spread):
    """Single steps that scatter widely, of 8 experts of which the first two, neighbours, have 3 % more load."""
    size = np.where(np.arange(8) < 2, 1.03, 1.0)
    steps = np.random.default_rng(seed).normal(size, spread, (steps, 8)).clip(0.01)
    return StepLoad.of(steps, size / size.sum())


def test_a_plan_for_steps_is_changed_where_its_mean_load_is_uneven():
    """Even if that hardly shows in steps that scatter: by the same measure, and never where the steps get worse."""
    load, before = uneven(1, 1000, 0.4), default_plan(8, 4)

    after = replan(before, load)

    step = 4 * (load.peak(before.held) - load.peak(after.held))
    whole = before.peak_over_mean(load.mean) - after.peak_over_mean(load.mean)
    assert (0 < step < 0.001, 0.01 < whole < 0.02) == (True, True)
    assert replan(before, load, least_gain=whole - 1e-6) is not before
    assert replan(before, load, least_gain=whole + 1e-6) is before
    worse = uneven(36, 40, 0.3)
    changed = min(
        (Plan.of(slots, 8) for slots in lowered(before.slots, worse, 0.0005)), key=lambda p: worse.peak(p.held)
    )
    assert changed.peak_over_mean(worse.mean) < before.peak_over_mean(worse.mean) - 0.01
    assert worse.peak(changed.held) > worse.peak(before.held)
    assert replan(before, worse) is before


def test_a_plan_for_steps_that_all_are_alike_is_that_for_the_mean():
    """Nothing scatters, so that the peak of a step is the peak of the mean."""
    counts = np.tile(counts_of(1, 12), (30, 1))
    shares = counts.sum(axis=0) / counts.sum()

    peaks = [place(load, 4, 4).peak_over_mean(shares) for load in (shares, StepLoad.of(counts))]

    assert peaks[1] <= peaks[0] + 1e-9


def test_steps_too_few_are_judged_by_their_mean():
    """Their covariance is hardly one; of very many, 1,000 are enough; more experts than a model has are refused."""
    counts = counts_of(FEWEST_STEPS, 8)
    mean = counts.sum(axis=0) / counts.sum()

    lengths = [len(Planning(4).load(own, mean).steps) for own in (counts[1:], counts, np.tile(counts, (200, 1)))]

    assert [1, FEWEST_STEPS, 1000] == lengths
    assert mean == pytest.approx(Planning(4).load(counts[1:], mean).mean)
    Planning(4).check(MOST_EXPERTS)
    with pytest.raises(SettingError, match="up to 2,000 experts in a layer, not for 2,004"):
        Planning(4).check(MOST_EXPERTS + 4)


def test_a_plan_for_steps_knows_none_after_the_cutoff():
    """Whatever comes after the cutoff, plans made there are the same; what came before it changes them."""
    counts = np.concatenate([pairs(600), counts_of(600, 8)])[:, None]
    turned = counts.copy()
    turned[600:] = turned[600:, :, ::-1]
    early = counts.copy()
    early[:600] = early[:600, :, [0, 1, 2, 3, 5, 4, 7, 6]]

    def planned(values):
        trace = LoadTrace.from_counts(values)
        test = evaluate(trace, [predictor("window_mean")], [500], [600])
        known = LayerPlans(trace, 0, forecasts_of(test, 0), {600: "stable"}, Planning(4), None)
        return Planning(4).replan(default_plan(8, 4), known._wanted(trace.layer(0), "window_mean", 600, 500)).experts

    assert planned(counts) == planned(turned)
    assert planned(counts) != planned(early)


def test_simulated_plans_for_steps_are_more_balanced():
    """On a trace whose experts make up for one another: as the mean alone cannot know."""
    trace = LoadTrace.from_counts(pairs(1500)[:, None], name="pairs")
    test = evaluate(trace, [predictor("window_mean")], [500], [500, 1000])

    balance = simulate(trace, test, Planning(4)).set_index("strategy")["balance"].loc["window_mean"].mean()

    load = trace.layer(0)
    by_mean = [
        evenness(place(load.until(cutoff).last(1000).mean_shares, 4), load.after(cutoff, 500).counts).balance
        for cutoff in (500, 1000)
    ]
    assert balance > np.mean(by_mean) + 0.1


def test_terms_too_large_for_a_float_are_no_warning():
    """An expert that makes almost all of the load, in steps that do not scatter."""
    counts = np.tile(np.array([[10**6, 1, 1, 1]]), (30, 1))

    assert 2 == len(place(StepLoad.of(counts), 2).slots)
    assert step_peak.StepPeak.of(np.array([[0, 1], [2, 3]]), StepLoad.of(counts)).peak == pytest.approx(1, abs=1e-2)
