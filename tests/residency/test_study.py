"""Resident sets scored on what followed, against plain loops over steps and experts."""

import numpy as np
import pytest

import moetrace as mt
from moetrace.residency.scoring import CACHE, COMPUTE, LOADING, NEITHER, UNKNOWN, UNTESTED
from moetrace.residency.study import hot

CUTOFFS = [120, 200, 280]
HORIZON = 80


@pytest.fixture(scope="module")
def counts():
    """Two layers of six experts over 400 steps, of which a step uses about half, and whose load moves."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 1, (2, 6)) + np.cumsum(rng.normal(0, 0.05, (400, 2, 6)), axis=0)
    shares = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    return np.array([[rng.multinomial(5, own) for own in step] for step in shares])


@pytest.fixture(scope="module")
def trace(counts):
    """As a trace whose experts are numbered from 1, and whose steps begin at 1."""
    return mt.LoadTrace.from_counts(counts, layers=[2, 4], info=mt.TraceInfo(name="moving", first_expert=1))


@pytest.fixture(scope="module")
def found(trace):
    """Two experts per layer."""
    return hot(trace, [mt.Ema()], slots=2, horizon=HORIZON, cutoffs=CUTOFFS, refresh=20, cold=2, transfer=0.5)


def top(shares, number):
    """The experts with the most load, the first of equal ones first."""
    return sorted(range(len(shares)), key=lambda e: (-round(shares[e], 12), e))[:number]


def rates(window, resident):
    """Share of token choices, and of uses, whose expert is one of *resident*."""
    used = window > 0
    return window[:, resident].sum() / window.sum(), used[:, resident].sum() / used.sum()


def row_of(frame, **key):
    """The only row with these values."""
    for name, value in key.items():
        frame = frame[frame[name] == value]
    (row,) = frame.to_dict("records")
    return row


@pytest.mark.parametrize("layer", [2, 4])
@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.slow
def test_a_set_covers_what_a_loop_counts(found, counts, layer, cutoff, slots):
    """By the mean of the history, and by the load that followed."""
    history, window = counts[:cutoff, layer // 2 - 1], counts[cutoff : cutoff + HORIZON, layer // 2 - 1]
    key = {"layer": layer, "cutoff": cutoff, "slots": slots, "allocation": "equal"}
    row = row_of(found.frames["scores"], method="window_mean", **key)
    hit, active = rates(window, top(history.sum(axis=0) / history.sum(), slots))

    assert (hit, active) == pytest.approx((row["hit_rate"], row["active_hit_rate"]))
    assert (window > 0).sum() / HORIZON == pytest.approx(row["active"])
    assert row["active"] * (1 - active) == pytest.approx(row["loads"])
    best = row_of(found.frames["scores"], method="oracle_static", **key)
    assert rates(window, top(window.sum(axis=0) / window.sum(), slots))[0] == pytest.approx(best["hit_rate"])
    assert rates(window, top((window > 0).sum(axis=0), slots))[1] == pytest.approx(best["active_hit_rate"])


@pytest.mark.parametrize("layer", [2, 4])
@pytest.mark.parametrize("cutoff", CUTOFFS)
@pytest.mark.slow
def test_caches_are_warm_at_the_cutoff(found, counts, layer, cutoff):
    """An LRU cache and a refreshed set have seen all steps before the horizon that they are scored on."""
    own, resident, hits = counts[:, layer // 2 - 1], [], []
    for row in own:
        hits.append((row[resident].sum(), (row[resident] > 0).sum()))
        for e in sorted(np.flatnonzero(row), key=lambda e: (row[e], -e)):
            resident = [e, *(old for old in resident if old != e)][:2]
    tokens, active = np.sum(hits[cutoff : cutoff + HORIZON], axis=0)
    window = own[cutoff : cutoff + HORIZON]
    key = {"layer": layer, "cutoff": cutoff, "slots": 2}
    row = row_of(found.frames["scores"], method="lru", **key)

    assert tokens / window.sum() == pytest.approx(row["hit_rate"])
    assert active / (window > 0).sum() == pytest.approx(row["active_hit_rate"])
    assert ((window > 0).sum() - active) / HORIZON == pytest.approx(row["loads"])
    covered, entered = 0, 0
    for first in range(cutoff, cutoff + HORIZON, 20):
        chosen = top(own[max(0, first - 1000) : first].sum(axis=0), 2)
        before = top(own[max(0, first - 1020) : first - 20].sum(axis=0), 2)
        entered += sum(own[first - 1, e] == 0 for e in chosen if e not in before) if first > cutoff else 0
        covered += own[first : first + 20, chosen].sum()
    row = row_of(found.frames["scores"], method="refreshed", **key)
    assert covered / window.sum() == pytest.approx(row["hit_rate"])
    assert row["loads"] == pytest.approx(row["active"] * (1 - row["active_hit_rate"]) + entered / HORIZON)


@pytest.mark.parametrize("total", [3, 4, 5, 7])
@pytest.mark.slow
def test_slots_divided_by_load_are_those_of_what_was_known(trace, counts, total):
    """The experts with the largest shares, of whichever layer: of the history, or of what followed in hindsight."""
    scores = hot(trace, total=total, horizon=HORIZON, cutoffs=CUTOFFS).frames["scores"]
    for cutoff in CUTOFFS:
        for method, seen in (
            ("window_mean", counts[:cutoff]),
            ("oracle_static", counts[cutoff : cutoff + HORIZON]),
        ):
            shares = seen.sum(axis=0) / seen.sum(axis=(0, 2))[:, None]
            best = top(shares.ravel(), total)
            own = scores[(scores["allocation"] == "by_load") & (scores["method"] == method)]

            assert [sum(e // 6 == layer for e in best) for layer in (0, 1)] == (
                own.loc[own["cutoff"] == cutoff, "slots"].tolist()
            )


@pytest.mark.slow
def test_a_predictor_is_scored_where_its_history_is_long_enough():
    """Others, and caches, at every cutoff."""
    counts = np.random.default_rng(0).multinomial(50, [0.4, 0.3, 0.2, 0.1], size=(700, 2))
    cutoffs = [100, 300, 500]
    scores = hot(mt.LoadTrace.from_counts(counts), [mt.Arima()], slots=2, horizon=100, cutoffs=cutoffs).frames["scores"]
    by_method = {name: sorted(set(own["cutoff"])) for name, own in scores.groupby("method")}

    assert [cutoff for cutoff in cutoffs if cutoff >= mt.Arima().needs] == by_method["arima"] != cutoffs
    assert cutoffs == by_method["window_mean"] == by_method["lru"] == by_method["oracle_static"]


def test_means_are_over_layers_and_cutoffs(found):
    """With an interval around them where the number of slots was asked for, and differences from window_mean."""
    scores = found.frames["scores"]
    own = scores[(scores["method"] == "ema") & (scores["slots"] == 2) & (scores["allocation"] == "equal")]
    base = scores[(scores["method"] == "window_mean") & (scores["slots"] == 2) & (scores["allocation"] == "equal")]
    row = row_of(found.frames["summary"], method="ema", slots=2, allocation="equal", state="all")

    assert own["hit_rate"].mean() == pytest.approx(row["hit_rate"])
    assert row["hit_rate_low"] < row["hit_rate"] < row["hit_rate_high"]
    assert row["active_hit_rate_low"] < row["active_hit_rate"] < row["active_hit_rate_high"]
    assert own["hit_rate"].mean() - base["hit_rate"].mean() == pytest.approx(row["difference"])
    assert own.groupby("layer")["hit_rate"].mean().min() == pytest.approx(row["worst_layer"])
    assert own["loads"].mean() * 2 * 0.5 * 1000 == pytest.approx(row["ms_per_step"])
    assert np.isnan(
        row_of(found.frames["summary"], method="ema", slots=3, allocation="equal", state="all")["hit_rate_low"]
    )


def test_age_is_the_distance_of_two_cutoffs(found, counts):
    """A set of one is scored on the horizon of the other, beside the set that was chosen there."""
    old, new = [], []
    for layer in (0, 1):
        for first, then in ((120, 200), (200, 280)):
            window = counts[then : then + HORIZON, layer]
            for cutoff, into in ((first, old), (then, new)):
                into.append(rates(window, top(counts[:cutoff, layer].sum(axis=0) / counts[:cutoff, layer].sum(), 2))[0])
    row = row_of(found.frames["ages"], method="window_mean", age=80, state="all")

    assert (np.mean(old), np.mean(new)) == pytest.approx((row["hit_rate"], row["fresh"]))
    assert row["fresh"] - row["hit_rate"] == pytest.approx(row["lost"])
    ages = found.frames["ages"]
    assert [0, 80, 160] == ages.loc[(ages["method"] == "ema") & (ages["state"] == "all"), "age"].tolist()


@pytest.mark.slow
def test_ages_are_whole_horizons(trace):
    """A first cutoff between the others has no ages of its own."""
    ages = hot(trace, slots=2, horizon=100, cutoffs=[50, 100, 200, 300]).frames["ages"]

    assert [0, 100, 200, 300] == ages.loc[ages["state"] == "all", "age"].tolist()


def test_the_curve_is_that_of_the_best_sets(found):
    """Its points are the scores at those numbers of experts."""
    curve, scores = found.frames["curve"], found.frames["scores"]
    for slots in (1, 2, 3):
        own = scores[(scores["slots"] == slots) & (scores["allocation"] == "equal")]
        by_layer = own[own["method"] == found.best].groupby("layer")["hit_rate"].mean()
        row = row_of(curve, slots=slots)

        assert (by_layer.mean(), by_layer.min()) == pytest.approx((row["hit_rate"], row["worst_layer"]))
        assert own.loc[own["method"] == "oracle_static", "hit_rate"].mean() == pytest.approx(row["hindsight"])
    assert [1.0] * 5 == pytest.approx(curve.loc[curve["slots"] == 6, curve.columns[3:]].to_numpy()[0].tolist())


@pytest.mark.slow
def test_sets_are_those_of_the_forecast_after_the_end(found, trace, counts):
    """Numbered as in the source, and from 0 for runtimes; the best predictor covered most."""
    history = counts[:, 0].sum(axis=0) / counts[:, 0].sum()
    by_mean = hot(trace, slots=2, horizon=HORIZON, cutoffs=CUTOFFS)
    sets = by_mean.frames["sets"]

    assert top(history, 2) == by_mean.sets[2]
    assert [e + 1 for e in top(history, 2)] == sets["experts"].iloc[0]
    assert history[top(history, 2)].sum() == pytest.approx(sets["expected"].iloc[0])
    rows = found.frames["summary"]
    rows = rows[(rows["state"] == "all") & (rows["slots"] == 2) & (rows["allocation"] == "equal")].set_index("method")
    assert found.best == rows.loc[["ema", "window_mean"], "hit_rate"].idxmax()
    assert found.answer.hit_rate == rows.loc[found.best, "hit_rate"]
    assert found.answer.hindsight == rows.loc["oracle_static", "hit_rate"]
    assert found.answer.oracle == rows.loc["oracle", "active_hit_rate"]
    assert found.answer.lru == rows.loc["lru", "active_hit_rate"]
    hit = rows["hit_rate"] - found.answer.hit_rate
    assert (found.answer.lru_adds, found.answer.refresh_adds) == pytest.approx((hit["lru"], hit["refreshed"]))
    assert found.answer.tokens == pytest.approx(5 / 6)


def test_the_coldest_experts_are_named_with_how_often_they_were(found, counts):
    """By the forecast of the best; cold in so many of the horizons."""
    cold = found.frames["cold"]
    windows = [counts[c : c + HORIZON, 0].sum(axis=0) for c in CUTOFFS]

    assert [2, 2, 4, 4] == cold["layer"].tolist()
    for row in cold[cold["layer"] == 2].to_dict("records"):
        often = np.mean([row["expert"] - 1 in sorted(range(6), key=lambda e: (w[e], e))[:2] for w in windows])
        assert often == pytest.approx(row["cold_windows"])
        assert row["share"] <= row["high_95"]
    ordered = sorted(found.shares[2])
    assert ordered[:2] == pytest.approx(cold[cold["layer"] == 2]["share"].tolist())


@pytest.mark.slow
def test_one_token_makes_both_rates_the_same():
    """Where every active expert has one token, what is covered of either is the same number."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(1, [0.4, 0.3, 0.2, 0.1], size=(400, 1))
    scores = hot(mt.LoadTrace.from_counts(counts), slots=2).frames["scores"]

    assert scores["hit_rate"].tolist() == pytest.approx(scores["active_hit_rate"].tolist())


