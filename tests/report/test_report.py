"""Tables, figures and pages: what they show, by structure."""

import json
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from moetrace import evaluate, predictor
from moetrace.analysis.tables import course_frames, states_tables
from moetrace.forecasting.predictability import predictability_frames
from moetrace.forecasting.summary import score_frames
from moetrace.report import figures
from moetrace.report.study import files_of
from moetrace.report.tables import csv, fitting, markdown, records, shown
from moetrace.synthetic import settling, synthetic_trace


def frames_of(trace, horizons=(300, 1000)):
    """What the report of a trace is drawn from."""
    made = [predictor("window_mean"), predictor("sw_avg"), predictor("ema")]
    states, test = states_tables(trace), evaluate(trace, made, horizons)
    known = predictability_frames(trace, states["layers"], test)
    return states | course_frames(trace) | score_frames(test) | known


@pytest.fixture(scope="module")
def frames(settled):
    """Of the synthetic trace with two layers of eight experts."""
    return frames_of(settled)


@pytest.fixture(scope="module")
def many():
    """Of a synthetic trace with 14 layers of 60 experts."""
    return frames_of(synthetic_trace([settling(800, steps=2200, experts=60)] * 14, name="many"))


def labels(figure):
    """What the legends say."""
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_has_a_title_axes_with_names_and_a_legend_outside(frames, name):
    """A panel for each layer or horizon, named; the legend is the figure's, so it hides no data."""
    figure = figures.draw(frames)[name]

    assert figure.get_suptitle().startswith("settled: ")
    assert (1 if name == "states" else 2) == len(figure.axes)
    assert figure.get_supylabel() or all(axes.get_ylabel() for axes in figure.axes)
    assert labels(figure)
    assert not any(axes.get_legend() for axes in figure.axes)
    assert name == "states" or all(axes.get_title("left") or axes.get_title("center") for axes in figure.axes)


@pytest.mark.parametrize("name", figures.FIGURES)
@pytest.mark.slow
def test_many_layers_and_experts_still_fit(many, name):
    """At most twelve panels, and the title says so; nobody's name is left out of a legend by accident."""
    figure = figures.draw(many)[name]
    panels = [axes for axes in figure.axes if axes.get_title("left")]
    figure.savefig("/dev/null", format="png")

    assert len(panels) in (0, 12)
    assert not panels or "12 of 14 layers" in figure.get_suptitle()
    assert len(labels(figure)) <= 10


def test_the_settle_step_is_marked_where_there_is_one(frames):
    """Layer 0 settles, layer 1 does not."""
    first, second = figures.draw(frames)["load_share"].axes

    assert ["settles at"] == [text.get_text()[:10] for text in first.texts]
    assert 0 == len(second.texts)


def test_curves_show_the_shares_in_percent(frames):
    """Eight curves, each the frame's shares times 100."""
    axes = figures.draw(frames)["load_share"].axes[0]
    load = frames["load"]
    expected = load[(load["layer"] == 0) & (load["expert"] == 3)]["share"] * 100

    assert np.allclose(expected, axes.lines[3].get_ydata())


def test_the_papers_errors_are_drawn_only_at_its_horizons(frames):
    """Labelled as what they are."""
    short, long = figures.draw(frames)["error_bars"].axes

    assert figures.PAPER_LABEL in labels(figures.draw(frames)["error_bars"])
    assert 1.3 in [line.get_ydata()[0] for line in long.lines]
    assert [] == list(short.lines)


def test_a_figure_without_data_is_left_out(settled):
    """A trace too short to score has no error figures."""
    drawn = figures.draw(frames_of(settled, [99_999]))

    assert {"load_share", "states", "movement", "variance", "range", "predictability"} == set(drawn)


class Page(HTMLParser):
    """Collects tags and what they load."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [
            value for name, value in attrs if name in ("src", "href") and not value.startswith(("data:", "#"))
        ]


@pytest.fixture(scope="module")
def files(frames):
    """All files of the report."""
    return dict(files_of({"settled": frames}, {"seed": "0", "odd": "<script>"}))


def test_the_page_loads_nothing_and_escapes_what_it_is_told(files):
    """One file under 5 MB, every figure inside it."""
    page = Page()
    page.feed(files["report.html"].decode())

    assert [] == page.loads
    assert 9 == page.tags.count("img")
    assert len(files["report.html"]) < 5_000_000
    assert b"odd: &lt;script&gt;" in files["report.html"]


def test_markdown_and_page_show_the_same_tables(files):
    """Every figure that the Markdown names is a file beside it."""
    text = files["report.md"].decode()
    named = [part.partition(")")[0] for part in text.split("](")[1:]]

    assert set(named) == {name for name in files if name.endswith(".png")}
    assert all(
        heading in text for heading in ("## settled: states", "## settled: error rates", "## settled: imbalance")
    )


def test_saved_tables_hold_what_the_frames_hold(files, frames):
    """CSV and JSON in full precision."""
    saved = json.loads(files["settled-scores.json"])

    assert frames["scores"]["error_rate"].tolist() == [row["error_rate"] for row in saved]
    assert csv(frames["summary"]).encode() == files["settled-summary.csv"]


def test_rounding_happens_only_for_people():
    """Percentages, thousands, and a dash for what is not there."""
    frame = pd.DataFrame({"error_rate": [0.01234, np.nan], "cutoff": [12000, 7], "value": [0.123456, 1.0]})

    assert [["1.23", "12,000", "0.123"], ["-", "7", "1"]] == shown(frame).to_numpy().tolist()
    assert [0.01234, None] == [row["error_rate"] for row in records(frame)]


def test_an_interval_is_shown_with_its_middle():
    """In one column, in percent."""
    frame = pd.DataFrame(
        {"difference": [0.01, 0.02], "difference_low": [-0.02, np.nan], "difference_high": [0.03, np.nan]}
    )

    assert "| 1.00 [-2.00, 3.00] |" in markdown(frame)
    assert "| 2.00 |" in markdown(frame)


def test_a_narrow_terminal_shows_fewer_columns_and_never_half_a_number():
    """The first columns that fit, whole; an interval goes with its middle."""
    frame = pd.DataFrame(
        {
            "predictor": ["sw_avg"],
            "difference": [0.12345],
            "difference_low": [0.1],
            "difference_high": [0.2],
            "cutoff": [123_456],
        }
    )

    assert list(frame.columns) == list(fitting(frame, 80).columns)
    assert ["predictor", "difference", "difference_low", "difference_high"] == list(fitting(frame, 40).columns)
    assert ["predictor"] == list(fitting(frame, 5).columns)
