"""What a command shows first fits a terminal, is sorted, and says what it leaves out."""

import io

import numpy as np
import pandas as pd
import pytest
from reporting.test_answers import BASE, CLEAR, EARLY, NEVER, SETTLED, layers, summary
from rich.console import Console

from moetrace.reporting.screens import (
    MOST_ROWS,
    place_screen,
    predict_screen,
    rendered,
    states_screen,
    traces_screen,
)


def text_of(screen, width=100, **more):
    """The screen as a terminal of that width shows it."""
    text = io.StringIO()
    Console(file=text, width=width, no_color=True, highlight=False).print(*rendered(screen, **more), sep="\n")
    return text.getvalue()


def moved(frame):
    """The same layers, with how far they moved, and a balanced load."""
    health = {"severity": "ok", "max_over_mean": 1.5, "hottest": 3, "hottest_share": 0.2, "idle": 0, "in_use": 0.9}
    return frame.assign(movement_before=0.1065, movement_after=0.0322, **health, since=pd.NA)


def test_states_have_one_line_for_each_layer_and_one_for_the_headings():
    """Settle step, interval and movement before and after."""
    text = text_of(states_screen(moved(layers(SETTLED, NEVER)), every=False))

    assert ["2", "ok", "3:", "1.5x", "0", "900", "400", "-", "1,200", "10.7%", "->", "3.2%", "agree"] in [
        line.split() for line in text.splitlines()
    ]
    assert ["4", "ok", "3:", "1.5x", "0", "never", "-", "10.7%", "agree"] in [
        line.split() for line in text.splitlines()
    ]
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.slow
def test_of_many_layers_those_that_need_a_look_come_first():
    """The unsettled first; twelve rows, the rest is counted, and --all shows them."""
    frame = moved(layers(*[SETTLED] * 19, NEVER))
    screen, whole = (states_screen(frame, every=every) for every in (False, True))

    assert MOST_ROWS == len(screen.columns[0][1])
    assert "40" == screen.columns[0][1][0]
    assert "8 more: --all" in text_of(screen)
    assert [str(layer) for layer in frame["layer"]] == list(whole.columns[0][1])
    frame.loc[4, "severity"] = "severe"
    assert str(frame["layer"][4]) == states_screen(frame, every=False).columns[0][1][0]


def test_predictors_are_sorted_by_their_error_while_stable():
    """The best first; each beside the baseline, in each state that was scored."""
    screen = predict_screen(summary(BASE, CLEAR, EARLY), 1000, every=False)
    table = dict(screen.columns[:3])

    assert ["arima", "window_mean", "auto"] == table["predictor"]
    assert ["1.20%", "1.72%", "too short"] == table["stable"]
    assert ["-0.52 points [-0.70, -0.30]", "(baseline)", "-"] == table["vs window_mean"]
    assert ["predictor", "stable", "vs window_mean", "transient", "vs window_mean"] == [
        name for name, _ in screen.columns
    ]


@pytest.mark.parametrize(("every", "hidden"), [(False, 2), (True, 0)])
def test_of_many_predictors_the_best_are_shown(every, hidden):
    """All of them if asked for."""
    rows = [(f"p{i:02}", "stable", 0.01 + i / 1000, 0.001, 0.0, 0.002, 9) for i in range(MOST_ROWS + 2)]
    screen = predict_screen(summary(*rows[::-1]), 1000, every=every)

    assert ([f"p{i:02}" for i in range(MOST_ROWS + 2 - hidden)], hidden) == (screen.columns[0][1], screen.hidden)


def test_a_text_in_brackets_is_no_markup():
    """Names are shown as they are."""
    frame = pd.DataFrame(
        {"trace": ["[red]x"], "first_step": [0], "last_step": [9], "layers": [1], "experts": [2], "tokens_per_step": [np.nan],
         "format": ["csv"], "imbalance": ["ok"], "findings": [""]}
    )  # fmt: skip

    assert "[red]x" in text_of(traces_screen(frame, "[b]", every=True))


@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_terminal_without_box_characters_gets_none(ascii_only):
    """ASCII only where the encoding has no more."""
    text = text_of(states_screen(moved(layers(SETTLED)), every=False), ascii_only=ascii_only)

    assert ascii_only == text.isascii()


def traces(*names):
    """A traces frame of traces of those names."""
    facts = {"first_step": 0, "last_step": 11_999, "layers": 58, "experts": 256, "tokens_per_step": 1_234_567}
    return pd.DataFrame(
        [{"trace": name, **facts, "format": "parquet", "imbalance": "ok", "findings": "none"} for name in names]
    )


def test_a_long_name_cuts_no_number_short():
    """The name takes more lines, all of it is there, and every other cell is whole."""
    name = "expert_distribution_recorder_1700000001.25_of_a_run_with_a_name_that_goes_on_and_on_and_on"
    text = text_of(traces_screen(traces(name), "", every=False))
    lines = text.splitlines()

    assert any(line.split()[-7:] == ["0-11,999", "58", "256", "1,234,567", "parquet", "ok", "none"] for line in lines)
    assert name == "".join(line[1:].split()[0] for line in lines if line.startswith(" ") and "trace" not in line)
    assert "…" not in text


@pytest.mark.parametrize(
    ("states", "shown"),
    [
        (["stable"], ["stable"]),
        (["unknown"], ["state unknown"]),
        (["transient", "unknown"], ["transient", "state unknown"]),
        (["stable", "transient", "unknown"], ["stable", "transient", "state unknown"]),
    ],
)
def test_plans_have_numbers_whatever_the_states_were(states, shown):
    """A trace too short to tell a state has plans all the same; beside a state that is known they are left out."""
    rows = [
        {"trace": "t", "horizon": 500, "strategy": name, "state": state, "peak_over_mean": 1.25, "moved": 0.5}
        for name in ("default", "level", "oracle")
        for state in (*states, "all")
    ]
    screen = place_screen(pd.DataFrame(rows), "said", every=False)

    assert f"{rows[0]['trace']}: said" == screen.sentence
    assert ["plan by", *shown, *(f"moved, {state}" for state in shown)] == [heading for heading, _ in screen.columns]
    assert all(cells == ["1.25x"] * 3 for heading, cells in screen.columns if heading in shown)
    assert ("unknown" in states) == ("State unknown: too few earlier steps to judge that layer." in screen.notes[0])
