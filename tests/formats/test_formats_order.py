"""Rows in another order than that of their steps are sorted in memory, or refused where they are too many."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import long_table

from moetrace import TraceError, open_trace
from moetrace.formats import convert
from moetrace.formats.stream import blocks as order

ORDERS = {
    "shuffled": lambda table: table.take(np.random.default_rng(0).permutation(len(table))),
    "by expert": lambda table: table.sort_by([("expert", "ascending"), ("layer", "ascending"), ("step", "ascending")]),
    "backwards": lambda table: table.sort_by([("step", "descending")]),
}


@pytest.mark.parametrize("by", ORDERS)
def test_rows_in_any_order_give_the_same_trace(small, tmp_path, monkeypatch, by):
    """Also where they come and go in several pieces."""
    monkeypatch.setattr(order, "PIECE_CELLS", 100)
    monkeypatch.setattr("moetrace.formats.readers.arrow.BATCH_CELLS", 30)
    pq.write_table(ORDERS[by](long_table(small)), tmp_path / "dump.parquet")

    convert(tmp_path / "dump.parquet", tmp_path / "t.parquet", name="t")

    assert np.array_equal(small.counts, open_trace(tmp_path / "t.parquet").counts)


def test_a_fault_found_after_the_sort_leaves_nothing(small, tmp_path):
    """A row that is there twice is named as in any other order."""
    rows = np.append(np.random.default_rng(0).permutation(small.counts.size), 5)
    pq.write_table(long_table(small).take(rows), tmp_path / "dump.parquet")
    (tmp_path / "out").mkdir()

    with pytest.raises(TraceError, match="is there 2 times"):
        convert(tmp_path / "dump.parquet", tmp_path / "out" / "t.parquet", name="t")
    assert [] == list((tmp_path / "out").iterdir())


def test_more_rows_than_can_be_sorted_are_refused_with_the_query(small, tmp_path, monkeypatch):
    """DuckDB sorts on disk."""
    monkeypatch.setattr(order, "MOST_SORTED", 50)
    pq.write_table(ORDERS["shuffled"](long_table(small)), tmp_path / "dump.parquet")

    with pytest.raises(
        TraceError, match=r"not in the order of their steps, and over 50 .*--sql 'SELECT.*ORDER BY step'"
    ):
        convert(tmp_path / "dump.parquet", tmp_path / "t.parquet", name="t")
