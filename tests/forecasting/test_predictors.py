"""A contract that every registered predictor keeps, and what is particular to each."""

from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pytest
from statsmodels.tsa.arima.model import ARIMA

from moetrace import LoadTrace, SettingError, evaluate, predictor
from moetrace.analysis.variogram import block_means, gain_of, last_level, levels, since_jump
from moetrace.forecasting.predictors import PREDICTORS, label
from moetrace.forecasting.predictors.arima import FittedArima, _estimate
from moetrace.forecasting.predictors.averages import slide, weights
from moetrace.forecasting.predictors.lstm import TrainingCourse, drawn_windows, window_at
from moetrace.synthetic import Course, settling, synthetic_trace

FAST = {"lstm": pytest.param("lstm:updates=5", marks=pytest.mark.slow)}
ALL = [FAST.get(name, name) for name in PREDICTORS]


@pytest.fixture(scope="module")
def history():
    """2,000 steps of a layer that settles at step 800."""
    return synthetic_trace([settling(800, steps=2000, tokens=3000)], seed=4).layer(0)


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.slow
def test_a_forecast_has_a_row_for_every_step(history, spec):
    """Shape, finite, close to shares."""
    found = predictor(spec).fit([history]).forecast(history, 130)

    assert (130, history.experts) == found.shares.shape
    assert np.isfinite(found.shares).all()
    assert np.allclose(1, found.shares.sum(axis=1), atol=0.1)
    assert found.status == "ok"


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.slow
def test_a_shorter_horizon_is_the_beginning_of_a_longer_one(history, spec):
    """So one forecast serves all horizons, except for a predictor that says otherwise."""
    made = predictor(spec)
    fitted = made.fit([history])
    if made.by_horizon:
        pytest.skip("forecasts each horizon by itself")

    assert np.array_equal(fitted.forecast(history, 300).shares[:70], fitted.forecast(history, 70).shares)


@pytest.mark.parametrize("spec", ALL)
def test_the_same_seed_gives_the_same_forecast(history, spec):
    """Fitting twice changes nothing, and the history is left alone."""
    before = history.counts.copy()
    first, again = (predictor(spec).fit([history]).forecast(history, 100).shares for _ in range(2))

    assert np.array_equal(first, again)
    assert np.array_equal(before, history.counts)


@pytest.mark.parametrize("spec", ALL)
def test_a_constant_history_goes_on(spec):
    """A load that never moved is forecast where it is."""
    counts = np.tile([500, 300, 200, 0], (2000, 1, 1))
    history = LoadTrace.from_counts(counts).layer(0)
    found = predictor(spec).fit([history]).forecast(history, 100)

    assert np.allclose([0.5, 0.3, 0.2, 0.0], found.shares, atol=1e-6)


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.slow
def test_no_predictor_sees_a_step_after_its_cutoff(spec):
    """A trace whose load turns around right after the cutoff has the same forecast there, in a backtest of both."""
    trace = synthetic_trace([settling(800, steps=2000, tokens=3000)], seed=4)
    counts = np.where(trace.steps[:, None, None] > 1600, trace.counts[..., ::-1], trace.counts)
    seen, spoiled = (
        evaluate(made, [predictor(spec)], [100], [1600]).shares for made in (trace, LoadTrace.from_counts(counts))
    )
    known = ["forecast", "predicted", "low_80", "high_80", "low_95", "high_95"]

    assert seen[known].to_dict() == spoiled[known].to_dict()
    assert not np.allclose(seen["actual"], spoiled["actual"])


@pytest.mark.parametrize("spec", ALL)
def test_what_was_fitted_applies_to_a_newer_history(history, spec):
    """And to a layer with another number of experts."""
    fitted = predictor(spec).fit([history.until(1500)])
    other = synthetic_trace([settling(800, steps=2000, experts=5)]).layer(0)

    assert (40, history.experts) == fitted.forecast(history, 40).shares.shape
    assert fitted.forecast(other, 40).shares.shape == (40, 5)


@pytest.mark.parametrize("spec", ALL)
@pytest.mark.slow
def test_steps_logged_every_tenth_time_are_forecast_for_every_step(spec):
    """Windows and horizons count steps."""
    long = synthetic_trace([settling(800, steps=20_000, tokens=30_000)], seed=4).layer(0)
    sparse = replace(long, steps=long.steps[::10], counts=long.counts[::10])
    found = predictor(spec).fit([sparse]).forecast(sparse, 120)

    assert (120, sparse.experts) == found.shares.shape
    assert np.abs(found.shares - sparse.last(1000).mean_shares).max() < 0.05


def naive_recursion(window, n):
    """The paper's SW_Avg, one step after the other."""
    values = [list(row) for row in window]
    w = len(values)
    for _ in range(n):
        values.append([sum(row[e] for row in values[-w:]) / w for e in range(len(values[0]))])
    return np.array(values[w:])


