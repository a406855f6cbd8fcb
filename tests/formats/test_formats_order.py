"""Rows in another order than that of their steps: sorted, in memory or on disk, and nothing is left."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import long_table

from moetrace import LoadTrace, TraceError, open_trace
from moetrace.formats import convert
from moetrace.formats.stream import sort
from moetrace.formats.stream.cells import Cells

ORDERS = {
    "shuffled": lambda table: table.take(np.random.default_rng(0).permutation(len(table))),
    "by expert": lambda table: table.sort_by([("expert", "ascending"), ("layer", "ascending"), ("step", "ascending")]),
    "backwards": lambda table: table.sort_by([("step", "descending")]),
}


@pytest.fixture
def small_chunks(monkeypatch):
    """A sort that goes to disk for more than 100 cells; the list has the folders it made there."""
    monkeypatch.setattr(sort, "SORT_CELLS", 100)
    monkeypatch.setattr("moetrace.formats.readers.parquet.BATCH_CELLS", 30)
    made = []
    scratch = sort.scratch

    def noted(folder):
        made.append(folder)
        return scratch(folder)

    monkeypatch.setattr(sort, "scratch", noted)
    return made


@pytest.mark.parametrize("order", ORDERS)
def test_a_sort_on_disk_gives_the_same_trace_and_leaves_nothing(small, tmp_path, small_chunks, order):
    """Temporary files lie in the folder of the trace while it runs."""
    pq.write_table(ORDERS[order](long_table(small)), tmp_path / "dump.parquet")
    (tmp_path / "out").mkdir()

    convert(tmp_path / "dump.parquet", tmp_path / "out" / "t.parquet", name="t")

    assert np.array_equal(small.counts, open_trace(tmp_path / "out" / "t.parquet").counts)
    assert [tmp_path / "out"] == small_chunks
    assert ["t.parquet"] == [path.name for path in (tmp_path / "out").iterdir()]


def test_a_fault_found_after_the_sort_leaves_nothing(small, tmp_path, small_chunks):
    """A row that is there twice is named as in any other order."""
    order = np.append(np.random.default_rng(0).permutation(small.counts.size), 5)
    pq.write_table(long_table(small).take(order), tmp_path / "dump.parquet")
    (tmp_path / "out").mkdir()

    with pytest.raises(TraceError, match="is there 2 times"):
        convert(tmp_path / "dump.parquet", tmp_path / "out" / "t.parquet", name="t")
    assert [] == list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("numbers", [(0, 2**62), (-5, 2**62), (-(2**40), 3)])
def test_any_numbers_come_back_from_disk_and_equal_steps_keep_their_order(tmp_path, small_chunks, numbers):
    """Columns are stored in the smallest integers that hold them."""
    rng = np.random.default_rng(0)
    low, high = numbers
    step = rng.integers(0, 40, 1000) * (high // 50 + 1) + low
    cells = Cells(step, rng.integers(low, high, 1000), np.arange(1000), rng.integers(0, 300, 1000))
    pieces = [Cells(*(column[a : a + 70] for column in cells)) for a in range(0, 1000, 70)]

    found = list(sort.sort_by_step(pieces, tmp_path))

    order = np.argsort(step, kind="stable")
    for expected, parts in zip(cells, zip(*found)):
        assert np.array_equal(expected[order], np.concatenate(parts))
    assert 100 >= max(len(piece.step) for piece in found)
    assert [] == list(tmp_path.iterdir())


def test_a_trace_of_one_step_needs_no_sorting(tmp_path, small_chunks):
    """However many cells it has."""
    counts = np.random.default_rng(0).integers(1, 9, (1, 4, 100))
    trace = LoadTrace.from_counts(counts)
    pq.write_table(long_table(trace).take(np.random.default_rng(1).permutation(400)), tmp_path / "dump.parquet")
    convert(tmp_path / "dump.parquet", tmp_path / "t.parquet", name="t")

    assert np.array_equal(counts, open_trace(tmp_path / "t.parquet").counts)
