"""Tables, figures and pages: what they show, by structure."""

import io
import json
import re
from html.parser import HTMLParser
from io import StringIO
from itertools import islice, pairwise
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Annotation, Text
from rich.console import Console

from moetrace import Planning, SettingError, predictor, study
from moetrace.placement.study import place, placement_frames
from moetrace.reporting import figures, paper
from moetrace.reporting.answers import answers_of
from moetrace.reporting.figures import knee
from moetrace.reporting.study import files_of
from moetrace.reporting.style import BLUE, GREEN, GREY, INK, Look, log_scale, new_figure, picture, styled
from moetrace.reporting.tables import GAP, csv, fitting, markdown, records, shown, terminal
from moetrace.residency.study import hot, residency_frames
from moetrace.synthetic import settling, synthetic_trace

pytestmark = pytest.mark.slow


def frames_of(trace, horizons=(300, 1000), gpus=None):
    """What the report of a trace is drawn from."""
    made = [predictor("window_mean"), predictor("sw_avg"), predictor("ema")]
    frames = study(trace, made, horizons).frames
    return frames if gpus is None else frames | placement_frames(place(trace, made, Planning(gpus), 300))


@pytest.fixture(scope="module")
def frames(settled):
    """Of the synthetic trace with two layers of eight experts."""
    return frames_of(settled, gpus=4) | residency_frames(hot(settled))


@pytest.fixture(scope="module")
def many():
    """Of a synthetic trace with 14 layers of 60 experts."""
    return frames_of(synthetic_trace([settling(800, steps=2200, experts=60)] * 14, name="many"))


ALL = {**figures.FIGURES, **paper.FIGURES}


def drawn(name, frames):
    """The figure of that name."""
    with styled():
        return ALL[name].draw(frames)


def labels(figure):
    """What the legends say, and the names beside the curves."""
    named = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return named + [text.get_text() for axes in figure.axes for text in axes.texts if text.arrow_patch]


@pytest.mark.parametrize("name", ALL)
def test_every_figure_has_a_message_and_names_its_axes(frames, name):
    """The legend is the figure's, so it hides no data."""
    figure = drawn(name, frames)

    assert len(ALL[name].message(frames)) > 15
    assert figure.get_supylabel() or figure.axes[0].get_ylabel() or figure.axes[0].get_yticklabels()
    assert all(axes.get_xlabel() or len(figure.axes) > 1 for axes in figure.axes)
    assert name != "predictability" or {"error rate (%)"} == {axes.get_ylabel() for axes in figure.axes}
    assert not any(axes.get_legend() for axes in figure.axes)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("placement", "knee", "kept", "ages")])
@pytest.mark.thorough
def test_many_layers_and_experts_still_fit(many, name):
    """At most twelve panels, and an axis says so; nobody's name is left out of a legend by accident."""
    figure = drawn(name, many)
    panels = [axes for axes in figure.axes if axes.get_title("left")]
    figure.savefig("/dev/null", format="png")

    assert len(panels) in (0, 12)
    assert not panels or "12 of 14 layers" in figure.get_supylabel()
    assert len(labels(figure)) <= 10


def test_the_map_has_a_row_for_each_layer_and_the_shares_of_the_frame(frames):
    """The peak is the share of the hottest expert times their number."""
    mesh = drawn("peaks", frames).axes[0].collections[0]
    expected = frames["peaks"].pivot_table(index="layer", columns="step", values="peak_over_mean")

    assert np.allclose(expected, mesh.get_array())


def test_layers_that_never_settle_are_drawn_as_such(frames):
    """Layer 0 has a settle step and an interval, layer 1 a mark at the end."""
    axes = drawn("settling", frames).axes[0]

    assert ["0", "1"] == [label.get_text() for label in axes.get_yticklabels()]
    assert "not stable at the end" in labels(axes.figure)


