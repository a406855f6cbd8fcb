"""The figures of the page: each has one message, which is its title. Adding one: a function and a line in FIGURES."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.reporting.answers import (
    BALANCED,
    PREDICTABLE,
    SETTLED,
    WORTH,
    best_of,
    best_plan,
    plan_peaks,
    predictable,
    settled,
    verdict_in,
    worthwhile,
)  # fmt: skip
from moetrace.reporting.residency import QUESTION as KEPT
from moetrace.reporting.residency import ages, coverage, kept, lasting
from moetrace.reporting.style import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    HOT,
    INK,
    STATE,
    level_line,
    log_scale,
    name_at_ends,
    new_figure,
    one_legend,
    one_panel,
    predictor_style,
    several_panels,
)  # fmt: skip
from moetrace.reporting.tables import rows_of
from moetrace.words import BASELINE, DEFAULT, ORACLE, STABLE, TRANSIENT, UNKNOWN

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.6
TOKENS_OVER_RIDGE = (0.03, 0.125, 0.5, 2, 8)
# Layers with a name on their axis, where there are more.
MOST_LABELS = 30

# The scale of the map ends at this quantile: the first steps of a run would leave the rest one colour.
USUAL = 0.99

Frames = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """A figure: the frames it *needs*, the first of which it shows, its *message*, and how it is drawn from them.

    *question* is that of the answer that it belongs to, on the page.
    """

    needs: tuple[str, ...]
    message: Callable[[Frames], str]
    draw: Callable[[Frames], Figure]
    question: str = ""


# --- how uneven ----------------------------------------------------------------------------------------------------


def peaks(frames: Frames) -> Figure:
    """The load of the hottest expert, all layers by steps."""
    table = frames["peaks"].pivot_table(index="layer", columns="step", values="peak_over_mean")
    figure, axes = one_panel(WIDTH, 1.3 + min(0.28 * len(table), 4.5))
    steps = [*(table.columns - np.diff(table.columns, prepend=0)), table.columns[-1]]
    rows = np.arange(len(table) + 1)
    highest = max(1.01, float(np.quantile(table, USUAL)))
    mesh = axes.pcolormesh(steps, rows, table.to_numpy(), cmap="cividis", rasterized=True, vmin=1, vmax=highest)
    _name_layers(axes, list(table.index), 0.5)
    axes.set(xlabel="step", ylabel="layer")
    figure.colorbar(mesh, ax=axes, label="times the mean load", fraction=0.05, aspect=12, extend="max")
    return figure


def _peaks_message(frames: Frames) -> str:
    worst = max(rows_of(frames["balance"]), key=lambda row: row["max_over_mean"])
    peak = f"{worst['max_over_mean']:.1f}x the mean load"
    return f"Layer {worst['layer']} is the most uneven now: its hottest expert has {peak}"


# --- when it became stable ------------------------------------------------------------------------------------------


def settling(frames: Frames, axes: Axes | None = None) -> Figure:
    """Settle step and its interval, a row for each layer: the earliest on top, those never stable at the bottom."""
    layers = frames["layers"].assign(at=frames["layers"]["settle_step"].astype("Float64"))
    layers = layers.sort_values("at", na_position="last", kind="stable").reset_index(drop=True)
    figure, axes = one_panel(WIDTH, 1.2 + min(0.24 * len(layers), 6.0), axes)
    last, stable = int(frames["windows"]["to_step"].max()), layers[layers["state"] == STABLE]
    axes.plot(stable["settle_step"], stable.index, "o", color=STATE[STABLE], markersize=5, label="settle step")
    ends = stable["settle_step_low"], stable["settle_step_high"]
    axes.hlines(stable.index, *ends, color=FAINT, linewidth=4, label="its interval", zorder=1)
    for end, name in zip(ends, ("begin", "end")):  # for the pointer alone
        axes.plot(end, stable.index, linestyle="", label=f"_{name} of the interval")
    for state, name in ((TRANSIENT, "not stable at the end"), (UNKNOWN, "stability unknown")):
        rows = layers.index[layers["state"] == state]
        if len(rows):
            axes.plot(np.full(len(rows), last), rows, ">", color=STATE[state], markersize=5, label=name)
    _name_layers(axes, layers["layer"].tolist(), 0.0)
    axes.set(xlabel="step", ylabel="layer", xlim=(frames["windows"]["from_step"].min(), last * 1.01))
    axes.set_ylim(len(layers) - 0.5, -0.5)
    one_legend(figure, axes)
    return figure


# --- how well predicted --------------------------------------------------------------------------------------------


def errors(frames: Frames) -> Figure:
    """Error over the run, a panel for each horizon: the best predictor, the baseline and the noise; the rest grey.

    The best over the shortest horizon, in every panel: a colour has one name in the legend of all.
    """
    course = frames["course"]
    horizons, best = sorted(course["horizon"].unique()), _best(frames, _shortest(frames["summary"]))
    figure, panels, columns = several_panels(len(horizons), WIDTH, 3.1, (0.6, 0.1, 0.85, 0.3))
    for i, (horizon, axes) in enumerate(zip(horizons, panels)):
        part = course[course["horizon"] == horizon]
        for name, curve in part.groupby("predictor", sort=False):
            known = curve.dropna(subset="error_rate").sort_values("cutoff", kind="stable")
            axes.plot(known["cutoff"], 100 * known["error_rate"], marker=".", **predictor_style(str(name), best))
        noise = part.groupby("cutoff")["error_noise"].mean()
        axes.plot(noise.index, 100 * noise, color=GREY, linestyle=":", label="noise")
        axes.set(
            title=f"next {horizon:,} steps", xlabel="cutoff (step)", ylabel="" if i % columns else "error rate (%)"
        )
        log_scale(axes)
    if not set(course["predictor"]) <= {best, BASELINE}:
        axes.plot([], [], color=FAINT, label="other predictors")
    one_legend(figure, axes)
    return figure


def _errors_message(frames: Frames) -> str:
    course = frames["course"].dropna(subset="error_rate")
    horizon = _shortest(frames["summary"])
    best = _best(frames, horizon)
    own = course[(course["horizon"] == horizon) & (course["predictor"] == best)]
    first, last = (
        f"{100 * row['error_rate']:.1f}% at step {row['cutoff']:,}" for _, row in own.iloc[[0, -1]].iterrows()
    )
    goes = f"goes from {first} to {last}" if len(own) > 1 else f"is {first}"
    return f"The error of {best} over the next {horizon:,} steps {goes}"


def _best(frames: Frames, horizon: int) -> str | None:
    """The predictor of the lowest mean error: while stable, if anything was scored there."""
    scored = frames["summary"][(frames["summary"]["horizon"] == horizon) & (frames["summary"]["scored"] > 0)]
    for state in ("stable", "all"):
        rows = scored[scored["state"] == state]
        if len(rows):
            return str(best_of(rows)["predictor"])
    return None


def _shortest(summary: pd.DataFrame) -> int:
    """The shortest horizon that anything was scored over."""
    return int(summary.loc[summary["scored"] > 0, "horizon"].min())


def comparison(frames: Frames, axes: Axes | None = None) -> Figure:
    """Each predictor's difference from the baseline with its interval, stable beside transient; in *axes* the first."""
    summary = frames["summary"]
    own = summary[(summary["horizon"] == _shortest(summary)) & (summary["scored"] > 0)]
    states = [state for state in ("stable", "transient", "unknown") if (own["state"] == state).any()]
    ranked = own[own["state"] == states[0]].sort_values("error_rate", ascending=False, kind="stable")
    names = ranked["predictor"].astype(str).tolist()
    figure, panels, columns = several_panels(len(states), WIDTH, 1.3 + 0.26 * len(names), axes=axes)
    best = _best(frames, int(own["horizon"].min()))
    for i, (state, axes) in enumerate(zip(states, panels)):
        rows = own[own["state"] == state].set_index("predictor").reindex(names)
        for at, (name, row) in enumerate(rows.iterrows()):
            colour, ends = {BASELINE: INK, best: BLUE}.get(str(name), GREY), ["difference_low", "difference_high"]
            axes.plot(100 * row[ends], [at, at], color=colour, linewidth=1.6, label="_end of the 95% interval")
            axes.plot([100 * row["difference"]], [at], "o", color=colour, markersize=5)
            if row["error_rate"] == row["error_rate"]:
                label, place = f"{100 * row['error_rate']:.3g}%", ("axes fraction", "data")
                axes.annotate(label, (1.01, at), xycoords=place, va="center", fontsize=8)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(labelleft=i % columns == 0)
        axes.set(title=f"{state}, {int(rows['scored'].max()):,} scores", xlabel=f"points above {BASELINE}")
        axes.margins(x=0.12)
    return figure


