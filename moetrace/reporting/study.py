"""The whole report of some traces: what the page says of each, and the files it is written as."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrace.files import file_name, write_bytes
from moetrace.reporting import figures, paper
from moetrace.reporting.answers import answers_of
from moetrace.reporting.comparison import distance_sentence
from moetrace.reporting.figures import possible
from moetrace.reporting.pages import Layer, Picture, Section, Topic, TracePage, as_html, as_markdown, values_of
from moetrace.reporting.phrases import NOTHING, percent
from moetrace.reporting.screens import layer_cells
from moetrace.reporting.style import USUAL, Look, inline, picture, styled
from moetrace.reporting.tables import csv, records, rows_of
from moetrace.words import OK, SCHEMA_VERSION, SEVERITIES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SUMMARY = [
    "predictor", "horizon", "state", "error_rate", "error_noise", "step_error_rate", "step_noise", "mape",
    "difference", "difference_low", "difference_high", "cutoffs", "scored", "too_short", "fallbacks",
]  # fmt: skip
SAVED = (
    "findings", "layers", "windows", "depth", "balance", "imbalance", "summary", "scores", "last_shares", "by_horizon",
    "by_history", "by_layer", "worst_experts", "placement", "plan_scores", "policies", "kept", "kept_summary",
)  # fmt: skip
"""The frames that are written as CSV and JSON."""
DRAWN = ("peaks", "course", "knee", "kept_curve", "kept_ages", "hottest", "load", "fluctuation", "movement")
"""The frames that only figures show: CSV alone."""
# Layers that a page lists, and draws: far more than any model has, and a page that a browser still opens.
MOST_LAYERS, MOST_COURSES = 512, 128
# Rows from which a file of data is Parquet: a row for each expert, layer and moment is too much for CSV.
LARGE = 100_000
# Layers whose courses show values under the pointer, and bytes of compressed rows within a page: it has to stay small.
MOST_POINTED, MOST_DATA = 12, 100_000


def write_report(
    studies: Mapping[str, Mapping[str, pd.DataFrame]],
    folder: str | Path,
    facts: Mapping[str, str] | None = None,
    kinds: Sequence[str] = ("png",),
    pairs: pd.DataFrame | None = None,
    look: Look = USUAL,
) -> list[Path]:
    """Write the report on some traces into *folder*; the files, ``report.html`` last.

    *studies* has the frames of each trace by its name, as `moetrace.study` makes them; *facts* are what the page
    says of how it was made; *kinds* are the files that each figure becomes, of ``png``, ``svg`` and ``pdf``.
    *pairs* says how far apart the loads of each two traces are, a row for each pair (`Comparison.as_row`); *look* is
    how the files of figures look, not the page. Raises `WorkspaceError` if a file cannot be written.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> found = mt.study(trace, [mt.WindowMean()], horizons=[500])
    >>> mt.write_report({found.trace: found.frames}, "my-report")[-1].name
    'report.html'
    """
    files = files_of(studies, facts or {}, kinds, pairs, look)
    return [write_bytes(Path(folder) / name, content) for name, content in files]


def files_of(
    studies: Mapping[str, Mapping[str, pd.DataFrame]],
    facts: Mapping[str, str],
    kinds: Sequence[str] = ("png",),
    pairs: pd.DataFrame | None = None,
    look: Look = USUAL,
) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file of the report; *studies* has the frames of each trace.

    Figures and tables of a trace are named after it; ``report.md`` and ``report.html`` come last, in which traces with
    the worst imbalance are first.
    """
    traces: list[TracePage] = []
    names: list[str] = []
    for number, (trace, frames) in enumerate(studies.items(), 1):
        stem, anchor = file_name(trace), f"trace-{number}"
        pictures: dict[str, Picture] = {}
        written = [own for own in (*SAVED, *DRAWN) if own in frames]
        texts = {own: _as_csv(frames[own]) for own in written if len(frames[own]) <= LARGE}
        drawn = _figures(stem, anchor, frames, kinds, pictures, texts, look)
        for name, content in (*drawn, *_data(stem, trace, frames, texts)):
            names.append(name)
            yield name, content
        traces.append(_page(trace, anchor, frames, pictures))
    traces.sort(key=lambda trace: -max(SEVERITIES.index(answer.severity or OK) for answer in trace.answers))
    apart = [] if pairs is None else [distance_sentence(row) for row in rows_of(pairs)]
    title = f"Expert load of {', '.join(studies)}"
    yield "report.md", as_markdown(title, traces, facts, apart).encode("utf-8", "backslashreplace")
    yield "report.html", as_html(title, traces, facts, apart, names).encode("utf-8", "backslashreplace")


