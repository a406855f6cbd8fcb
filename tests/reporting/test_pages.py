"""Parts of the page: the values under the pointer, the messages of figures, and its tables."""

import json

import numpy as np
import pandas as pd
import pytest

from moetrace.reporting import pages
from moetrace.reporting.figures import FIGURES, possible
from moetrace.reporting.pages import Section, TracePage, as_markdown, grid, values_of
from moetrace.reporting.paper import FIGURES as PAPER
from moetrace.reporting.style import one_panel


def test_values_are_the_points_of_curves_at_their_places():
    """In parts of 10,000 from the left and the top; thresholds and points that are no numbers are left out."""
    figure, axes = one_panel(4, 2)
    axes.plot([0, 5, 10], [0.0, np.nan, 1234.5678], label="_busiest")
    axes.plot([0, 10], [0.123456, 1.0])
    axes.axhline(3)
    axes.set(xlabel="step", ylabel="load", xlim=(0, 10), ylim=(0, 2000), position=(0.1, 0.2, 0.8, 0.6))

    (panel,) = json.loads(values_of(figure))

    assert ("step", "load", {"x", "y", "curves"}) == (panel["x"], panel["y"], set(panel))
    (busiest, first), (unnamed, second) = panel["curves"]
    assert ("busiest", "") == (busiest, unnamed)
    assert [[1000, 8000, 0.0, 0.0], [9000, 4296, 10.0, 1235]] == first
    assert [0.0, 0.1235] == second[0][2:]


def test_values_of_a_map_have_the_colour_of_each_cell():
    """At the middle of the cell; names of rows and of the colour are those of the axes."""
    figure, axes = one_panel(4, 2)
    mesh = axes.pcolormesh([0, 2, 4], [0, 1], [[1.5, 2.5]])
    axes.set_yticks([0.5], ["7"])
    figure.colorbar(mesh, label="times")

    (panel,) = json.loads(values_of(figure))

    ((_, cells),) = panel["curves"]
    assert ({"0.5": "7"}, "times") == (panel["names"], panel["z"])
    assert [[1.0, 0.5, 1.5], [3.0, 0.5, 2.5]] == [cell[2:] for cell in cells]


def test_of_long_curves_every_nth_point_is_kept(monkeypatch):
    """As few as the page may have; cells of a map stay."""
    monkeypatch.setattr(pages, "MOST_POINTS", 10)
    figure, axes = one_panel(4, 2)
    axes.plot(range(21), range(21))

    (panel,) = json.loads(values_of(figure))

    assert [0.0, 3.0, 6.0, 9.0, 12.0, 15.0, 18.0] == [point[2] for point in panel["curves"][0][1]]
    assert [] == json.loads(values_of(one_panel(4, 2)[0]))


def test_a_table_shows_its_first_rows_and_how_many_follow(monkeypatch):
    """Headings in words; the columns that hold no numbers are known."""
    monkeypatch.setattr(pages, "MOST_ROWS", 2)
    frame = pd.DataFrame({"settle_step": [1, 2, 3], "state": ["stable"] * 3, "error_rate": [0.5, 0.25, 0.1]})

    table = grid(frame)

    assert ["settle step", "state", "error rate %"] == table.headings
    assert [["1", "stable", "50.00"], ["2", "stable", "25.00"]] == table.rows
    assert ([1], 1) == (table.words, table.more)
    assert 0 == grid(frame.head(2)).more


def test_markdown_has_the_first_rows_of_a_table_and_says_how_many_follow(monkeypatch):
    """And nothing where all are there."""
    monkeypatch.setattr(pages, "MOST_ROWS", 2)
    tables = {"Short": pd.DataFrame({"n": [1, 2]}), "Long": pd.DataFrame({"n": [3, 4, 5]})}
    page = TracePage("t", "trace-1", "facts", [], [], [], [], [], 0, [Section("Title", "Text.", tables)])

    text = as_markdown("Load", [page], {"seed": "0"}, ["a and b are alike"])

    lines = [line for line in text.splitlines() if line]
    assert ["# Load", "## Do they have the same load?", "- a and b are alike", "## t", "facts"] == lines[:5]
    table = lines[lines.index("### Title") : lines.index("## Definitions")]
    rows = ["| n |", "| ---: |"]
    assert ["### Title", "Text.", "**Short**", *rows, "| 1 |", "| 2 |"] == table[:7]
    assert ["**Long**", *rows, "| 3 |", "| 4 |", "And 1 more rows, in the files."] == table[7:]
    assert ["## How this was made", "- seed: 0"] == lines[-2:]


@pytest.mark.parametrize(("scored", "there"), [([0, 1], True), ([0, 0], False), ([], False)])
def test_a_figure_needs_rows_and_scores(scored, there):
    """One of which nothing was scored is left out."""
    scores = pd.DataFrame({"scored": scored})

    found = possible(FIGURES, {"course": pd.DataFrame({"n": [1]}), "summary": scores})

    assert ({"errors", "predictors"} if there else set()) == set(found)


SUMMARY = pd.DataFrame(
    [("a", 1000, "transient", 4, 0.1), ("a", 1000, "all", 4, 0.1), ("b", 1000, "all", 4, 0.2), ("b", 500, "all", 0, 0.0)],
    columns=["predictor", "horizon", "state", "scored", "error_rate"],
)  # fmt: skip
COURSE = pd.DataFrame(
    [("a", 1000, 500, 0.2), ("a", 1000, 1500, 0.05), ("a", 1000, 2500, np.nan), ("b", 1000, 500, 0.3), ("a", 2000, 500, 0.4)],
    columns=["predictor", "horizon", "cutoff", "error_rate"],
)  # fmt: skip
PLANS = pd.DataFrame(
    [("default", 1.4, "all"), ("level", 1.2, "all"), ("ema", 1.25, "all"), ("ema", 1.0, "stable"), ("oracle", 1.1, "all")],
    columns=["strategy", "peak_over_mean", "state"],
).assign(gpus=8)  # fmt: skip
VERDICT = pd.DataFrame({"worth_from": [0.5], "ridge": [200.0], "hardware": ["h200"], "tokens_per_expert": [33.0]})


@pytest.mark.parametrize(
    ("figure", "frames", "message"),
    [
        (
            "peaks",
            {"balance": pd.DataFrame({"layer": [1, 4], "max_over_mean": [2.0, 3.14]})},
            "Layer 4 is the most uneven now: its hottest expert has 3.1x the mean load",
        ),
        (
            "errors",
            {"course": COURSE, "summary": SUMMARY},
            "The error of a over the next 1,000 steps goes from 20.0% at step 500 to 5.0% at step 1,500",
        ),
        (
            "placement",
            {"placement": PLANS},
            "On 8 GPUs plans by level lower the busiest GPU from 1.40x to 1.20x of the mean load",
        ),
        (
            "knee",
            {"verdict": VERDICT},
            "On H200, a plan saves 5% or more if experts get at least about 100 tokens per pass on average",
        ),
        ("knee", {}, "A plan saves less than 5% at every number of tokens per expert"),
        (
            "predicted",
            {"last_shares": pd.DataFrame({"horizon": [2000], "cutoff": [9000]})},
            "Predicted and actual share of the 2,000 steps after 9,000",
        ),
    ],
)
def test_a_figure_says_what_it_shows(figure, frames, message):
    """The message of each figure that has numbers in it."""
    assert message == {**FIGURES, **PAPER}[figure].message(frames)
