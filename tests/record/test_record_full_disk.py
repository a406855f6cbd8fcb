"""A disk that is full, slow to be emptied, or gone: the training goes on, and the trace says what is missing."""

import errno
import os
import shutil
import subprocess
import warnings
from contextlib import contextmanager

import numpy as np
import pytest

from moetrace import TraceError, WorkspaceError, open_trace
from moetrace.record import Recorder, RecordingWarning, folder, read_parts


class Disk:
    """A folder that can be filled and emptied."""

    def __init__(self, place, fill, empty):
        self.place, self.fill, self.empty = place, fill, empty

    @property
    def path(self):
        """Where the trace will lie."""
        return self.place / "run.parquet"


def mounted(place):
    """Whether a file system of 1 MiB could be mounted at *place*."""
    mount = shutil.which("mount")
    if mount is None:
        return False
    return 0 == subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode


@pytest.fixture
def tmpfs(tmp_path):
    """A disk of 1 MiB; needs root, as in a container."""
    place = tmp_path / "disk"
    place.mkdir()
    if not mounted(place):
        pytest.skip("no tmpfs can be mounted: not root, or not Linux")
    filler = place / "filler"

    def fill():
        with pytest.raises(OSError, match="No space"), filler.open("ab", buffering=0) as file:  # noqa: PT012
            while True:
                file.write(b"x" * 4096)

    yield Disk(place, fill, filler.unlink)
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def simulated(tmp_path, monkeypatch):
    """A disk on which every file that is written meets ENOSPC, once filled."""
    save, convert = folder.save_trace, folder.convert

    def full(*_args, **_settings):
        raise WorkspaceError(f"{tmp_path}/run.parts: cannot be written: {os.strerror(errno.ENOSPC)}")

    def put(saves, converts):
        monkeypatch.setattr(folder, "save_trace", saves)
        monkeypatch.setattr(folder, "convert", converts)

    return Disk(tmp_path, lambda: put(full, full), lambda: put(save, convert))


@pytest.fixture(params=["tmpfs", "simulated"])
def disk(request):
    """A disk that is really full, where one can be had, and one that seems to be."""
    return request.getfixturevalue(request.param)


def record(recorder, first, last, plus=0):
    """Record the steps from *first* to *last*, of counts that name them."""
    for step in range(first, last + 1):
        recorder.add(0, [step + plus, 1])
        recorder.step(step)


def expected(*spans, plus=0):
    """What `record` has added for these spans."""
    return [[[step + plus, 1]] for first, last in spans for step in range(first, last + 1)]


@contextmanager
def one_warning(match):
    """Exactly one warning that matches."""
    with pytest.warns(RecordingWarning, match=match) as told:
        yield
    assert 1 == len(told), [str(warning.message) for warning in told]


def test_a_training_on_a_full_disk_finishes(disk):
    """One warning while it runs; with room again, not a step is missing."""
    recorder = Recorder(disk.path, block=10)
    record(recorder, 1, 20)
    disk.fill()
    with one_warning("No space left.*the run goes on"):
        record(recorder, 21, 110)
    disk.empty()
    record(recorder, 111, 120)
    recorder.close()

    assert expected((1, 120)) == open_trace(disk.path).counts.tolist()
    assert [disk.path] == list(disk.place.iterdir())


def test_what_does_not_fit_into_memory_is_missing_and_said(disk):
    """The oldest 30 of 50 blocks are dropped: a warning at the end and a finding of the trace say which steps."""
    recorder = Recorder(disk.path, block=10)
    record(recorder, 1, 20)
    disk.fill()
    with one_warning("No space left"):
        record(recorder, 21, 520)
    assert 20 == len(recorder._waiting)
    disk.empty()
    with one_warning("steps 21 to 320 are missing: they could not be written"):
        recorder.close()
    trace = open_trace(disk.path)

    assert expected((1, 20), (321, 520)) == trace.counts.tolist()
    assert ["1 gap in the steps (stride 1): 20 to 321"] == [
        found.evidence for found in trace.info.findings if found.name == "gap"
    ]


def test_the_bytes_held_are_bounded(simulated, monkeypatch):
    """Large blocks are dropped sooner; the newest is always held."""
    monkeypatch.setattr("moetrace.record.recorder.MOST_WAITING", 3 * 10 * 2 * 8)
    recorder = Recorder(simulated.path, block=10)
    simulated.fill()
    with one_warning("No space left"):
        record(recorder, 1, 100)
    assert [(71, 80), (81, 90), (91, 100)] == [(block.steps[0], block.steps[-1]) for block in recorder._waiting]
    monkeypatch.setattr("moetrace.record.recorder.MOST_WAITING", 1)
    record(recorder, 101, 110)

    assert [(101, 110)] == [(block.steps[0], block.steps[-1]) for block in recorder._waiting]


def test_a_run_that_went_back_while_the_disk_was_full_is_one_run(disk):
    """The steps that were given up do not stand in the place of blocks that were dropped."""
    recorder = Recorder(disk.path, block=10)
    record(recorder, 1, 100)
    disk.fill()
    with one_warning("No space left"):
        recorder.resume_from(50)
        record(recorder, 51, 350, plus=1000)
    disk.empty()
    with one_warning("are missing"):
        recorder.close()
    trace = open_trace(disk.path)

    assert list(range(1, 51)) == trace.steps[:50].tolist()
    assert expected((1, 50)) == trace.counts[:50].tolist()
    assert [[[step + 1000, 1]] for step in trace.steps[50:]] == trace.counts[50:].tolist()


