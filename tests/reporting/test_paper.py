"""The paper's figures: each curve and line at the height that its frame has, in percent where the axis says so."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle, StepPatch

from moetrace.reporting.paper import MOST_PANELS, error_course, fluctuation, load_share, movement, predicted

LAYERS = pd.DataFrame({"layer": [3], "settle_step": [200], "settle_step_low": [150], "settle_step_high": [250]})
AT = {"trace": "t", "layer": 3, "step": [100, 200, 300]}


def heights(figure):
    """By its label the height of each line of the only panel, at its end; of vertical lines the step."""
    (axes,) = [axes for axes in figure.axes if axes.lines]
    vertical = {line.get_label(): line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1}
    return axes, {line.get_label(): line.get_ydata()[-1] for line in axes.lines} | vertical


def test_movement_is_drawn_in_percent_with_its_thresholds():
    """And the interval of the settle step."""
    course = pd.DataFrame({**AT, "movement": [0.1, 0.05, 0.01], "unsettle_above": 0.08, "settle_below": 0.04})

    axes, lines = heights(movement({"movement": course, "layers": LAYERS}))

    assert 1.0 == pytest.approx(lines["mean over the hold"])
    assert [4.0, 8.0] == sorted(line.get_ydata()[0] for line in axes.lines if line.get_label() == "_")
    assert 200 in lines.values()
    assert {"transient above 8%", "stable below 4%"} <= {text.get_text() for text in axes.texts}
    (span,) = axes.patches
    assert (150, 250) == (span.get_x(), span.get_x() + span.get_width())


def test_fluctuation_has_the_noise_of_the_longest_window():
    """A curve for each window; the range in percent of a share."""
    parts = [
        pd.DataFrame({**AT, "window": window, "range": [0.3, 0.2, value], "noise_range": value / 2})
        for window, value in ((10, 0.02), (200, 0.06))
    ]

    _, lines = heights(fluctuation({"fluctuation": pd.concat(parts), "layers": LAYERS}, "range"))

    named = {label: height for label, height in lines.items() if "window" in label or "steps" in label}
    assert {"10 steps": 2.0, "200 steps": 6.0, "sampling noise, longest window": 3.0} == pytest.approx(named)
    assert 200 in lines.values()


def test_errors_are_drawn_beside_their_noise():
    """At each cutoff, in percent."""
    rows = [("sw_avg", 1000, 500, 0.2, 0.01), ("sw_avg", 1000, 1500, 0.1, 0.02), ("lstm", 1000, 1500, 0.3, 0.04)]
    course = pd.DataFrame(rows, columns=["predictor", "horizon", "cutoff", "error_rate", "error_noise"])

    axes, lines = heights(error_course({"course": course}))

    assert {"sw_avg": 10.0, "noise": 3.0}.items() <= {label: round(h, 9) for label, h in lines.items()}.items()
    assert "next 1,000 steps" == axes.get_title()


@pytest.mark.parametrize("experts", [4, 12])
def test_predicted_shares_stand_over_the_actual_ones(experts):
    """In percent, experts by their actual share; a predictor that is neither the paper's nor the baseline is left out."""
    actual = np.roll(np.arange(1, experts + 1) / (experts * (experts + 1) / 2), 1)
    order = np.argsort(-actual, kind="stable")
    said = {name: np.roll(actual, shift) for shift, name in enumerate(("sw_avg:window=10", "window_mean", "level"))}
    frame = pd.concat(
        pd.DataFrame({"layer": 3, "expert": range(experts), "predictor": name, "predicted": shares, "actual": actual})
        for name, shares in said.items()
    )

    (axes,) = predicted({"last_shares": frame}).axes

    assert ["sw_avg:window=10", "window_mean"] == [line.get_label() for line in axes.lines]
    for line in axes.lines:
        assert np.allclose(100 * said[line.get_label()][order], line.get_ydata())
        assert list(range(experts)) == list(line.get_xdata())
    steps = [bar.get_data() for bar in axes.patches if isinstance(bar, StepPatch)]  # where experts are many
    bars = steps[0][0] if steps else [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]
    assert np.allclose(100 * actual[order], bars)
    assert [(-0.5, 11.5)] * (experts == 12) == [(edges[0], edges[-1]) for _, edges, _ in steps]
    assert [str(expert) for expert in order] == [label.get_text() for label in axes.get_xticklabels()]


def test_many_layers_and_experts_are_drawn_by_samples_and_ranks():
    """The first and the last layer among those that stand for the rest; the colour of a curve is its rank at the end."""
    share = np.linspace(0.01, 0.15, 12)
    rows = [(layer, step, e, share[e]) for layer in range(40) for step in (1, 2) for e in range(12)]
    load = pd.DataFrame(rows, columns=["layer", "step", "expert", "share"])

    figure = load_share({"load": load, "layers": LAYERS.assign(layer=100)})

    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    titles = [axes.get_title(loc="left") for axes in panels]
    assert MOST_PANELS == len(titles)
    assert ("layer 0", "layer 4", "layer 39") == (titles[0], titles[1], titles[-1])
    assert "12 of 40 layers" in figure.get_supylabel()
    (curves,) = panels[0].collections
    assert 12 == len({tuple(colour) for colour in curves.get_edgecolor()})
    assert 15.0 == pytest.approx(max(path.vertices[:, 1].max() for path in curves.get_paths()))
