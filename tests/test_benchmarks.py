"""The page of the benchmarks: its tables stand in the files of results, and no file is forgotten."""

import importlib
import re
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
tables, run = (importlib.import_module(name) for name in ("tables", "run"))
PAGE = (ROOT / "benchmarks" / "README.md").read_text()
FILES = sorted(tables.RESULTS.glob("*.csv"))


def test_tables_of_the_page_stand_in_their_files():
    """Each is what its file says, and short."""
    lengths = [len(table.splitlines()) - 2 for table in re.findall(r"(?m)(?:^\|.*\n)+", PAGE)]

    assert tables.filled(PAGE) == PAGE
    assert 0 < min(lengths) <= max(lengths) <= 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_named_on_the_page_and_has_a_number_in_a_cell(path):
    """A file that a run writes and nobody explains, or cells that would have to be parsed, fail."""
    frame = tables.read(path.stem)

    assert f"`{path.name}`" in PAGE
    assert len(frame) > 0
    assert not frame.map(lambda cell: any(re.fullmatch(pattern, cell) for pattern in tables.SEVERAL)).any(axis=None)


def test_cells_with_several_numbers_become_columns():
    """Intervals, pairs and thousands, as the scripts print them."""
    text = "| a | b | c, x / y | d |\n|---|---|---|---|\n| 1 [0, 2] | 3 ± 1 % | 1,000 / 2 | - |\n| 4 |  | 5 / 6 | 7 |\n"
    (frame,) = tables.printed(text)

    assert frame.columns.tolist() == ["a", "a, low", "a, high", "b %", "b, ± %", "c, x", "c, y", "d"]
    assert frame.to_numpy().tolist() == [
        ["1", "0", "2", "3", "1", "1000", "2", ""],
        ["4", "", "", "", "", "5", "6", "7"],
    ]


def test_pictures_of_the_page_are_small():
    """All that are linked are there, each under 40 KB."""
    pictures = [tables.HERE / name for name in re.findall(r"!\[[^\]]+\]\((\S+)\)", PAGE)]

    assert pictures
    assert all(0 < path.stat().st_size < 40_000 for path in pictures)


@pytest.mark.parametrize("guard", run.GUARDS, ids=lambda guard: guard.table)
def test_a_lost_ratio_is_noticed(guard):
    """The recorded ones hold; a bound on the other side of them is missed by every row."""
    beyond = guard._replace(least=guard.most if guard.most < 9 else 1e9)

    assert [] == guard.missed()
    assert 0 < len(beyond.missed()) == len(guard._replace(least=1e9).missed())
    assert beyond.missed()[0].startswith(f"{guard.table}: {guard.column} is ")