def test_colours_belong_to_meanings(frames):
    """The baseline is black and the best predictor blue in every figure, whatever their order."""
    by_label = {line.get_label(): line.get_color() for line in drawn("errors", frames).axes[0].lines}
    plans = {line.get_label(): line.get_color() for line in drawn("placement", frames).axes[0].lines}

    assert INK == by_label["window_mean"] == plans["planned by window_mean"]
    assert BLUE in by_label.values()
    assert GREEN == plans["perfect forecast"]
    axes = drawn("predictors", frames).axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    dots = {names[int(line.get_ydata()[0])]: line.get_color() for line in axes.lines if line.get_marker() == "o"}
    assert {INK, BLUE, GREY} == set(dots.values())
    assert INK == dots["window_mean"]


def test_the_settle_step_is_marked_where_there_is_one(frames):
    """Layer 0 settles, layer 1 does not."""
    first, second = drawn("load_share", frames).axes

    assert ["settles at"] == [text.get_text()[:10] for text in first.texts]
    assert 0 == len(second.texts)


def test_curves_show_the_shares_in_percent(frames):
    """Eight curves, each the frame's shares times 100."""
    axes = drawn("load_share", frames).axes[0]
    load = frames["load"]
    expected = load[(load["layer"] == 0) & (load["expert"] == 3)]["share"] * 100

    assert np.allclose(expected, axes.lines[3].get_ydata())


def test_errors_have_one_best_predictor_in_every_panel(frames):
    """Its colour has one name, also where another is the best over a longer horizon."""
    summary = frames["summary"].copy()
    shortest, longest = summary["horizon"].min(), summary["horizon"].max()
    worst = summary[summary["horizon"] == longest].groupby("predictor")["error_rate"].mean().idxmax()
    summary.loc[(summary["horizon"] == longest) & (summary["predictor"] == worst), "error_rate"] = 0.0
    figure = drawn("errors", dict(frames) | {"summary": summary})
    named = [{line.get_label() for line in axes.lines if line.get_color() == BLUE} for axes in figure.axes]

    assert shortest < longest
    assert 1 == len(named[0])
    assert len(figure.axes) * [named[0]] == named
    assert ["next 300 steps", "next 1,000 steps"] == [axes.get_title() for axes in figure.axes]
    assert ["error rate (%)", ""] == [axes.get_ylabel() for axes in figure.axes]
    assert named[0] < set(labels(figure))


def test_every_strategy_is_drawn_once(frames):
    """Also where the best is the baseline, which has a curve of its own."""
    with styled():
        named = labels(figures.plan_course(frames["plan_scores"], "window_mean"))

    assert sorted(set(named)) == sorted(named)
    assert "planned by window_mean" in named


@pytest.mark.parametrize("names", [1, 5, 9])
def test_names_beside_curves_are_apart(frames, names):
    """In the order of the last points, none over another, each in the picture; in a column of paper it is a legend."""
    scores = frames["plan_scores"]
    one = scores[scores["strategy"] == "sw_avg"]
    near = [one.assign(strategy=f"own{i}", peak_over_mean=1.2 + i / 1000) for i in range(names)]
    with styled():
        figure = figures.plan_course(pd.concat([scores, *near]), "ema")
        figure.draw_without_rendering()
    beside = sorted((t for t in figure.axes[0].texts if isinstance(t, Annotation)), key=lambda text: text.xy[1])
    boxes = [Text.get_window_extent(text) for text in beside]

    assert [f"own{i}" for i in range(names)] == [own for text in beside if (own := text.get_text())[:3] == "own"]
    assert all(lower.y1 <= upper.y0 + 0.5 for lower, upper in pairwise(boxes))
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert not figure.legends
    with styled(Look.of("3.3in", None)):
        assert names < len(figures.plan_course(pd.concat([scores, *near]), "ema").legends[0].get_texts())


def test_the_error_at_a_single_cutoff_goes_nowhere(frames):
    """The heading says where it is, not from where to where."""
    course = frames["course"]
    alone = dict(frames) | {"course": course[course["cutoff"] == course["cutoff"].min()]}

    assert " goes from " in ALL["errors"].message(frames)
    assert " steps is " in ALL["errors"].message(alone)


