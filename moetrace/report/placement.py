"""Figures about plans: how even each left the load over the run, and for how long one holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetrace.report.answers import BASELINE
from moetrace.report.style import BLUE, FAINT, GREEN, GREY, INK, MARKER, STATE, new_figure, one_legend

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STRATEGIES = {"in_order": (GREY, "in order"), BASELINE: (INK, f"planned by {BASELINE}"), "oracle": (GREEN, "oracle")}


def plans(scores: pd.DataFrame, replanning: pd.DataFrame | None, best: str) -> Figure:
    """The busiest GPU over the run, a curve per strategy; and by how often to plan, if *replanning* is there.

    *scores* are those of one trace, *replanning* the summary for one strategy; *best* is the strategy recommended.
    """
    panels = 1 if replanning is None else 2
    figure = new_figure(max(8.0, 5.6 * panels), 4.2)
    courses(figure.add_subplot(1, panels, 1), scores, best)
    one_legend(figure, figure.axes[0])
    if replanning is not None:
        _holding(figure.add_subplot(1, panels, 2), replanning)
    return figure


def courses(axes: Axes, scores: pd.DataFrame, best: str) -> None:
    """The busiest GPU over the run, mean over layers, a curve per strategy: those that matter have a name."""
    means = scores.groupby(["strategy", "cutoff"], sort=False)["peak_over_mean"].mean().reset_index()
    others = [name for name in means["strategy"].unique() if name not in STRATEGIES and name != best]
    for name in [*others, best, *STRATEGIES]:
        colour, label = STRATEGIES.get(name, (BLUE, f"planned by {best}") if name == best else (FAINT, None))
        curve = means[means["strategy"] == name].sort_values("cutoff")
        if len(curve):
            axes.plot(curve["cutoff"], curve["peak_over_mean"], marker=".", color=colour, label=label)
    if others:
        axes.plot([], [], color=FAINT, label="other forecasts")
    axes.set(xlabel="cutoff (step)", ylabel="busiest GPU, in mean loads")
    axes.set_ylim(bottom=1)
    axes.grid(visible=True)


def _holding(axes: Axes, replanning: pd.DataFrame) -> None:
    every = replanning["replan_every"].dropna().unique().tolist()
    places = {n: i for i, n in enumerate([*every, 0])}  # 0 stands for never again
    for shift, (state, own) in enumerate(replanning[replanning["state"] != "all"].groupby("state", observed=True)):
        at = [places[n] + 0.08 * (2 * shift - 1) for n in own["replan_every"].fillna(0)]
        middle = 100 * own["difference"]
        ends = [middle - 100 * own["difference_low"], 100 * own["difference_high"] - middle]
        looks = {"color": STATE[str(state)], "marker": MARKER[str(state)], "markersize": 5, "capsize": 3}
        axes.errorbar(at, middle, ends, label=f"made while {state}", **looks)  # type: ignore[arg-type]
    axes.set_xticks(range(len(places)), [*(f"{n:,}" for n in every), "once"])
    axes.set(
        title=f"plans by {replanning['strategy'].iloc[0]}, made every so many steps",
        xlabel="steps from one plan to the next",
        ylabel=f"above planning every {every[0]:,} (% of the mean load)",
    )
    axes.grid(visible=True)
    axes.legend(loc="upper left")
