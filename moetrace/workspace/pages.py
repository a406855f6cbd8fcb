"""The report from Python: what the page says of each trace, and the files that it is written as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from moetrace.comparison import pairs_frame
from moetrace.errors import SettingError, check_several
from moetrace.forecasting.backtest import Progress, Stages
from moetrace.forecasting.predictors import QUICK, label, predictor
from moetrace.forecasting.study import HORIZONS, study
from moetrace.frames import Later, stacked
from moetrace.placement.planning import Planning, usual_gpus
from moetrace.placement.study import place, placement_frames
from moetrace.reporting.screens import report_screen
from moetrace.reporting.study import DRAWN, write_report
from moetrace.reporting.style import Look
from moetrace.residency.study import hot, residency_frames
from moetrace.trace import LoadTrace
from moetrace.workspace.found import Found, command
from moetrace.workspace.options import Backtesting, Device, Note, Selection, reused_line, silent

if TYPE_CHECKING:
    from moetrace.workspace.options import Traced

Frames = dict[str, pd.DataFrame]
FIGURE_KINDS = ("png", "svg", "pdf")
# The rows of figures, beside the summary: those that only figures show, and others.
OF_FIGURES = (*DRAWN, "layers", "windows", "by_horizon", "by_history", "plan_scores", "last_shares")


@command(Selection, Backtesting, Device)
def report(
    traces: Traced | Sequence[Traced],
    horizons: Sequence[int] | None = None,
    *,
    gpus: int | None = None,
    redundant: int = 0,
    figures: Sequence[str] = ("png",),
    figure_width: float | str | None = None,
    figure_titles: bool = False,
    style: str | Path | None = None,
    folder: str | Path = "moetrace-report",
    note: Note = silent,
    progress: Progress | None = None,
    selection: Selection,
    backtesting: Backtesting,
    device: Device,
) -> Found[dict[str, Frames]]:
    """One page about some traces, with its figures and data, in *folder*: ``moetrace report``.

    *figures* are the kinds of files that each becomes, of ``png``, ``svg`` and ``pdf``; none with ``()``. These files,
    not the page, have a *figure_width* in inches, or such as ``"84mm"``, a *style* of matplotlib or its file, and with
    *figure_titles* their message above them. The result has the rows of every figure: ``frame("course")``.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)], name="run")
    >>> mt.report(trace, [500], gpus=1, predictor=["window_mean"], figures=()).files[-1]
    'moetrace-report/report.html'
    """
    check_kinds(figures)
    look = Look.of(figure_width, style, titles=figure_titles)
    given = [traces] if isinstance(traces, LoadTrace | pd.DataFrame | str | Path) else traces
    opened = [selection.open(trace) for trace in given]
    studies = {own.name: studied(own, horizons, gpus, redundant, note, progress, backtesting, device) for own in opened}
    return written(opened, studies, folder, figures, report_facts(backtesting, horizons or HORIZONS), look)


def check_kinds(figures: Sequence[str]) -> None:
    """Raise `SettingError` unless *figures* are kinds of files that a figure may become."""
    check_several(figures, "figures", "['png']")
    for kind in figures:
        if kind not in FIGURE_KINDS:
            raise SettingError(f"unknown figure format {kind!r} (choose {', '.join(FIGURE_KINDS)}, or none)")


def report_facts(backtesting: Backtesting, horizons: Sequence[int]) -> dict[str, str]:
    """What a page says of how it was made."""
    packages = ("moetrace", "numpy", "statsmodels", "jax", "pyarrow")
    every = f"{backtesting.first or 500}, then every {backtesting.every or '1000 or more'} steps"
    return {
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}, moetrace {version('moetrace')}",
        "predictors": ", ".join(label(own) for own in backtesting.predictors()),
        "horizons": ", ".join(map(str, horizons)),
        "cutoffs": ", ".join(map(str, backtesting.cutoffs or ())) or every,
        "seed": str(backtesting.seed),
        "versions": ", ".join(f"{package} {version(package)}" for package in packages),
    }


def written(
    traces: Sequence[LoadTrace],
    studies: dict[str, Frames],
    folder: str | Path,
    figures: Sequence[str],
    facts: Mapping[str, str],
    look: Look,
) -> Found[dict[str, Frames]]:
    """Write the page of *studies*, those of *traces* by name, into *folder*."""
    pairs = pairs_frame([trace for trace in traces if trace.name in studies])
    files = [str(path) for path in write_report(studies, folder, facts, tuple(figures), pairs, look)]
    names = [name for name in ("summary", "scores", *OF_FIGURES) if any(name in own for own in studies.values())]

    def together(name: str) -> pd.DataFrame:
        return stacked([own[name] for own in studies.values() if name in own])

    frames = Later({name: partial(together, name) for name in names} | {"comparisons": lambda: pairs})
    screen = replace(report_screen(*next(iter(studies.items()))), sentence=f"{', '.join(studies)}: {files[-1]}")
    return Found("report", ", ".join(studies), screen, frames, studies, files=files)


def studied(
    trace: LoadTrace,
    horizons: Sequence[int] | None,
    gpus: int | None,
    redundant: int,
    note: Note,
    progress: Progress | None,
    backtesting: Backtesting,
    device: Device,
) -> Frames:
    """The frames of the page about one trace; *gpus* are those of `usual_gpus` if None, and 1 leaves plans out."""
    notes: list[str] = []
    predictors, settings = backtesting.predictors(), backtesting.settings(note)
    over, cutoffs = backtesting.windows(trace, horizons, HORIZONS, notes.append, "--horizons")
    stages = Stages(progress, 70, 5, 25)  # the default predictors, sets, plans
    found = study(trace, predictors, over, cutoffs, stages.next(), seed=backtesting.seed, **settings)
    for text in notes:  # not of a trace that is too short for anything, which is a line of its own
        note(text)
    if reused := reused_line(trace.name, found.computed, found.reused):
        note(reused)
    kept = hot(trace, [predictor(name) for name in QUICK], progress=stages.next(), seed=backtesting.seed, **settings)
    frames = found.frames | residency_frames(kept)
    number = gpus or usual_gpus(trace.experts)
    if number == 1:
        return frames
    if gpus is None:
        note(f"{trace.name}: placement is evaluated on {number} GPUs (--gpus sets it)")
    placed = place(
        trace, predictors, Planning(number, redundant, time=device.time()), over[0], cutoffs, stages.next(),
        expert_bytes=device.expert_bytes, first=backtesting.first, seed=backtesting.seed, **settings,
    )  # fmt: skip
    return frames | placement_frames(placed)
