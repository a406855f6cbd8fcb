"""The answers in words: true to the frames, with their uncertainty, and honest about what was not measured."""

import pandas as pd
import pytest

from moetrace.reporting.answers import balanced, expected, predictable, settled
from moetrace.reporting.phrases import count_of, listed, percent, points


def layers(*rows):
    """A layers frame: state, outcome, settle step and the ends of its interval, one row for each layer."""
    names = ["layer", "state", "outcome", "settle_step", "settle_step_low", "settle_step_high"]
    frame = pd.DataFrame([(2 * i, *row) for i, row in enumerate(rows, 1)], columns=names)
    steps = dict.fromkeys(names[3:], "Int64")
    unsettled = frame["outcome"].map({"unsettled again": 7000})
    ends = {"unsettled_step": unsettled.astype("Int64"), "unsettled_step_high": unsettled.astype("Int64") + 100}
    return frame.assign(trace="t", detectors="agree", **ends).astype(steps)


SETTLED = ("stable", "settled", 900, 400, 1200)
LATE = ("stable", "settled", 2250, 2100, 2400)
GRADUAL = ("stable", "settled", 2250, 400, 8850)
START = ("stable", "stable from the start", 0, 0, 0)
NEVER = ("transient", "never settled", None, None, None)
AGAIN = ("transient", "unsettled again", None, None, None)
UNKNOWN = ("unknown", "unknown", None, None, None)


@pytest.mark.parametrize(
    ("rows", "number", "said"),
    [
        ([SETTLED, LATE], "2 of 2 layers", "Both layers are stable by the end. Layer 2 settled by step 900. Layer 4 settled at step 2,250."),
        (
            [SETTLED, SETTLED, GRADUAL],
            "3 of 3 layers",
            "All 3 layers are stable by the end. Two settled by step 900. Layer 6 settled gradually, around step 2,250 (plausible range 400 to 8,850).",
        ),
        ([("stable", "settled", 2250, 400, 2400)], "1 of 1 layers", "Layer 2 settled at step 2,250."),
        ([("stable", "settled", 2250, 400, 2401)], "1 of 1 layers", "Layer 2 settled gradually, around step 2,250 (plausible range 400 to 2,401)."),
        ([LATE], "1 of 1 layers", "The only layer is stable by the end. Layer 2 settled at step 2,250."),
        ([SETTLED, START, SETTLED], "3 of 3 layers", "All 3 layers are stable by the end. Layer 2 settled by step 900. Layer 6 settled at step 900."),
        ([START, START], "2 of 2 layers", "Both layers are stable from the start."),
        ([LATE, NEVER], "1 of 2 layers", "One of 2 layers is stable by the end. Layer 2 settled at step 2,250. Layer 4 never settled."),
        ([NEVER, NEVER], "0 of 2 layers", "None of 2 layers is stable by the end. No layer settles."),
        ([AGAIN], "0 of 1 layers", "Layer 2 was stable for a time, but unstable again by step 7,100."),
        ([NEVER, AGAIN], "0 of 2 layers", "Layer 4 was stable for a time, but unstable again by step 7,100."),
        ([AGAIN, AGAIN], "0 of 2 layers", "Both layers were stable for a time, but unstable again by step 7,100."),
        ([AGAIN] * 12, "0 of 12 layers", "All 12 layers were stable for a time, but unstable again by step 7,100."),
        ([NEVER, *[AGAIN] * 4], "0 of 5 layers", "Layers 4, 6, 8 and 10 were stable for a time, but unstable again by step 7,100."),
        ([NEVER, *[AGAIN] * 5], "0 of 6 layers", "5 layers (4, 6, 8, 10 and others) were stable for a time, but unstable again by step 7,100."),
        ([UNKNOWN], "0 of 1 layers", "Stability unknown for the only layer: too few rows, or rows too far apart."),
        ([UNKNOWN, UNKNOWN], "0 of 2 layers", "Stability unknown for all 2 layers: too few rows, or rows too far apart."),
        ([NEVER, UNKNOWN], "0 of 2 layers", "Layer 4: stability unknown (too few rows, or rows too far apart)."),
    ],
)  # fmt: skip
def test_settled_counts_layers_and_names_the_exceptions(rows, number, said):
    """How many are stable, since when the last one is, and which are not."""
    answer = settled(layers(*rows))

    assert number == answer.number
    assert answer.sentence.endswith(said)


