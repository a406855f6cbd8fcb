"""Draws the pictures of the page from the files in `benchmarks/results/`, in the style of moetrace's own figures."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from tables import read

from moetrace.reporting.style import (
    BLUE,
    FAINT,
    GREY,
    INK,
    MARKER,
    STATE,
    level_line,
    log_scale,
    one_legend,
    one_panel,
    picture,
    several_panels,
    styled,
)

COLOURS = {"auto": BLUE, "window_mean": INK, "by time": BLUE, "by tokens": INK, "EPLB": GREY, "default": FAINT}


def accuracy() -> Figure:
    """Error of each predictor on each trace at a horizon of 1,000 steps, stable and transient."""
    frame = read("accuracy")
    frame = frame[frame["horizon"] == "1000"]
    figure, panels, _ = several_panels(2, 8.5, 3.6)
    for axes, (state, own) in zip(panels, frame.groupby("state")):
        for predictor, rows in own.groupby("predictor", sort=False):
            colour = COLOURS.get(str(predictor), FAINT)
            label = predictor if predictor in COLOURS else "_" if predictor != "lstm" else "other predictors"
            shape = {"color": colour, "label": label, "markersize": 5, "zorder": 3 if predictor == "auto" else 2}
            axes.plot(rows["trace"], rows["error_rate %"].astype(float), "o", **shape)
        noise = own.drop_duplicates("trace")
        axes.plot(noise["trace"], noise["noise %"].astype(float), "_", color=INK, markersize=12, label="noise floor")
        axes.set(title=f"{state} cutoffs", ylabel="error rate in %")
        axes.set_xticks(range(len(noise)), noise["trace"], rotation=35, ha="right")
        log_scale(axes)
    one_legend(figure, panels[0])
    return figure


def expected_errors() -> Figure:
    """Calibration ratio of `auto` at a horizon of 1,000 steps, with its interval, by trace and state."""
    frame = read("expected_errors")
    frame = frame[(frame["predictor"] == "auto") & (frame["horizon"] == "1000")]
    names = frame["trace"].unique().tolist()
    figure, axes = one_panel(8.5, 3.6)
    level_line(axes, 1, "as expected", color=GREY, linewidth=0.8)
    for shift, (state, own) in zip((-0.12, 0.12), frame.groupby("state")):
        ratio, low, high = (pd.to_numeric(own[f"calibration ratio{end}"]) for end in ("", ", low", ", high"))
        error = [(ratio - low).fillna(0), (high - ratio).fillna(0)]
        at = [names.index(name) + shift for name in own["trace"]]
        axes.errorbar(at, ratio, error, fmt=MARKER[str(state)], color=STATE[str(state)], label=state)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set(ylabel="observed error\nover expected error")
    one_legend(figure, axes)
    return figure


def step_time() -> Figure:
    """Saved step time by ridge over tokens, of each planner, without and with redundant experts."""
    frame = read("step_time")
    frame = frame[frame["load"] == "gpt-moe-128e-serving-decode"]
    figure, panels, _ = several_panels(2, 8.5, 3)
    for axes, (redundant, own) in zip(panels, frame.groupby("redundant")):
        for planner in ("default", "EPLB", "by tokens", "by time"):
            axes.plot(
                own["ridge / tokens"], own[f"{planner} %"].astype(float), "o-", color=COLOURS[planner], label=planner
            )
        axes.set(
            title=f"{redundant} redundant experts", xlabel="ridge over tokens per expert", ylabel="step time saved in %"
        )
        axes.grid(visible=True)
    one_legend(figure, panels[0])
    return figure


def draw(folder: Path) -> None:
    """Write all pictures into *folder*; the same figures give the same files."""
    for make in (accuracy, expected_errors, step_time):
        with styled(), matplotlib.rc_context({"svg.hashsalt": make.__name__}):
            (folder / f"{make.__name__}.svg").write_bytes(picture(make(), "svg"))
