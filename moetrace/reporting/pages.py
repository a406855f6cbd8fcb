"""The page: one HTML file that loads nothing, and the same answers and tables in Markdown.

The values that it shows under the pointer are read from the drawn figures, so that every figure has them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.reporting.phrases import Answer
from moetrace.reporting.tables import markdown, markdown_text, readable, words_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Rows of a table on the page: nobody reads more, and the files have them all.
MOST_ROWS = 1000
DEFINITIONS = {
    "share": "the tokens of an expert over all tokens of its layer in a step",
    "error rate": "the sum over experts of |predicted - actual| share of the load of the whole horizon",
    "noise": "the error of a forecast that knew the slowly moving load exactly: no forecast can do better",
    "difference": "from the mean of the last 1,000 steps (window_mean), over the same layers and cutoffs, with a 95% "
    "interval from a paired bootstrap: where it includes 0, the two cannot be told apart",
    "movement": "the relative change of the load from one window of 200 steps to the next, noise taken off",
    "settle step": "where the movement, averaged over 500 steps, falls below 4% for good; above 6% a layer is "
    "transient again",
    "interval of the settle step": "from where movement was last clearly above the rule to where it first is clearly "
    "below",
    "expert order": "whether a second detector, which sees the order of the experts alone, settles within 1,000 steps",
    "variance, range": "the paper's sliding measures of the share of an expert",
}


@dataclass(frozen=True)
class Picture:
    """A figure on the page: its *name*, what it says, itself as an SVG element, and what is in it.

    *values* are shown under the pointer (`values_of`), *data* is a link to the rows that it shows, of a file *named*.
    """

    name: str
    message: str
    svg: str
    values: str = "[]"
    data: str = ""
    named: str = ""


@dataclass(frozen=True)
class Topic:
    """A question of a trace: its *answer*, and the figures that the answer rests on."""

    answer: Answer
    pictures: Sequence[Picture]

    @property
    def slug(self) -> str:
        """Its name in links."""
        return self.answer.question.lower().rstrip("?").replace(" ", "-")


@dataclass(frozen=True)
class Section:
    """What stands behind an answer: a title, a sentence or two, tables by caption, and figures."""

    title: str
    text: str = ""
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()


@dataclass(frozen=True)
class Layer:
    """A row of the explorer, as text, and the course of the layer, or nothing."""

    cells: Sequence[str]
    course: Picture | None


@dataclass(frozen=True)
class TracePage:
    """All that the page says of one trace; *anchor* is its name within the page, *layers* some of *all_layers*."""

    name: str
    anchor: str
    facts: str
    answers: Sequence[Answer]
    topics: Sequence[Topic]
    findings: Sequence[Mapping[str, str]]
    headings: Sequence[str]
    layers: Sequence[Layer]
    all_layers: int
    sections: Sequence[Section]


@dataclass(frozen=True)
class Grid:
    """A frame as text: *headings*, *rows*, the columns that are words, and how many rows there are beyond these."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int]
    more: int = 0


def grid(frame: pd.DataFrame) -> Grid:
    """A frame as the page shows it, its first `MOST_ROWS` rows."""
    more = max(0, len(frame) - MOST_ROWS)
    text = readable(frame.head(MOST_ROWS))
    headings = [str(name) for name in text.columns]
    words = [i for i, name in enumerate(headings) if name.removesuffix(" %") in words_of(frame)]
    return Grid([name.replace("_", " ") for name in headings], text.to_numpy().tolist(), words, more)


