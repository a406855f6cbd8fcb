"""Resident sets in words and figures."""

import numpy as np
import pandas as pd
import pytest

from moetrace.reporting.residency import ages, coverage, kept, kept_notes
from moetrace.reporting.screens import kept_screen

ANSWER = {
    "trace": "t", "best": "level", "allocation": "equal", "slots": 32.0, "layers": 12, "experts": 128, "above_mean": 38, "horizon": 1000,
    "refresh": 100, "worth": "compute", "hit_rate": 0.677, "hit_rate_low": 0.6, "hit_rate_high": 0.75, "active_hit_rate": 0.267, "worst_layer": 0.6,
    "active": 120.3, "tokens": 32.6, "hindsight": 0.684, "by_load_adds": 0.002, "refresh_adds": -0.0001, "lru_adds": 0.0213, "lru": 0.26, "oracle": 0.28,
    "ends": "stable", "holds": 4000, "reach": 9500,
}  # fmt: skip
NAN = float("nan")
NONE = pd.DataFrame(columns=["layer"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {},
            "Keeping 32 of 128 experts per layer covers 67.7% of token choices (95% interval 60.0 to 75.0%), but only "
            "26.7% of the experts active in a step: with 33 tokens per expert and step, nearly all experts are active. "
            "Worth it if a CPU computes the other experts, not if they are loaded.",
        ),
        (
            {"active": 90.0, "hit_rate_low": NAN},
            "Keeping 32 of 128 experts per layer covers 67.7% of token choices, but only 26.7% of the experts active "
            "in a step. Worth it if a CPU computes the other experts, not if they are loaded.",
        ),
        (
            {"worth": "loading", "active": 8.0, "active_hit_rate": 0.6, "hit_rate_low": NAN},
            "Keeping 32 of 128 experts per layer covers 67.7% of token choices and 60.0% of the experts active in a "
            "step. Worth it: a step loads 3.2 instead of 8.0 experts per layer.",
        ),
        (
            {"worth": "cache", "hit_rate_low": NAN, "lru": 0.664},
            "Keeping 32 of 128 experts per layer covers 67.7% of token choices and 26.7% of the experts active in a "
            "step. An LRU cache of that size has 66.4% of them: the hot experts change too fast for a fixed set.",
        ),
        (
            {"worth": "neither", "hit_rate": 0.27, "hit_rate_low": NAN},
            "Keeping 32 of 128 experts per layer covers 27.0% of token choices and 26.7% of the experts active in a "
            "step; as many experts taken at random would cover 25.0%. Not worth it: no experts are hot enough.",
        ),
        (
            {"worth": "unknown", "allocation": "by_load", "hit_rate_low": NAN},
            "Keeping 384 of 1,536 experts, divided over the layers by load, covers 67.7% of token choices and 26.7% of "
            "the experts active in a step. Not enough evidence for a verdict: record more steps.",
        ),
    ],
)
def test_the_answer_is_graded_and_says_what_is_covered(changes, sentence):
    """Both rates, and what that is good for."""
    assert sentence == kept(ANSWER | changes).sentence


def test_notes_say_how_long_a_set_holds_and_what_is_left():
    """The knee, the gains with their sign, and the bound for every forecast."""
    knee, gains, left, order = kept_notes(ANSWER, NONE, NONE)

    assert "About 38 experts per layer" in knee
    assert "A set chosen while the load is stable covers at most 1 point less than a new one for 4,000 steps." in knee
    assert "+0.0 points by a set chosen anew every 100 steps, +2.1 by an LRU cache" in gains
    assert "+0.2 by as many slots, divided unequally over the layers." in gains
    assert "covers 68.4%, so that a better forecast can gain at most 0.7 points." in left
    assert "an LRU cache holds 26.0%, a cache with perfect foresight 28.0%." in left
    assert "the order of its tokens is unknown" in order
    assert "for 9,500 steps, as far as the trace shows" in kept_notes(ANSWER | {"holds": None}, NONE, NONE)[0]
    assert "A set covers" in kept_notes(ANSWER | {"ends": "unknown"}, NONE, NONE)[0]
    assert "unequally" not in kept_notes(ANSWER | {"by_load_adds": None}, NONE, NONE)[1]
    assert 3 == len(kept_notes(ANSWER | {"tokens": 0.0625, "active": 8.0}, NONE, NONE))