def test_closing_can_be_tried_until_it_works(disk):
    """Each time it does not, it is said, and where what was recorded is."""
    recorder = Recorder(disk.path, block=10)
    record(recorder, 1, 20)
    disk.fill()
    record(recorder, 21, 25)
    for _ in range(2):
        with one_warning(r"memory has steps 21 to 25: call close\(\)"):
            recorder.close()
    disk.empty()
    recorder.close()
    recorder.close()

    assert expected((1, 25)) == open_trace(disk.path).counts.tolist()


def test_after_with_closing_can_be_tried_again(disk):
    """A block `with` that ends well on a full disk warns, gives the lock up, and can still be closed."""
    with one_warning("cannot be written"), Recorder(disk.path, block=10) as recorder:
        record(recorder, 1, 20)
        disk.fill()
        record(recorder, 21, 25)
    disk.empty()
    recorder.close()

    assert expected((1, 25)) == open_trace(disk.path).counts.tolist()


def test_what_another_has_gone_on_with_is_left_alone(simulated):
    """A recorder that gave the lock up does not write into parts that are another's by now."""
    with one_warning("cannot be written"), Recorder(simulated.path, block=10) as recorder:
        record(recorder, 1, 10)
        simulated.fill()
    simulated.empty()
    other = Recorder(simulated.path, resume=True, block=5)
    with one_warning("another recorder"):
        recorder.close()
    record(other, 11, 15)
    other._parts.release()
    with one_warning("was continued by another recorder, or removed"):
        recorder.close()

    assert expected((1, 15)) == read_parts(simulated.path.with_suffix(".parts")).counts.tolist()


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_the_error_of_the_run_stays_what_it_is(disk, on_error):
    """A full disk does not take its place, and the lock is free for the next recorder."""
    with warnings.catch_warnings(), pytest.raises(ZeroDivisionError) as caught:  # noqa: PT012
        warnings.simplefilter("error")
        with Recorder(disk.path, block=10, on_error=on_error) as recorder:
            record(recorder, 1, 15)
            disk.fill()
            1 / 0  # noqa: B018
    assert "No space left" in caught.value.__notes__[0]
    disk.empty()

    assert 10 == Recorder(disk.path, resume=True).last_step


def test_what_memory_held_when_a_run_failed_is_said(simulated):
    """Steps that could not be written end with the process."""
    recorder = Recorder(simulated.path, block=10)
    record(recorder, 1, 10)
    simulated.fill()
    with pytest.warns(RecordingWarning) as told, pytest.raises(ZeroDivisionError), recorder:  # noqa: PT012, PT031
        record(recorder, 11, 25)
        1 / 0  # noqa: B018

    assert "steps 11 to 25 could not be written, and end with the process" in str(told[-1].message)


def test_errors_are_raised_when_asked_for(disk):
    """`on_error="raise"`: from `step`, `flush` and `close`; what was given is kept all the same."""
    recorder = Recorder(disk.path, block=10, on_error="raise")
    record(recorder, 1, 10)
    disk.fill()
    with pytest.raises(WorkspaceError, match="No space left"):
        record(recorder, 11, 20)
    for method in (recorder.flush, recorder.close):
        with pytest.raises(WorkspaceError, match="No space left"):
            method()
    disk.empty()
    recorder.close()

    assert expected((1, 20)) == open_trace(disk.path).counts.tolist()


def test_mistakes_are_raised_also_when_errors_only_warn(tmp_path):
    """A wrong argument shows at the first call, and so does a place that cannot be written to."""
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkspaceError, match="cannot be written"):
        Recorder(tmp_path / "file" / "run.parquet")
    with pytest.raises(TraceError, match="layer -1"):
        Recorder(tmp_path / "run.parquet").add(-1, [1])


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    """Somebody cleans up during the run: it is said, and what comes after is recorded."""
    path = tmp_path / "run.parquet"
    recorder = Recorder(path, block=10)
    record(recorder, 1, 20)
    shutil.rmtree(path.with_suffix(".parts"))
    with one_warning("parts that were written before are gone"):
        record(recorder, 21, 30)
    with pytest.raises(WorkspaceError, match="another recorder"):
        Recorder(path, resume=True)
    recorder.close()

    assert expected((21, 30)) == open_trace(path).counts.tolist()


def test_a_folder_that_was_removed_before_closing_is_said(tmp_path):
    """Nothing is left, and closing does not pretend that nothing was recorded."""
    path = tmp_path / "run.parquet"
    recorder = Recorder(path, block=10)
    record(recorder, 1, 20)
    shutil.rmtree(path.with_suffix(".parts"))

    with one_warning("nothing is left of the trace"):
        recorder.close()


def test_a_clean_up_that_fails_after_the_trace_is_in_place_does_no_harm(tmp_path, monkeypatch):
    """Closing again only cleans up: the trace is not made again of the parts that are left."""
    path = tmp_path / "run.parquet"
    recorder = Recorder(path, block=10)
    record(recorder, 1, 30)
    remove = folder.PartsFolder.remove

    def refused(_parts):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "marker")

    monkeypatch.setattr(folder.PartsFolder, "remove", refused)
    with one_warning("Permission denied"):
        recorder.close()
    (path.with_suffix(".parts") / "part-00000002.parquet").unlink()
    monkeypatch.setattr(folder.PartsFolder, "remove", remove)
    recorder.close()

    assert np.array_equal(expected((1, 30)), open_trace(path).counts)
    assert [path] == list(tmp_path.iterdir())
