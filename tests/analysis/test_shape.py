"""The shape of a load: parameters of known loads within their intervals, batches, and how long a load remembers."""

import numpy as np
import pytest
from scipy.stats import dirichlet

import moetrace as mt
from moetrace.analysis.shape import FAMILIES, correlation_time, distinct_frame, expected_distinct, fit

KNOWN = {
    "power_law": (0.8, lambda rng, n: rng.random(n) ** -0.8),
    "log_normal": (1.0, lambda rng, n: np.exp(rng.normal(size=n))),
    "dirichlet": (0.7, lambda rng, n: rng.standard_gamma(0.7, n)),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("experts", [16, 128])
@pytest.mark.slow
def test_a_known_parameter_lies_in_its_interval(name, experts):
    """In 95% of cases, of which 40 of 50 are certain; and a load of the family is not called another one."""
    truth, draw = KNOWN[name]
    found = []
    for seed in range(50):
        load = draw(np.random.default_rng([seed, experts]), experts)
        found.append(fit(name, load / load.sum()))
    own = FAMILIES[name].parameter

    assert 40 < sum(row[f"{own}_low"] <= truth <= row[f"{own}_high"] for row in found)
    assert 40 < sum(row[f"{name}_p"] > 0.05 for row in found)
    widths = [row[f"{own}_high"] / row[f"{own}_low"] for row in found]
    assert np.median(widths) < {16: 8, 128: 3}[experts]


@pytest.mark.parametrize("exponent", [0.3, 1.0, 1.5])
def test_a_power_law_by_rank_is_found_exactly(exponent):
    """As simulators make it."""
    load = np.arange(1, 65) ** -exponent
    found = fit("power_law", load / load.sum())

    assert (exponent, 0, 1) == pytest.approx(
        (found["exponent"], found["power_law_fit"], found["power_law_p"]), abs=2e-3
    )


@pytest.mark.parametrize("concentration", [0.3, 3.0])
def test_a_concentration_has_the_greatest_likelihood(concentration):
    """Of a symmetric Dirichlet distribution."""
    load = np.random.default_rng(1).dirichlet(np.full(32, concentration))
    found = fit("dirichlet", load)["concentration"]
    likelihood = [dirichlet.logpdf(load, np.full(32, found * part)) for part in (0.97, 1.0, 1.03)]

    assert 1 == np.argmax(likelihood)
    assert np.log(load).std(ddof=1) == pytest.approx(fit("log_normal", load)["sigma"], rel=1e-3)


def test_another_family_fits_worse():
    """A few experts with all of the load are no log-normal, and the distance is half the sum of differences."""
    load = np.array([0.24] * 4 + [0.04 / 60] * 60)
    found = fit("log_normal", load)
    quantiles = np.exp(found["sigma"] * np.sort(np.random.default_rng(0).normal(size=(4000, 64)), axis=1).mean(axis=0))[
        ::-1
    ]

    assert found["log_normal_p"] < 0.05
    assert np.abs(quantiles / quantiles.sum() - load).sum() / 2 == pytest.approx(found["log_normal_fit"], abs=0.05)


def test_a_row_has_the_shape_of_the_last_steps():
    """Of 1,000, with the family that is nearest; the last row is the mean of the layers."""
    rng, zipf = np.random.default_rng(2), np.arange(1, 33) ** -1.0
    early, late = np.full(32, 1 / 32), zipf / zipf.sum()
    counts = np.concatenate([rng.multinomial(4000, own, size=(1000, 2)) for own in (early, late)])
    trace = mt.LoadTrace.from_counts(counts, name="zipf", layers=[3, 7])
    shape = mt.shape_frame(trace)

    assert ["power_law"] * 3 == shape["best_fit"].tolist()
    assert [1.0] * 3 == pytest.approx(shape["exponent"].tolist(), abs=0.02)
    assert (shape["best_fit_error"] == shape["power_law_fit"]).all()
    assert [3, 7] == shape["layer"].tolist()[:2]
    assert shape["layer"].isna().tolist() == [False, False, True]
    assert shape["sigma"][:2].mean() == pytest.approx(shape["sigma"][2])
    assert -(late * np.log(late)).sum() / np.log(32) == pytest.approx(shape["entropy"][0], abs=1e-3)


def test_two_experts_have_no_shape_to_fit():
    """And an expert without load has half a token in it."""
    two = mt.shape_frame(mt.LoadTrace.from_counts(np.full((20, 1, 2), 5)))
    idle = mt.shape_frame(mt.LoadTrace.from_counts(np.tile([8, 4, 2, 0], (20, 1, 1))))
    shares = np.array([160, 80, 40, 0.5]) / 280.5

    assert two["best_fit"].isna().all()
    assert two["exponent"].isna().all()
    assert [*two] == [*idle]
    assert np.log(shares).std(ddof=1) == pytest.approx(idle["sigma"][0], rel=1e-3)


def test_distinct_experts_of_a_batch():
    """Counted, and expected of independent choices: those agree where they are independent."""
    shares = np.array([0.6, 0.2, 0.1, 0.05, 0.05])
    counts = np.random.default_rng(0).multinomial(6, shares, size=(4000, 1))
    rows = distinct_frame(mt.LoadTrace.from_counts(counts).layer(0)).set_index("batch").to_dict("index")

    assert [6 / 64, 6 / 16, 1.5, 6, 24, 96] == list(rows)
    assert sum(1 - (1 - p) ** 6 for p in shares) == pytest.approx(expected_distinct(shares, np.array([6]))[0])
    for tokens in (6, 24, 96):
        assert rows[tokens]["distinct"] == pytest.approx(rows[tokens]["distinct_expected"], abs=0.03)
    assert (counts[-1000:] > 0).sum(axis=2).mean() == rows[6]["distinct"]
    assert np.isnan(rows[1.5]["distinct"])
    assert rows[1.5]["distinct_expected"] < rows[6]["distinct_expected"]
    assert 1.0 == expected_distinct(np.array([1.0, 0.0]), np.array([3]))[0]


@pytest.mark.parametrize(("memory", "every"), [(0.0, 1), (0.8, 1), (0.95, 1), (0.8, 10)])
def test_the_autocorrelation_time_of_a_known_load(memory, every):
    """Of an autoregressive load, in steps: (1 + r) / (1 - r) rows; 1 row for independent ones."""
    rng, rows = np.random.default_rng(4), 2500
    values = np.tile(rng.normal(0, 0.1, 40), (rows, 1))
    for t in range(1, rows):
        values[t] = memory * values[t - 1] + rng.normal(0, 0.1 * np.sqrt(1 - memory**2), 40)
    counts = (1e6 * np.exp(values)).astype(int)[:, None]
    load = mt.LoadTrace.from_counts(counts, steps=every * np.arange(1, rows + 1)).layer(0)

    assert every * (1 + memory) / (1 - memory) == pytest.approx(correlation_time(load, rows * every), rel=0.15)
    assert np.isnan(correlation_time(load.between(every, 9 * every)))
    assert np.isnan(correlation_time(mt.LoadTrace.from_counts(np.full((50, 1, 3), 2)).layer(0)))
