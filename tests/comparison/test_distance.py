"""How far apart two loads are, and when they are called the same: 95% of the time, for loads of several kinds."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

import moetrace as mt
from moetrace.comparison import Sample, check_comparable, distance_of, pairs_frame, samples_of


def wandering(rng, rows, width, deviation):
    """Normal noise of the batches, correlated over about 5 steps, shape (rows, width)."""
    values = np.zeros((rows, width))
    values[0] = rng.normal(0, deviation, width)
    for t in range(1, rows):
        values[t] = 0.8 * values[t - 1] + rng.normal(0, deviation * 0.6, width)
    return values


def drawn(kind, base, rows, rng):
    """A trace of *rows* steps whose load stands still at *base* (layers, experts)."""
    experts, topics, counts = base.shape[1], wandering(rng, rows, 4, 1), []
    for layer, shares in enumerate(base):
        heights = np.tile(shares, (rows, 1))
        if kind == "dirichlet":
            heights = rng.standard_gamma(heights * 60) + 1e-12
        if kind == "correlated":
            heights = heights * np.exp(wandering(rng, rows, experts, 0.2))
        if kind == "topics":
            heights = heights * np.exp(topics @ np.random.default_rng([9, layer]).normal(0, 0.15, (4, experts)))
        counts.append(rng.multinomial(512, heights / heights.sum(axis=1, keepdims=True)))
    return mt.LoadTrace.from_counts(np.stack(counts, axis=1))


def distance_between(a, b, top=2):
    """The distance of two traces."""
    return distance_of(samples_of(a), samples_of(b), top)


def pair(kind, seed, shape=(3, 8), rows=(600, 900), shift=0.0):
    """Two traces of one load, of which the second has moved by *shift* in its first layer alone."""
    rng = np.random.default_rng([seed, *shape])
    base = rng.dirichlet(np.full(shape[1], 3.0), shape[0])
    other = base.copy()
    other[0, [base[0].argmin(), base[0].argmax()]] += [shift, -shift]
    return drawn(kind, base, rows[0], rng), drawn(kind, other, rows[1], rng)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multinomial", "dirichlet", "correlated", "topics"])
def test_two_samples_of_one_load_are_called_the_same(kind):
    """In about 95 of 100 cases: 8 of 60 that are not would be by chance in one case in 200."""
    shapes = [((3, 8), (600, 900)), ((2, 64), (1000, 400)), ((4, 16), (200, 200))]
    found = [distance_between(*pair(kind, seed, *shapes[seed % 3])) for seed in range(60)]

    assert 60 - sum(own.same for own in found) <= 7
    ratios = np.array([own.distance / own.noise for own in found])
    assert 0.85 < ratios.mean() < 1.15


@pytest.mark.parametrize("kind", ["multinomial", "dirichlet", "correlated", "topics"])
@pytest.mark.slow
def test_a_known_shift_of_one_layer_is_found(kind):
    """Of 5% of its token choices, in one of three layers, and its size is measured."""
    found = [distance_between(*pair(kind, seed, rows=(3000, 3000), shift=0.05)) for seed in range(4)]

    assert [False] * 4 == [own.same for own in found]
    assert np.mean([own.layers[0]["distance"] for own in found]) == pytest.approx(0.05, abs=0.015)
    assert all(own.layers[0]["distance"] > own.layers[0]["noise_high"] for own in found)


def test_each_measure_is_what_it_says():
    """Against loops over the experts."""
    a, b = (
        drawn("multinomial", np.random.default_rng(n).dirichlet(np.ones(6), 1), 50, np.random.default_rng(n))
        for n in (1, 2)
    )
    p, q = (own.counts[:, 0].sum(axis=0) / own.counts.sum() for own in (a, b))
    halves = []
    for own in (a, b):
        first, second = own.counts[:25, 0].sum(axis=0), own.counts[25:, 0].sum(axis=0)
        halves.append(sum(abs(first / first.sum() - second / second.sum())) / 2)
    (row,) = distance_between(a, b, top=3).layers

    assert sum(abs(x - y) for x, y in zip(p, q)) / 2 == pytest.approx(row["distance"])
    assert sum(abs(x - y) for x, y in zip(sorted(p), sorted(q))) / 2 == pytest.approx(row["sorted_distance"])
    assert spearmanr(p, q).statistic == pytest.approx(row["rank_correlation"])
    assert len({*np.argsort(p)[-3:]} & {*np.argsort(q)[-3:]}) / 3 == pytest.approx(row["overlap"])
    assert max(halves) == pytest.approx(row["halves"])


def test_the_noise_of_both_counts():
    """A short trace has more of it, and so has the distance to it."""
    base = np.random.default_rng(0).dirichlet(np.full(8, 3.0), 1)
    long, short = (drawn("multinomial", base, rows, np.random.default_rng(rows)) for rows in (4000, 250))
    noises = {
        name: distance_between(*pair).noise for name, pair in {"long": (long, long), "mixed": (long, short)}.items()
    }

    assert 3 < noises["mixed"] / noises["long"] / np.sqrt(1 / 2) < 5.5


BASE = np.random.default_rng(5).dirichlet(np.full(16, 1.0), 4)
TUNED = BASE * np.exp(np.random.default_rng(6).normal(0, 0.3, BASE.shape))
SEED = np.random.default_rng(7).dirichlet(np.full(16, 1.0), 4)


@pytest.mark.parametrize(
    ("other", "order", "same"),
    [
        (BASE, "same", True),
        (TUNED / TUNED.sum(axis=1, keepdims=True), "same", False),
        (BASE[:, np.random.default_rng(8).permutation(16)], "permuted", False),
        (SEED, "different", False),
        (SEED[:1, :4], "unknown", False),
    ],
    ids=["one load", "fine-tuned", "renumbered", "two seeds", "few experts"],
)
def test_the_order_of_the_experts_is_recognised(other, order, same):
    """A fine-tuned model keeps it, another numbering has the same shares by rank, two seeds have nothing in common."""
    known = BASE[: len(other), : other.shape[1]]
    a, b = (drawn("multinomial", base, 500, np.random.default_rng(n)) for n, base in enumerate((known, other)))
    found = distance_between(a, b)

    assert (order, same) == (found.order, found.same)


def test_what_cannot_be_known_is_not_said():
    """Too few steps have no noise floor, equal shares no ranks; a load without noise is the same only as itself."""
    few = mt.LoadTrace.from_counts(np.full((5, 1, 4), 3))
    still = [mt.LoadTrace.from_counts(np.tile(own, (100, 1, 1))) for own in ([3, 3, 3], [3, 3, 3], [4, 3, 2])]
    found = distance_between(few, few)

    assert (None, "unknown") == (found.same, found.order)
    assert np.isnan(found.layers[0]["rank_correlation"])
    assert (True, False) == (distance_between(*still[:2]).same, distance_between(*still[1:]).same)
    assert np.isnan(Sample.of(few.layer(0).between(1, 1)).halves)


def test_all_pairs_are_those_two_by_two(small):
    """Of traces with one shape; others are left out."""
    traces = [drawn("multinomial", BASE, 100, np.random.default_rng(n)) for n in range(3)]
    named = [mt.LoadTrace.from_counts(own.counts, name=f"t{n}") for n, own in enumerate(traces)]
    frame = pairs_frame([*named, small])

    assert [("t0", "t1"), ("t0", "t2"), ("t1", "t2")] == list(zip(frame["a"], frame["b"]))
    assert distance_between(traces[0], traces[2]).distance == frame["distance"][1]
    assert 0 == len(pairs_frame([small]))


def parts(trace, *spans, **info):
    """Parts of a *trace* by the steps that each spans, named as on the command line."""
    whole = replace(trace, info=replace(trace.info, **info))
    cut = [whole.select(first=first, last=last) for first, last in spans]
    return [replace(own, info=replace(own.info, name=f"run:{a}-{b}")) for own, (a, b) in zip(cut, spans)]


@pytest.mark.parametrize(
    "known", [{"source": "dump", "fingerprint": "f"}, {"fingerprint": "f", "settings": {"bin": 2}}]
)
def test_parts_of_a_trace_that_share_steps_are_refused(known):
    """With parts that share none, which are compared; traces of another source, or none, may have the same steps."""
    trace = mt.LoadTrace.from_counts(np.ones((100, 1, 4), int))
    a, b = parts(trace, (10, 60), (60, 99), **known)

    with pytest.raises(mt.SettingError, match=r"share the steps 60 to 60: .* such as run:10-54 run:55-99"):
        check_comparable(a, b)
    with pytest.raises(mt.SettingError, match=r"share the steps 20 to 60: .* such as run:10-54 run:55-99"):
        check_comparable(*parts(trace, (20, 99), (10, 60), **known))
    check_comparable(*parts(trace, (10, 60), (61, 99), **known))
    check_comparable(a, replace(b, info=replace(b.info, fingerprint="g")))
    check_comparable(a, replace(b, info=replace(b.info, settings={"bin": 4})))
    check_comparable(*parts(trace, (10, 60), (60, 99)))


def test_one_trace_is_known_by_the_digests_of_its_layers():
    """Whatever it was read from."""
    trace = replace(mt.LoadTrace.from_counts(np.ones((9, 1, 4), int)), digests={0: "d"})

    with pytest.raises(mt.SettingError, match="are one trace"):
        check_comparable(trace, replace(trace, info=mt.TraceInfo("other", fingerprint="f")))
    check_comparable(trace, replace(trace, digests={0: "e"}))


def test_only_loads_of_one_shape_are_compared():
    """Layers can be selected, experts cannot."""
    one, two, wide = (mt.LoadTrace.from_counts(np.ones((9, *shape), int)) for shape in ((1, 4), (2, 4), (1, 8)))

    with pytest.raises(mt.SettingError, match=r"1 layers and .* 2: .*--layers"):
        check_comparable(one, two)
    with pytest.raises(mt.SettingError, match=r"4 experts and .* has 8: loads of one shape compare$"):
        check_comparable(one, wide)
