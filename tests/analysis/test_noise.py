"""The noise floor: the error of a forecast that knows the load, and nothing where the trace cannot tell it."""

from dataclasses import replace

import numpy as np
import pytest
import scipy  # its modules are loaded when they are used

from moetrace import Course, LoadTrace, horizon_noise, synthetic_trace
from moetrace.analysis import variogram
from moetrace.analysis.variogram import SHARE_FLOOR, _scatter, mean_noise, pooled_shares

SHARE = np.arange(1, 33) / np.arange(1, 33).sum()


def still(kind, stride, rows, *, varying=False, seed=0):
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
        load = still(kind, stride, 30_000 if stride == 1 else 6000, varying=varying, seed=seed)
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
    assert np.isnan(horizon_noise(still("tokens", 1, rows), -1, rows)).all()
    assert not np.isnan(horizon_noise(still("tokens", 1, 50), -1, 50)).any()


def test_a_load_without_noise_has_none():
    """Counts that are always the same."""
    load = LoadTrace.from_counts(np.tile([3, 1], (500, 1, 1))).layer(0)

    assert (0.0, 0.0) == horizon_noise(load, 300, 100)


@pytest.mark.parametrize(("length", "spacing", "stride"), [(1, 1, 1), (7, 1, 1), (30, 6, 1), (3, 1, 10), (2, 1, 50)])
@pytest.mark.parametrize(("first", "last"), [(0, 240), (13, 221)])
def test_the_scatter_equals_its_naive_twin(length, spacing, stride, first, last):
    """Means with a gap of 20 steps between them, and as far again; relative to the share of all three."""
    load = still("topics", stride, 240, varying=True)
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
    load, again = still("topics", 1, 1000), still("topics", 1, 1000)
    whole = [_scatter(load, 30, 930, length, 20) for length in (1, 30)]
    monkeypatch.setattr(variogram, "PART", 7)
    monkeypatch.setattr(variogram, "VALUES_AT_A_TIME", 50)

    assert whole == [pytest.approx(_scatter(again, 30, 930, length, 20)) for length in (1, 30)]


def test_the_line_through_both_distances_is_followed_to_0():
    """Of squared distances v and g v the noise is v (2 - g); longer means scatter by the root of their length less."""
    load = still("topics", 1, 1000)
    for rows, measured in ((1, 1), (64, 64), (400, 100)):
        scatter, growth = _scatter(load, 0, 1000, measured, 20)
        if growth <= 1.3:
            assert scatter * (2 - growth) ** 0.5 * (measured / rows) ** 0.5 == pytest.approx(mean_noise(load, rows))


def test_noise_is_that_of_the_steps_up_to_the_end_of_the_horizon():
    """A long horizon is looked at alone, a short one with the steps before it, and never what comes after."""
    load = still("topics", 1, 3000)
    for horizon, seen in ((1500, 1500), (300, 1000), (100, 1000), (50, 500), (10, 200), (1, 200)):
        expected = mean_noise(load.between(1000 + horizon - seen, 999 + horizon), horizon)
        assert expected == horizon_noise(load, 999, horizon)[1]
