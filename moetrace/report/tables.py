"""Frames as text: a table for the terminal, Markdown, CSV, or JSON records. Rounding happens here only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType

# Fractions in code, percentages where a person reads them.
PERCENT = {
    "error_rate", "error_noise", "step_error_rate", "step_noise", "mape", "abs_points", "difference",
    "difference_low", "difference_high", "movement_before", "movement_after", "settle_below",
    "window_mean_error_rate", "share", "error", "part_of_error", "noise_part", "coverage_80", "coverage_95",
}  # fmt: skip
NOTHING = "-"
# Characters of a cell above which it may be folded.
LONG_TEXT = 40


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
        return f"{value:.3g}"
    if isinstance(value, int) or (hasattr(value, "dtype") and value.dtype.kind in "iu"):
        return f"{value:,}"
    return str(value)


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The same frame as text, each interval in one column with what it is the interval of."""
    return shown(_with_intervals(frame))


def terminal(frame: pd.DataFrame, title: str) -> RenderableType:
    """A table for the terminal; headings break at words, only long texts are folded."""
    from rich import box
    from rich.table import Table

    text = readable(frame)
    words = _words(frame)
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in text.columns:
        left = str(name) in words
        short = max((len(cell) for cell in text[name]), default=0) <= LONG_TEXT
        heading = str(name).replace("_", "\n").replace(" ", "\n")
        table.add_column(heading, justify="left" if left else "right", vertical="top", no_wrap=short)
    for row in text.itertuples(index=False):
        table.add_row(*row)
    return table


def _with_intervals(frame: pd.DataFrame) -> pd.DataFrame:
    """*name*, *name*_low and *name*_high as one column, ``middle [low, high]``, in the unit of *name*."""
    for name in [str(column) for column in frame.columns if f"{column}_low" in frame.columns]:
        ends = [f"{name}_low", f"{name}_high"]
        parts = shown(frame[[name, *ends]])
        both = [
            middle if NOTHING in (middle, low) else f"{middle} [{low}, {high}]"
            for middle, low, high in parts.to_numpy()
        ]
        heading = f"{name} %" if name in PERCENT else name
        frame = frame.assign(**{name: both}).drop(columns=ends).rename(columns={name: heading})
    return frame


def _words(frame: pd.DataFrame) -> set[str]:
    import pandas as pd

    return {str(name) for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])}


def markdown(frame: pd.DataFrame) -> str:
    """A table in Markdown."""
    text = readable(frame)
    words = _words(frame)
    head = [str(name) for name in text.columns]
    rule = ["---" if name.removesuffix(" %") in words else "---:" for name in head]
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in text.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *cells]) + "\n"


def csv(frame: pd.DataFrame) -> str:
    """Comma-separated, full precision, the columns' own names."""
    text: str = frame.to_csv(index=False, lineterminator="\n")
    return text


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for a JSON document; what is not a number is null."""
    objects = frame.astype(object)
    rows = objects.where(frame.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]
