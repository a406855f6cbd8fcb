"""Whatever a file or a disk can do ends in exit code 1, one line, and nothing left behind."""

import gzip
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import long_table

from moetrace import LoadTrace
from moetrace.formats import room

SMALL = LoadTrace.from_counts(np.random.default_rng(1).multinomial(100, [0.4, 0.3, 0.2, 0.1], size=(60, 2)))


class Evil:
    """Unpickling it leaves a mark."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def parquet(table: pa.Table | dict, **options: object) -> bytes:
    """A Parquet file in memory."""
    sink = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), sink, **options)
    return sink.getvalue()


def csv() -> bytes:
    """The small trace as CSV."""
    return long_table(SMALL).to_pandas().to_csv(index=False).encode()


def npz(**arrays: np.ndarray) -> bytes:
    """A packed archive."""
    sink = io.BytesIO()
    np.savez_compressed(sink, **arrays)
    return sink.getvalue()


def npy_header(shape: tuple[int, ...], kind: str = "<i8") -> bytes:
    """The header of an array, without the array."""
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": kind, "fortran_order": False, "shape": shape})
    return sink.getvalue()


def archive(name: str, content: bytes, claimed: int | None = None) -> bytes:
    """A zip archive of one member, whose directory may claim another size."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(name, content)
    data = sink.getvalue()
    return data if claimed is None else data.replace(struct.pack("<I", len(content)), struct.pack("<I", claimed))


def flipped(data: bytes, place: int) -> bytes:
    """*data* with one byte turned over."""
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def long(**columns: object) -> bytes:
    """A long Parquet file of these columns, the others all 0 and the tokens all 1."""
    n = len(next(iter(columns.values())))
    zero = np.zeros(n, np.int64)
    return parquet({"step": zero, "layer": zero, "expert": zero, "tokens": zero + 1, **columns})


def evil_array() -> bytes:
    """An array of objects, as `np.save` pickles it."""
    sink = io.BytesIO()
    np.save(sink, np.array([Evil()], dtype=object), allow_pickle=True)
    return sink.getvalue()


