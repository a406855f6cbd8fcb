"""The figures of the paper, as it has them, and those behind the answers: the appendix of the page, and for papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.reporting.figures import Frames, Kind
from moetrace.reporting.style import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    MARKER,
    STATE,
    WINDOWS,
    level_line,
    log_scale,
    one_legend,
    several_panels,
)  # fmt: skip
from moetrace.reporting.tables import rows_of
from moetrace.words import BASELINE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The paper's errors, drawn where ours are; which definition they have it does not say.
PAPER = {1000: 0.013, 2000: 0.018}
PAPER_LABEL = "GPT-3 350M, arXiv 2404.16914, definition not stated"
# More panels than this cannot be read; evenly spaced layers stand for the rest, and the axis says so.
MOST_PANELS = 12
# More curves than this cannot be named; their colour tells their order instead.
MOST_NAMED = 10
NOISE: dict[str, Any] = {"color": GREY, "linestyle": ":", "linewidth": 1.2}
THRESHOLD: dict[str, Any] = {"color": GREY, "linestyle": "-.", "linewidth": 0.9}
SETTLE: dict[str, Any] = {"color": INK, "linestyle": "--", "linewidth": 1}
PREDICTORS: Mapping[str, dict[str, Any]] = {
    "sw_avg": {"color": BLUE, "marker": "o"},
    "arima": {"color": "#d55e00", "marker": "s"},
    "lstm": {"color": GREEN, "marker": "D"},
}
"""The paper's three, each with a colour of its own here."""


