"""The canonical file: the same trace comes back, from any reader, and damage never goes unnoticed."""

import errno
import io
from dataclasses import replace

import cloudpickle
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SAMPLE
from fuzz import flips
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


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=hnp.arrays(np.int64, hnp.array_shapes(min_dims=3, max_dims=3, max_side=7), elements=st.integers(1, 2**40)),
    start=st.integers(-5, 10**12),
)
@pytest.mark.slow
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


def test_other_readers_notice_a_flipped_bit_of_the_counts(saved):
    """Pages have checksums, which pyarrow verifies when it is told to."""
    with pq.ParquetFile(saved) as file:
        column = file.metadata.row_group(0).column(2)
    content = bytearray(saved.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    saved.write_bytes(content)

    with pq.ParquetFile(saved, page_checksum_verification=True) as file, pytest.raises(OSError, match="CRC"):
        file.read()


@pytest.mark.slow
def test_no_flipped_bit_gives_a_wrong_answer(saved, tmp_path):
    """1,500 flips over data, page headers and footer: refused or harmless. `make fuzz` flips every bit."""
    rng = np.random.default_rng(0)
    size = saved.stat().st_size
    places = list(zip(rng.integers(0, size, 1500).tolist(), rng.integers(0, 8, 1500).tolist()))

    found = flips.outcomes(saved, places, tmp_path)

    assert {"same", "refused", "aborted"} >= set(found)
    assert found.count("refused") > 1000


def test_reading_one_layer_reads_the_bytes_of_that_layer(tmp_path, monkeypatch):
    """Of eight layers about an eighth of the file: its own row groups and the footer, and nothing twice."""
    counts = np.random.default_rng(0).multinomial(10**6, np.full(64, 1 / 64), size=(3000, 8))
    save_trace(LoadTrace.from_counts(counts), tmp_path / "t.parquet")
    trace = open_trace(tmp_path / "t.parquet")
    metadata = pq.read_metadata(tmp_path / "t.parquet")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    mine = [group for group in groups if group.column(1).statistics.min == 5]
    stored = sum(group.column(i).total_compressed_size for group in mine for i in range(3))
    asked = []

    class Counted(pq.ParquetFile):
        def __init__(self, source, **options):
            super().__init__(pa.PythonFile(Noted(source.read_bytes()), mode="r"), **options)

    class Noted(io.BytesIO):
        def read(self, size=-1):
            asked.append(size)
            return super().read(size)

    monkeypatch.setattr(pq, "ParquetFile", Counted)

    assert np.array_equal(counts[:, 5], trace.layer(5).counts)
    # The end of a Parquet file is read in one piece of 64 KiB, in which the footer most often lies.
    assert stored <= sum(asked) <= stored + metadata.serialized_size + (1 << 16)
    assert sum(asked) < (tmp_path / "t.parquet").stat().st_size / 5


def test_the_sample_trace_is_what_its_card_says(tmp_path):
    """12,000 steps of 4 layers of 8 experts, 2,048 tokens in every layer of every step."""
    info = convert(SAMPLE, tmp_path / "a.parquet", name="a")
    trace = open_trace(tmp_path / "a.parquet")

    assert (len(trace.steps), trace.layers, trace.experts) == (12_000, (2, 4, 6, 8), 8)
    assert info.tokens_per_step == 2048


def test_the_footer_is_parsed_once_for_all_layers(saved, monkeypatch):
    """With thousands of layers it is long."""
    trace, parsed, read = open_trace(saved), [], pq.read_metadata
    monkeypatch.setattr(pq, "read_metadata", lambda path: parsed.append(path) or read(path))

    for _ in range(2):
        for layer in trace.layers:
            assert trace.layer(layer).counts.shape == (len(trace.steps), trace.experts)
    assert len(parsed) <= 1


def test_a_file_that_was_replaced_meanwhile_is_noticed(saved, small):
    """By the digests; the layers that are the same are read."""
    trace = open_trace(saved)
    first, *others = trace.layers
    trace.layer(first)
    changed = small.counts.copy()
    changed[:, 1:] += 1
    save_trace(LoadTrace.from_counts(changed, layers=small.layers, steps=small.steps), saved)

    assert np.array_equal(small.layer(first).counts, trace.layer(first).counts)
    for layer in others:
        with pytest.raises(TraceError, match="changed while it was read; run the same command again"):
            trace.layer(layer)


def test_a_trace_goes_to_another_process_without_its_footer(saved):
    """What is sent is small, and reads the same."""
    trace = open_trace(saved)
    trace.layer(trace.layers[0])
    sent = cloudpickle.dumps(trace)

    assert b"FileMetaData" not in sent
    assert np.array_equal(trace.counts, cloudpickle.loads(sent).counts)


@pytest.mark.parametrize("name", ["log.csv", "table.parquet"])
def test_a_dump_is_not_called_damaged(tmp_path, name):
    """Whoever gives a dump where a trace is wanted is told how it becomes one."""
    path = tmp_path / name
    frame = pd.DataFrame({"step": [1, 1], "expert": [0, 1], "tokens": [3, 4]})
    frame.to_csv(path) if path.suffix == ".csv" else frame.to_parquet(path)

    with pytest.raises(TraceError, match=f"is not a trace that moetrace wrote; run `moetrace ingest {path}` first"):
        open_trace(path)


NO_MEMORY = (
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("can't start new thread"),
    ImportError("libarrow.so: failed to map segment from shared object"),
)


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("what", ["read_metadata", "ParquetFile"])
def test_a_lack_of_memory_is_not_called_damage(saved, monkeypatch, what, error):
    """It is raised as it is, in opening and in reading a layer; any other error of the library is damage."""

    def short(*_args, **_settings):
        raise error

    trace = open_trace(saved)
    monkeypatch.setattr(pq, what, short)
    read = {"read_metadata": lambda: open_trace(saved), "ParquetFile": lambda: trace.layer(trace.layers[0])}[what]

    with pytest.raises(type(error)) as raised:
        read()
    assert error is raised.value
    error = RuntimeError("bad page")
    with pytest.raises(TraceError, match="is damaged: bad page; ingest its source again"):
        read()