def test_a_course_shows_the_hottest_experts_and_the_rest_as_a_band(frames):
    """Five curves with names, and the quantiles of the other three experts."""
    hottest = frames["hottest"][frames["hottest"]["layer"] == 0]
    with styled():
        figure = figures.course(hottest)
    named = [label for label in labels(figure) if label.startswith("expert ")]

    assert {f"expert {name}" for name in hottest["series"].unique()[:5]} == set(named)
    assert "80% of the others" in labels(figure)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0.8, 12.0), ["1", "2", "5", "10"]),
        ((0.05, 0.6), ["0.05", "0.1", "0.2", "0.5"]),
        ((0.001, 1.0), ["0.001", "0.01", "0.1", "1"]),
    ],
)
def test_a_logarithmic_axis_has_a_few_round_numbers(ends, expected):
    """Whether it spans a part of a power of ten, or many."""
    figure = new_figure(4, 3, (0.5, 0.1, 0.5, 0.1))
    axes = figure.add_subplot()
    axes.plot([0, 1], ends)
    axes.set_ylim(ends)
    log_scale(axes)
    axes.set_ylim(ends)
    figure.draw_without_rendering()

    shown = [(tick.get_loc(), tick.label1.get_text()) for tick in axes.yaxis.get_major_ticks()]
    assert expected == [text for at, text in shown if ends[0] <= at <= ends[1]]


def test_a_logarithmic_axis_of_many_powers_shows_some_of_them():
    """Equally far apart, each as the power that it is; which ones is up to matplotlib."""
    figure = new_figure(4, 3, (0.5, 0.1, 0.5, 0.1))
    axes = figure.add_subplot()
    axes.plot([0, 1], [1e-20, 1.0])
    log_scale(axes)
    figure.draw_without_rendering()

    shown = {
        tick.get_loc(): tick.label1.get_text().replace("\N{MINUS SIGN}", "-") for tick in axes.yaxis.get_major_ticks()
    }
    powers = [round(np.log10(at)) for at in shown if 1e-20 <= at <= 1]
    assert 5 <= len(powers) <= 12
    assert 1 == len(set(np.diff(powers)))
    assert [10.0**power for power in powers] == pytest.approx([float(shown[at]) for at in shown if 1e-20 <= at <= 1])


def test_the_papers_errors_are_drawn_only_at_its_horizons(frames):
    """Labelled as what they are."""
    short, long = drawn("error_course", frames).axes

    assert paper.PAPER_LABEL in labels(short.figure)
    assert 1.3 in [line.get_ydata()[0] for line in long.lines]
    assert 1.3 not in [line.get_ydata()[0] for line in short.lines]


def test_a_figure_without_data_is_left_out(settled):
    """A trace too short to score has no error figures."""
    possible = figures.possible(ALL, frames_of(settled, [99_999]))

    assert {"peaks", "settling", "load_share", "movement", "variance", "range", "predictability"} == set(possible)


@pytest.fixture(scope="module")
def files(frames):
    """All files of the report."""
    return dict(files_of({"settled": frames}, {"seed": "0", "odd": "<script>"}))