# --- is balancing worth it -----------------------------------------------------------------------------------------


STRATEGIES = {
    DEFAULT: (GREY, "default placement"),
    BASELINE: (INK, f"planned by {BASELINE}"),
    ORACLE: (GREEN, "perfect forecast"),
}


def plan_course(scores: pd.DataFrame, best: str, axes: Axes | None = None) -> Figure:
    """The busiest GPU over the run, mean over layers, a curve per strategy: those that matter in colour.

    *scores* are those of the plans of one trace; *best* is the strategy recommended.
    """
    figure, axes = one_panel(WIDTH, 3.0, axes)
    means = scores.groupby(["strategy", "cutoff"], sort=False)["peak_over_mean"].mean().reset_index()
    named = {str(name): (FAINT, str(name)) for name in means["strategy"].unique()}
    for name, (colour, label) in (named | {best: (BLUE, f"planned by {best}")} | STRATEGIES).items():
        curve = means[means["strategy"] == name].sort_values("cutoff", kind="stable")
        if len(curve):
            axes.plot(curve["cutoff"], curve["peak_over_mean"], marker=".", color=colour, label=label)
    axes.set(xlabel="cutoff (step)", ylabel="busiest GPU / mean GPU load")
    axes.set_ylim(bottom=1)
    axes.grid(visible=True)
    name_at_ends(figure, axes)
    return figure


