"""Whatever a file or a disk can do ends in exit code 1, one line, and nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bad_files import BOMBS, FILES, GOOD, LITTLE_MEMORY, PAGED, csv, flipped, parquet
from conftest import long_table

from moetrace import LoadTrace, ReadOptions, TraceError, read_trace
from moetrace.formats import convert, sources, sources_in


@pytest.fixture
def failing(moetrace):
    """Run an ingest that must fail: exit code 1, one line, nothing left; returns the line."""

    def run(*argv):
        before = sorted(path for path in Path.cwd().parent.rglob("*"))
        done = moetrace("ingest", *argv)
        after = sorted(path for path in Path.cwd().parent.rglob("*") if path.name not in {"moetrace-out", "traces"})

        assert (1, "", 1) == (done.code, done.out, done.err.count("\n")), done.err
        assert done.err.startswith("moetrace: ")
        assert after == [path for path in before if path.name not in {"moetrace-out", "traces"}]
        return done.err

    return run


@pytest.mark.parametrize("fault", FILES)
@pytest.mark.slow
def test_a_bad_file_is_one_line(failing, tmp_path, fault):
    """The line names the file and what is wrong with it; no pickle is opened."""
    name, content, said = FILES[fault]
    (tmp_path / name).write_bytes(content)

    line = failing(tmp_path / name)

    assert str(tmp_path / name) in line
    assert said in line


@pytest.mark.parametrize("byte", range(4, len(PAGED), 499))
@pytest.mark.slow
def test_a_corrupt_page_is_refused_or_harmless(moetrace, tmp_path, byte):
    """Of a dump with page checksums, as moetrace itself exports it."""
    (tmp_path / "x.parquet").write_bytes(flipped(PAGED, byte))

    done = moetrace("ingest", tmp_path / "x.parquet", "--quiet")

    assert done.code in {0, 1}
    assert done.err.count("\n") == done.code


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.slow
def test_what_would_not_fit_in_memory_is_refused_with_the_amount(failing, tmp_path, monkeypatch, bomb):
    """A small file can ask for a lot; here there are 100 MB."""
    monkeypatch.setattr(sources, "available", lambda: LITTLE_MEMORY)
    name, content, said = BOMBS[bomb]
    (tmp_path / name).write_bytes(content())
    assert (tmp_path / name).stat().st_size < 200_000 or bomb == "Fortran array"

    line = failing(tmp_path / name)

    assert said in line
    assert "GiB of memory, and there are 0.1 GiB" in line


@pytest.mark.slow
def test_what_is_held_whole_is_refused_where_it_does_not_fit(tmp_path, monkeypatch):
    """`read_trace` holds a trace in memory; ingesting the same source streams."""
    counts = np.ones((3000, 10, 400), np.int32)
    np.save(tmp_path / "x.npy", counts)
    monkeypatch.setattr(sources, "available", lambda: 80 << 20)

    with pytest.raises(TraceError, match=r"a trace of over [\d,]+ counts would take 0\.1 GiB of memory.*ingest it"):
        read_trace(tmp_path / "x.npy")
    convert(
        tmp_path / "x.npy", tmp_path / "x.parquet", name="x", options=ReadOptions(accept=("smoothed", "cumulative"))
    )


def test_a_folder_named_as_a_file_is_no_file(failing, tmp_path):
    """An empty one holds nothing."""
    (tmp_path / "x.parquet").mkdir()

    assert "holds no trace files" in failing(tmp_path / "x.parquet")


def test_a_folder_of_folders_names_those_that_hold_traces(failing, tmp_path):
    """A rank, a run or a step each; what is named can be read."""
    for folder in ("rank0", "rank1", "notes"):
        (tmp_path / "run" / folder).mkdir(parents=True)
    for rank in ("rank0", "rank1"):
        (tmp_path / "run" / rank / "x.csv").write_bytes(csv())

    assert "run: holds no trace files itself; its folders rank0, rank1 do; give those" in failing(tmp_path / "run")
    assert len(sources_in(tmp_path / "run" / "rank0")) == 1


@pytest.mark.parametrize("path", ["pipe", "/dev/zero"])
def test_what_has_no_end_is_not_read(failing, tmp_path, path):
    """Pipes and devices are neither files nor folders."""
    os.mkfifo(tmp_path / "pipe")

    assert "neither a file nor a folder" in failing(tmp_path / path)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", "x\0y", "x" * 121, "名前"])
def test_names_stay_in_the_workspace(failing, tmp_path, name):
    """Parts of a path are no name; what can be one is said."""
    (tmp_path / "x.parquet").write_bytes(GOOD)

    line = failing(tmp_path / "x.parquet", "--name", name)

    assert "cannot be the name of a trace" in line
    assert "at most 120 characters, which begins with a letter or a digit" in line


def test_a_file_that_vanishes_is_named(moetrace, tmp_path, monkeypatch):
    """Between looking at it and reading it."""
    (tmp_path / "x.csv").write_bytes(csv())
    monkeypatch.setattr("moetrace.formats.readers.head_of", lambda path: path.unlink() or "")

    done = moetrace("ingest", tmp_path / "x.csv")

    assert (1, 1) == (done.code, done.err.count("\n"))
    assert f"{tmp_path / 'x.csv'}" in done.err


@pytest.mark.slow
def test_a_known_file_is_read_whatever_it_is_called(moetrace, tmp_path):
    """By its content: a Parquet file with the name of another kind."""
    for name in ("a.csv", "b.jsonl", "c.npy"):
        (tmp_path / name).write_bytes(GOOD)
        assert 60 == moetrace("ingest", tmp_path / name, "--json").json["traces"][0]["steps"]


@pytest.mark.parametrize("place", ["moetrace-out", "moetrace-out/traces"])
def test_a_file_where_a_folder_has_to_be_is_named(moetrace, tmp_path, place):
    """The workspace cannot be made there."""
    (tmp_path / "x.parquet").write_bytes(GOOD)
    Path(place).parent.mkdir(exist_ok=True)
    Path(place).write_text("a file")

    done = moetrace("ingest", tmp_path / "x.parquet")

    assert (1, 1) == (done.code, done.err.count("\n"))
    assert "moetrace-out/traces: cannot be written" in done.err


def test_a_folder_where_the_trace_has_to_be_is_named(moetrace, tmp_path):
    """It is not replaced, and nothing is left."""
    (tmp_path / "x.parquet").write_bytes(GOOD)
    Path("moetrace-out/traces/x.parquet").mkdir(parents=True)

    done = moetrace("ingest", tmp_path / "x.parquet", "--force")

    assert (1, 1) == (done.code, done.err.count("\n"))
    assert "x.parquet: cannot be written: Is a directory" in done.err
    assert ["x.parquet"] == [path.name for path in Path("moetrace-out/traces").iterdir()]


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_said_and_the_old_trace_stays(moetrace, tmp_path, full_disk):
    """While the trace is written."""
    counts = np.random.default_rng(0).multinomial(10**6, np.full(64, 1 / 64), size=(2000, 2))
    table = long_table(LoadTrace.from_counts(counts))
    (tmp_path / "x.parquet").write_bytes(GOOD)
    (tmp_path / "big.parquet").write_bytes(parquet(table))
    moetrace("ingest", tmp_path / "x.parquet", "-w", full_disk)

    done = moetrace("ingest", tmp_path / "big.parquet", "--name", "x", "--force", "-w", full_disk)

    assert (1, 1) == (done.code, done.err.count("\n"))
    assert "x.parquet: cannot be written: No space left on device; free some space" in done.err
    assert ["x.parquet"] == [path.name for path in (full_disk / "traces").iterdir()]
    assert [60] == [trace["steps"] for trace in moetrace("list", "-w", full_disk, "--json").json["traces"]]


# Another user may not even see the libraries, so they are loaded before root becomes one.
AS_NOBODY = """
import os, sys
from moetrace.cli import main
main(["ingest", sys.argv[1], "-w", sys.argv[2], "-q", "-o", os.devnull, "--force"])
if os.geteuid() == 0:
    os.setuid(65534)