class Page(HTMLParser):
    """Collects tags, names, and what they load."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.loads += [
            value
            for name, value in attrs
            if name in ("src", "href") and not value.startswith(("data:", "#", "figures/"))
        ]


def test_the_page_loads_nothing_and_escapes_what_it_is_told(files):
    """One small file, every figure inside it; the only links lead to the files beside it."""
    page = Page()
    page.feed(files["report.html"].decode())

    assert set(page.loads) == {quote(name) for name in files if name.startswith("data/")}
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == len(figures.FIGURES) + 2 + len(paper.FIGURES)
    assert len(files["report.html"]) < 2_000_000
    assert b"odd: &lt;script&gt;" in files["report.html"]


@pytest.mark.thorough
def test_a_page_of_many_layers_stays_small(many):
    """At most 3 MB for 58 layers of 256 experts; the layers are folded above twelve."""
    page = dict(files_of({"many": many}, {}, ()))["report.html"]

    assert len(page) < 2_000_000
    assert b'<details class="explorer">' in page


def test_the_page_shows_few_numbers_when_it_opens(files):
    """At most 200 cells of a trace outside of what is folded; the rest is one click away."""
    folded = re.sub(r"<details>.*?</details>", "", files["report.html"].decode(), flags=re.DOTALL)

    assert folded.count("<td") + folded.count("<th") <= 200


def test_markdown_says_what_the_page_says(files, frames):
    """The same answers and the same tables."""
    text = files["report.md"].decode()

    assert all(answer.question in text for answer in answers_of(frames))
    assert "### Imbalance by other tools' definitions" in text


def test_a_question_without_an_answer_has_the_command_that_gives_it(frames):
    """With the name of the trace in it: it can be copied."""
    name = frames["layers"]["trace"].iloc[0]
    answers = answers_of({key: frame for key, frame in frames.items() if key != "verdict"})

    assert f"Not evaluated. Run moetrace place {name} --gpus N." in [answer.sentence for answer in answers]


def test_several_traces_are_compared_on_the_page(frames, monkeypatch):
    """Each two of them in a sentence, on both pages; one trace is compared with nothing."""
    monkeypatch.setattr("moetrace.reporting.study.possible", lambda *_: {})
    row = {
        "a": "one",
        "b": "<two>",
        "distance": 0.1,
        "noise": 0.01,
        "sorted_distance": 0.1,
        "same": False,
        "order": "same",
    }
    both = dict(files_of({"one": frames, "<two>": frames}, {}, (), pd.DataFrame([row])))

    assert "- The loads of one and &lt;two&gt; differ by 10.0% of the token choices" in both["report.md"].decode()
    assert "<li>The loads of one and &lt;two&gt; differ by 10.0%" in both["report.html"].decode()
    alone = dict(files_of({"one": frames}, {}, (), pd.DataFrame()))
    assert "same load?" not in alone["report.md"].decode() + alone["report.html"].decode()


def test_saved_tables_hold_what_the_frames_hold(files, frames, monkeypatch):
    """CSV and JSON in full precision, the JSON with the version of its schema; a large one is Parquet."""
    saved = json.loads(files["data/settled-scores.json"])
    monkeypatch.setattr("moetrace.reporting.study.LARGE", 10)
    monkeypatch.setattr("moetrace.reporting.study.possible", lambda *_: {})
    large = dict(files_of({"settled": frames}, {}))
    shares = pd.read_parquet(io.BytesIO(large["data/settled-last_shares.parquet"]))

    assert (1, "settled", "scores") == (saved["schema_version"], saved["trace"], saved["table"])
    assert frames["scores"]["error_rate"].tolist() == [row["error_rate"] for row in saved["rows"]]
    assert csv(frames["summary"]).encode() == files["data/settled-summary.csv"]
    assert frames["last_shares"]["predicted"].tolist() == shares["predicted"].tolist()


def test_a_logarithmic_axis_between_two_round_numbers_has_labels_too():
    """At least two: one says nothing of how far apart values are."""
    figure = new_figure(4, 3)
    axes = figure.add_subplot()
    axes.plot([0, 1], [2.1, 4.4])
    log_scale(axes)
    low, high = axes.get_ylim()
    figure.draw_without_rendering()

    assert 2 <= sum(
        low <= tick.get_loc() <= high and bool(tick.label1.get_text()) for tick in axes.yaxis.get_major_ticks()
    )


@pytest.mark.parametrize("name", ALL)
def test_a_figure_fits_a_column(frames, name):
    """The width asked for, panels below each other, and every text within it."""
    with styled(Look.of("3.3in", None)):
        figure = ALL[name].draw(frames)
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]

    assert 3.3 == figure.get_figwidth()
    assert -0.02 < box.x0 < box.x1 < 3.32
    assert (len(panels), 1) == panels[0].get_subplotspec().get_gridspec().get_geometry()


@pytest.mark.parametrize(
    ("width", "inches"), [("3.3in", 3.3), ("84mm", 84 / 25.4), (" 8.4 cm", 8.4 / 2.54), (7, 7), ("7", 7)]
)
def test_a_width_has_a_unit(width, inches):
    """Inches, unless it says another."""
    assert inches == pytest.approx(Look.of(width, None).width)


@pytest.mark.parametrize("width", ["wide", "3.3pt", "1in", "25in", -3, 0, "nan"])
def test_a_width_that_is_none_is_refused(width):
    """With what it may be."""
    with pytest.raises(SettingError, match=f"a figure is 2 to 24 inches wide, such as 3.3in or 84mm, not {width}"):
        Look.of(width, None)


def test_a_style_is_a_name_or_a_file(frames, tmp_path, monkeypatch):
    """It changes files of figures, neither the page nor what is drawn afterwards; another is refused."""
    monkeypatch.setattr("moetrace.reporting.study.possible", lambda *_: {"peaks": figures.FIGURES["peaks"]})
    (tmp_path / "mine.mplstyle").write_text("axes.facecolor: abcdef\n")
    look = Look.of("3.3in", tmp_path / "mine.mplstyle")
    plain, own = (dict(files_of({"settled": frames}, {}, ("svg",), look=each)) for each in (Look(), look))
    name = "figures/settled-peaks.svg"

    assert (False, True) == (b"#abcdef" in plain[name], b"#abcdef" in own[name])
    assert plain["report.html"] == own["report.html"]
    with styled(Look.of(None, "dark_background")):
        assert (0, 0, 0, 1) == new_figure(4, 3).get_facecolor()
    assert (1, 1, 1, 1) == new_figure(4, 3).get_facecolor()
    with pytest.raises(SettingError, match="there is no style file and no style 'gplot'; did you mean 'ggplot'"):
        Look.of(None, "gplot")
    (tmp_path / "no.mplstyle").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingError, match=r"no style '.*no\.mplstyle'"):
        Look.of(None, tmp_path / "no.mplstyle")


def test_a_style_that_needs_what_is_not_there_is_refused(tmp_path, monkeypatch):
    """Such as TeX: in a line that names it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "tex.mplstyle").write_text("text.usetex: True\n")
    with styled(Look.of(None, tmp_path / "tex.mplstyle")):
        figure = new_figure(4, 3)
        figure.text(0.5, 0.5, "load")
        with pytest.raises(SettingError, match=r"in the style .*tex\.mpl"):
            picture(figure, "png")


