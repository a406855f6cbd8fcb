"""Parquet files with the defects that writers have really had: one line each, or the right numbers."""

import numpy as np
import pytest
from bad_files import DEFECTS, SMALL, chunk_values, written

from moetrace import read_trace


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.slow
def test_a_defect_is_refused_in_one_line(moetrace, tmp_path, defect):
    """Exit code 1, the file is named, nothing is left."""
    (tmp_path / "x.parquet").write_bytes(DEFECTS[defect]())

    done = moetrace("ingest", tmp_path / "x.parquet")

    assert (1, "", 1) == (done.code, done.out, done.err.count("\n")), done.err
    assert f"{tmp_path / 'x.parquet'}" in done.err
    assert [] == list((tmp_path / "cwd").rglob("*.parquet"))


@pytest.mark.parametrize("content", [written, lambda: chunk_values(8), lambda: chunk_values(-8)])
def test_a_file_whose_pages_are_sound_is_read(tmp_path, content):
    """Also where only the footer miscounts the values of a column, of which there are as many as rows."""
    (tmp_path / "x.parquet").write_bytes(content())

    assert np.array_equal(SMALL.counts, read_trace(tmp_path / "x.parquet").counts)
