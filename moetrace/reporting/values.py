"""The values that a page shows under the pointer: read from a drawn figure, so that every figure has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Points of a figure that a page keeps: more than can be pointed at, and a page has to stay small.
MOST_POINTS = 4000
# A place in a figure is in so many parts of its width and height.
PARTS = 10_000


def values_of(figure: Figure) -> str:
    """The curves of a *figure* that was drawn, as JSON for the script of the page; ``[]`` where it has none.

    A panel has the names of its axes, ``x`` and ``y``, and ``curves``: a label, and points as place from the left and
    from the top in parts of 10,000, and the two values. A cell of a map has a third, its colour, called ``z``. Where
    ``names`` are given the second value is the place of a name. Of long curves every n-th point is kept.
    """
    curves = {axes: list(_curves(axes)) for axes in figure.axes if axes.get_label() != "<colorbar>"}
    number = sum(len(values) for found in curves.values() for _, values in found)
    every = max(1, -(-number // MOST_POINTS))
    panels = [
        _panel(axes, [(label, values if axes.collections else values[::every]) for label, values in found])
        for axes, found in curves.items()
        if found
    ]
    text = json.dumps(panels, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _curves(axes: Axes) -> Iterator[tuple[str, Any]]:
    """Label and values of what is drawn in data coordinates: curves, shape (points, 2), and maps, (cells, 3)."""
    from matplotlib.collections import QuadMesh

    for line in axes.lines:
        label, values = str(line.get_label()), np.asarray(line.get_xydata(), dtype=float)
        if line.get_transform() != axes.transData or not len(values):
            continue  # a threshold, or the sample of a legend
        values = values[np.isfinite(values).all(axis=1)]
        yield "" if label.startswith("_child") else label.removeprefix("_"), values
    for mesh in axes.collections:
        if isinstance(mesh, QuadMesh):
            corners = np.asarray(mesh.get_coordinates())
            middles = (corners[:-1, :-1] + corners[1:, 1:]) / 2
            yield "", np.dstack([middles, np.asarray(mesh.get_array())]).reshape(-1, 3)


def _panel(axes: Axes, curves: list[tuple[str, Any]]) -> dict[str, Any]:
    """One panel for the script, see `values_of`."""
    from matplotlib.ticker import FixedFormatter, FixedLocator

    figure = axes.get_figure(root=True)
    assert figure is not None
    size = np.array([figure.bbox.width, figure.bbox.height])
    panel: dict[str, Any] = {"x": axes.get_xlabel(), "y": axes.get_ylabel(), "curves": []}
    locator, formatter = axes.yaxis.get_major_locator(), axes.yaxis.get_major_formatter()
    if isinstance(locator, FixedLocator) and isinstance(formatter, FixedFormatter):
        panel["names"] = dict(zip((f"{place:g}" for place in locator()), formatter.seq))
    bars = [other for other in figure.axes if other.get_label() == "<colorbar>"]
    if bars:
        panel["z"] = bars[0].get_ylabel()
    for label, values in curves:
        places = axes.transData.transform(values[:, :2]) / size
        places = np.round(PARTS * np.column_stack([places[:, 0], 1 - places[:, 1]])).astype(int)
        rows = [[*place, *(float(f"{value:.4g}") if abs(value) < 1000 else round(value) for value in own)]
                for place, own in zip(places.tolist(), values.tolist())]  # fmt: skip
        panel["curves"].append([label, rows])
    return panel