DIAGONAL = np.arange(300_000)
GOOD = parquet(long_table(SMALL))
PAGED = parquet(long_table(SMALL), write_page_checksum=True, compression="none", use_dictionary=False)
# What a file is called, what is in it, and a part of what is said about it.
FILES = {
    "empty Parquet": ("x.parquet", b"", "is empty"),
    "empty CSV": ("x.csv", b"", "has no header"),
    "empty JSON lines": ("x.jsonl", b"", "is empty"),
    "empty array": ("x.npy", b"", "cannot be read as NumPy"),
    "truncated Parquet": ("x.parquet", GOOD[: len(GOOD) // 2], "magic bytes not found"),
    "truncated gzip": ("x.csv.gz", gzip.compress(csv())[:-200], "cannot be read"),
    "truncated archive": ("x.npz", npz(counts=SMALL.counts)[:-30], "cannot be read as NumPy"),
    "truncated array": ("x.npy", npy_header((60, 2, 4)) + bytes(100), "no such 3,840 bytes"),
    "CSV named Parquet": ("x.parquet", csv(), "magic bytes not found"),
    "archive named Parquet": ("x.parquet", npz(counts=SMALL.counts), "magic bytes not found"),
    "picture named CSV": ("x.csv", b"\x89PNG\r\n\x1a\n" + bytes(200), "has no header"),
    "wrong magic": ("x.parquet", b"PARX" + GOOD[4:-4] + b"PARX", "magic bytes not found"),
    "unknown kind": ("x.dat", b"what is this", "is in no known format"),
    "corrupt archive": ("x.npz", flipped(npz(counts=SMALL.counts), 200), "cannot be read as NumPy"),
    "corrupt gzip": ("x.csv.gz", flipped(gzip.compress(csv()), 200), "cannot be read"),
    "objects": ("x.npy", evil_array(), "nothing is unpickled"),
    "objects in an archive": ("x.npz", archive("counts.npy", evil_array()), "nothing is unpickled"),
    "pickle named array": ("x.npy", pickle.dumps(Evil()), "nothing is unpickled"),
    "pickle named archive": ("x.npz", pickle.dumps(Evil()), "nothing is unpickled"),
    "array that says 100 GB": ("x.npy", npy_header((10**6, 100, 125)), "no such 100,000,000,000 bytes"),
    "archive that says 100 GB": ("x.npz", archive("counts.npy", npy_header((10**6, 100, 125))), "no such 100,000,000"),
    "member that says 4 GB": ("x.npz", archive("counts.npy", npy_header((1000, 100, 5000)), 2**32 - 9), "ends 4,000,000 bytes early"),
    "negative shape": ("x.npy", npy_header((-1, 4)), "shape is (-1, 4)"),
    "shape beyond 64 bits": ("x.npy", npy_header((2**62, 2**62, 4)), "has no such"),
    "member with a path": ("x.npz", archive("../../counts.npy", b"no array"), "cannot be read as NumPy"),
    "expert beyond all": ("x.parquet", long(expert=np.array([0, 10**12])), "expert 1 is missing"),
    "as many layers as experts": ("x.parquet", long(layer=DIAGONAL, expert=DIAGONAL), "300,000 layers of 300,000 experts"),
    "choice beyond all": ("x.parquet", parquet({"step": [1], "topk_ids": [[10**12]]}), "of memory, and there are"),
    "one expert after all": ("x.jsonl", b'{"step": 1, "layer": 0, "topk_ids": [[4000000000000]]}\n', "would take"),
    "columns of no use": ("x.csv", ",".join(f"c{i}" for i in range(150_000)).encode() + b"\n", "has 150,000 columns"),
    "a line longer than memory": ("x.csv.gz", gzip.compress(b"step,layer,expert,tokens\n" + b"1" * (20 << 20)), "cannot be read"),
    "deep JSON": ("x.jsonl", b"[" * 100_000 + b"\n", "cannot be read"),
    "not UTF-8": ("x.csv", b"st\xe9p,layer,expert,tokens\n1,0,0,5\n", "whose name is no UTF-8"),
    "row without counts": ("x.parquet", parquet({"step": [1, 2], "layer": [0, 0], "counts": [[1, 2], []]}), "row 1: is an empty list"),
    "encrypted": ("x.parquet", b"PARE" + GOOD[4:-4] + b"PARE", "encrypted"),
}  # fmt: skip


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
def test_a_bad_file_is_one_line(failing, tmp_path, fault):
    """The line names the file and what is wrong with it; no pickle is opened."""
    name, content, said = FILES[fault]
    (tmp_path / name).write_bytes(content)

    line = failing(tmp_path / name)

    assert str(tmp_path / name) in line
    assert said in line


@pytest.mark.parametrize("byte", range(4, len(PAGED), 499))
def test_a_corrupt_page_is_refused_or_harmless(moetrace, tmp_path, byte):
    """Of a dump with page checksums, as moetrace itself exports it."""
    (tmp_path / "x.parquet").write_bytes(flipped(PAGED, byte))

    done = moetrace("ingest", tmp_path / "x.parquet", "--quiet")

    assert done.code in {0, 1}
    assert done.err.count("\n") == done.code


BOMBS = {
    "one step without end": ("x.parquet", lambda: long(step=np.zeros(3_000_000, np.int64)), "more than 1,"),
    "one list without end": ("x.parquet", lambda: parquet({"step": [1], "counts": [np.zeros(3_000_000, np.int64)]}), "a list of 3,000,000"),
    "packed text": ("x.csv.gz", lambda: gzip.compress(b"step,layer,expert,tokens\n" + b"1,0,0,5\n" * 3_000_000), "step 1, with more than"),
    "packed JSON": ("x.jsonl.gz", lambda: gzip.compress(b'{"step":1,"layer":0,"expert":0,"tokens":5}\n' * 1_500_000), "step 1, with more than"),
    "Fortran array": ("x.npy", lambda: _saved(np.asfortranarray(np.zeros((3000, 10, 200)))), "the array, which has to be held whole"),
    "rank of a fork": ("mcore_ep_loads_0.npz", lambda: npz(loads=np.zeros((10, 3000, 200), np.int64)), "the array, which has to be held whole"),
    "one step of an array": ("x.npz", lambda: npz(counts=np.ones((2, 10, 200_000), np.int64)), "one step of it"),
}  # fmt: skip


def _saved(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_would_not_fit_in_memory_is_refused_with_the_amount(failing, tmp_path, monkeypatch, bomb):
    """A small file can ask for a lot; here there are 100 MB."""
    monkeypatch.setattr(room, "available", lambda: 100 << 20)
    name, content, said = BOMBS[bomb]
    (tmp_path / name).write_bytes(content())
    assert (tmp_path / name).stat().st_size < 200_000 or bomb == "Fortran array"

    line = failing(tmp_path / name)

    assert said in line
    assert "GiB of memory, and there are 0.1 GiB" in line


def test_a_folder_named_as_a_file_is_no_file(failing, tmp_path):
    """An empty one holds nothing."""
    (tmp_path / "x.parquet").mkdir()

    assert "holds no trace files" in failing(tmp_path / "x.parquet")


@pytest.mark.parametrize("path", ["pipe", "/dev/zero"])
def test_what_has_no_end_is_not_read(failing, tmp_path, path):
    """Pipes and devices are neither files nor folders."""
    os.mkfifo(tmp_path / "pipe")

    assert "neither a file nor a folder" in failing(tmp_path / path)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", "x\0y"])
def test_names_stay_in_the_workspace(failing, tmp_path, name):
    """Parts of a path are no name."""
    (tmp_path / "x.parquet").write_bytes(GOOD)

    assert "cannot be the name of a trace" in failing(tmp_path / "x.parquet", "--name", name)


def test_a_file_that_vanishes_is_named(moetrace, tmp_path, monkeypatch):
    """Between looking at it and reading it."""
    (tmp_path / "x.csv").write_bytes(csv())
    monkeypatch.setattr("moetrace.formats.refuse_lookalikes", lambda path: path.unlink())

    done = moetrace("ingest", tmp_path / "x.csv")

    assert (1, 1) == (done.code, done.err.count("\n"))
    assert f"{tmp_path / 'x.csv'}" in done.err


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


@pytest.mark.parametrize("rows", ["in order", "shuffled"])
def test_a_full_disk_is_said_and_the_old_trace_stays(moetrace, tmp_path, full_disk, monkeypatch, rows):
    """While the trace is written, or its rows are sorted."""
    monkeypatch.setattr("moetrace.formats.spill.SORT_CELLS", 10_000)
    counts = np.random.default_rng(0).multinomial(10**6, np.full(64, 1 / 64), size=(2000, 2))
    table = long_table(LoadTrace.from_counts(counts))
    if rows == "shuffled":
        table = table.take(np.random.default_rng(0).permutation(len(table)))
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