def load_share(frames: Frames) -> Figure:
    """Share of every expert over the steps, a panel per layer, the settle step marked."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.collections import LineCollection

    load, settle = frames["load"], _settle_steps(frames["layers"])
    named = load["expert"].nunique() <= MOST_NAMED
    figure, panels = _panels(load, "share of the layer's load (%)", right=0.15 if named else 0.8)
    for layer, part, axes in panels:
        shares = part.pivot(index="step", columns="expert", values="share")
        if named:
            for i, expert in enumerate(shares.columns):
                colour = matplotlib.colormaps["tab10"](i)
                axes.plot(shares.index, 100 * shares[expert], color=colour, linewidth=0.9, label=f"{expert}")
        else:
            ranks = (shares.iloc[-1].rank(method="first") - 1) / (len(shares.columns) - 1)
            colours = matplotlib.colormaps["viridis"](ranks.to_numpy())
            steps, heights = np.broadcast_arrays(shares.index, 100 * shares.to_numpy().T)
            curves = list(np.stack([steps, heights], axis=-1))  # (experts, steps, 2), drawn at once and kept as pixels
            axes.add_collection(LineCollection(curves, colors=list(colours), linewidths=0.7, rasterized=True))
            axes.autoscale_view()
        _mark_settled(axes, settle.get(layer))
        axes.set_ylim(bottom=0)
    if named:
        one_legend(figure, axes, "expert", columns=MOST_NAMED)
    else:
        bar = figure.colorbar(ScalarMappable(cmap="viridis"), ax=figure.axes, fraction=0.02, aspect=40)
        bar.set_ticks([0, 1], labels=["lowest", "highest"])
        bar.set_label("load at the end, by rank", fontsize=8)
    return figure


def fluctuation(frames: Frames, measure: str) -> Figure:
    """Sliding *measure*, ``variance`` or ``range``, mean over experts, a panel per layer, a curve per window."""
    course = frames["fluctuation"]
    scale, unit = (1.0, "squared share") if measure == "variance" else (100.0, "share, %")
    figure, panels = _panels(course, f"{measure} ({unit})")
    settle = _settle_steps(frames["layers"])
    for layer, part, axes in panels:
        for window, curve in part.groupby("window"):
            colour = WINDOWS.get(int(str(window)), GREY)
            axes.plot(curve["step"], scale * curve[measure], color=colour, linewidth=0.9, label=f"{window} steps")
        longest = part[part["window"] == part["window"].max()].iloc[-1]
        axes.axhline(scale * longest[f"noise_{measure}"], label="sampling noise, longest window", **NOISE)
        if measure == "variance":  # hardly above the noise: which is why the rule does not judge by the variance
            axes.axhline(longest["threshold_variance"], label="threshold of the state rule", **THRESHOLD)
        _mark_settled(axes, settle.get(layer))
        log_scale(axes)
    one_legend(figure, axes, "window")
    return figure


def movement(frames: Frames) -> Figure:
    """What the state rule judges, a panel per layer: movement, its thresholds, settle step and interval."""
    course = frames["movement"]
    figure, panels = _panels(course, "movement (%)")
    rows = {int(row["layer"]): row for row in rows_of(frames["layers"].dropna(subset="settle_step"))}
    for layer, part, axes in panels:
        axes.plot(part["step"], 100 * part["movement"], color=BLUE, linewidth=1, label="mean over the hold")
        for name, text in (("unsettle_above", "transient above"), ("settle_below", "stable below")):
            percent = 100 * part[name].iloc[0]
            level_line(axes, percent, f"{text} {percent:g}%", **THRESHOLD)
        if layer in rows:
            low, high = float(rows[layer]["settle_step_low"]), float(rows[layer]["settle_step_high"])
            axes.axvspan(low, high, color=FAINT, alpha=0.4, linewidth=0, label="interval of the settle step")
            _mark_settled(axes, int(rows[layer]["settle_step"]))
        axes.set_ylim(bottom=0)
    one_legend(figure, axes)
    return figure


def error_course(frames: Frames) -> Figure:
    """Error at each cutoff, mean over layers, of the paper's predictors, with the paper's errors."""
    course = frames["course"]
    horizons = sorted(course["horizon"].unique())
    width = max(8.0, 5.2 * len(horizons))
    figure, panels, _ = several_panels(len(horizons), width, 4.2, (0.6, 0.4, 1.1, 0.3))
    for horizon, axes in zip(horizons, panels):
        part = course[course["horizon"] == horizon]
        for name, curve in part.groupby("predictor", sort=False):
            base = str(name).partition(":")[0]
            known = curve.dropna(subset="error_rate").sort_values("cutoff", kind="stable")
            style = PREDICTORS.get(base, {"color": FAINT})
            axes.plot(known["cutoff"], 100 * known["error_rate"], label=name if base in PREDICTORS else None, **style)
        noise = part.groupby("cutoff")["error_noise"].mean()
        axes.plot(noise.index, 100 * noise, label="noise", **NOISE)
        if int(horizon) in PAPER:
            percent = 100 * PAPER[int(horizon)]
            axes.axhline(percent, color=INK, linestyle="-.", linewidth=0.8, label=PAPER_LABEL)
            axes.annotate(
                f"{percent:.1f}%", (1, percent), xycoords=("axes fraction", "data"), xytext=(2, 0),
                textcoords="offset points", fontsize=7, va="center",
            )  # fmt: skip
        axes.set(title=f"next {horizon:,} steps", xlabel="cutoff (step)", ylabel="error rate (%)")
        log_scale(axes)
    one_legend(figure, axes, columns=4)
    return figure


def predictability(frames: Frames) -> Figure:
    """Error and noise by horizon, and error by the length of the history whose mean is the forecast."""
    figure, panels, _ = several_panels(2, 10.4, 4.2, (0.6, 0.1, 1.0, 0.3))
    shown = (
        (frames["by_horizon"], "horizon", "level, by horizon", "steps ahead"),
        (frames["by_history"], "history", "mean of the last steps, 1,000 steps ahead", "steps of history"),
    )
    for axes, (frame, along, title, xlabel) in zip(panels, shown):
        for state, part in frame.groupby("state", sort=True, observed=True):
            colour, marker = STATE[str(state)], MARKER[str(state)]
            axes.plot(part[along], 100 * part["error_rate"], color=colour, marker=marker, markersize=4, label=state)
            axes.plot(part[along], 100 * part["error_noise"], color=colour, linestyle=":", label=f"{state}: noise")
        axes.set(title=title, xlabel=xlabel, ylabel="error rate (%)", xscale="log")
        steps = sorted(frame[along].unique())
        axes.set_xticks(steps, [f"{n / 1000:g}k" if n >= 1000 else f"{n}" for n in steps], fontsize=7)
        axes.minorticks_off()
        log_scale(axes)
    one_legend(figure, figure.axes[0])
    return figure


def predicted(frames: Frames) -> Figure:
    """What the baseline and the paper's predictors said of the load of each expert, beside what happened."""
    shares = frames["last_shares"]
    figure, panels = _panels(shares, "share of the layer's load (%)", "expert, by actual share")
    for _, own, axes in panels:
        part = own.pivot(index="expert", columns="predictor", values="predicted")
        actual = own.groupby("expert")["actual"].first().sort_values(ascending=False, kind="stable")
        at, many = np.arange(len(actual)), len(actual) > MOST_NAMED
        if many:
            axes.stairs(100 * actual, np.arange(len(actual) + 1) - 0.5, fill=True, color=FAINT, label="actual")
        else:
            axes.bar(at, 100 * actual, color=FAINT, width=0.9, label="actual")
        for name in part.columns:
            style = PREDICTORS.get(str(name).partition(":")[0], {"color": INK, "marker": "x"})
            if str(name).partition(":")[0] in (*PREDICTORS, BASELINE):
                own_shares = 100 * part[name].reindex(actual.index)
                marks = style | {"linestyle": "", "markersize": 2 if many else 4, "fillstyle": "none"}
                axes.plot(at, own_shares, label=name, rasterized=many, **marks)
        every = -(-len(actual) // 16)
        axes.set_xticks(at[::every], [str(expert) for expert in actual.index[::every]], fontsize=7)
    one_legend(figure, axes)
    return figure


def _said(text: str) -> Callable[[Frames], str]:
    return lambda _frames: text


def _last_cutoff(frames: Frames) -> str:
    shares = frames["last_shares"]
    return f"Predicted and actual share of the {shares['horizon'].iloc[0]:,} steps after {shares['cutoff'].iloc[0]:,}"


FIGURES: Mapping[str, Kind] = {
    "load_share": Kind(("load", "layers"), _said("Load share of every expert"), load_share),
    "variance": Kind(
        ("fluctuation", "layers"), _said("Sliding variance of the load share, mean over experts"),
        lambda frames: fluctuation(frames, "variance"),
    ),
    "range": Kind(
        ("fluctuation", "layers"), _said("Sliding range of the load share, mean over experts"),
        lambda frames: fluctuation(frames, "range"),
    ),
    "error_course": Kind(("course",), _said("Error of the paper's predictors at each cutoff"), error_course),
    "movement": Kind(
        ("movement", "layers"), _said("Movement from one window to the next, noise taken off: what the rule judges"),
        movement,
    ),
    "predictability": Kind(("by_horizon", "by_history"), _said("Error by horizon and by history"), predictability),
    "predicted": Kind(("last_shares",), _last_cutoff, predicted),
}  # fmt: skip
"""The figures of the appendix: the paper's own first."""


# --- shared by the figures ---------------------------------------------------------------------


def _panels(
    frame: pd.DataFrame, ylabel: str, xlabel: str = "step", right: float = 0.15
) -> tuple[Figure, list[tuple[int, pd.DataFrame, Axes]]]:
    """A figure with one panel per layer, at most `MOST_PANELS`, in reading order: layer, its part of *frame*, panel."""
    parts = {int(str(layer)): part for layer, part in frame.groupby("layer")}
    layers = list(parts)
    chosen = layers
    if len(layers) > MOST_PANELS:
        chosen = [layers[i] for i in np.linspace(0, len(layers) - 1, MOST_PANELS).round().astype(int)]
    columns = min(2 if len(chosen) <= 4 else 3, len(chosen))
    size = 5.4 * columns, 2.6 + 0.8 / -(-len(chosen) // columns)
    figure, axes, columns = several_panels(len(chosen), *size, (0.75, right, 0.95, 0.3), columns)
    for i, (layer, panel) in enumerate(zip(chosen, axes)):
        panel.set_title(f"layer {layer}", fontsize=9, loc="left")
        panel.tick_params(labelsize=7)
        if i + columns >= len(chosen):
            panel.set_xlabel(xlabel, fontsize=8)
    some = "" if chosen == layers else f"; {len(chosen)} of {len(layers)} layers"
    edge = {} if figure.get_layout_engine() else {"x": 0.1 / figure.get_figwidth()}
    figure.supylabel(f"{ylabel}{some}", fontsize=9, **edge)
    return figure, [(layer, parts[layer], panel) for layer, panel in zip(chosen, axes)]


def _settle_steps(layers: pd.DataFrame) -> dict[int, int]:
    settled = layers.dropna(subset="settle_step")
    return dict(zip(settled["layer"].astype(int), settled["settle_step"].astype(int)))


def _mark_settled(axes: Axes, step: int | None) -> None:
    if step is not None:
        axes.axvline(step, **SETTLE)
        axes.annotate(
            f"settles at {step:,}", (step, 0.97), xycoords=("data", "axes fraction"), xytext=(3, 0),
            textcoords="offset points", fontsize=7, va="top",
        )  # fmt: skip
