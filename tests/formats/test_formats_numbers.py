"""Numbers that no log would have, and that arithmetic in 64 bits does not survive."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moetrace import TraceError, read_trace
from moetrace.formats.location import check_ranks

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
    with pytest.raises(TraceError, match=r"rank 1, 2, 3, 4, 5, 6, 7, 8, \.\.\. \(999999999998\) is missing"):
        check_ranks([tmp_path / "rank0.csv", tmp_path / "rank999999999999.csv"])
