"""The whole report of some traces: which sections it has, and the files it is written as."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moetrace.files import file_name, write_bytes
from moetrace.report import figures
from moetrace.report.pages import Section, as_html, as_markdown
from moetrace.report.style import png
from moetrace.report.tables import csv, records

if TYPE_CHECKING:
    import pandas as pd

# What is said above the tables; the definitions are in the README.
TEXTS = {
    "error": "error_rate is the sum over experts of |predicted - actual share| of the load of the whole horizon; "
    "error_noise is what it would be for a forecast that knew the slowly moving load exactly. "
    "difference is from window_mean over the same layers and cutoffs, with a 95 % interval from a paired "
    "bootstrap: where it includes 0, the two cannot be told apart. "
    "Predictors with too_short scores are averaged over fewer cutoffs.",
    "paper": "The paper's errors are drawn as lines: they are of another model, and the paper does not define them.",
    "states": "movement is the relative change of the load from one window of 200 steps to the next, sampling "
    "noise taken off; a layer settles where its mean over 500 steps stays below 4 %, and is transient again above 6 %. "
    "The interval of the settle step reaches from where movement was last clearly above the rule to where it first "
    "is clearly below; rank_settle_step is what the order of the experts alone says. "
    "variance_100 and range_100 are the paper's sliding measures.",
}
SUMMARY = [
    "predictor", "horizon", "state", "error_rate", "error_noise", "step_error_rate", "step_noise", "mape",
    "difference", "difference_low", "difference_high", "cutoffs", "scored", "too_short", "fallbacks",
]  # fmt: skip
SAVED = (
    "layers", "windows", "depth", "imbalance", "summary", "scores", "last_shares", "by_horizon", "by_history",
    "by_layer", "worst_experts",
)  # fmt: skip
"""The frames that are written as CSV and JSON."""


def write_report(
    studies: Mapping[str, Mapping[str, pd.DataFrame]], folder: Path, facts: Mapping[str, str] | None = None
) -> list[Path]:
    """Write the report on some traces into *folder*; the files, ``report.html`` last.

    *studies* has the frames of each trace by its name, as `moetrace.study` makes them; *facts* are what the page
    says of how it was made. Raises `WorkspaceError` where a file cannot be written.

    >>> from pathlib import Path
    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> found = mt.study(trace, [mt.WindowMean()], horizons=[500])
    >>> mt.write_report({found.trace: found.frames}, Path("my-report"))[-1].name
    'report.html'
    """
    return [write_bytes(folder / name, content) for name, content in files_of(studies, facts or {})]


def files_of(
    studies: Mapping[str, Mapping[str, pd.DataFrame]], facts: Mapping[str, str]
) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file of the report; *studies* has the frames of each trace.

    Figures and tables of a trace are named after it; ``report.md`` and ``report.html`` come last.
    """
    sections: list[Section] = []
    for trace, frames in studies.items():
        drawn = {name: png(figure) for name, figure in figures.draw(frames).items()}
        for name, picture in drawn.items():
            yield f"{file_name(trace)}-{name}.png", picture
        for name in SAVED:
            yield f"{file_name(trace)}-{name}.csv", csv(frames[name]).encode("utf-8", "backslashreplace")
            yield f"{file_name(trace)}-{name}.json", json.dumps(records(frames[name]), default=_number).encode()
        sections += _sections(trace, file_name(trace), frames, drawn)
    sections.insert(0, _in_short(studies))
    title = f"Expert load of {', '.join(studies)}"
    yield "report.md", as_markdown(title, sections, facts).encode("utf-8", "backslashreplace")
    yield "report.html", as_html(title, sections, facts).encode("utf-8", "backslashreplace")


def _number(value: object) -> object:
    return value.item() if hasattr(value, "item") else str(value)


def _in_short(studies: Mapping[str, Mapping[str, pd.DataFrame]]) -> Section:
    """The answer for each trace, in a sentence."""
    return Section("In short", " ".join(f"{trace}: {_sentence(frames)}" for trace, frames in studies.items()))


def _sentence(frames: Mapping[str, pd.DataFrame]) -> str:
    return str(frames["sentence"]["sentence"].iloc[0])


def _sections(
    trace: str, file: str, frames: Mapping[str, pd.DataFrame], drawn: Mapping[str, bytes]
) -> Sequence[Section]:
    def shown(*names: str) -> list[tuple[str, str, bytes]]:
        return [(figures.FIGURES[name][0], f"{file}-{name}.png", drawn[name]) for name in names if name in drawn]

    def own(name: str) -> pd.DataFrame:
        return frames[name].drop(columns="trace")

    imbalance = own("imbalance").pivot_table(index=["definition", "of"], columns="layer", values="value", sort=False)
    imbalance.columns = [f"layer {layer}" for layer in imbalance.columns]
    scored = {"Mean over layers and cutoffs": frames["summary"][SUMMARY]} if len(frames["summary"]) else {}
    return [
        Section(
            f"{trace}: states",
            TEXTS["states"],
            {"Layers": own("layers"), "By depth": own("depth"), "Windows of one state": own("windows")},
            shown("load_share", "states", "movement", "variance", "range"),
        ),
        Section(
            f"{trace}: error rates",
            f"{TEXTS['error']} {TEXTS['paper']}" if scored else "The trace is too short to score these horizons.",
            scored,
            shown("error_bars", "error_course", "predicted"),
        ),
        Section(
            f"{trace}: what can be predicted",
            _sentence(frames),
            {
                "By horizon, the forecast of `level`": own("by_horizon"),
                "By history, the mean of the last steps, 1,000 steps ahead": own("by_history"),
                "By layer, in the stable state": own("by_layer"),
                "The experts that cause most of the error": own("worst_experts"),
            },
            shown("predictability"),
        ),
        Section(
            f"{trace}: imbalance",
            "Share of the load over the last 1,000 steps, per expert, in every project's own definition.",
            {"Imbalance by layer": imbalance.reset_index()},
        ),
    ]