def test_figures_come_in_the_kinds_that_papers_take(files, frames, monkeypatch):
    """PNG, SVG and PDF of each, if asked for; the paper's figures among them."""
    monkeypatch.setattr("moetrace.reporting.study.possible", lambda known, _: {"load_share": known["load_share"]})
    first = dict(islice(files_of({"settled": frames}, {}, ("png", "svg", "pdf")), 3))
    begin = {name.rpartition(".")[2]: content[:5] for name, content in first.items()}

    assert {"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"} == begin
    assert b"/Type3" not in first["figures/settled-load_share.pdf"]
    assert b"Load share of every expert" not in first["figures/settled-load_share.svg"]
    titled = dict(islice(files_of({"settled": frames}, {}, ("svg",), look=Look(titles=True)), 1))
    assert b"settled: Load share of every expert" in titled["figures/settled-load_share.svg"]
    assert "figures/settled-load_share.png" in files


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

    assert "| 1.00 \\[-2.00, 3.00\\] |" in markdown(frame)
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


def test_a_heading_is_as_wide_as_its_longest_word():
    """It is broken at words, on a terminal, and room is kept for the widest of them."""
    frame = pd.DataFrame({"a": [1], "is_extraordinarily_so": [2], "b": [3]})
    lines = StringIO()
    Console(file=lines, width=60).print(terminal(frame, "numbers"))

    assert ["a", "is_extraordinarily_so"] == list(fitting(frame, 1 + 15 + 2 * GAP).columns)
    assert ["a"] == list(fitting(frame, 15 + 2 * GAP).columns)
    said = [line.split() for line in lines.getvalue().splitlines()]
    assert [["numbers"], ["is"], ["extraordinarily"], ["a", "so", "b"]] == [words for words in said if words][:4]


