"""Tables of benchmarks: from the Markdown that a script prints to CSV, and from CSV into the page.

A cell with several numbers becomes several columns, so that every column of a file is a number or a name.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
RESULTS = HERE / "results"
NUMBER = r"([+-]?[\d,]*\.?\d+(?:e-?\d+)?) ?%?"
# A cell with several numbers, and what is added to its column's name for each; None takes the names from the heading.
SEVERAL = {
    rf"{NUMBER} \[{NUMBER}, {NUMBER}\]": ("", ", low", ", high"),
    rf"{NUMBER} ± {NUMBER}": ("", ", ±"),
    rf"{NUMBER} of {NUMBER}": ("", ", of"),
    rf"{NUMBER} / {NUMBER}": None,
    rf"{NUMBER} to {NUMBER}": None,
}
# A table of the page, below the name of its file: `rows` is a query, `columns` are `name as heading`, `pivot` is index,
# columns and values.
MARKED = re.compile(r"(<!-- table (?P<name>\w+)(?P<how>.*) -->\n\n)(?:\|.*\n)*\n*")


def printed(text: str) -> list[pd.DataFrame]:
    """The Markdown tables of a *text*, each number in a column of its own."""
    found = re.findall(r"(?m)^\|.*\|$(?:\n\|.*\|$)*", text)
    return [_tidy([_cells(line) for line in table.splitlines()]) for table in found]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("`", "").strip("|").split("|")]


def _tidy(rows: list[list[str]]) -> pd.DataFrame:
    head, _, *body = rows
    if len({*head}) < len(head):
        raise ValueError(f"two columns with one name: {head}")
    columns: dict[str, list[str]] = {}
    for name, cells in zip(head, zip(*body)):
        cells = ["" if cell == "-" else cell for cell in cells]
        for pattern, endings in SEVERAL.items():
            split = [re.fullmatch(pattern, cell) for cell in cells]
            if any(split) and all(match or re.fullmatch(rf"({NUMBER})?", cell) for match, cell in zip(split, cells)):
                names = [name + ending for ending in endings] if endings else _names(name)
                for i, own in enumerate(names):
                    alone = [cell if i == 0 else "" for cell in cells]
                    part = [match[i + 1] if match else cell for match, cell in zip(split, alone)]
                    columns |= _plain(own, part, "%" in "".join(cells))
                break
        else:
            columns |= _plain(name, cells, any("%" in cell for cell in cells))
    return pd.DataFrame(columns)


def _names(heading: str) -> list[str]:
    """*late, median / largest* names *late, median* and *late, largest*; *lowest to highest* is two names."""
    first, _, last = re.split("( / | to )", heading)
    before = re.match(r"(.*[,:] )?", first)
    return [first, f"{before[0] if before else ''}{last}"]


def _plain(name: str, cells: list[str], percent: bool) -> dict[str, list[str]]:
    """The column, its numbers without a thousands separator and a sign of percent, which its name has."""
    numbers = [re.fullmatch(rf"{NUMBER}|", cell) for cell in cells]
    if not all(numbers):
        return {name: cells}
    plain = [(match[1] or "").replace(",", "") for match in numbers if match]
    return {f"{name} %" if percent and "%" not in name else name: plain}


def read(name: str) -> pd.DataFrame:
    """A file of results as text, so that the page has the digits of the file."""
    return pd.read_csv(RESULTS / f"{name}.csv", dtype=str, keep_default_na=False)


def filled(page: str) -> str:
    """The *page* with all its tables made anew from the files."""
    return MARKED.sub(lambda mark: f"{mark[1]}{_table(mark['name'], mark['how'])}\n", page)


def _table(name: str, how: str) -> str:
    frame = read(name)
    options = {key.strip(): value.strip() for key, _, value in (part.partition(":") for part in how.split(";")[1:])}
    if "rows" in options:
        frame = frame.query(options["rows"], engine="python")
    if "pivot" in options:
        index, columns, values = options["pivot"].split(" | ")
        frame = frame.pivot_table(values, index, columns, "first", sort=False).reset_index()
    if "columns" in options:
        names = [part.partition(" as ") for part in options["columns"].split(" | ")]
        frame = frame[[own for own, _, _ in names]].set_axis([new or own for own, _, new in names], axis=1)
    frame = frame.fillna("")
    numeric = [all(re.fullmatch(rf"{NUMBER}|", cell) for cell in frame[column]) for column in frame]
    lines = [frame.columns, ["---:" if right else "---" for right in numeric], *frame.to_numpy()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
