"""The figure about plans: how even each left the load, and for how long one holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetrace.report.style import STATE_STYLE, curves, new_figure, one_legend, trace_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plans(scores: pd.DataFrame, replanning: pd.DataFrame | None, gpus: int) -> Figure:
    """The busiest GPU over the run, a curve per strategy; and by how often to plan, if *replanning* is there.

    *scores* are those of one trace, *replanning* the summary for one strategy.
    """
    panels = 1 if replanning is None else 2
    figure = new_figure(max(8.0, 5.6 * panels), 4.6)
    figure.suptitle(f"{trace_of(scores)}: experts on {gpus} GPUs")
    _courses(figure.add_subplot(1, panels, 1), scores)
    one_legend(figure, figure.axes[0], None)
    if replanning is not None:
        _holding(figure.add_subplot(1, panels, 2), replanning)
    return figure


def _courses(axes: Axes, scores: pd.DataFrame) -> None:
    horizon = int(scores["horizon"].iloc[0])
    means = scores.groupby(["strategy", "cutoff"], sort=False)["peak_over_mean"].mean().reset_index()
    curves(axes, means, "strategy", "peak_over_mean")
    axes.set(
        title=f"plans for the next {horizon:,} steps, mean over layers",
        xlabel="cutoff (step)",
        ylabel="load of the busiest GPU over the mean",
    )
    axes.set_ylim(bottom=1)
    axes.grid(axis="y", alpha=0.3)


def _holding(axes: Axes, replanning: pd.DataFrame) -> None:
    every = replanning["replan_every"].dropna().unique().tolist()
    places = {n: i for i, n in enumerate([*every, 0])}  # 0 stands for never again
    for shift, (state, own) in enumerate(replanning[replanning["state"] != "all"].groupby("state", observed=True)):
        colour, marker = STATE_STYLE[str(state)]
        at = [places[n] + 0.08 * (2 * shift - 1) for n in own["replan_every"].fillna(0)]
        middle = 100 * own["difference"]
        ends = [middle - 100 * own["difference_low"], 100 * own["difference_high"] - middle]
        axes.errorbar(
            at, middle, ends, color=colour, marker=marker, markersize=5, capsize=3, label=f"made while {state}"
        )
    axes.set_xticks(range(len(places)), [*(f"{n:,}" for n in every), "once"])
    axes.set(
        title=f"plans by {replanning['strategy'].iloc[0]}, made every so many steps",
        xlabel="steps from one plan to the next",
        ylabel=f"above planning every {every[0]:,} (% of the mean load)",
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left", fontsize=8, frameon=False)