def as_html(
    title: str, traces: Sequence[TracePage], facts: Mapping[str, str], apart: Sequence[str], files: Sequence[str]
) -> str:
    """The page as one HTML file; *facts* say how it was made, *files* lie beside it, *apart* how traces differ."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("moetrace.reporting", "page"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["grid"] = grid
    questions = list(dict.fromkeys(answer.question for trace in traces for answer in trace.answers))
    page = environment.get_template("page.html").render(
        title=title, traces=traces, questions=questions, definitions=DEFINITIONS, facts=facts, files=files, apart=apart
    )
    return page.lstrip()


def as_markdown(title: str, traces: Sequence[TracePage], facts: Mapping[str, str], apart: Sequence[str]) -> str:
    """The same answers and tables in Markdown."""
    lines = [f"# {markdown_text(title)}", ""]
    lines += ["## Do they have the same load?", "", *(f"- {markdown_text(own)}" for own in apart), ""] if apart else []
    for trace in traces:
        lines += [f"## {markdown_text(trace.name)}", "", markdown_text(trace.facts), ""]
        for answer in trace.answers:
            said = markdown_text(f"{answer.sentence} ({answer.evidence})" if answer.evidence else answer.sentence)
            lines += [f"- **{answer.question}** {markdown_text(answer.number)}. {said}"]
        for row in trace.findings:
            what, where = f"Finding {row['name']} ({row['severity']})", f"{row['place']}: {row['evidence']}"
            lines += ["- " + markdown_text(f"{what}, {where}. Advice: {row['advice']}.")]
        lines += [""]
        for section in trace.sections:
            lines += [f"### {markdown_text(section.title)}", ""]
            lines += [markdown_text(section.text), ""] if section.text else []
            for caption, frame in section.tables.items():
                more = len(frame) - MOST_ROWS
                lines += [f"**{caption}**", "", markdown(frame.head(MOST_ROWS))]
                lines += [f"And {more:,} more rows, in the files.", ""] if more > 0 else []
    lines += ["## Definitions", "", *(f"- **{word}**: {meaning}" for word, meaning in DEFINITIONS.items()), ""]
    lines += ["## How this was made", "", *(f"- {name}: {markdown_text(value)}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


# --- values under the pointer ----------------------------------------------------------------------------------------

# Points of a figure that a page keeps: more than can be pointed at, and a page has to stay small.
MOST_POINTS = 4000
# A place in a figure is in so many parts of its width and height.
PLACES = 10_000


def values_of(figure: Figure) -> str:
    """The curves of a *figure* that was drawn, as JSON for the script of the page; ``[]`` where it has none.

    A panel has the names of its axes, ``x`` and ``y``, and ``curves``: a label, and points as place from the left and
    from the top in parts of 10,000, and the two values. A cell of a map has a third, its colour, called ``z``. Where
    ``names`` are given the second value is the place of a name. Of long curves every n-th point is kept.
    """
    curves = {axes: list(_curves(axes)) for axes in figure.axes if axes.get_label() != "<colorbar>"}
    number = sum(len(values) for found in curves.values() for _, values in found)
    every = max(1, -(-number // MOST_POINTS))
    panels = [
        _panel(axes, [(label, values if axes.collections else values[::every]) for label, values in found])
        for axes, found in curves.items()
        if found
    ]
    text = json.dumps(panels, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _curves(axes: Axes) -> Iterator[tuple[str, Any]]:
    """Label and values of what is drawn in data coordinates: curves, shape (points, 2), and maps, (cells, 3)."""
    from matplotlib.collections import QuadMesh

    for line in axes.lines:
        label, values = str(line.get_label()), np.asarray(line.get_xydata(), dtype=float)
        if line.get_transform() != axes.transData or not len(values):
            continue  # a threshold, or the sample of a legend
        values = values[np.isfinite(values).all(axis=1)]
        yield "" if label.startswith("_child") else label.removeprefix("_"), values
    for mesh in axes.collections:
        if isinstance(mesh, QuadMesh):
            corners = np.asarray(mesh.get_coordinates())
            middles = (corners[:-1, :-1] + corners[1:, 1:]) / 2
            yield "", np.dstack([middles, np.asarray(mesh.get_array())]).reshape(-1, 3)


def _panel(axes: Axes, curves: list[tuple[str, Any]]) -> dict[str, Any]:
    """One panel for the script, see `values_of`."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    figure = axes.get_figure(root=True)
    assert figure is not None
    size = np.array([figure.bbox.width, figure.bbox.height])
    panel: dict[str, Any] = {"x": axes.get_xlabel(), "y": axes.get_ylabel(), "curves": []}
    locator, formatter = axes.yaxis.get_major_locator(), axes.yaxis.get_major_formatter()
    if isinstance(locator, FixedLocator) and isinstance(formatter, FuncFormatter):  # what `set_yticks` makes of labels
        panel["names"] = {f"{place:g}": formatter(place) for place in locator()}
    bars = [other for other in figure.axes if other.get_label() == "<colorbar>"]
    if bars:
        panel["z"] = bars[0].get_ylabel()
    for label, values in curves:
        places = axes.transData.transform(values[:, :2]) / size
        places = np.round(PLACES * np.column_stack([places[:, 0], 1 - places[:, 1]])).astype(int)
        rows = [[*place, *(float(f"{value:.4g}") if abs(value) < 1000 else round(value) for value in own)]
                for place, own in zip(places.tolist(), values.tolist())]  # fmt: skip
        panel["curves"].append([label, rows])
    return panel