def test_cold_experts_come_with_their_cost_and_a_warning():
    """Of the sets without them."""
    cold = pd.DataFrame({"layer": [2, 2, 4, 4]})
    curve = pd.DataFrame({"slots": [126, 127], "hit_rate": [0.985, 0.99], "worst_layer": [0.98, 0.96]})
    note = kept_notes(ANSWER, cold, curve)[-1]

    assert "Removing the 2 coldest experts of every layer would have cost 1.5% of the token choices" in note
    assert "2.0% in the worst layer. An expert that is cold in this trace may be one that another workload" in note


def row(method, hit_rate, **changes):
    """A row of the summary."""
    return {
        "method": method, "allocation": "equal", "slots": 32.0, "state": "all", "hit_rate": hit_rate, "hit_rate_low": NAN,
        "hit_rate_high": NAN, "active_hit_rate": 0.3, "loads": 88.0, "ms_per_step": NAN,
    } | changes  # fmt: skip


def test_the_screen_has_forecasts_first_then_caches_then_oracles():
    """The best first, only of the slots that were asked for, and a column of milliseconds where they are known."""
    rows = [
        row("oracle", 0.9), row("lru", 0.6), row("ema", 0.5), row("level", 0.7), row("level", 0.71, allocation="by_load"),
        row("level", 0.3, slots=16.0), row("level", 0.6, state="stable"), row("oracle_static", 0.8), row("refreshed", 0.65),
    ]  # fmt: skip
    frames = {"summary": pd.DataFrame(rows), "cold": NONE, "curve": NONE}
    columns = dict(kept_screen(ANSWER, frames).columns)

    assert [
        "set by level, unequal slots", "set by level", "set by ema", "set refreshed every 100 steps", "LRU cache",
        "best set in hindsight", "cache with perfect foresight",
    ] == columns["experts kept"]  # fmt: skip
    assert "ms/step" not in columns
    timed = frames | {"summary": frames["summary"].assign(ms_per_step=12.345)}
    assert ["12.3"] * 7 == dict(kept_screen(ANSWER, timed).columns)["ms/step"]
    assert () == tuple(kept_screen(ANSWER, frames | {"summary": frames["summary"].iloc[:0]}).columns)


def test_figures_show_what_the_frames_have():
    """Coverage by the number of experts, and by the age of a set."""
    slots = np.arange(1, 5)
    names = ("hit_rate", "active_hit_rate", "median_layer", "worst_layer", "hindsight")
    (axes,) = coverage(pd.DataFrame({"slots": slots, **dict.fromkeys(names, slots / 4)}), 2).axes
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    frame = pd.DataFrame(
        {"method": ["a", "b", "a", "a"], "state": ["all", "all", "all", "stable"], "age": [0, 0, 500, 0], "lost": [0, 0.1, 0.02, 0.03]}
    )  # fmt: skip
    (aged,) = ages(frame, "a").axes
    lost = {line.get_label(): list(line.get_ydata()) for line in aged.get_lines()}

    assert [25.0, 50.0, 75.0, 100.0] == curves["median layer"] == curves["best set in hindsight"]
    assert ([0.0, 2.0], [3.0]) == (lost["all sets"], lost["chosen while stable"])


def test_what_was_not_tested_is_said():
    """Coverage of the trace itself is no promise."""
    untested = ANSWER | {"worth": "untested", "hit_rate_low": float("nan")}

    assert kept(untested).sentence.endswith(
        "of this trace. Not tested: it has too few steps, or steps too far apart, to score a set on what followed."
    )
    assert 1 == len(kept_notes(untested, NONE, NONE))