def test_numbers_end_below_each_other_and_words_begin_so():
    """In a table of a terminal."""
    frame = pd.DataFrame({"name": ["one", "three"], "tokens": [1, 1000]})
    lines = StringIO()
    Console(file=lines, width=60).print(terminal(frame, "t"))

    one, three = (next(line for line in lines.getvalue().splitlines() if name in line) for name in frame["name"])
    assert one.index("one") == three.index("three")
    assert one.index("1") + 1 == three.index("1,000") + 5


def test_the_knee_shows_percent_saved_and_where_the_trace_is():
    """Without hardware, at the highest ridge that is asked about."""
    saving = pd.DataFrame({"tokens_over_ridge": [0.5, 1.0, 2.0], "saved": [0.0, 0.01, 0.2]})
    verdict = {"ridge": None, "memory_bound_ridge": 400.0, "tokens_per_expert": 300.0}
    (axes,) = knee(saving, verdict).axes
    curve, *_, here = axes.lines

    assert [0.5, 1.0, 2.0] == list(curve.get_xdata())
    assert [0, 1, 20] == pytest.approx(list(curve.get_ydata()))
    assert (0.75, "this trace at a ridge of 400") == (here.get_xdata()[0], here.get_label())
    (axes,) = knee(saving, verdict | {"ridge": 100.0}).axes
    assert (3.0, "this trace") == (axes.lines[-1].get_xdata()[0], axes.lines[-1].get_label())


def test_a_page_of_very_many_layers_stays_one_that_opens(many, monkeypatch):
    """It lists and draws the layers with the hottest experts, says so, and cuts long tables."""
    monkeypatch.setattr("moetrace.reporting.study.MOST_LAYERS", 5)
    monkeypatch.setattr("moetrace.reporting.study.MOST_COURSES", 2)
    monkeypatch.setattr("moetrace.reporting.pages.MOST_ROWS", 7)
    monkeypatch.setattr("moetrace.reporting.study.possible", lambda *_: {})  # figures take long, and are not asked for
    files = dict(files_of({"many": many}, {}, ()))
    page = files["report.html"].decode()
    hottest = many["balance"].nlargest(5, "max_over_mean")["layer"].tolist()

    assert "14 layers: open one to see its course (the 5 with the hottest experts; all are in the files)" in page
    assert {str(layer) for layer in hottest[:2]} == set(re.findall(r"<summary>course of layer (\d+)<", page))
    assert "<p>And 7 more rows, in the files.</p>" in page
    assert "And 7 more rows, in the files." in files["report.md"].decode()
    assert 14 == len(pd.read_csv(io.BytesIO(files["data/many-layers.csv"])))


def test_names_and_findings_are_no_live_markdown(frames, monkeypatch):
    """A viewer fetches no picture and follows no link that the name of a trace would make."""
    name = "![x](http://host/a.png) [y](http://host) `z` *w* <b>"
    monkeypatch.setattr("moetrace.reporting.study.possible", lambda known, _: {"load_share": known["load_share"]})
    named = {kind: frame.assign(trace=name) if "trace" in frame else frame for kind, frame in frames.items()}

    text = dict(files_of({name: named}, {}))["report.md"].decode()

    assert "](http" not in text.replace("\\](http", "")
    assert "\\!" not in text
    assert "!\\[x\\](http://host/a.png) \\[y\\](http://host) \\`z\\` \\*w\\* &lt;b&gt;" in text


def test_a_notebook_shows_a_figure(frames):
    """By the picture that it makes of itself: no pyplot, no magic command."""
    assert drawn("settling", frames)._repr_png_().startswith(b"\x89PNG")
