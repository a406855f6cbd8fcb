"""The workspace: names, what is there already, and files that are whole or not there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fuzz import kills

from moetrace import ReadOptions, SettingError, TraceError, Workspace, WorkspaceError, save_trace
from moetrace.files import replacing, sweep, write_text
from moetrace.workspace.traces import names_apart


@pytest.fixture
def place(tmp_path):
    """An empty workspace."""
    return Workspace(tmp_path / "out")


def test_a_source_becomes_a_trace_named_by_its_stem(place, long_file, small):
    """And is found again by name or by path."""
    done = place.ingest(long_file)

    assert ("small", False) == (done.trace.name, done.unchanged)
    assert ["small"] == place.names()
    assert np.array_equal(small.counts, place.open("small").counts)
    assert np.array_equal(small.counts, place.open(str(done.path)).counts)


def test_the_same_source_again_does_nothing(place, long_file):
    """The file is not even touched."""
    path = place.ingest(long_file).path
    before = path.stat().st_mtime_ns

    assert place.ingest(long_file).unchanged
    assert before == path.stat().st_mtime_ns


def test_another_source_under_a_taken_name_is_refused(place, long_file):
    """The error names both ways out, and each of them works."""
    place.ingest(long_file)
    table = pq.read_table(long_file)
    pq.write_table(table.slice(0, 8), long_file)

    with pytest.raises(WorkspaceError, match=r"--name, or .* --force"):
        place.ingest(long_file)
    assert 60 == len(place.open("small").steps)
    assert 1 == len(place.ingest(long_file, name="other").trace.steps)
    assert 1 == len(place.ingest(long_file, force=True).trace.steps)


def test_sources_of_one_name_are_told_apart_by_their_folders(tmp_path):
    """As the ranks and runs of many are; where folders do not tell, nothing is made up."""
    paths = {name: [tmp_path / name] for name in ("a/x.csv", "b/x.csv", "b/y.csv")}
    same = {name: [tmp_path / name] for name in ("a/x.csv", "a/x.parquet", "b/y.csv")}

    assert ["a-x", "b-x", "y"] == list(names_apart(paths).values())
    assert ["x", "x", "y"] == list(names_apart(same).values())


def test_the_command_names_them_so(moetrace, long_file):
    """Both are read, and the same command again does nothing."""
    other = long_file.parent / "other" / long_file.name
    other.parent.mkdir()
    shutil.copy(long_file, other)
    done, again = (moetrace("ingest", long_file, other, "--json") for _ in range(2))

    assert [f"{long_file.parent.name}-small", "other-small"] == [trace["name"] for trace in done.json["traces"]]
    assert (0, True) == (again.code, all(trace["unchanged"] for trace in again.json["traces"]))


def test_an_empty_name_is_none(place, long_file):
    """It is not as if none had been given."""
    with pytest.raises(WorkspaceError, match="'' cannot be the name"):
        place.ingest(long_file, name="")


def test_other_options_are_another_source(place, long_file):
    """What was read differently is not the same."""
    place.ingest(long_file)

    with pytest.raises(WorkspaceError, match="other options"):
        place.ingest(long_file, options=ReadOptions(tokens_per_step=100))


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x" * 200, "a\nb"])
def test_names_that_are_no_file_names_are_refused(place, long_file, name):
    """Nothing is written outside the workspace."""
    with pytest.raises(WorkspaceError):
        place.trace_path(name)


def test_a_damaged_trace_is_replaced_only_by_force(place, long_file):
    """The way out is in the message."""
    path = place.ingest(long_file).path
    path.write_bytes(path.read_bytes()[:-20])

    with pytest.raises(WorkspaceError, match="--force"):
        place.ingest(long_file)
    assert not place.ingest(long_file, force=True).unchanged


def test_unknown_traces_are_named_with_those_there_are(place, long_file):
    """Also when there are none yet."""
    with pytest.raises(WorkspaceError, match="moetrace ingest"):
        place.chosen([])
    place.ingest(long_file)
    with pytest.raises(SettingError, match="did you mean 'small'"):
        place.path_of("smal")
    with pytest.raises(SettingError, match="there are small"):
        place.remove("another")


def test_a_trace_is_called_like_its_file(place, long_file):
    """Whatever its metadata say, and after it was renamed by hand."""
    moved = place.ingest(long_file).path.rename(place.trace_path("other"))

    assert "other" == place.open("other").name
    assert "other" == place.open(str(moved)).name


def test_traces_of_one_name_are_told_apart(place, small, tmp_path):
    """By as many folders as it takes; their results lie apart too, also from those of a trace in the workspace."""
    paths = [
        tmp_path / "x" / "a" / "run.parquet",
        tmp_path / "y" / "a" / "run.parquet",
        tmp_path / "y" / "other.parquet",
    ]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_trace(small, path)
    place.ingest(paths[0])

    assert ["x/a/run", "y/a/run", "other"] == list(place.unique_names(map(str, paths)).values())
    folders = [place.result_path("predict", given) for given in ("run", *map(str, paths))]
    assert place.root / "predict" / "run" == folders[0]
    assert 4 == len(set(folders))


def test_remove_takes_all_results_along_and_no_other(place, small, tmp_path):
    """What looks alike stays: run-1 beside run.1."""
    for name in ("run.1", "run-1"):
        save_trace(small, tmp_path / f"{name}.parquet")
        place.ingest(tmp_path / f"{name}.parquet")
        for command in ("predict", "place", "hot", "parts"):
            file = place.root / command / name / "x"
            file.parent.mkdir(parents=True)
            file.write_text("x")
    place.remove("run.1")

    assert [["run-1"]] * 4 == [
        [p.name for p in (place.root / c).iterdir()] for c in ("predict", "place", "hot", "parts")
    ]


def test_results_of_a_trace_renamed_by_hand_can_be_removed(place, long_file):
    """They are never those of the new name, and go by the old one."""
    place.ingest(long_file).path.rename(place.trace_path("new"))
    kept = place.root / "predict" / "small" / "x"
    kept.parent.mkdir(parents=True)
    kept.write_text("x")

    assert place.root / "predict" / "new" == place.result_path("predict", "new")
    place.remove("small")
    assert (False, ["new"]) == (kept.exists(), place.names())


def test_a_link_in_the_workspace_is_a_trace_of_its_own_name(moetrace, place, long_file):
    """Listed, opened, computed and removed by it; the file that it points to stays."""
    root = place.root
    place.ingest(long_file, name="real")
    target = place.trace_path("real").rename(root / "elsewhere.parquet")
    place.trace_path("t").symlink_to(target)
    where = ("-w", root, "--json")
    listed = [trace["name"] for trace in moetrace("list", *where).json["traces"]]
    predicted = moetrace("predict", "t", "--horizon", 10, "--cutoffs", 50, "--predictor", "ema", *where)

    assert (["t"], {"t"}) == (listed, {score["trace"] for score in predicted.json["scores"]})
    assert {"t": str(root / "predict" / "t" / "forecast-10.parquet")} == predicted.json["forecasts"]
    assert 0 == moetrace("remove", "t", *where).code
    assert (True, []) == (target.exists(), [*root.rglob("t*.parquet"), *root.rglob("forecast*")])


def test_a_trace_named_twice_is_removed_once(moetrace, place, long_file):
    """And a second time there is nothing left, which is said in a whole sentence."""
    place.ingest(long_file)

    assert 0 == moetrace("remove", "small", "small", "-w", place.root).code
    assert moetrace("remove", "small", "-w", place.root).err.endswith(f"in {place.root}; there are none\n")


def test_remove_deletes_the_trace_and_not_its_source(place, long_file):
    """Only the canonical file goes."""
    place.ingest(long_file)
    place.remove("small")

    assert [] == place.names()
    assert long_file.exists()


def test_a_failed_ingest_leaves_nothing(place, tmp_path):
    """No trace, no partial file."""
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")

    with pytest.raises(TraceError):
        place.ingest(tmp_path / "bad.parquet")
    assert [] == list((place.root / "traces").iterdir())


def test_what_a_dead_process_left_is_swept(tmp_path):
    """What a living one is writing stays."""
    code = "import os, sys; from moetrace.files import replacing, Path\nwith replacing(Path(sys.argv[1])): os._exit(0)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "x.parquet"], check=True)
    (left,) = tmp_path.iterdir()
    with replacing(tmp_path / "y.parquet") as ours:
        sweep(tmp_path)

        assert (False, True) == (left.exists(), ours.exists())


@pytest.mark.parametrize(("source", "fact"), [("read_text", "another boot"), ("readlink", "pid:[1]")])
def test_a_living_process_of_another_machine_with_this_host_name_is_left_alone(tmp_path, monkeypatch, source, fact):
    """Host names do not tell hosts or containers apart; their boot and PID namespace do."""
    with monkeypatch.context() as there:
        there.setattr(Path, source, lambda _path: fact)
        with replacing(tmp_path / "x.parquet") as partial:
            theirs = partial.with_name(partial.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-"))  # no process here
            theirs.touch()
    sweep(tmp_path)

    assert theirs.exists()
    sweep(tmp_path, everyone=True)
    assert not theirs.exists()


def test_a_process_number_used_again_does_not_protect_what_is_left(tmp_path):
    """The process of that number has begun at another time."""
    with replacing(tmp_path / "x.parquet") as partial:
        left = partial.with_name(re.sub(r"-(\d+)-(\d+)-", r"-\1-1000-", partial.name))
        left.touch()
        sweep(tmp_path)

        assert [partial] == list(tmp_path.iterdir())


def test_an_error_while_writing_keeps_the_old_file(tmp_path):
    """And no temporary one."""
    path = tmp_path / "file"
    path.write_text("old")

    def write_half():
        with replacing(path) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert "old" == path.read_text()
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.thorough
def test_a_killed_ingest_leaves_the_old_trace_or_the_new_one(tmp_path):
    """Killed at five moments while it replaces a trace; the next ingest sweeps up. `make fuzz` kills fifty times."""
    assert {"old", "new"} >= set(kills.outcomes(5, tmp_path))


def test_a_file_the_user_named_is_not_replaced_unasked(tmp_path):
    """Without force it is an error."""
    write_text(tmp_path / "x", "one", force=False)

    with pytest.raises(WorkspaceError, match="--force"):
        write_text(tmp_path / "x", "two", force=False)
    write_text(tmp_path / "x", "two", force=True)
    assert "two" == (tmp_path / "x").read_text()