def knee(saving: pd.DataFrame, verdict: Mapping[str, Any], axes: Axes | None = None) -> Figure:
    """What a plan saves by tokens per expert over the ridge of the hardware; this trace on its hardware is marked.

    *saving* is the ``knee`` of one trace, *verdict* that of it: without hardware, the GPU of the highest ridge counts.
    """
    figure, axes = one_panel(WIDTH, 3.0, axes)
    axes.plot(saving["tokens_over_ridge"], 100 * saving["saved"], marker=".", color=BLUE, label="one plan")
    for part, style in ((2, ":"), (5, "--")):
        level_line(axes, part, f"{part}%", color=FAINT, linestyle=style)
    ridge = verdict["ridge"] if verdict["ridge"] is not None else verdict["memory_bound_ridge"]
    if ridge:
        known = "this trace" if verdict["ridge"] is not None else f"this trace at a ridge of {ridge:,.0f}"
        axes.axvline(verdict["tokens_per_expert"] / ridge, color=INK, label=known)
    axes.set_xscale("log")
    axes.set(xlabel="tokens per expert and pass / ridge", ylabel="expert time saved (%)")
    axes.set_xticks(TOKENS_OVER_RIDGE, [f"{value:g}" for value in TOKENS_OVER_RIDGE])
    axes.minorticks_off()
    axes.set_ylim(bottom=min(0, 100 * saving["saved"].min()))
    axes.grid(visible=True)
    one_legend(figure, axes)
    return figure


def _knee_message(frames: Frames) -> str:
    found = worthwhile(verdict_in(frames) or {})
    return found.removesuffix(".") if found else "A plan saves less than 5% at every number of tokens per expert"