@pytest.mark.slow
def test_a_total_and_a_part_to_cover_are_divided_by_load(trace, found):
    """The sets have the total; those that cover a part are as small as the forecast allows."""
    total = hot(trace, total=5, horizon=HORIZON, cutoffs=CUTOFFS)
    cover = hot(trace, cover=0.8, horizon=HORIZON, cutoffs=CUTOFFS)

    assert 5 == total.frames["sets"]["slots"].sum() == sum(map(len, total.sets.values()))
    assert ("by_load", 2.5) == (total.answer.allocation, total.answer.slots)
    assert total.answer.by_load_adds is None
    assert cover.frames["sets"]["expected"].mean() >= 0.8
    smaller = cover.frames["sets"]["slots"].sum() - 1
    assert hot(trace, total=smaller, horizon=HORIZON, cutoffs=CUTOFFS).frames["sets"]["expected"].mean() < 0.8


@pytest.mark.parametrize(
    ("shares", "tokens", "worth"),
    [([0.5, 0.3, 0.1, 0.1], 200, COMPUTE), ([0.6, 0.3, 0.05, 0.05], 2, LOADING), ([0.25] * 4, 200, NEITHER)],
)
@pytest.mark.slow
def test_what_a_set_is_worth(shares, tokens, worth):
    """Many tokens make every expert active; an even load has no hot experts."""
    counts = np.random.default_rng(0).multinomial(tokens, shares, size=(400, 2))

    trace = mt.LoadTrace.from_counts(counts)
    assert worth == hot(trace, slots=2).answer.worth
    assert UNKNOWN == hot(trace, slots=2, cutoffs=[100, 200], horizon=100).answer.worth


