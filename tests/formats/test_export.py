"""`moetrace export`: what is written comes back, and others read it."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moetrace import LoadTrace, ReadOptions, TraceError, read_trace, save_trace
from moetrace.formats import conversion
from moetrace.formats.conversion import LAYOUTS, export_trace

# Findings of counts that Hypothesis makes up.
ODD = ReadOptions(accept=("smoothed", "cumulative"))
ENDINGS = {"csv": ".csv", "npz": ".npz"}
READABLE = [kind for kind in LAYOUTS if kind != "forecasting"]


@pytest.mark.parametrize("kind", READABLE)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=hnp.arrays(np.int64, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6), elements=st.integers(1, 2**40)),
    start=st.integers(0, 10**9),
    cells=st.sampled_from([1, 20, 1 << 25]),
)
@pytest.mark.slow
def test_what_is_exported_comes_back(tmp_path, kind, counts, start, cells):
    """Written, and ingested again: the same counts, steps and layers, whatever the size of the blocks."""
    layers = range(3, 3 + counts.shape[1])
    trace = LoadTrace.from_counts(counts, steps=np.arange(start, start + len(counts)), layers=layers)
    path = tmp_path / f"out{ENDINGS.get(kind, '.parquet')}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "EXPORT_CELLS", cells)
        export_trace(trace, path, kind)

    found = read_trace(path, options=ODD)

    assert np.array_equal(counts, found.counts)
    assert np.array_equal(trace.steps, found.steps)
    assert trace.layers == found.layers


def test_forecasting_libraries_get_sorted_series(small, tmp_path):
    """unique_id, ds and y, as Nixtla's libraries want them."""
    export_trace(small, tmp_path / "out.parquet", "forecasting")

    frame = pd.read_parquet(tmp_path / "out.parquet")

    assert ["unique_id", "ds", "y"] == list(frame.columns)
    series = frame[frame["unique_id"] == "layer_5/expert_2"]
    assert small.steps.tolist() == series["ds"].tolist()
    assert small.counts[:, 1, 2].tolist() == series["y"].tolist()
    assert 8 * 60 == len(frame)


def test_the_command_writes_what_was_asked_for(moetrace, small, long_file):
    """Layers and steps are chosen, and other programs read the file."""
    moetrace("ingest", long_file)

    done = moetrace("export", "small", "--to", "wide", "-o", "out.parquet", "--layers", 5, "--steps", "20:29")

    frame = pl.read_parquet("out.parquet")
    assert (0, "") == (done.code, done.out)
    assert small.counts[10:20, 1].tolist() == [list(row) for row in frame.drop("step", "layer").rows()]


def test_an_existing_file_is_kept_unless_forced(moetrace, long_file):
    """And a path has to be given."""
    moetrace("ingest", long_file)
    moetrace("export", "small", "-o", "out.parquet")

    assert 1 == moetrace("export", "small", "-o", "out.parquet").code
    assert 0 == moetrace("export", "small", "-o", "out.parquet", "--force").code
    assert 2 == moetrace("export", "small").code


def test_a_damaged_trace_leaves_no_file(small, tmp_path):
    """Nothing half-written takes the place of the output."""
    save_trace(small, tmp_path / "small.parquet")
    broken = LoadTrace(
        small.info, small.steps, small.layers, small.experts, lambda _: (_ for _ in ()).throw(TraceError("x", "y", "z"))
    )

    with pytest.raises(TraceError):
        export_trace(broken, tmp_path / "out.npz", "npz")

    assert ["small.parquet"] == [path.name for path in tmp_path.iterdir()]
