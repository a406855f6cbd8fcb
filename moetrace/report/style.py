"""What all figures have in common: colours, size, legend, and how they become a picture."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour-blind safe (Okabe and Ito), in the order predictors are given.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
STATE_STYLE = {"stable": (COLOURS[0], "o"), "transient": (COLOURS[4], "s"), "all": ("grey", "^")}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def png(figure: Figure) -> bytes:
    """The figure as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def trace_of(frame: pd.DataFrame) -> str:
    """The name of the trace that a frame is about; a dollar sign in it begins no formula."""
    return str(frame["trace"].iloc[0]).replace("$", r"\$")


def curves(axes: Axes, frame: pd.DataFrame, by: str, measure: str, scale: float = 1.0) -> None:
    """*measure* over the cutoffs, a marked curve for each value of *by*, in the order of the rows."""
    for colour, marker, (name, curve) in zip(COLOURS * 9, MARKERS * 9, frame.groupby(by, sort=False)):
        known = curve.dropna(subset=measure).sort_values("cutoff")
        axes.plot(known["cutoff"], scale * known[measure], color=colour, marker=marker, markersize=4, label=name)


def one_legend(figure: Figure, axes: Axes, title: str | None, columns: int = 6) -> None:
    """What the curves of the last panel are called, below all panels: it hides no data."""
    handles, labels = axes.get_legend_handles_labels()
    place: Any = "outside lower center"
    figure.legend(
        handles, labels, title=title, title_fontsize=8, loc=place, ncols=min(len(labels), columns), fontsize=8,
        frameon=False,
    )  # fmt: skip