@pytest.mark.slow
def test_a_cache_is_worth_more_where_hot_experts_change():
    """Four experts at a time have the load, others every 20 steps: no fixed set covers it, what was used last does."""
    rng = np.random.default_rng(0)
    busy = np.repeat([rng.permutation(16)[:4] for _ in range(40)], 20, axis=0)
    counts = np.zeros((800, 1, 16), np.int64)
    np.put_along_axis(counts[:, 0], rng.permuted(busy, axis=1)[:, :2], 1, axis=1)
    answer = hot(mt.LoadTrace.from_counts(counts), slots=4).answer

    assert CACHE == answer.worth
    assert answer.lru > answer.active_hit_rate + 0.3


@pytest.mark.slow
def test_how_long_a_set_holds():
    """A load that swaps its experts at step 300 ends it; one that stays does not."""
    still, moved = np.tile([8, 4, 2, 1], (600, 1, 1)), np.tile([8, 4, 2, 1], (600, 1, 1))
    moved[300:] = [1, 2, 4, 8]
    found = [
        hot(mt.LoadTrace.from_counts(own), slots=2, horizon=100, cutoffs=[100, 200, 300, 400, 500]).answer
        for own in (still, moved)
    ]

    assert (None, 500) == (found[0].holds, found[0].reach)
    assert 100 == found[1].holds