@pytest.mark.parametrize(("w", "n"), [(1, 5), (7, 50), (50, 20)])
def test_sw_avg_equals_the_recursion(w, n):
    """To 1e-12, however it is computed."""
    window = np.random.default_rng(0).random((w, 3))

    assert np.abs(naive_recursion(window, n) - slide(window, n)).max() < 1e-12


def test_sw_avg_of_many_steps_stays_exact():
    """2,000 rounds of a running total do not drift."""
    window = np.random.default_rng(0).random((500, 2))

    assert np.abs(naive_recursion(window, 2000) - slide(window, 2000)).max() < 1e-12


def test_ema_equals_its_recursion():
    """Each step moves the average by a tenth, from the first on."""
    history = synthetic_trace([settling(800, steps=300)]).layer(0)
    average, weight = np.zeros(history.experts), 0.0
    for share in history.shares:
        average, weight = 0.9 * average + 0.1 * share, 0.9 * weight + 0.1

    assert np.allclose(average / weight, predictor("ema").fit([]).forecast(history, 1).shares)


@pytest.mark.slow
def test_arima_of_the_paper_is_there(history):
    """(5,1,5) on single steps: fitted for each expert, or replaced by a named fallback."""
    short = replace(history, steps=history.steps[-200:], counts=history.counts[-200:, :2])
    found = predictor("arima:order=5,1,5:block=1").fit([short]).forecast(short, 10)

    assert found.status == "ok" or found.status.startswith("fallback:window_mean:")


@pytest.mark.parametrize("moving", [(-0.8,), (0.3,), (-0.5, 0.2), (0.4, -0.3, 0.1)])
@pytest.mark.parametrize("blocks", [1, 2, 40])
def test_all_experts_filtered_at_once_are_each_filtered_alone(history, moving, blocks):
    """What statsmodels' own filter forecasts with the same parameters, from its exact diffuse start."""
    settings: Any = predictor(f"arima:order=0,1,{len(moving)}")
    found = FittedArima(settings, np.array(moving)).forecast(history, blocks * settings.block).shares[:: settings.block]
    for series, forecast in zip(settings.means(history).T, found.T):
        model = ARIMA(series / series.std(), order=settings.order, trend="n")
        expected = model.filter([*moving, 1.0], cov_type="none").forecast(blocks) * series.std()

        assert np.abs(expected / forecast - 1).max() < 1e-6


def test_a_failed_fit_is_a_named_fallback(history, monkeypatch):
    """window_mean stands in, and the status says for how many and why."""
    monkeypatch.setattr("moetrace.forecasting.predictors.arima._estimate", lambda *_, **__: (None, "not_converged"))
    found = predictor("arima").fit([history]).forecast(history, 20)

    assert found.status == "fallback:window_mean:8/8:failed"
    assert np.allclose(history.last(1000).mean_shares, found.shares)


def test_shared_parameters_of_arima_weigh_a_new_block_as_the_variogram_does():
    """The moving average of (0, 1, 1) is the gain of the local level, less 1; both are estimates."""
    load = synthetic_trace([Course(steps=4000, tokens=2000, changes=((1, 0.002),))]).layer(0)

    fitted = predictor("arima").fit([load])

    assert isinstance(fitted, FittedArima)
    assert [gain_of(load) - 1] == pytest.approx(fitted.parameters.tolist(), abs=0.2)


