"""What all figures have in common: one map of colours, size, legend, and how they become a picture."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrace.errors import SettingError, known_names
from moetrace.words import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure
    from matplotlib.ticker import Locator

# Safe for the colour-blind (Okabe and Ito). A colour belongs to a meaning, never to a position.
INK, GREY, FAINT = "#1b1b1b", "#7f7f7f", "#c4c4c4"
BLUE, GREEN = "#0072b2", "#009e73"
STATE = {"stable": "#56b4e9", "transient": "#d55e00", "unknown": GREY, "all": GREY}
MARKER = {"stable": "o", "transient": "s", "unknown": "x", "all": "^"}
# The hottest experts of a layer, in the order of their load; all others are grey.
HOT = ("#d55e00", "#e69f00", "#009e73", "#56b4e9", "#cc79a7")
WINDOWS = {10: FAINT, 100: BLUE, 200: INK}
"""The paper's windows, in steps."""
# On a page the colours follow its theme: what they are called there.
VARIABLES = {INK: "--ink", GREY: "--grey", FAINT: "--faint", BLUE: "--blue", GREEN: "--green"}

Margins = tuple[float, float, float, float]
"""Left, right, bottom and top of a figure's panels, in inches."""
# Dots per inch of what is drawn as pixels on a page: curves too many to be kept as lines.
PAGE_DPI = 64
# Without a date the same figure is the same file. PNG: half the time of the usual compression, and 2% larger.
FILES: dict[str, dict[str, Any]] = {
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
    "png": {"pil_kwargs": {"compress_level": 3}},
}
# A logarithmic axis has 1, 2 and 5 times the powers of ten where its ends are less than so many times apart, else the
# powers alone, and of them at most so many.
FEW_POWERS, MOST_TICKS = 300, 10
# A line of a title in inches, and letters on an inch of it.
LINE, LETTERS = 0.2, 11
# The same of a legend, and the inches of the mark before each name.
LEGEND_LINE, LEGEND_LETTERS, MARK = 0.16, 14, 0.5
# Inches that a figure needs for names beside curves, those between two names, and of its height those of its axis.
NAMED, LINE_APART, AXIS = 5.0, 0.15, 0.6
# Widths that can be asked for, in inches, and of them those that a panel needs.
NARROWEST, WIDEST, PANEL = 2, 24, 2.5
WIDTH = re.compile(r"(\d+\.?\d*) ?(in|cm|mm)?")
INCH = {"in": 1, "cm": 2.54, "mm": 25.4}


SETTINGS: dict[str, Any] = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid.axis": "y", "grid.color": FAINT, "grid.linewidth": 0.5, "font.size": 9, "axes.titlesize": 9,
    "legend.frameon": False, "legend.fontsize": 8, "figure.titlesize": 11, "svg.fonttype": "none",
    "pdf.fonttype": 42,  # TrueType: publishers refuse the outlines of Type 3
}  # fmt: skip
"""How matplotlib draws here."""


@dataclass(frozen=True)
class Look:
    """How figures look as files: *width* in inches, their own where None; a *style* of matplotlib; with *titles*."""

    width: float | None = None
    style: str | None = None
    titles: bool = False

    @classmethod
    def of(cls, width: float | str | None, style: str | Path | None, *, titles: bool = False) -> Look:
        """A look by a *width* such as ``3.3in``, ``8.4cm`` or ``84mm``, and the name or the file of a *style*.

        Raises `SettingError` for an unknown width or style.
        """
        match = WIDTH.fullmatch(f"{width}".strip()) if width is not None else None
        inches = float(match[1]) / INCH[match[2] or "in"] if match else None
        if width is not None and not (inches and NARROWEST <= inches <= WIDEST):
            raise SettingError(f"a figure is {NARROWEST} to {WIDEST} inches wide, such as 3.3in or 84mm, not {width}")
        found = cls(inches, None if style is None else str(style), titles)
        with styled(found):
            return found


USUAL = Look()
LOOK = ContextVar("LOOK", default=USUAL)
"""How figures look within `styled`."""


@contextmanager
def styled(look: Look = USUAL) -> Iterator[None]:
    """Within it, figures look alike; raises `SettingError` where there is no such style."""
    import matplotlib
    from matplotlib import style

    outer = LOOK.set(look)
    try:
        with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
            if look.style is not None:
                try:
                    style.use(look.style)
                except (OSError, ValueError):
                    known = known_names(look.style, style.available)
                    raise SettingError(f"there is no style file and no style {look.style!r}; {known}") from None
            yield
    finally:
        LOOK.reset(outer)


