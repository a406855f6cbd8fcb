"""What a plan and a set of one trace do on another: against the plans and sets made by hand."""

import numpy as np
import pytest

import moetrace as mt
from moetrace.placement.step_time import HIGHEST_RIDGE

SHARES = np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05])


def trace(shares, steps=400, name="t", seed=0, tokens=300):
    """Two layers of one load."""
    counts = np.random.default_rng(seed).multinomial(tokens, shares, size=(steps, 2))
    return mt.LoadTrace.from_counts(counts, name=name)


@pytest.fixture(scope="module")
def turned():
    """Two traces whose experts have each other's loads, and whose second trace changes in the middle."""
    late = np.concatenate([trace(SHARES[::-1], 200, seed=1).counts, trace(np.roll(SHARES, 2), 200, seed=2).counts])
    return trace(SHARES, name="a"), mt.LoadTrace.from_counts(late, name="b")


def test_all_plans_are_scored_on_the_second_half_of_the_other(turned):
    """Its own plan is of its first half alone, so that it knows nothing of the change, and none is the default."""
    a, b = turned
    found = mt.compare(a, b, gpus=2, ridge=40).transfer
    planning = mt.Planning(2, time=mt.StepTime(ridge=40))
    sums = {"other": 0.0, "own": 0.0, "default": 0.0}
    for layer in (0, 1):
        after = b.layer(layer).between(201, 400).counts
        plans = {"default": planning.default(6)}
        for name, seen in (("other", a.layer(layer)), ("own", b.layer(layer).between(1, 200))):
            plans[name] = planning.place(planning.load(seen.counts, seen.mean_shares))
        for name, plan in plans.items():
            sums[name] += sum(
                max(sum(max(n, 40) if n else 0 for n, held in zip(row, gpu) if held) for gpu in plan.held)
                for row in after
            )

    assert (201, 400, 2, 0) == tuple(found[name] for name in ("from_step", "to_step", "gpus", "redundant"))
    assert sums["other"] / sums["own"] - 1 == pytest.approx(found["slower_than_own"])
    assert sums["other"] / sums["default"] - 1 == pytest.approx(found["slower_than_default"])
    assert found["slower_than_own_low"] < found["slower_than_own"] < found["slower_than_own_high"]
    assert found["slower_than_own_memory_bound"] is None


def test_without_hardware_both_ends_are_known(turned):
    """Where expert time is proportional to tokens, and where every expert is memory-bound."""
    found = mt.compare(*turned, gpus=2).transfer
    bound = mt.compare(*turned, gpus=2, ridge=HIGHEST_RIDGE).transfer

    assert found["slower_than_default"] > 0.3
    assert 0 == found["slower_than_default_memory_bound"] == bound["slower_than_default"]  # three experts on each GPU
    assert 2 == mt.compare(*turned, gpus=2, redundant=2).transfer["redundant"]


def test_sets_are_scored_on_the_second_half_of_the_other(turned):
    """That of the first trace, its own, and the best."""
    a, b = turned
    found = mt.compare(a, b, slots=2).transfer
    after = b.counts[200:].sum(axis=0) / b.counts[200:].sum(axis=(0, 2))[:, None]

    assert after[:, :2].sum(axis=1).mean() == pytest.approx(found["hit_rate"])
    assert after[:, 4:].sum(axis=1).mean() == pytest.approx(found["own_hit_rate"])
    assert after[:, 2:4].sum(axis=1).mean() == pytest.approx(found["best_hit_rate"])
    assert (2, 2 / 6) == (found["slots"], found["random_hit_rate"])


def test_only_the_last_steps_of_both_are_planned_from():
    """A load from 1,000 steps before counts no more: sets are of the last 1,000."""
    old, new = trace(SHARES, 1500, seed=3).counts, trace(SHARES[::-1], 1000, seed=4).counts
    a = mt.LoadTrace.from_counts(np.concatenate([old, new]))
    b = mt.LoadTrace.from_counts(np.concatenate([old, new, trace(SHARES[::-1], 2500, seed=5).counts]))
    found = mt.compare(a, b, slots=2).transfer

    assert found["best_hit_rate"] == found["hit_rate"] == found["own_hit_rate"]


def test_progress_counts_layers_and_nothing_is_asked_for_by_default(turned):
    """Of the transfer."""
    seen = []
    mt.compare(*turned, slots=1, progress=lambda *at: seen.append(at))

    assert [(1, 2), (2, 2)] == seen
    assert {} == mt.compare(*turned).transfer
    assert 1 == mt.compare(*turned).distance.top


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": 4}, "redundant"),
        ({"slots": 7}, "slots must be above 0 and at most 6"),
        ({"gpus": 0}, "one GPU or more"),
    ],
)
def test_what_does_not_fit_is_refused(turned, settings, message):
    """With what would work."""
    with pytest.raises(mt.SettingError, match=message):
        mt.compare(*turned, **settings)


def test_other_shapes_and_one_step_are_refused(turned, small):
    """A trace of another model, and one that leaves nothing to score."""
    a, b = turned
    with pytest.raises(mt.SettingError, match=r"t has 3 layers and a has 2: .*layers selects some"):
        mt.compare(mt.LoadTrace.from_counts(np.ones((9, 3, 6), int), name="t"), a)
    with pytest.raises(mt.SettingError, match="small has 4 experts and a has 6"):
        mt.compare(small, a)
    with pytest.raises(mt.SettingError, match="b has one step"):
        mt.compare(a, b.select(last=1), slots=2)
    assert mt.compare(a, b.select(last=2), gpus=2, slots=2).transfer["to_step"] == 2
