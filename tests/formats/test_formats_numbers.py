"""Numbers that no log would have, and that arithmetic in 64 bits does not survive."""

import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moetrace import ReadOptions, TraceError, read_trace

LOWEST, HIGHEST = -(2**63), 2**63 - 1


@pytest.mark.parametrize("column", ["step", "layer", "expert"])
@pytest.mark.parametrize("numbers", [(LOWEST, HIGHEST), (0, HIGHEST), (LOWEST, 0), (HIGHEST, LOWEST)])
@pytest.mark.parametrize("first", [True, False], ids=["in the first step", "in a later step"])
def test_numbers_at_the_end_of_64_bits_are_refused(tmp_path, column, numbers, first):
    """Differences of them would wrap around."""
    columns = {"step": [1, 1, 2, 2], "layer": [0, 0, 0, 0], "expert": [0, 1, 0, 1], "tokens": [5, 5, 5, 5]}
    columns[column] = [*numbers, 0, 1] if first else [0, 1, *numbers]
    pq.write_table(
        pa.table({name: np.array(values, np.int64) for name, values in columns.items()}), tmp_path / "x.parquet"
    )

    # In a later step the place that it should have had may be missed first.
    said = rf"has a {column} -?9223372036854775\d+" if first or column == "step" else f"{column}"
    with pytest.raises(TraceError, match=rf"x\.parquet.* {said}"):
        read_trace(tmp_path / "x.parquet")


def test_a_rank_far_away_names_only_the_first_missing(tmp_path):
    """Not a million millions of them."""
    paths = [tmp_path / "rank0.csv", tmp_path / "rank999999999999.csv"]
    for path in paths:
        path.write_text("step,expert,tokens\n1,0,5\n")
    with pytest.raises(TraceError, match=r"rank 1, 2, 3, 4, 5, 6, 7, 8, \.\.\. \(999999999998\) is missing"):
        read_trace(paths, options=ReadOptions(merge="experts"))


@pytest.mark.parametrize("form", ["csv", "jsonl", "json"])
def test_a_count_that_a_column_of_floats_cannot_hold_is_refused(tmp_path, form):
    """5.0 makes the column one of floats, in which 2^53 + 1 becomes 2^53."""
    texts = {
        "csv": "step,expert,tokens\n1,0,5.0\n1,1,9007199254740993\n",
        "jsonl": '{"step": 1, "expert": 0, "tokens": 5.0}\n{"step": 1, "expert": 1, "tokens": 9007199254740993}\n',
        "json": "[[[5.0, 9007199254740993]]]",
    }
    (tmp_path / f"x.{form}").write_text(texts[form])

    with pytest.raises(TraceError, match=r"9007199254740992\.0 is beyond the whole numbers"):
        read_trace(tmp_path / f"x.{form}")


def test_the_largest_exact_count_is_read(tmp_path):
    """One below 2^53, also beside a float."""
    (tmp_path / "x.csv").write_text("step,expert,tokens\n1,0,5.0\n1,1,9007199254740991\n")

    assert [5, 2**53 - 1] == read_trace(tmp_path / "x.csv").counts.ravel().tolist()


def test_an_array_that_is_there_several_times_is_refused(tmp_path):
    """One of them would be taken in silence."""
    np.save(tmp_path / "counts.npy", np.ones((2, 1, 2), np.int64))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.write(tmp_path / "counts.npy", "counts.npy")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.write(tmp_path / "counts.npy", "counts.npy")

    with pytest.raises(TraceError, match=r"holds counts\.npy several times"):
        read_trace(tmp_path / "x.npz")
