"""The course of one layer, as the page's explorer shows it: one for each of up to a hundred layers.

Written as SVG here, in a millisecond; a plotting library takes fifty for the same few lines, a tenth of a whole report.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from moetrace.report.style import FAINT, GREY, HOT, INK, page_colour

if TYPE_CHECKING:
    import pandas as pd

WIDTH, HEIGHT = 518.0, 158.0
LEFT, RIGHT, TOP, BOTTOM = 36.0, 498.0, 6.0, 106.0
"""Where the curves are, in points."""
BAND = ("low", "middle", "high")
# Of a letter of the legend, and of a line and the gaps around it.
LETTER, LINE = 4.9, 30.0


def course(hottest: pd.DataFrame) -> str:
    """An SVG element: the hottest experts of a layer in colour, all others as a grey band of quantiles.

    *hottest* is the part of the frame of that name that is about one layer, a row for each series and step.
    """
    series = {str(name): 100 * part["share"].to_numpy() for name, part in hottest.groupby("series", sort=False)}
    steps = hottest["step"].unique()
    across = _Scale(float(steps[0]), float(steps[-1]), LEFT, RIGHT)
    up = _Scale(0.0, max(float(hottest["share"].max()) * 100, 1e-9), BOTTOM, TOP)
    at = [across(step) for step in steps.tolist()]
    curves, names = [], []
    if "low" in series:
        low, middle, high = ([up(share) for share in series.pop(name).tolist()] for name in BAND)
        band = _points([*at, *at[::-1]], [*low, *high[::-1]])
        curves += [f'<polygon points="{band}" {_filled(FAINT)} opacity=".5"/>', _curve(at, middle, GREY, 0.9)]
        names += [("80 % of the others", FAINT)]
    for colour, (expert, shares) in zip(HOT, series.items()):
        curves += [_curve(at, [up(share) for share in shares.tolist()], colour, 1.1)]
        names += [(f"expert {expert}", colour)]
    parts = [*_axes(across, up), *curves, *_legend(names)]
    return f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" font-size="9" {_filled(INK)}>\n' + "\n".join(parts) + "\n</svg>"


class _Scale:
    """From numbers between *low* and *high* to points between *begin* and *end*."""

    def __init__(self, low: float, high: float, begin: float, end: float) -> None:
        self.low, self.high, self.begin = low, high, begin
        self.points = (end - begin) / ((high - low) or 1.0)

    def __call__(self, number: float) -> float:
        return self.begin + (number - self.low) * self.points

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """At most so many round numbers in between, as points and text."""
        from matplotlib.ticker import MaxNLocator

        found = MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)
        return [(self(tick), f"{tick:,.10g}") for tick in found if self.low <= tick <= self.high]


def _axes(across: _Scale, up: _Scale) -> Iterable[str]:
    grey = f'stroke="{page_colour(GREY)}" stroke-width=".8" fill="none"'
    yield f'<path d="M{LEFT:g} {TOP:g}V{BOTTOM:g}H{RIGHT:g}" {grey}/>'
    for x, text in across.ticks(8):
        yield f'<path d="M{x:.1f} {BOTTOM:g}v3" {grey}/>' + _text(x, BOTTOM + 12, text)
    for y, text in up.ticks(5):
        yield f'<path d="M{LEFT:g} {y:.1f}h-3" {grey}/>' + _text(LEFT - 5, y + 3, text, "end")
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 25, "step")
    yield f'<g transform="rotate(-90)">{_text(-(TOP + BOTTOM) / 2, 9, "share of the load (%)")}</g>'


def _legend(names: Sequence[tuple[str, str]]) -> Iterable[str]:
    """What each colour is, below."""
    widths = [LINE + LETTER * len(name) for name, _ in names]
    x = (WIDTH - sum(widths)) / 2
    for width, (name, colour) in zip(widths, names):
        yield f'<rect x="{x:.1f}" y="{HEIGHT - 10:g}" width="14" height="2" {_filled(colour)}/>'
        yield _text(x + 18, HEIGHT - 6, name, "start")
        x += width


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _curve(x: Sequence[float], y: Sequence[float], colour: str, width: float) -> str:
    return f'<polyline points="{_points(x, y)}" fill="none" stroke="{page_colour(colour)}" stroke-width="{width}"/>'


def _points(x: Sequence[float], y: Sequence[float]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))


def _filled(colour: str) -> str:
    return f'fill="{page_colour(colour)}"'