def new_figure(width: float, height: float, margins: Margins | None = None) -> Figure:
    """An empty figure, in inches, with these *margins*; fitted to what is in it without, which takes twice as long.

    Where another width was asked for, it has that, and is fitted.
    """
    asked = LOOK.get().width
    figure = _shown()(
        figsize=(asked or width, height), layout=None if margins and not asked else "constrained", dpi=110
    )
    if margins and not asked:
        left, right, bottom, top = margins
        edges = {"left": left / width, "right": 1 - right / width, "bottom": bottom / height, "top": 1 - top / height}
        figure.subplots_adjust(**edges, wspace=0.16, hspace=0.28)
    return figure


def one_panel(width: float, height: float, axes: Axes | None = None) -> tuple[Figure, Axes]:
    """An empty figure with one panel, or the figure of the *axes* to draw into."""
    figure, (panel,), _ = several_panels(1, width, height, axes=axes)
    return figure, panel


def several_panels(
    n: int,
    width: float,
    height: float,
    margins: Margins | None = None,
    columns: int | None = None,
    axes: Axes | None = None,
) -> tuple[Figure, list[Axes], int]:
    """An empty figure of *n* panels in *columns*, all beside each other if None, with rows of that *height*.

    With the number of columns, which are as many as the width asked for has room for. Where there are *axes* to draw
    into, these are the only panel.
    """
    if axes is not None:
        return axes.figure, [axes], 1  # type: ignore[return-value]
    asked, columns = LOOK.get().width, columns or n
    columns = columns if asked is None else max(1, min(columns, int(asked / PANEL)))
    rows = -(-n // columns)
    figure = new_figure(width, height * rows, margins)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(n)], columns


@cache
def _shown() -> type[Figure]:
    """A figure that a notebook shows by itself: without pyplot, matplotlib leaves that to others."""
    from matplotlib.figure import Figure

    class Shown(Figure):
        """A figure with a picture of itself."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.look = LOOK.get()

        def _repr_png_(self) -> bytes:
            with styled(self.look):
                return picture(self, "png")

    return Shown


def picture(figure: Figure, kind: str, title: str = "") -> bytes:
    """The figure as a file of that *kind*, ``png``, ``svg`` or ``pdf``, with *title* above it."""
    from matplotlib.transforms import Bbox

    width, height = figure.get_size_inches()
    lines = textwrap.wrap(title.replace("$", r"\$"), int(width * LETTERS))  # a dollar sign begins no formula
    head = LINE * (len(lines) + 1) if lines else 0.0
    above = figure.text(0.5, 1 + LINE / 2 / height, "\n".join(lines), ha="center", va="bottom", fontsize=11)
    above.set_in_layout(False)
    buffer = io.BytesIO()
    box = Bbox([[0, 0], [width, height + head]])
    try:
        figure.savefig(buffer, format=kind, bbox_inches=box, **FILES[kind])
    except RuntimeError as error:  # such as a style that needs TeX, which is not installed
        if (style := LOOK.get().style) is None:
            raise
        said = str(error).partition("\n")[0]
        raise SettingError(f"figures cannot be drawn in the style {style}: {said}") from error
    above.remove()
    return buffer.getvalue()


def inline(figure: Figure, salt: str) -> str:
    """The figure as an SVG element in the colours of the page around it.

    Names within it begin with *salt*, so that two figures of a page never share one.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None}, dpi=PAGE_DPI)
    figure.set_layout_engine("none")  # it has its layout now, which costs as much as all the rest
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for pattern, replacement in SLIMMER:
        text = pattern.sub(replacement, text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()


def _shorter(found: re.Match[str]) -> str:
    """A path with a tenth of a point, in which each pair of numbers after the first goes on with a line."""
    return re.sub(r" ?\n(?:L )?", " ", re.sub(r"(\.\d)\d+", r"\1", found[0]))


SLIMMER: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"<metadata>.*?</metadata>", re.DOTALL), ""),
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r' id="[a-zA-Z0-9.]+_\d+"'), ""),
    (re.compile(r' xmlns:xlink="[^"]*"| xmlns="[^"]*"'), ""),
    (re.compile(r"xlink:href"), "href"),
    (re.compile(r"; font-family: [^;\"]*"), ""),
    (re.compile(r"font: ([\d.]+)px [^\"]*?(?=[\";])"), r"font-size: \1px"),
    (re.compile(r' transform="rotate\(-0 [^"]*"'), ""),
    (re.compile(r"<style type.*?</style>", re.DOTALL), ""),
    (re.compile(r' (?:d|points)="[^"]*"'), _shorter),
    (re.compile(r'(<svg[^>]*?) width="[^"]*"'), r"\1"),
    (re.compile(r'(<svg[^>]*?) height="[^"]*"'), r"\1"),
    (re.compile(r"\n\s*"), "\n"),
)
"""What a page does not need of an SVG file, and what stands in its place."""


