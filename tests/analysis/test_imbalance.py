"""Imbalance: each definition equals a plain loop; its severity by each threshold, of which experts, and since when."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moetrace import LoadTrace, examine
from moetrace.analysis.imbalance import IMBALANCE, THRESHOLDS, health, health_frame, in_use, severity_of
from moetrace.reporting.answers import alarm, balanced


def naive_gini(load):
    """Mean absolute difference of all pairs over twice the mean."""
    n = len(load)
    return sum(abs(a - b) for a in load for b in load) / (2 * n * n * (sum(load) / n))


NAIVE = {
    "mean_over_max": lambda x: (sum(x) / len(x)) / max(x),
    "max_over_mean": lambda x: max(x) / (sum(x) / len(x)),
    "max_violation": lambda x: (max(x) - sum(x) / len(x)) / (sum(x) / len(x)),
    "cv": lambda x: (sum((v - sum(x) / len(x)) ** 2 for v in x) / len(x)) ** 0.5 / (sum(x) / len(x)),
    "entropy": lambda x: -sum(v / sum(x) * np.log(v / sum(x)) for v in x if v / sum(x) > 0) / np.log(len(x)),
    "dead_fraction": lambda x: sum(v == 0 for v in x) / len(x),
    "gini": naive_gini,
}


@pytest.mark.parametrize("name", IMBALANCE)
@given(load=hnp.arrays(np.float64, st.integers(2, 9), elements=st.floats(0, 100)).filter(lambda x: x.sum() > 1e-3))
@pytest.mark.slow
def test_imbalance_equals_its_naive_twin(name, load):
    """Every definition agrees with a loop."""
    measure, _ = IMBALANCE[name]

    assert NAIVE[name](load.tolist()) == pytest.approx(measure(load), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "best"), [("mean_over_max", 1), ("max_violation", 0), ("cv", 0), ("gini", 0), ("entropy", 1)]
)
def test_equal_loads_are_best(name, best):
    """Every definition calls equal loads its best value."""
    assert best == pytest.approx(IMBALANCE[name][0](np.full(8, 0.125)))


def test_a_single_expert_has_an_even_load():
    """Whose entropy is 1, though the logarithm of 1 is 0."""
    assert 1.0 == IMBALANCE["entropy"][0](np.array([3.0]))


def dominated(top, experts=16):
    """One expert with the share *top*, the others alike."""
    return np.r_[top, np.full(experts - 1, (1 - top) / (experts - 1))]


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (np.full(8, 1 / 8), "ok"),
        (dominated(2.0 / 16), "ok"),
        (dominated(2.01 / 16), "moderate"),
        (dominated(4.0 / 16), "moderate"),
        (dominated(4.01 / 16), "severe"),
        (np.r_[np.zeros(1), np.full(15, 1 / 15)], "moderate"),
        (np.r_[np.zeros(4), np.full(12, 1 / 12)], "severe"),
        (dominated(0.79, 3), "moderate"),
        (dominated(0.8, 3), "collapsed"),
        (dominated(0.97), "collapsed"),
        (dominated(0.85), "collapsed"),
        (np.r_[np.full(12, 0.004 / 12), np.full(4, 0.996 / 4)], "collapsed"),
        (np.array([0.99, 0.01]), "ok"),
        (np.array([1.0]), "ok"),
    ],
)
def test_each_threshold_is_where_it_says(share, expected):
    """Just at it and just beyond it; two experts cannot collapse onto one, as a router of one expert never can."""
    assert expected == severity_of(share)


def test_experts_in_use_are_the_perplexity_of_the_shares():
    """A naive twin: exp of the entropy over the number of experts; 4 of 16 alike are a quarter."""
    share = np.array([0.5, 0.25, 0.125, 0.125])

    assert in_use(share) == pytest.approx(np.exp(-sum(p * np.log(p) for p in share)) / 4)
    assert in_use(np.r_[np.full(4, 0.25), np.zeros(12)]) == pytest.approx(0.25)
    assert THRESHOLDS.in_use == 0.3


@pytest.fixture(scope="module")
def collapsing():
    """Layer 0 is even, layer 1 collapses onto its expert 3 (numbered 4) after step 1,500, with three idle experts."""
    rng = np.random.default_rng(0)
    even, bad = np.full(16, 1 / 16), np.full(16, 0.03 / 12)
    bad[:3], bad[3] = 0, 0.97
    layer = np.concatenate([rng.multinomial(4000, even, 1500), rng.multinomial(4000, bad, 1500)])
    trace = LoadTrace.from_counts(np.stack([rng.multinomial(4000, even, 3000), layer], axis=1), name="collapsing")
    info = trace.info
    return LoadTrace(type(info)(**{**vars(info), "first_expert": 1}), trace.steps, trace.layers, 16, trace.read_layer)


def test_the_worst_layer_is_named_first(collapsing):
    """With its severity, expert, share, since when within a block, and what people do about it."""
    frame = health_frame(collapsing)
    found = health(collapsing.layer(1))

    assert ["ok", "collapsed"] == frame["severity"].tolist()
    assert ("collapsed", 4, 3) == (found.severity, found.hottest, found.idle)
    assert 1501 == pytest.approx(found.since, abs=50)
    sentence = balanced(frame).sentence
    assert sentence.startswith("The router of layer 1 has collapsed (8% of experts in use): expert 4 gets 15.5x")
    assert f"since step {found.since:,}" in sentence
    assert "3 experts got no token at all. Go back to a checkpoint before it" in sentence
    assert sentence in alarm(frame)
    assert "" == alarm(frame[:1])
    assert balanced(frame[:1]).sentence.startswith("The load is balanced: the busiest expert (layer 0")


def test_the_doctor_finds_the_same(collapsing):
    """An error, and no advice on how to plan for such a load; since when is told there, too."""
    found = {finding.name: finding for finding in examine(collapsing)}

    assert {"dead", "collapse"} <= set(found)
    assert "drift" not in found
    assert ("error", "layer 1") == (found["collapse"].severity, found["collapse"].place)
    assert f"since step {health(collapsing.layer(1)).since}" in found["collapse"].evidence


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_every_command_starts_with_a_collapse(collapsing, moetrace, tmp_path):
    """The screens of states, predict and place, and the page; check exits with 1, and list of its table is valid."""
    from moetrace import save_trace

    save_trace(collapsing, tmp_path / "c.parquet")
    quick = ("--predictor", "window_mean", "--cutoffs", "1000")

    outs = [
        moetrace("states", tmp_path / "c.parquet").out,
        moetrace("predict", tmp_path / "c.parquet", *quick).out,
        moetrace("place", tmp_path / "c.parquet", "--gpus", "4", *quick).out,
        moetrace("report", tmp_path / "c.parquet", *quick, "--figures", "none", "--folder", tmp_path / "r").out,
    ]

    assert [True] * 4 == ["The router of layer 1 has collapsed" in " ".join(out.split()) for out in outs], outs
    assert [True] * 3 == [out.startswith("c: The router of layer 1") for out in outs[:3]], outs
    assert "The router of layer 1 has collapsed" in (tmp_path / "r" / "report.html").read_text()
    assert 1 == moetrace("check", tmp_path / "c.parquet").code
    layers = moetrace("states", tmp_path / "c.parquet", "--json").json["layers"]
    fields = {"severity", "max_over_mean", "hottest", "hottest_share", "idle", "since"}
    assert all(fields <= set(row) for row in layers)