def test_each_expert_has_an_autoregression_of_its_own():
    """Its forecast is that of statsmodels; one whose fit has its root at the border is named with the kind of root."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 300, 60)
    series = 5000 + np.array([sum(0.7**k * noise[i - k] for k in range(i + 1)) for i in range(60)])
    trace = LoadTrace.from_counts(np.rint(np.repeat(np.stack([series, 10_000 - series], axis=1), 50, axis=0))[:, None])
    load = trace.layer(0)
    means = load.shares[500::50]
    fit = ARIMA(means[:, 0] - means[:, 0].mean(), order=(1, 0, 0)).fit()

    found = predictor("arima:order=1,0,0").fit([load]).forecast(load, 150)

    assert "ok" == found.status
    expected = means[:, 0].mean() + fit.forecast(3)
    assert expected == pytest.approx(found.shares[::50, 0].tolist(), abs=0.002)
    assert (None, "not_stationary") == _estimate(np.arange(60.0), (1, 0, 0))


@pytest.mark.parametrize(
    "spec",
    ["sw_avg:window=300", "arima:order=5,1,5:block=1", "ema:decay=0.99", "lstm:hidden=4:seed=3", "window_mean"],
)
def test_a_label_makes_the_same_predictor(spec):
    """Specs and labels are inverse."""
    assert spec == label(predictor(spec))


def test_a_seed_reaches_the_predictors_that_have_one():
    """Unless the spec gives another."""
    assert asdict(predictor("lstm", seed=7))["seed"] == 7
    assert asdict(predictor("lstm:seed=3", seed=7))["seed"] == 3
    assert label(predictor("window_mean", seed=7)) == "window_mean"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nope", "there is no predictor 'nope'; there are sw_avg"),
        ("sw_avg:size=3", "has no setting 'size'; it has window"),
        ("sw_avg:window=x", "is a whole number above 0, not 'x'"),
        ("sw_avg:window=0", "above 0"),
        ("arima:order=1,1", "three whole numbers"),
        ("ema:decay=1.5", "between 0 and 1"),
    ],
)
def test_nonsense_is_refused_with_what_there_is(spec, said):
    """Names, settings and values."""
    with pytest.raises(SettingError, match=said):
        predictor(spec)


@pytest.mark.parametrize("name", PREDICTORS)
def test_settings_are_documented_and_immutable(name):
    """Every predictor is a frozen dataclass with a docstring."""
    made = predictor(name)

    assert type(made).__doc__
    assert all(field.name for field in fields(made))
    with pytest.raises(AttributeError):
        setattr(made, "needs_nothing", 1)  # noqa: B010 - a checker refuses the plain way, too


@pytest.mark.slow
def test_weights_are_saved_and_loaded_without_pickle(history, tmp_path):
    """The same forecast comes back; any other file is refused by name."""
    fitted = predictor("lstm:updates=5").fit([history])
    fitted.save(tmp_path / "weights.npz")
    (tmp_path / "other.npz").write_bytes(b"nothing of the kind")
    np.savez(tmp_path / "hostile.npz", settings=np.array([{"a": 1}], dtype=object))
    again = predictor("lstm").load(tmp_path / "weights.npz")

    assert np.array_equal(fitted.forecast(history, 50).shares, again.forecast(history, 50).shares)
    for name in ("other.npz", "hostile.npz", "missing.npz"):
        with pytest.raises(SettingError, match=name):
            predictor("lstm").load(tmp_path / name)


def test_training_windows_are_those_that_were_drawn(history):
    """Numbers drawn through several layers give the windows that making all of them one by one would."""
    settings: Any = predictor("lstm")
    courses = [TrainingCourse.of(history.until(cutoff), settings) for cutoff in (900, 1200)]
    drawn = np.random.default_rng(1).integers(0, sum(course.windows for course in courses), 50)
    every = []  # one window after the other, for a naive twin
    for course in courses:
        for end in course.moments:
            inputs, base, unit = window_at(settings, course.means[:end], levels(course.means, course.gain)[:end])
            after = course.means[end : end + settings.segment].mean(axis=0)
            every += list(zip(inputs, (after - base) / unit))

    found = drawn_windows(courses, drawn, settings)

    for i, number in enumerate(drawn):
        assert np.allclose(every[number][0], found.inputs[i], rtol=1e-4, atol=1e-5)
        assert every[number][1] == pytest.approx(found.targets[i, 0], rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_nothing_to_learn_from_leaves_the_level(history):
    """Runs too short for a single window give an untrained network, which forecasts the level."""
    found = predictor("lstm").fit([history.until(100)]).forecast(history, 10)
    means = block_means(history, 50)

    assert np.allclose(levels(means, gain_of(history))[-1], found.shares[0], atol=1e-6)


def test_auto_weighs_what_was_right_before():
    """On a load that stands still the longest mean wins; the weights sum to 1 and follow the horizon."""
    still = synthetic_trace([settling(2, steps=9000, tokens=500)], seed=1).layer(0)
    short, long = weights(still, 100), weights(still, 2000)

    assert 1 == pytest.approx(short.sum())
    assert not np.array_equal(short, long)
    assert weights(still.until(600), 1000) == pytest.approx(np.exp([4.2, 0, 0]) / np.exp([4.2, 0, 0]).sum())
    assert long[2] > 3 * weights(still.until(600), 1000)[2]


def test_auto_weights_equal_their_naive_twin():
    """Log errors of the candidates at each earlier cutoff, by age, and the prior."""
    trace = synthetic_trace([Course(steps=3000, tokens=50_000, changes=((1, 0.01), (1600, 0.001)))], seed=2)
    history, horizon = trace.layer(0), 500
    total, believed = 3.0, [0.0, 3 * 0.3, 3 * 0.3]
    for cutoff in range(2500, 0, -250):
        past = history.until(cutoff)
        if len(past.steps) <= 250 + 200:  # a cutoff earlier than that says nothing
            break
        errors = [
            sum(
                abs(
                    predictor(spec).fit([]).forecast(past, horizon).shares.mean(axis=0)
                    - history.after(cutoff, horizon).mean_shares
                )
            )
            for spec in ("level", "level:trend=0.2", "window_mean")
        ]
        weight = 0.5 ** ((3000 - horizon - cutoff) / 1000)
        total += weight
        believed = [b + weight * np.log(error / (sum(errors) / 3)) for b, error in zip(believed, errors)]
    heights = [np.exp(-14 * b / total) for b in believed]

    assert [height / sum(heights) for height in heights] == pytest.approx(weights(history, horizon).tolist())


def jumping(at=4000, steps=6000):
    """A layer that stands still but for one step, at which its load turns around; and the same without the jump."""
    still = synthetic_trace([Course(steps=steps, tokens=5000, changes=((1, 0.0002),))], seed=3).layer(0)
    return replace(still, counts=np.where(still.steps[:, None] >= at, still.counts[:, ::-1], still.counts)), still


@pytest.mark.parametrize("after", [100, 150, 700, 1900])
def test_what_came_before_a_jump_is_forgotten(after):
    """As soon as a hundred steps after it, and no more than two blocks of what follows are lost."""
    load, still = jumping()
    present = since_jump(load.until(4000 + after))

    assert 4000 <= present.steps[0] <= 4100
    assert present.steps[-1] == 4000 + after
    assert since_jump(still.until(4000 + after)).steps[0] == 1


def test_large_changes_of_a_load_that_always_moves_are_no_jumps():
    """Nor is anything in a history of a thousand steps or less; a jump further back than 5,000 steps does not matter."""
    lively = synthetic_trace([Course(steps=4000, changes=((1, 0.02),))]).layer(0)
    load, _ = jumping(at=600, steps=6500)

    assert since_jump(lively) is lively
    assert 600 > since_jump(load.until(1000)).steps[0]
    assert 600 <= since_jump(load.until(3000)).steps[0]
    assert since_jump(load.until(6500)).steps[0] == 1


@pytest.mark.parametrize("spec", ["level", "auto"])
def test_forecasts_after_a_jump_are_of_the_load_after_it(spec):
    """Half way into the memory of the mean of 1,000 steps, and when it is through but the variogram still sees the jump."""
    load, _ = jumping()
    for cutoff, times in ((4300, 5), (5200, 0.9)):
        errors = {
            by: abs(
                predictor(by).fit([]).forecast(load.until(cutoff), 500).shares.mean(axis=0)
                - load.after(cutoff, 500).mean_shares
            ).sum()
            for by in (spec, "window_mean")
        }
        assert errors[spec] * times < errors["window_mean"]


@pytest.mark.slow
def test_training_is_compiled_once(history, caplog):
    """A second network of the same shape, as for the next cutoff, is trained with what the first one was."""
    import jax

    trained: Any = predictor("lstm:updates=3").fit([history.until(1000)])
    with jax.log_compiles():
        again: Any = predictor("lstm:updates=3").fit([history.until(1500)])

    assert [] == [line for line in caplog.messages if "_update" in line]
    assert not np.array_equal(trained.network.head.weight, again.network.head.weight)


def test_level_forgets_as_fast_as_the_load_moves():
    """The gain of a moving load is larger than that of a noisy still one."""
    moving = synthetic_trace([Course(steps=5000, tokens=100_000, changes=((1, 0.01),))]).layer(0)
    still = synthetic_trace([Course(steps=5000, tokens=500, changes=((1, 0.0001),))]).layer(0)

    assert gain_of(moving) > 0.5 > 0.1 > gain_of(still)


def test_levels_equal_their_recursion():
    """The exponential average of the blocks, the first ones averaged with what there is."""
    means = np.random.default_rng(0).random((30, 2))
    weight = 0.3
    expected = [
        sum((1 - weight) ** (t - i) * means[i] for i in range(t + 1)) / sum((1 - weight) ** i for i in range(t + 1))
        for t in range(30)
    ]

    assert np.allclose(expected, levels(means, weight), rtol=1e-14, atol=0)
    assert np.allclose(expected[-1], last_level(means, weight), rtol=1e-14, atol=0)


def test_a_trend_goes_on_from_the_middle_of_the_last_window():
    """A share that rises by 1e-5 a step is forecast to rise on by the part asked for."""
    steps = np.arange(3000)
    share = 0.3 + 1e-5 * steps
    counts = np.rint(np.stack([share, 1 - share], axis=1) * 10**9)
    history = LoadTrace.from_counts(counts[:, None]).layer(0)
    whole = predictor("window_mean:trend=1").fit([]).forecast(history, 500).shares

    assert np.allclose(0.3 + 1e-5 * np.arange(3000, 3500), whole[:, 0], atol=2e-5)