@pytest.mark.parametrize(
    ("rows", "evidence"), [([START, START], "the rank test"), ([START, LATE], "layer 4 settled between 2,100")]
)
def test_only_a_layer_that_settles_has_an_interval(rows, evidence):
    """What was stable from the start is not said to have settled between 0 and 0."""
    assert settled(layers(*rows)).evidence.startswith(evidence)


def summary(*rows):
    """A summary frame: predictor, state, error, difference with its ends, and how many scores it is the mean of."""
    names = ["predictor", "state", "error_rate", "difference", "difference_low", "difference_high", "scored"]
    frame = pd.DataFrame(rows, columns=names)
    return frame.assign(trace="t", horizon=1000, error_noise=0.006, coverage_80=0.79, too_short=0)


BASE = ("window_mean", "stable", 0.0172, 0.0, 0.0, 0.0, 35)
CLEAR = ("arima", "stable", 0.012, -0.0052, -0.007, -0.003, 35)
LUCKY = ("ema", "stable", 0.011, -0.0062, -0.03, 0.02, 35)
UNCLEAR = ("auto", "stable", 0.0162, -0.001, -0.003, 0.001, 35)
NO_INTERVAL = ("auto", "stable", 0.0046, -0.0126, float("nan"), float("nan"), 2)
EARLY = ("auto", "transient", 0.09, -0.1, -0.15, -0.05, 9)
NOTHING = ("auto", "stable", float("nan"), float("nan"), float("nan"), float("nan"), 0)


@pytest.mark.parametrize(
    ("rows", "number", "said"),
    [
        ([BASE, UNCLEAR], "1.62% error", "Stable phase: no predictor clearly beats the 1,000-step mean (error 1.72%, noise floor 0.60%)."),
        ([BASE, CLEAR], "1.20% error", "arima clearly beats the 1,000-step mean: 1.20% error instead of 1.72% (noise floor 0.60%)."),
        ([BASE, CLEAR, LUCKY], "1.10% error", "arima clearly beats the 1,000-step mean: 1.20% error instead of 1.72% (noise floor 0.60%)."),
        ([UNCLEAR], "1.62% error", "auto has 1.62% error (noise floor 0.60%), no clear difference from the 1,000-step mean."),
        ([CLEAR], "1.20% error", "arima has 1.20% error (noise floor 0.60%), -0.52 points [-0.70, -0.30] compared with the 1,000-step mean."),
        ([BASE], "1.72% error", "Stable phase: window_mean has 1.72% error (noise floor 0.60%)."),
        ([BASE, NO_INTERVAL], "0.46% error", "too few cutoffs to compare predictors with the 1,000-step mean (error 1.72%, noise floor 0.60%); auto has 0.46% error."),
        ([EARLY], "9.0% error, transient", "Nothing could be evaluated in a stable phase."),
        ([NOTHING], "not measured", "Not measured: no cutoff of this trace can be evaluated 1,000 steps ahead."),
    ],
)  # fmt: skip
def test_predictable_speaks_of_what_was_scored(rows, number, said):
    """The best beside the baseline; where their interval holds 0 neither is called better."""
    answer = predictable(summary(*rows), 1000)

    assert number == answer.number
    assert answer.sentence.endswith(said)


def test_a_history_that_is_too_short_is_called_so():
    """Where a horizon could be scored, and no predictor had the history, the horizon is not to blame."""
    answer = predictable(summary(NOTHING).assign(too_short=4), 1000)

    assert "Not measured: every cutoff has less history than any of the predictors needs." == answer.sentence


def test_the_number_of_scores_is_the_evidence():
    """By state, with what the intervals held."""
    answer = predictable(summary(BASE, UNCLEAR, EARLY), 1000)

    assert (
        "errors are means over 35 (stable) or 9 (transient) pairs of layer and cutoff; brackets are 95% intervals. The 80% prediction intervals of the predictor with the lowest error covered the load in 79% (stable, auto) and 79% (transient, auto)"
        == answer.evidence
    )


