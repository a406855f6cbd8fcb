"""A recorder that is killed: at most one block is missing, no file is damaged, and nothing stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moetrace import open_trace
from moetrace.files import PREFIX
from moetrace.record import Recorder, read_parts

# Records until it is killed: prints a step once the recorder has taken it.
ENDLESS = """
import sys
import time
import pyarrow.parquet  # so that the first block is not late
from moetrace.record import Recorder

recorder = Recorder(sys.argv[1], block=5, resume=True)
step = recorder.last_step or 0
while True:
    step += 1
    for layer in range(3):
        recorder.add(layer, [step, layer, 1, 2])
    recorder.step(step)
    print(step, flush=True)
    time.sleep(0.003)
"""


def killed_after(path, seconds):
    """The last step that the child reported before `kill -9`, *seconds* after its first."""
    child = subprocess.Popen([sys.executable, "-c", ENDLESS, path], stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    said = child.stdout.read().rpartition("\n")[0].split()
    child.wait()
    child.stdout.close()
    return int(said[-1]) if said else 0


@pytest.mark.thorough
def test_a_kill_loses_at_most_one_block(tmp_path):
    """`kill -9` at 6 random moments: every time a readable trace, at most five steps short, and right."""
    rng = np.random.default_rng(0)
    path = tmp_path / "run.parquet"
    for seconds in rng.uniform(0, 0.5, 6):
        said = killed_after(path, seconds)
        parts = path.with_suffix(".parts")
        if said < 5 and not list(parts.glob("part-*")):
            continue  # nothing to lose but the first block
        trace = read_parts(parts)

        reached = int(trace.steps[-1])
        assert said - 5 <= reached
        assert list(range(1, reached + 1)) == trace.steps.tolist()
        assert [[[step, layer, 1, 2] for layer in range(3)] for step in trace.steps] == trace.counts.tolist()

    Recorder(path, resume=True).close()

    assert reached == open_trace(path).steps[-1]


def kills(number, folder):
    """What came of each of so many kills of `kills.py`, with its files in *folder*."""
    command = [sys.executable, Path(__file__).with_name("kills.py"), "--kills", str(number)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(folder)})
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.thorough
def test_going_on_after_a_kill_gives_the_undisturbed_trace(tmp_path):
    """Killed at random moments, closing included: the same trace, or one block less; no file is left over."""
    found = kills(20, tmp_path)

    assert 20 == len(found)
    assert [] == [kill for kill in found if not kill["sound"]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.thorough
def test_a_kill_before_any_change_to_the_disk_does_no_harm(tmp_path):
    """One kill before each file that is made, moved or removed from the first step to the end of closing."""
    found = kills(0, tmp_path)

    assert 30 < len(found)
    assert [] == [kill for kill in found if not kill["sound"]]


def left_by_the_dead(folder):
    """A half-written file in *folder* of a process that has ended."""
    code = "import os, sys; from moetrace.files import replacing, Path\nwith replacing(Path(sys.argv[1])): os._exit(0)"
    subprocess.run([sys.executable, "-c", code, folder / "x.parquet"], check=True)
    return next(folder.glob(f"{PREFIX}*"))


@pytest.mark.parametrize("by", ["recorder", "ingest"])
@pytest.mark.slow
def test_what_a_kill_left_is_swept(tmp_path, moetrace, by):
    """Half-written files in the folder of parts and beside the trace, by the next recorder or `ingest` of the place."""
    path = tmp_path / "run.parquet"
    recorder = Recorder(path, block=1)
    recorder.add(0, [1, 2])
    recorder.step()
    recorder._parts.release()  # as a kill does
    parts = path.with_suffix(".parts")
    left = [left_by_the_dead(tmp_path), left_by_the_dead(parts)]
    if by == "recorder":
        Recorder(path, resume=True).close()
    else:
        assert 0 == moetrace("ingest", parts).code

    assert [False, False] == [file.exists() for file in left]


def test_what_another_machine_left_is_swept(tmp_path):
    """Within the folder of parts the lock says that nobody is writing, whatever machine it was."""
    path = tmp_path / "run.parquet"
    parts = path.with_suffix(".parts")
    parts.mkdir()
    (parts / f"{PREFIX}elsewhere-1-x.parquet").write_bytes(b"half")

    recorder = Recorder(path)

    assert ["moetrace-parts.txt"] == [file.name for file in parts.iterdir()]
    assert recorder.last_step is None


def test_a_replacement_killed_before_its_first_block_still_replaces(tmp_path):
    """`force=True`, a kill, `resume=True`: the trace that was to be replaced is not continued."""
    path = tmp_path / "run.parquet"
    for value in (1, 2):
        with Recorder(path, force=True) as recorder:
            recorder.add(0, [value])
            recorder.step(10)
    Recorder(path, force=True)._parts.release()  # as a kill does

    with Recorder(path, resume=True) as recorder:
        recorder.add(0, [3])
        recorder.step(1)

    assert ([1], [[[3]]]) == (open_trace(path).steps.tolist(), open_trace(path).counts.tolist())


def test_parts_that_lost_their_marker_are_no_rubbish(tmp_path):
    """Where there is no trace yet they are all there is of the run."""
    path = tmp_path / "run.parquet"
    recorder = Recorder(path, block=1)
    recorder.add(0, [1])
    recorder.step()
    (path.with_suffix(".parts") / "moetrace-parts.txt").unlink()
    recorder._parts.release()

    assert 1 == Recorder(path, resume=True).last_step


def test_a_run_that_changes_its_folder_is_one_trace(tmp_path, monkeypatch):
    """A relative path means the place where the recorder was opened."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Recorder("run.parquet", block=1) as recorder:
        for _ in range(2):
            recorder.add(0, [1])
            recorder.step()
            monkeypatch.chdir(tmp_path / "elsewhere")

    assert [1, 2] == open_trace(tmp_path / "run.parquet").steps.tolist()