def _as_csv(frame: pd.DataFrame) -> bytes:
    return csv(frame).encode("utf-8", "backslashreplace")


def _figures(
    stem: str,
    anchor: str,
    frames: Mapping[str, Any],
    kinds: Sequence[str],
    pictures: dict[str, Picture],
    texts: Mapping[str, bytes],
    look: Look,
) -> Iterator[tuple[str, bytes]]:
    """Every figure that the *frames* allow, as a file of each of *kinds*; *pictures* gets it for the page."""
    trace = frames["about"]["trace"].iloc[0]
    for name, kind in possible({**figures.FIGURES, **paper.FIGURES}, frames).items():
        with styled():
            figure, message = kind.draw(frames), kind.message(frames)
            pictures[name] = _picture(name, message, figure, f"{anchor}-{name}", texts.get(kind.needs[0], b""))
        with styled(look):
            if kinds and (look.width or look.style):
                figure = kind.draw(frames)
            for ending in kinds:
                title = f"{trace}: {message}" if look.titles else ""
                yield f"figures/{stem}-{name}.{ending}", picture(figure, ending, title)


def _picture(name: str, message: str, figure: Figure, salt: str, rows: bytes, *, pointed: bool = True) -> Picture:
    """A *figure* for the page, with its *rows*, a CSV, as a link: compressed ones, or none where they are too many."""
    svg = inline(figure, salt)
    packed = gzip.compress(rows, mtime=0)
    data = "" if not rows or len(packed) > MOST_DATA else base64.b64encode(packed).decode()
    return Picture(name, message, svg, values_of(figure) if pointed else "[]", data, f"{salt}.csv.gz")


def _data(
    stem: str, trace: str, frames: Mapping[str, pd.DataFrame], texts: Mapping[str, bytes]
) -> Iterator[tuple[str, bytes]]:
    """The tables behind the page: CSV and JSON, the large ones as Parquet."""
    for name in [name for name in (*SAVED, *DRAWN) if name in frames]:
        if name not in texts:
            content = io.BytesIO()
            frames[name].to_parquet(content, index=False)
            yield f"data/{stem}-{name}.parquet", content.getvalue()
            continue
        yield f"data/{stem}-{name}.csv", texts[name]
        if name in DRAWN:
            continue
        document = {"schema_version": SCHEMA_VERSION, "trace": trace, "table": name, "rows": records(frames[name])}
        yield f"data/{stem}-{name}.json", json.dumps(document, default=_number).encode()


def _number(value: object) -> object:
    return value.item() if hasattr(value, "item") else str(value)


def _page(trace: str, anchor: str, frames: Mapping[str, Any], pictures: Mapping[str, Picture]) -> TracePage:
    """What the page says of one trace."""
    import pandas as pd

    about, (headings, layers) = rows_of(frames["about"])[0], _layers(anchor, frames)
    facts = [
        about["model"],
        f"{about['steps']:,} steps, {about['first_step']:,} to {about['last_step']:,}",
        f"{about['layers']:,} layers x {about['experts']:,} experts",
        f"{int(about['tokens_per_step']):,} tokens a step" if pd.notna(about["tokens_per_step"]) else None,
        f"findings: {about['findings'] or 'none'}",
    ]
    answers, asked = answers_of(frames), {name: kind.question for name, kind in figures.FIGURES.items()}
    topics = [
        Topic(answer, [pictures[name] for name in pictures if asked.get(name) == answer.question]) for answer in answers
    ]
    findings = rows_of(frames["findings"].drop(columns="trace")) if "findings" in frames else []
    return TracePage(
        trace, anchor, "; ".join(fact for fact in facts if fact), answers, topics, findings, headings, layers,
        len(frames["layers"]), _sections(frames, pictures),
    )  # fmt: skip


