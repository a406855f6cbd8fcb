"""Parquet by URI: a file, a folder, a hive-partitioned data set, through pyarrow and through fsspec."""

import numpy as np
import pyarrow.dataset as ds
import pyarrow.fs as pf
import pyarrow.parquet as pq
import pytest
from conftest import long_table

from moetrace import ReadOptions, open_trace, read_trace

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def memory():
    """fsspec's file system in memory, empty, as Arrow sees it."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    return pf.PyFileSystem(pf.FSSpecHandler(system))


def hive(trace, path, system):
    """A data set partitioned by layer."""
    ds.write_dataset(
        long_table(trace), path, filesystem=system, format="parquet", partitioning=["layer"], partitioning_flavor="hive"
    )


def test_a_file_is_read_by_its_uri(small, tmp_path):
    """file:// is one of pyarrow's own."""
    pq.write_table(long_table(small), tmp_path / "dump.parquet")

    assert np.array_equal(small.counts, read_trace((tmp_path / "dump.parquet").as_uri()).counts)


@pytest.mark.parametrize("layout", ["file", "folder", "hive"])
def test_other_schemes_go_through_fsspec(small, memory, layout):
    """A single file, several in a folder, and partitions."""
    if layout == "hive":
        hive(small, "/bucket/run", memory)
    else:
        memory.create_dir("/bucket/run")
        halves = [small.select(last=30), small.select(first=31)]
        for i, part in enumerate([small] if layout == "file" else halves):
            pq.write_table(long_table(part), f"/bucket/run/part{i}.parquet", filesystem=memory)
    uri = "memory://bucket/run/part0.parquet" if layout == "file" else "memory://bucket/run"

    assert np.array_equal(small.counts, read_trace(uri).counts)


def test_uris_are_ingested_and_known_again(moetrace, small, memory):
    """By names, sizes and times, without fetching the content for it."""
    hive(small, "/bucket/run", memory)

    done = moetrace("ingest", "memory://bucket/run", "--json")
    again = moetrace("ingest", "memory://bucket/run")

    (trace,) = done.json["traces"]
    assert ("run", "parquet") == (trace["name"], trace["format"])
    assert "already imported, unchanged" in again.out
    assert np.array_equal(small.counts, open_trace(trace["path"]).counts)


def test_uris_are_merged(small, memory):
    """Replicas in two objects."""
    memory.create_dir("/bucket")
    for rank in range(2):
        pq.write_table(long_table(small), f"/bucket/rank{rank}.parquet", filesystem=memory)

    found = read_trace([f"memory://bucket/rank{rank}.parquet" for rank in range(2)], options=ReadOptions(merge="sum"))

    assert np.array_equal(2 * small.counts, found.counts)


@pytest.mark.parametrize("uri", ["memory://bucket/missing.parquet", "nothing://at/all", "file:///no/such/file.parquet"])
def test_what_is_not_there_is_named(moetrace, memory, uri):
    """In one line, with exit code 1."""
    done = moetrace("ingest", uri)

    assert 1 == done.code
    assert done.err.startswith(f"moetrace: {uri}: ")
    assert 1 == done.err.count("\n")
