"""Frames as text: a table for the terminal, Markdown, CSV, or JSON records. Rounding happens here only."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING, Any

from moetrace.errors import printable
from moetrace.reporting.phrases import NOTHING

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType

# Fractions in code, percentages where a person reads them.
PERCENT = {
    "error_rate", "error_noise", "step_error_rate", "step_noise", "mape", "abs_points", "difference",
    "difference_low", "difference_high", "movement_before", "movement_after", "settle_below",
    "window_mean_error_rate", "share", "error", "part_of_error", "noise_part", "coverage_80", "coverage_95",
    "above_oracle", "moved", "moved_per_1000", "expected", "expected_error",
}  # fmt: skip
# Characters of a cell above which it may be folded.
LONG_TEXT = 40
# What is left to a folded column, and what a column takes besides its text.
LEAST_TEXT = 20
GAP = 3


def shown(frame: pd.DataFrame) -> pd.DataFrame:
    """The same frame as text, rounded for people; percentages get a % in their heading."""
    import pandas as pd

    columns = {}
    for name in frame.columns:
        column = frame[name]
        heading = f"{name} %" if name in PERCENT else str(name)
        columns[heading] = [_cell(value, percent=name in PERCENT) for value in column]
    return pd.DataFrame(columns, index=frame.index)


def _cell(value: Any, *, percent: bool) -> str:
    import pandas as pd

    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return NOTHING
    if percent:
        return f"{100 * value:.2f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int) or (hasattr(value, "dtype") and value.dtype.kind in "iu"):
        return f"{value:,}"
    return printable(str(value))


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The same frame as text; *name*, *name*_low and *name*_high are one column, ``middle [low, high]``."""
    for name in [str(column) for column in frame.columns if f"{column}_low" in frame.columns]:
        ends = [f"{name}_low", f"{name}_high"]
        parts = shown(frame[[name, *ends]])
        both = [
            middle if NOTHING in (middle, low) else f"{middle} [{low}, {high}]"
            for middle, low, high in parts.to_numpy()
        ]
        heading = f"{name} %" if name in PERCENT else name
        frame = frame.assign(**{name: both}).drop(columns=ends).rename(columns={name: heading})
    return shown(frame)


def terminal(frame: pd.DataFrame, title: str, *, ascii_only: bool = False) -> RenderableType:
    """A table for the terminal; headings break at words, only long texts are folded."""
    from rich import box
    from rich.markup import escape as unmarked  # a text may hold [brackets], which mean something to rich
    from rich.table import Table

    text = readable(frame)
    words = words_of(frame)
    table = Table(
        title=unmarked(title),
        title_justify="left",
        title_style="bold",
        box=box.ASCII2 if ascii_only else box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in text.columns:
        left = str(name) in words
        short = max((len(cell) for cell in text[name]), default=0) <= LONG_TEXT
        heading = str(name).replace("_", "\n").replace(" ", "\n")
        table.add_column(heading, justify="left" if left else "right", vertical="top", no_wrap=short)
    for row in text.itertuples(index=False):
        table.add_row(*map(unmarked, row))
    return table


def fitting(frame: pd.DataFrame, width: int) -> pd.DataFrame:
    """The first columns of *frame* that a terminal *width* characters wide has room for; at least one.

    A number that is cut short is a wrong number, so a column is shown whole or not at all.
    """
    text = readable(frame)
    used, kept = 0, 0
    for name in text.columns:
        longest = max((len(cell) for cell in text[name]), default=0)
        heading = max(len(word) for word in str(name).replace("_", " ").split())
        used += max(heading, longest if longest <= LONG_TEXT else LEAST_TEXT) + GAP
        kept += used <= width or kept == 0
    shown_names = [str(name).removesuffix(" %") for name in text.columns[:kept]]
    ends = {str(name): str(name).removesuffix("_low").removesuffix("_high") for name in frame.columns}
    return frame[[name for name, base in ends.items() if base in shown_names]]


def words_of(frame: pd.DataFrame) -> set[str]:
    """The columns that hold no numbers."""
    import pandas as pd

    return {str(name) for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])}


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as they are, each a dict by column."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown."""
    text = readable(frame)
    words = words_of(frame)
    head = [str(name) for name in text.columns]
    rule = ["---" if name.removesuffix(" %") in words else "---:" for name in head]
    cells = [[markdown_text(str(cell)) for cell in row] for row in text.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *cells]) + "\n"


def markdown_text(text: str) -> str:
    """*text* that Markdown and HTML show as it is: no link, no image, no emphasis, no cell of a table.

    >>> markdown_text("![x](http://host/a.png) a|b")
    '!\\\\[x\\\\](http://host/a.png) a\\\\|b'
    """
    return re.sub(r"([\\`*|\[\]])", r"\\\1", escape(text, quote=False))


def csv(frame: pd.DataFrame) -> str:
    """Comma-separated, full precision, the columns' own names; no text that a spreadsheet would run."""

    def harmless(value: Any) -> Any:  # with the apostrophe that makes it text to a spreadsheet
        formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        return f"'{value}" if formula else value

    words = {name: frame[name].map(harmless) for name in frame.columns if frame[name].dtype.kind in "OT"}
    return frame.assign(**words).to_csv(index=False, lineterminator="\n")


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for a JSON document; what is not a number is null."""
    objects = frame.astype(object)
    rows = objects.where(frame.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]