def _placement_message(frames: Frames) -> str:
    peaks, gpus = plan_peaks(frames["placement"]), int(frames["placement"]["gpus"].iloc[0])
    best = best_plan(peaks)
    lowered = f"lower the busiest GPU from {peaks[DEFAULT]:.2f}x to {peaks[best]:.2f}x of the mean load"
    return f"On {gpus} GPUs plans by {best} {lowered}"


def _kept(frames: Frames) -> dict[str, Any]:
    return rows_of(frames["kept"])[0]


FIGURES: Mapping[str, Kind] = {
    "peaks": Kind(("peaks", "balance"), _peaks_message, peaks, BALANCED),
    "settling": Kind(("layers", "windows"), lambda f: settled(f["layers"]).sentence, settling, SETTLED),
    "errors": Kind(("course", "summary"), _errors_message, errors, PREDICTABLE),
    "predictors": Kind(
        ("summary", "course"), lambda f: predictable(f["summary"], _shortest(f["summary"])).sentence, comparison,
        PREDICTABLE,
    ),
    "knee": Kind(("knee", "verdict"), _knee_message, lambda f: knee(f["knee"], verdict_in(f) or {}), WORTH),
    "placement": Kind(
        ("plan_scores", "placement"), _placement_message,
        lambda f: plan_course(f["plan_scores"], best_plan(plan_peaks(f["placement"]))), WORTH,
    ),
    "kept": Kind(
        ("kept_curve", "kept"), lambda f: kept(_kept(f)).sentence,
        lambda f: coverage(f["kept_curve"], _kept(f)["slots"]), KEPT,
    ),
    "ages": Kind(
        ("kept_ages", "kept"), lambda f: lasting(_kept(f)),
        lambda f: ages(f["kept_ages"], _kept(f)["best"]), KEPT,
    ),
}  # fmt: skip
"""The figures of the page, in its order; one whose frames are missing or empty is left out."""


def possible(kinds: Mapping[str, Kind], frames: Frames) -> dict[str, Kind]:
    """Those *kinds* of figure that the *frames* allow."""
    return {name: kind for name, kind in kinds.items() if all(_filled(frames.get(need)) for need in kind.needs)}


def _filled(frame: pd.DataFrame | None) -> bool:
    """Whether there is a *frame* with rows; one of scores has something that was scored."""
    if frame is None or not len(frame):
        return False
    return bool((frame["scored"] > 0).any()) if "scored" in frame else True


# --- a layer -------------------------------------------------------------------------------------------------------


def course(hottest: pd.DataFrame) -> Figure:
    """The course of one layer: its five hottest experts in colour, all others as a grey band of quantiles."""
    figure = new_figure(7.2, 2.2, (0.5, 1.3, 0.42, 0.07))
    axes = figure.add_subplot()
    series = {str(name): part for name, part in hottest.groupby("series", sort=False)}
    steps = next(iter(series.values()))["step"]
    if "low" in series:
        low, middle, high = (100 * series.pop(name)["share"].to_numpy() for name in ("low", "middle", "high"))
        axes.fill_between(steps, low, high, color=FAINT, alpha=0.5, linewidth=0, label="_80% of the others")
        axes.plot(steps, middle, color=GREY, linewidth=0.9, label="80% of the others")
    for colour, (expert, part) in zip(HOT, series.items()):
        axes.plot(part["step"], 100 * part["share"], color=colour, linewidth=1.1, label=f"expert {expert}")
    axes.set(xlabel="step", ylabel="share of the load (%)")
    axes.set_ylim(bottom=0)
    name_at_ends(figure, axes)
    return figure


def _name_layers(axes: Axes, layers: Sequence[int], shift: float) -> None:
    """The numbers of the layers beside their rows, as many as can be read; the axis knows all."""
    every = -(-len(layers) // MOST_LABELS)
    axes.set_yticks([shift + i for i in range(len(layers))], [str(layer) for layer in layers], fontsize=8)
    for i, tick in enumerate(axes.yaxis.get_major_ticks()):
        tick.set_visible(i % every == 0)
    if shift:
        axes.invert_yaxis()