@pytest.mark.parametrize("steps", [40, 400, 1500, 4000])
@pytest.mark.slow
def test_windows_fit_the_trace(steps):
    """Three cutoffs at least, and the usual ones where it is long."""
    counts = np.random.default_rng(0).multinomial(50, [0.4, 0.3, 0.2, 0.1], size=(steps, 1))
    found = hot(mt.LoadTrace.from_counts(counts), slots=2)
    scores = found.frames["scores"]

    assert min(1000, steps // 4) == scores["horizon"].iloc[0]
    assert min(100, steps // 4) == found.answer.refresh
    assert scores["cutoff"].nunique() >= 3
    if steps == 4000:
        assert [500, 1000, 2000, 3000] == sorted(scores["cutoff"].unique())


@pytest.mark.slow
def test_layers_may_come_in_any_order(trace, found):
    """Whoever runs the tasks."""
    turned = hot(
        trace, [mt.Ema()], slots=2, horizon=HORIZON, cutoffs=CUTOFFS, refresh=20,
        run=lambda tasks: [task.run() for task in reversed(tasks)],
    )  # fmt: skip

    assert found.frames["scores"].equals(turned.frames["scores"])


@pytest.mark.slow
def test_progress_is_percent_of_forecasts_and_then_of_sets(trace):
    """Each layer is counted in both, of which the first take more."""
    seen = []
    hot(trace, slots=2, horizon=HORIZON, cutoffs=CUTOFFS, progress=lambda *at: seen.append(at))

    assert [(30, 100), (60, 100), (80, 100), (100, 100)] == seen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 7}, "slots must be above 0 and at most 6"),
        ({"cold": 6}, "cold must be from 0 to 5"),
        ({"refresh": 0}, "refresh must be at least 1"),
        ({"horizon": 900}, "the longest horizon is"),
    ],
)
def test_what_cannot_be_done_is_refused(trace, settings, message):
    """With what would work."""
    with pytest.raises(mt.SettingError, match=message):
        hot(trace, **settings)


