"""Errors of a forecast: each equals a plain loop over the definition."""

import numpy as np
import pytest

from moetrace.forecasting.layers import errors, predicted_shares, step_errors

RNG = np.random.default_rng(0)
COUNTS = RNG.multinomial(50, [0.5, 0.3, 0.2, 0.0], size=20) * RNG.integers(1, 4, size=(20, 1))
FORECAST = RNG.dirichlet([3, 2, 1, 1], size=20)


def naive_errors(forecast, counts):
    """The definitions, step by step and expert by expert."""
    steps, experts = counts.shape
    tokens = sum(counts[t][e] for t in range(steps) for e in range(experts))
    rate = step_rate = points = 0.0
    relative = []
    for e in range(experts):
        actual = sum(counts[t][e] for t in range(steps)) / tokens
        predicted = sum(sum(counts[t]) * forecast[t][e] for t in range(steps)) / tokens
        rate += abs(predicted - actual)
        points += abs(predicted - actual) / experts
        if actual > 0:
            relative.append(abs(predicted - actual) / actual)
    for t in range(steps):
        step_rate += sum(abs(forecast[t][e] - counts[t][e] / sum(counts[t])) for e in range(experts)) / steps
    return rate, step_rate, sum(relative) / len(relative), experts - len(relative), points


def errors_of(forecast, counts):
    """The errors of a forecast, from the pieces that scores are made of."""
    totals = counts.sum(axis=1)
    by_step = step_errors(forecast, counts / totals[:, None])
    return errors(predicted_shares(forecast, totals), counts.sum(axis=0) / totals.sum(), by_step)


def test_errors_equal_their_naive_twin():
    """Vectorised and looped agree, an idle expert included."""
    assert naive_errors(FORECAST, COUNTS) == pytest.approx(tuple(errors_of(FORECAST, COUNTS)), rel=1e-12)


def test_a_perfect_forecast_has_no_error():
    """Predicting what happens gives 0 everywhere."""
    found = errors_of(COUNTS / COUNTS.sum(axis=1, keepdims=True), COUNTS)

    assert pytest.approx(tuple(found), abs=1e-15) == (0, 0, 0, 1, 0)


def test_the_error_rate_ignores_what_averages_out():
    """Errors of opposite sign in two steps cancel in error_rate, not in step_error_rate."""
    found = errors_of(np.array([[0.6, 0.4], [0.4, 0.6]]), np.array([[50, 50], [50, 50]]))

    assert pytest.approx(found.error_rate) == 0
    assert pytest.approx(found.step_error_rate) == 0.2