def _layers(anchor: str, frames: Mapping[str, Any]) -> tuple[list[str], list[Layer]]:
    """The explorer: a row for each of the `MOST_LAYERS` layers with the hottest experts, and the course of some."""
    courses = {int(layer): part for layer, part in frames["hottest"].groupby("layer")}
    balance = {row["layer"]: row for row in rows_of(frames["balance"])}
    scored = frames["by_layer"]
    nearest = scored[scored["horizon"] == scored["horizon"].min()]
    errors = {row["layer"]: row["error_rate"] for row in rows_of(nearest)}
    hottest = sorted(balance, key=lambda layer: -balance[layer]["max_over_mean"])
    listed, drawn = set(hottest[:MOST_LAYERS]), set(hottest[:MOST_COURSES])
    rows, layers = [], []
    for state in rows_of(frames["layers"]):
        number = int(state["layer"])
        if number not in listed:
            continue
        hot = balance[number]
        cells = layer_cells(state) | {"error, stable": percent(errors[number]) if number in errors else NOTHING}
        rows.append(cells)
        message = (
            f"Layer {number}: expert {hot['hottest']} is the hottest, at {hot['max_over_mean']:.1f}x the mean load"
        )
        picture = None
        if number in drawn:
            with styled():
                own, few = courses[number], len(drawn) <= MOST_POINTED
                picture = _picture(
                    "course", message, figures.course(own), f"{anchor}-layer-{number}", _as_csv(own), pointed=few
                )
        layers.append(Layer(list(cells.values()), picture))
    return list(rows[0]), layers


def _sections(frames: Mapping[str, Any], pictures: Mapping[str, Picture]) -> list[Section]:
    """What stands behind the answers, folded."""

    def own(name: str) -> pd.DataFrame:
        return frames[name].drop(columns="trace")

    imbalance = own("imbalance").pivot_table(index="layer", columns="definition", values="value", sort=False)
    whose = own("imbalance").drop_duplicates("definition")
    scored = {"Mean over layers and cutoffs": frames["summary"][SUMMARY]} if len(frames["summary"]) else {}
    drawn = {name: pictures[name] for name in paper.FIGURES if name in pictures}
    behind = ("movement", "predictability", "predicted")
    return [
        Section(
            "All predictors", "" if scored else "The trace is too short to score these horizons.", scored,
            [drawn[name] for name in ("predictability", "predicted") if name in drawn],
        ),
        Section(
            "How far ahead, from how much history, and where the error sits",
            tables={
                "By horizon, the forecast of level": own("by_horizon"),
                "By history, the mean of the last steps, 1,000 steps ahead": own("by_history"),
                "By layer, while stable": own("by_layer"),
                "The experts that cause most of the error": own("worst_experts"),
            },
        ),
        Section(
            "The paper's measures and figures",
            "The paper's errors are drawn as lines: they are of another model, and the paper does not define them.",
            {"By depth, means over layers": own("depth")},
            [own for name, own in drawn.items() if name not in behind],
        ),
        Section(
            "States in detail", tables={"Layers": own("layers"), "Ranges of steps in one state": own("windows")},
            pictures=[drawn["movement"]] if "movement" in drawn else [],
        ),
        Section(
            "Imbalance by other tools' definitions",
            "; ".join(f"{row['definition']}: {row['of']}" for row in rows_of(whose)) + ".",
            {"Load of the last 1,000 steps": imbalance.reset_index()},
        ),
        *(Section("Plans", tables={"By strategy and state": own(name)}) for name in ("placement",) if name in frames),
    ]  # fmt: skip