def test_balanced_names_the_hottest_expert_of_the_worst_layer():
    """The most severe first, then the highest peak; how many experts idle, and what to do where it is severe."""
    frame = pd.DataFrame(
        {
            "layer": [2, 4], "steps": 1000, "hottest": [1, 5], "max_over_mean": [5.2, 3.1], "idle": [0, 2],
            "severity": ["moderate", "severe"], "hottest_share": [0.2, 0.3], "in_use": 0.5, "since": [None, 700],
        }
    )  # fmt: skip

    sentence = balanced(frame).sentence

    assert sentence.startswith(
        "Severe imbalance in layer 4: expert 5 gets 3.1x the mean load (30% of the tokens), since step 700. 2 experts got "
        "no token at all. When training, raise the balancing loss"
    )
    assert balanced(frame[:1]).sentence == (
        "Moderate imbalance in layer 2: expert 1 gets 5.2x the mean load (20% of the tokens)."
    )
    several = balanced(frame.assign(severity="severe")).sentence
    assert several.startswith("Severe imbalance in 2 layers, most in layer 2: expert 1 gets 5.2x")
    collapsed = frame.assign(severity="collapsed")
    assert "since step 700. So has layer 2. 2 experts" in balanced(collapsed.assign(max_over_mean=[3, 4])).sentence
    three = pd.concat([collapsed, collapsed[:1].assign(layer=6)])
    assert "the tokens). So have layers 6 and 4. 2 experts" in balanced(three).sentence


@pytest.mark.parametrize(
    ("fraction", "said"), [(0.0162, "1.62%"), (0.0299, "2.99%"), (0.03, "3.0%"), (0.187, "18.7%"), (0, "0.00%")]
)
def test_percentages_have_three_digits(fraction, said):
    """Two decimals below 3%, one above."""
    assert said == percent(fraction)


@pytest.mark.parametrize(
    ("middle", "low", "high", "said"),
    [
        (-0.091, -0.155, -0.036, "-9.1 points [-15.5, -3.6]"),
        (0.0052, 0.001, 0.009, "+0.52 points [+0.10, +0.90]"),
        (0.0052, -0.001, 0.009, "no clear difference"),
        (0.0052, float("nan"), float("nan"), "+0.52 points"),
        (float("nan"), float("nan"), float("nan"), "-"),
    ],
)
def test_a_difference_whose_interval_holds_zero_is_none(middle, low, high, said):
    """In percentage points, with the interval where it has one."""
    assert said == points(middle, low, high)


def test_lists_and_counts_read_as_english():
    """One layer, two layers; the rest of a long list is counted."""
    assert ("one layer", "1,200 layers") == (count_of(1, "layer").replace("1", "one"), count_of(1200, "layer"))
    assert ("2", "2 and 4", "2, 4 and 6") == (listed([2]), listed([2, 4]), listed([2, 4, 6]))
    assert "2, 4, 6, 8 and 2 more" == listed([2, 4, 6, 8, 10, 12])


def test_the_expected_error_is_that_of_the_best_predictor():
    """The best while the load is stable; the mean over layers at that horizon. Nothing is said where it is unknown."""
    rows = [("a", 1000, "stable", 5, 0.02), ("b", 1000, "stable", 5, 0.01), ("b", 1000, "transient", 5, 0.2),
            ("a", 1000, "transient", 5, 0.1), ("a", 2000, "stable", 5, 0.001), ("c", 1000, "stable", 0, 0.001)]  # fmt: skip
    summary = pd.DataFrame(rows, columns=["predictor", "horizon", "state", "scored", "error_rate"])
    ahead = pd.DataFrame({"predictor": list("aabb"), "expected_error": [0.5, 0.5, 0.03, 0.05]})

    assert (
        "Expected error over the 1,000 steps after the trace, from how the load changes at its end: 4.0% (b)."
        == expected(ahead, summary, 1000)
    )
    assert "at its end: 50" in expected(ahead, summary, 3000)
    assert "" == expected(ahead.assign(expected_error=float("nan")), summary, 1000)