sys.exit(main(["ingest", *sys.argv[3:]]))
"""


@pytest.mark.parametrize("locked", ["source", "workspace"])
@pytest.mark.slow
def test_missing_permissions_are_named(tmp_path, locked):
    """As another user than root, who may do anything."""
    good, source, place = tmp_path / "good.parquet", tmp_path / "x.parquet", tmp_path / "out"
    good.write_bytes(GOOD)
    source.write_bytes(GOOD)
    place.mkdir()
    place.chmod(0o555 if locked == "workspace" else 0o777)
    source.chmod(0 if locked == "source" else 0o644)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o711)
    command = [sys.executable, "-c", AS_NOBODY, good, tmp_path / "first", source, "-w", place]

    done = subprocess.run(command, capture_output=True, text=True)

    assert (1, 1) == (done.returncode, done.stderr.count("\n")), done.stderr
    assert f"{source if locked == 'source' else place}" in done.stderr
    assert "Permission denied" in done.stderr


def test_a_frame_of_anything_is_no_surprise(failing, tmp_path):
    """Text, dates and nested columns where numbers are due."""
    for i, step in enumerate((["a"], [pd.Timestamp(0)], [[1]], [{"a": 1}], [None])):
        path = tmp_path / f"{i}.parquet"
        pd.DataFrame({"step": step, "layer": [0], "expert": [0], "tokens": [1]}).to_parquet(path)
        assert str(path) in failing(path)