def predictor_style(name: str, best: str | None) -> dict[str, Any]:
    """How the curve of a predictor looks: baseline black, the best blue, all others grey."""
    if name == best:
        return {"color": BLUE, "linewidth": 1.8, "zorder": 3, "label": name}
    if name == BASELINE:
        return {"color": INK, "linewidth": 1.4, "zorder": 2, "label": name}
    return {"color": FAINT, "linewidth": 1.0, "zorder": 1, "label": f"_{name}"}


def one_legend(figure: Figure, axes: Axes, title: str | None = None, columns: int = 6) -> None:
    """What the curves of a panel are called, below all panels: it hides no data. In axes of others, within them."""
    handles, labels = axes.get_legend_handles_labels()
    if not isinstance(figure, _shown()):
        axes.legend(handles, labels, title=title)
        return
    asked = LOOK.get().width
    columns = min(len(labels), columns)
    if asked and labels:
        rows = -(-len(labels) // columns)
        columns = max(1, min(columns, int(asked / (MARK + max(map(len, labels)) / LEGEND_LETTERS))))
        more = -(-len(labels) // columns) - rows
        figure.set_figheight(figure.get_figheight() + LEGEND_LINE * more)
    place: Any = "outside lower center" if figure.get_layout_engine() else "lower center"
    figure.legend(handles, labels, title=title, title_fontsize=8, loc=place, ncols=columns)


def name_at_ends(figure: Figure, axes: Axes) -> None:
    """The name of each curve beside its last point; a legend in axes of others, and where there is no room."""
    import numpy as np

    if not isinstance(figure, _shown()) or figure.get_figwidth() < NAMED:
        one_legend(figure, axes)
        return
    apart = LINE_APART / (figure.get_figheight() - AXIS)
    in_panel = axes.transScale + axes.transLimits
    axes.margins(x=0.01)
    ends = []
    for line in axes.lines:
        points = np.asarray(line.get_xydata(), dtype=float)
        points = points[np.isfinite(points).all(axis=1)]
        if len(points) and not str(line.get_label()).startswith("_"):
            ends.append((in_panel.transform(points[-1])[1], points[-1], line))
    ends.sort(key=lambda end: float(end[0]))
    steps = apart * np.arange(len(ends))
    heights = np.maximum.accumulate(np.array([end[0] for end in ends]) - steps) + steps
    heights -= max(0.0, heights.max(initial=0) - 1)
    for height, (_, end, line) in zip(heights, ends):
        axes.annotate(
            str(line.get_label()), end, (1.03, height), textcoords="axes fraction", fontsize=8, va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": line.get_color(), "linewidth": 0.8},
        )  # fmt: skip


def level_line(axes: Axes, height: float, text: str, **style: Any) -> None:
    """A line across at a *height*, with its *text* above its right end."""
    axes.axhline(height, label="_", **style)
    axes.annotate(
        text, (1, height), xycoords=("axes fraction", "data"), xytext=(-1, 1),
        textcoords="offset points", fontsize=7, ha="right", va="bottom",
    )  # fmt: skip


def log_scale(axes: Axes) -> None:
    """A logarithmic axis where anything lies above 0, with plain numbers; a load that stands still says so."""
    import numpy as np

    if not np.isfinite(axes.dataLim.minposy):
        axes.annotate("constant: nothing above 0", (0.5, 0.5), xycoords="axes fraction", ha="center", fontsize=8)
        return
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    between = (1, 2, 5) if high < FEW_POWERS * low else (1,)
    locator: Locator = LogLocator(subs=between, numticks=MOST_TICKS)
    ticks = np.asarray(locator.tick_values(low, high))
    if np.count_nonzero((low <= ticks) & (ticks <= high)) < 2:
        locator = MaxNLocator(4, min_n_ticks=2)  # between two round numbers, as on any axis
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.6g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(visible=True)