@pytest.mark.parametrize(("steps", "apart"), [(1, 1), (3, 1), (40, 1001)])
def test_a_trace_that_cannot_be_scored_has_sets_all_the_same(counts, steps, apart):
    """By its own mean load, with what they cover of it; the answer says that nothing was tested."""
    info, at = mt.TraceInfo(name="window", first_expert=1), apart * np.arange(steps)
    short = mt.LoadTrace.from_counts(counts[:steps], steps=at, layers=[2, 4], info=info)
    means = [counts[:steps, layer].sum(axis=0) / counts[:steps, layer].sum() for layer in (0, 1)]

    found = hot(short, slots=2, cold=1)
    shared = hot(short, total=3)

    assert UNTESTED == found.answer.worth
    assert {2: top(means[0], 2), 4: top(means[1], 2)} == found.sets
    assert np.mean([own[top(own, 2)].sum() for own in means]) == pytest.approx(found.answer.hit_rate)
    assert min(own[top(own, 2)].sum() for own in means) == pytest.approx(found.answer.worst_layer)
    assert [1 + top(own, 6)[-1] for own in means] == found.frames["cold"]["expert"].tolist()
    assert 3 == sum(len(experts) for experts in shared.sets.values())
    curve = found.frames["curve"]
    assert [np.mean([own[top(own, n)].sum() for own in means]) for n in range(1, 7)] == pytest.approx(curve["hit_rate"])
    assert found.frames["scores"].empty
    assert found.frames["summary"].empty


def test_what_dividing_the_slots_by_load_adds(found, trace):
    """The hit rate of as many slots, divided over the layers, less that of two in each; of the best forecast."""
    table = found.frames["summary"].query("slots == 2 and state == 'all'")
    rates = table.set_index(["allocation", "method"])["hit_rate"]

    assert rates["equal", "window_mean"] > rates["equal", "ema"]
    assert "window_mean" == found.best
    assert rates["by_load", "window_mean"] - rates["equal", "window_mean"] == pytest.approx(found.answer.by_load_adds)


def test_the_mean_of_the_window_is_asked_once(trace):
    """Though it always is, and may be asked for."""
    scores = hot(trace, [mt.WindowMean()], slots=2, horizon=HORIZON, cutoffs=[120]).frames["scores"]
    key = (scores["method"] == "window_mean") & (scores["allocation"] == "equal") & (scores["slots"] == 2)

    assert [2, 4] == scores[key]["layer"].tolist()
