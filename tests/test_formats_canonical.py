"""The canonical file: the same trace comes back, from any reader, and damage never goes unnoticed."""

import subprocess
import sys
from dataclasses import replace

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from conftest import SAMPLE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moetrace import LoadTrace, TraceError, open_trace, save_trace
from moetrace.formats import convert


@pytest.fixture
def saved(small, tmp_path):
    """The small trace as a canonical file."""
    save_trace(small, tmp_path / "small.parquet")
    return tmp_path / "small.parquet"


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    counts=hnp.arrays(np.int64, hnp.array_shapes(min_dims=3, max_dims=3, max_side=7), elements=st.integers(1, 2**40)),
    start=st.integers(-5, 10**12),
)
def test_what_is_saved_comes_back(tmp_path, counts, start):
    """Counts, steps, layers and metadata survive the round trip."""
    trace = LoadTrace.from_counts(counts, name="round trip", steps=np.arange(start, start + len(counts)))
    trace = replace(trace, info=replace(trace.info, model="m", top_k=2, assumptions=("a",)))
    save_trace(trace, tmp_path / "trace.parquet")

    found = open_trace(tmp_path / "trace.parquet")

    assert np.array_equal(counts, found.counts)
    assert np.array_equal(trace.steps, found.steps)
    assert trace.info == found.info


def test_others_read_it_too(small, saved):
    """pandas, DuckDB and Polars see step, layer and counts."""
    expected = {
        (s, la): small.counts[i, j].tolist() for i, s in enumerate(small.steps) for j, la in enumerate(small.layers)
    }
    frames = [
        pd.read_parquet(saved),
        duckdb.sql(f"select * from '{saved}'").df(),
        pl.read_parquet(saved).to_pandas(),
    ]

    for frame in frames:
        found = {(row.step, row.layer): list(row.counts) for row in frame.itertuples()}
        assert expected == found


def test_one_layer_is_read_without_the_others(settled, tmp_path, monkeypatch):
    """Reading a layer asks for its row groups only."""
    save_trace(settled, tmp_path / "settled.parquet")
    trace = open_trace(tmp_path / "settled.parquet")
    asked = []
    read = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_groups", lambda self, groups: asked.extend(groups) or read(self, groups)
    )

    trace.layer(1)

    layers = [pq.read_metadata(tmp_path / "settled.parquet").row_group(i).column(1).statistics.min for i in asked]
    assert [1] * len(asked) == layers


def test_a_dump_is_converted_with_what_is_known_of_it(long_file, tmp_path):
    """Format, source, fingerprint and tokens per step are in the metadata."""
    info = convert(long_file, tmp_path / "out.parquet", name="n")

    assert (info.name, info.format, info.source, info.tokens_per_step) == ("n", "parquet", "small.parquet", 100)
    assert len(info.fingerprint) == 64
    assert info == open_trace(tmp_path / "out.parquet").info


def test_a_gap_is_a_finding(small, tmp_path):
    """Missing steps are shown, not refused."""
    keep = np.r_[0:20, 30:60]
    holed = LoadTrace.from_counts(small.counts[keep], steps=small.steps[keep], name="holed")
    from conftest import long_table

    pq.write_table(long_table(holed), tmp_path / "dump.parquet")

    findings = convert(tmp_path / "dump.parquet", tmp_path / "out.parquet", name="holed").findings

    assert [(found.name, found.place) for found in findings] == [("gap", "after step 29")]


def test_a_failed_write_leaves_the_old_file(saved, small):
    """An error while writing leaves what was there, and no partial file."""
    before = saved.read_bytes()
    broken = replace(small, read_layer=lambda _: (_ for _ in ()).throw(TraceError("x", "y", "z")))

    with pytest.raises(TraceError):
        save_trace(broken, saved)

    assert before == saved.read_bytes()
    assert [saved] == list(saved.parent.iterdir())


def test_a_later_schema_is_refused(saved, small, monkeypatch):
    """A file of a newer moetrace says so."""
    monkeypatch.setattr("moetrace.formats.canonical.SCHEMA_VERSION", 99)
    save_trace(small, saved)
    monkeypatch.undo()

    with pytest.raises(TraceError, match="schema 99"):
        open_trace(saved)


# A flipped bit can abort the process inside the Parquet library, so flips are tried in a child.
FLIP = """
import sys
import numpy as np
from moetrace import TraceError, open_trace

path, expected = sys.argv[1], np.load(sys.argv[2])
data = bytearray(open(path, "rb").read())
for place in sys.stdin:
    byte, bit = map(int, place.split())
    data[byte] ^= 1 << bit
    with open(path, "wb") as file:
        file.write(data)
    data[byte] ^= 1 << bit
    try:
        trace = open_trace(path)
        same = np.array_equal(trace.counts, expected) and trace.name == "small" and trace.steps[0] == 10
        print("same" if same else "WRONG", flush=True)
    except TraceError:
        print("refused", flush=True)
"""


def flip_outcomes(path, counts, places, tmp_path):
    """What became of the trace after each single flipped bit: same, refused, WRONG or aborted."""
    np.save(tmp_path / "expected.npy", counts)
    outcomes: list[str] = []
    while len(outcomes) < len(places):
        rest = places[len(outcomes) :]
        copy = tmp_path / "flipped.parquet"
        copy.write_bytes(path.read_bytes())
        child = subprocess.run(
            [sys.executable, "-c", FLIP, copy, tmp_path / "expected.npy"],
            input="".join(f"{byte} {bit}\n" for byte, bit in rest),
            capture_output=True,
            text=True,
        )
        outcomes += child.stdout.split()
        if child.returncode:
            assert child.returncode < 0, child.stderr
            outcomes.append("aborted")
    return outcomes


def test_no_flipped_bit_gives_a_wrong_answer(saved, small, tmp_path):
    """300 flips over data, page headers and footer: refused or harmless, never wrong."""
    size = saved.stat().st_size
    rng = np.random.default_rng(0)
    places = list(zip(np.linspace(0, size - 1, 300).astype(int).tolist(), rng.integers(0, 8, 300).tolist()))

    outcomes = flip_outcomes(saved, small.counts, places, tmp_path)

    assert outcomes.count("WRONG") == 0
    assert outcomes.count("refused") > 200


def test_the_sample_trace_is_what_its_card_says(tmp_path):
    """12,000 steps of 4 layers of 8 experts, 2,048 tokens in every layer of every step."""
    info = convert(SAMPLE, tmp_path / "a.parquet", name="a")
    trace = open_trace(tmp_path / "a.parquet")

    assert (len(trace.steps), trace.layers, trace.experts) == (12_000, (2, 4, 6, 8), 8)
    assert info.tokens_per_step == 2048
