"""The figures, each drawn from a frame that can be printed too. Adding one: a function and a line in FIGURES."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.report.style import COLOURS, MARKERS, STATE_STYLE, curves, new_figure, one_legend, trace_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The paper's errors, drawn where ours are; which definition they have it does not say.
PAPER = {1000: 0.013, 2000: 0.018}
PAPER_LABEL = "GPT-3 350M, arXiv 2404.16914, definition not stated"
# More panels than this cannot be read; evenly spaced layers stand for the rest, and the title says so.
MOST_PANELS = 12
# More curves than this cannot be named; their colour tells their order instead.
MOST_NAMED = 10
NOISE: dict[str, Any] = {"color": "grey", "linestyle": ":", "linewidth": 1.2}
SETTLE: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}


def load_share(load: pd.DataFrame, layers: pd.DataFrame) -> Figure:
    """Share of every expert over the steps, a panel per layer, the settle step marked."""
    figure, panels = _panels(load, "Load share of every expert", "share of the layer's load (%)")
    settle = _settle_steps(layers)
    for layer, axes in panels.items():
        part = load[load["layer"] == layer].pivot_table(index="step", columns="expert", values="share")
        for colour, expert in zip(_expert_colours(part.iloc[-1]), part.columns):
            axes.plot(part.index, 100 * part[expert], color=colour, linewidth=0.9, label=f"{expert}")
        _mark_settled(axes, settle.get(layer))
        axes.set_ylim(bottom=0)
    if load["expert"].nunique() > MOST_NAMED:
        _rank_scale(figure)
    else:
        one_legend(figure, axes, "expert", columns=MOST_NAMED)
    return figure


def fluctuation(course: pd.DataFrame, layers: pd.DataFrame, measure: str) -> Figure:
    """Sliding *measure*, ``variance`` or ``range``, mean over experts, a panel per layer, a curve per window."""
    scale, unit = (1.0, "squared share") if measure == "variance" else (100.0, "share, %")
    title = f"Sliding {measure} of the load share, mean over experts"
    figure, panels = _panels(course, title, f"{measure} ({unit})")
    settle = _settle_steps(layers)
    for layer, axes in panels.items():
        part = course[course["layer"] == layer]
        for colour, (window, curve) in zip(COLOURS, part.groupby("window")):
            axes.plot(curve["step"], scale * curve[measure], color=colour, linewidth=0.9, label=f"{window} steps")
        longest = part[part["window"] == part["window"].max()].iloc[-1]
        axes.axhline(scale * longest[f"noise_{measure}"], label="sampling noise, longest window", **NOISE)
        if measure == "variance":  # hardly above the noise: which is why the rule does not judge by the variance
            axes.axhline(
                longest["threshold_variance"], color="black", linewidth=0.7, label="threshold of the state rule"
            )
        _mark_settled(axes, settle.get(layer))
        _log_scale(axes, plain=measure == "range")
    one_legend(figure, axes, "window")
    return figure


def movement(course: pd.DataFrame, layers: pd.DataFrame) -> Figure:
    """What the state rule judges, a panel per layer: movement, its thresholds, settle step and interval."""
    figure, panels = _panels(course, "Movement from one window to the next, noise taken off", "movement (%)")
    settle = _settle_steps(layers)
    for layer, axes in panels.items():
        part = course[course["layer"] == layer]
        axes.plot(part["step"], 100 * part["movement"], color=COLOURS[0], linewidth=1, label="mean over the hold")
        for name, style in (("unsettle_above", ":"), ("settle_below", "-.")):
            axes.axhline(100 * part[name].iloc[0], color="grey", linestyle=style, linewidth=0.9, label=name)
        if layer in settle:
            row = layers[layers["layer"] == layer].iloc[0]
            axes.axvspan(
                float(row["settle_step_low"]),
                float(row["settle_step_high"]),
                color=COLOURS[1],
                alpha=0.2,
                linewidth=0,
                label="interval of the settle step",
            )
        _mark_settled(axes, settle.get(layer))
        axes.set_ylim(bottom=0)
    one_legend(figure, axes, None)
    return figure


def state_map(windows: pd.DataFrame) -> Figure:
    """The state of every layer over the steps: one bar a layer, shallow ones on top."""
    layers = sorted(int(layer) for layer in windows["layer"].unique())
    figure = new_figure(9.0, 1.4 + min(0.3 * len(layers), 9.0))
    axes = figure.add_subplot()
    figure.suptitle(f"{trace_of(windows)}: state of each layer")
    for state, part in windows.groupby("state", sort=True):
        colour, _ = STATE_STYLE[str(state)]
        at = [layers.index(int(layer)) for layer in part["layer"]]
        widths = part["to_step"] - part["from_step"] + 1
        axes.barh(at, widths, left=part["from_step"], height=0.9, color=colour, label=state)
    every = -(-len(layers) // 32)
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]], fontsize=7)
    axes.set(xlabel="step", ylabel="layer")
    axes.invert_yaxis()
    axes.margins(0)
    one_legend(figure, axes, None)
    return figure


def error_course(course: pd.DataFrame) -> Figure:
    """Error over the run, mean over layers: a panel per horizon, a curve per predictor, the noise below."""
    horizons = sorted(course["horizon"].unique())
    figure = new_figure(max(8.0, 5.2 * len(horizons)), 4.6)
    figure.suptitle(f"{trace_of(course)}: error of the forecast made at each cutoff, mean over layers")
    for i, horizon in enumerate(horizons):
        axes = figure.add_subplot(1, len(horizons), i + 1)
        part = course[course["horizon"] == horizon]
        curves(axes, part, "predictor", "error_rate", 100)
        noise = part.groupby("cutoff")["error_noise"].mean()
        axes.plot(noise.index, 100 * noise, color="grey", linestyle=":", label="noise")
        _paper_line(axes, int(horizon))
        axes.set(title=f"next {horizon:,} steps", xlabel="cutoff (step)", ylabel="error rate (%)")
        _log_scale(axes)
    one_legend(figure, axes, None)
    return figure


def error_bars(summary: pd.DataFrame) -> Figure:
    """Mean error by predictor and state: a panel per horizon, the noise as a tick on each bar."""
    horizons = sorted(summary["horizon"].unique())
    states = [state for state in ("transient", "stable", "all") if state in set(summary["state"])]
    figure = new_figure(max(8.0, 5.2 * len(horizons)), 4.6)
    figure.suptitle(f"{trace_of(summary)}: mean error by predictor and state")
    for i, horizon in enumerate(horizons):
        axes = figure.add_subplot(1, len(horizons), i + 1)
        part = summary[summary["horizon"] == horizon]
        names = list(part["predictor"].unique())
        width = 0.8 / len(states)
        for k, state in enumerate(states):
            rows = part[part["state"] == state].set_index("predictor").reindex(names)
            at = np.arange(len(names)) + (k - (len(states) - 1) / 2) * width
            axes.bar(at, 100 * rows["error_rate"], width, color=STATE_STYLE[state][0], label=state)
            axes.hlines(100 * rows["error_noise"], at - width / 2, at + width / 2, color="black", linewidth=1.2)
            _name_heights(axes, at, 100 * rows["error_rate"])
        axes.hlines([], 0, 0, color="black", linewidth=1.2, label="noise")
        _paper_line(axes, int(horizon))
        axes.set(title=f"next {horizon:,} steps", ylabel="error rate (%)")
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        _log_scale(axes)
    one_legend(figure, axes, None)
    return figure


def predictability(by_horizon: pd.DataFrame, by_history: pd.DataFrame) -> Figure:
    """Error and noise by horizon, and error by the length of the history whose mean is the forecast."""
    figure = new_figure(10.4, 4.6)
    figure.suptitle(f"{trace_of(by_horizon)}: how well the load can be known")
    panels = (
        (by_horizon, "horizon", "level, by horizon", "steps ahead"),
        (by_history, "history", "mean of the last steps, 1,000 steps ahead", "steps of history"),
    )
    for i, (frame, along, title, xlabel) in enumerate(panels):
        axes = figure.add_subplot(1, 2, i + 1)
        for state, part in frame.groupby("state", sort=True):
            colour, marker = STATE_STYLE[str(state)]
            axes.plot(part[along], 100 * part["error_rate"], color=colour, marker=marker, markersize=4, label=state)
            axes.plot(part[along], 100 * part["error_noise"], color=colour, linestyle=":", label=f"{state}: noise")
        axes.set(title=title, xlabel=xlabel, ylabel="error rate (%)", xscale="log")
        axes.set_xticks(sorted(frame[along].unique()), [f"{n:,}" for n in sorted(frame[along].unique())], fontsize=7)
        axes.minorticks_off()
        _log_scale(axes)
    one_legend(figure, figure.axes[0], None)
    return figure


def predicted_against_actual(shares: pd.DataFrame) -> Figure:
    """What each predictor said of the load of each expert, beside what happened, for one cutoff."""
    cutoff, horizon = int(shares["cutoff"].iloc[0]), int(shares["horizon"].iloc[0])
    title = f"Predicted and actual share of the {horizon:,} steps after step {cutoff:,}"
    figure, panels = _panels(shares, title, "share of the layer's load (%)", "expert, by actual share")
    for layer, axes in panels.items():
        part = shares[shares["layer"] == layer].pivot_table(
            index="expert", columns="predictor", values="predicted", sort=False
        )
        actual = shares[shares["layer"] == layer].groupby("expert")["actual"].first().sort_values(ascending=False)
        at = np.arange(len(actual))
        axes.bar(at, 100 * actual, color="lightgrey", width=0.9, label="actual")
        size = 4 if len(actual) <= 16 else 2
        for colour, marker, predictor in zip(COLOURS * 9, MARKERS * 9, part.columns):
            predicted = part[predictor].reindex(actual.index)
            axes.plot(at, 100 * predicted, marker, color=colour, markersize=size, fillstyle="none", label=predictor)
        every = -(-len(actual) // 16)
        axes.set_xticks(at[::every], [str(expert) for expert in actual.index[::every]], fontsize=7)
    one_legend(figure, axes, None)
    return figure


FIGURES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], Figure]]] = {
    "load_share": ("Load share of every expert", lambda f: load_share(f["load"], f["layers"])),
    "variance": ("Sliding variance", lambda f: fluctuation(f["fluctuation"], f["layers"], "variance")),
    "range": ("Sliding range", lambda f: fluctuation(f["fluctuation"], f["layers"], "range")),
    "movement": ("Movement that the state rule judges", lambda f: movement(f["movement"], f["layers"])),
    "states": ("State of each layer over the steps", lambda f: state_map(f["windows"])),
    "error_course": ("Error over the run", lambda f: error_course(f["course"])),
    "error_bars": ("Error by predictor and state", lambda f: error_bars(f["summary"])),
    "predictability": ("How well the load can be known", lambda f: predictability(f["by_horizon"], f["by_history"])),
    "predicted": ("Predicted and actual shares", lambda f: predicted_against_actual(f["last_shares"])),
}
"""Name, caption and how to draw it from the frames of one trace; one whose frame is empty is left out."""
NEEDS = {
    "load_share": ("load",), "variance": ("fluctuation",), "range": ("fluctuation",), "movement": ("movement",),
    "states": ("windows",), "error_course": ("course",), "error_bars": ("summary",),
    "predictability": ("by_horizon", "by_history"), "predicted": ("last_shares",),
}  # fmt: skip
"""The frames that a figure is drawn from."""


def draw(frames: Mapping[str, Any]) -> dict[str, Figure]:
    """The figures of one trace that its *frames* allow, by name."""
    return {name: make(frames) for name, (_, make) in FIGURES.items() if all(len(frames[need]) for need in NEEDS[name])}


# --- shared by the figures ---------------------------------------------------------------------


def _panels(frame: pd.DataFrame, title: str, ylabel: str, xlabel: str = "step") -> tuple[Figure, dict[int, Axes]]:
    """A figure with one panel per layer, at most `MOST_PANELS`, in reading order."""
    layers = sorted(int(layer) for layer in frame["layer"].unique())
    chosen = layers
    if len(layers) > MOST_PANELS:
        chosen = [layers[i] for i in np.linspace(0, len(layers) - 1, MOST_PANELS).round().astype(int)]
    columns = 2 if len(chosen) <= 4 else 3
    columns = min(columns, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = new_figure(5.4 * columns, 2.6 * rows + 0.6)
    note = "" if chosen == layers else f" ({len(chosen)} of {len(layers)} layers)"
    figure.suptitle(f"{trace_of(frame)}: {title[0].lower()}{title[1:]}{note}")
    axes: Sequence[Axes] = [figure.add_subplot(rows, columns, i + 1) for i in range(len(chosen))]
    for i, (layer, panel) in enumerate(zip(chosen, axes)):
        panel.set_title(f"layer {layer}", fontsize=9, loc="left")
        panel.tick_params(labelsize=7)
        if i + columns >= len(chosen):
            panel.set_xlabel(xlabel, fontsize=8)
    figure.supylabel(ylabel, fontsize=9)
    return figure, dict(zip(chosen, axes))


def _expert_colours(last: pd.Series) -> list[Any]:
    """A colour for each expert: its own where they are few, else by the rank of its *last* share."""
    import matplotlib

    if len(last) <= MOST_NAMED:
        return [matplotlib.colormaps["tab10"](i) for i in range(len(last))]
    ranks = (last.rank(method="first") - 1) / (len(last) - 1)
    return [matplotlib.colormaps["viridis"](rank) for rank in ranks]


def _settle_steps(layers: pd.DataFrame) -> dict[int, int]:
    settled = layers.dropna(subset="settle_step")
    return dict(zip(settled["layer"].astype(int), settled["settle_step"].astype(int)))


def _mark_settled(axes: Axes, step: int | None) -> None:
    if step is not None:
        axes.axvline(step, **SETTLE)
        axes.annotate(
            f"settles at {step:,}", (step, 0.97), xycoords=("data", "axes fraction"), xytext=(3, 0),
            textcoords="offset points", fontsize=7, va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
        )  # fmt: skip


def _paper_line(axes: Axes, horizon: int) -> None:
    if horizon in PAPER:
        percent = 100 * PAPER[horizon]
        axes.axhline(percent, color="black", linestyle="-.", linewidth=0.8, label=PAPER_LABEL)
        axes.annotate(
            f"{percent:.1f} %", (1, percent), xycoords=("axes fraction", "data"), xytext=(2, 0),
            textcoords="offset points", fontsize=7, va="center",
        )  # fmt: skip


def _name_heights(axes: Axes, at: Any, heights: pd.Series) -> None:
    """The value above each bar: on a logarithmic axis its length alone tells little."""
    for x, height in zip(at, heights):
        if height == height:
            axes.annotate(f"{height:.1f}", (x, height), ha="center", va="bottom", fontsize=6)


def _rank_scale(figure: Figure) -> None:
    """A colour bar for curves that are too many to name."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(cmap="viridis"), ax=figure.axes, fraction=0.02, aspect=40)
    bar.set_ticks([0, 1], labels=["lowest", "highest"])
    bar.set_label("load at the end, by rank", fontsize=8)


def _log_scale(axes: Axes, *, plain: bool = True) -> None:
    """A logarithmic axis where anything lies above 0, with *plain* numbers; a load that stands still says so."""
    if not np.isfinite(axes.dataLim.minposy):
        axes.annotate("constant: nothing above 0", (0.5, 0.5), xycoords="axes fraction", ha="center", fontsize=8)
        return
    axes.set_yscale("log")
    if not plain:
        return
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
    axes.set_yticks(ticks)
    axes.grid(axis="y", alpha=0.3)
