"""A recorder belongs to the process that opened it: what is forked from it writes nothing and locks nothing."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from moetrace import TraceError, WorkspaceError, open_trace
from moetrace.record import Recorder

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system"),
    # The parents here have threads only where other tests have left some.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore:.*fork.*:RuntimeWarning"),
]


@pytest.fixture
def path(tmp_path):
    """Where the trace will lie."""
    return tmp_path / "run.parquet"


def record(recorder, first, last):
    """Record the steps from *first* to *last*."""
    for step in range(first, last + 1):
        recorder.add(0, [step, 1])
        recorder.step(step)


def in_a_child(work):
    """The exit code of a forked child that does *work*."""
    child = os.fork()
    if not child:
        code = 99
        try:
            work()
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def parts_of(path):
    """The names of what has been recorded so far."""
    return sorted(file.name for file in path.with_suffix(".parts").glob("part-*"))


def test_a_child_that_leaves_with_writes_nothing(path):
    """`sys.exit` in a forked child inside `with`: the steps that its parent holds are the parent's."""
    with Recorder(path, block=10) as recorder:
        record(recorder, 1, 15)

        def leave():
            with recorder:
                sys.exit(7)

        assert 7 == in_a_child(leave)
        assert 1 == len(parts_of(path))
        record(recorder, 16, 25)

    assert list(range(1, 26)) == open_trace(path).steps.tolist()


@pytest.mark.parametrize("method", ["flush", "close"])
def test_a_child_neither_writes_nor_closes(path, method):
    """Nothing happens, and nothing is said."""
    recorder = Recorder(path, block=10)
    record(recorder, 1, 5)

    assert 0 == in_a_child(getattr(recorder, method))
    assert [] == parts_of(path)
    recorder.close()
    assert list(range(1, 6)) == open_trace(path).steps.tolist()


@pytest.mark.parametrize(
    "call",
    [
        lambda recorder: recorder.add(0, [1, 1]),
        lambda recorder: recorder.step(),
        lambda recorder: recorder.resume_from(3),
        lambda recorder: recorder.note(a=1),
        lambda recorder: recorder.assume("a"),
    ],
    ids=["add", "step", "resume_from", "note", "assume"],
)
def test_a_child_that_records_is_told(path, call):
    """What it says would be lost: the error names both processes and the way out."""
    recorder = Recorder(path, block=10)

    def refused():
        with pytest.raises(TraceError, match=rf"opened by process {os.getppid()}.*record in the process that opens"):
            call(recorder)

    assert 0 == in_a_child(refused)


def wait_for(event):
    """What a data-loader worker does all day."""
    event.wait(30)


def test_workers_do_not_lock(path):
    """While a forked worker of `multiprocessing` lives, the lock is the parent's, and free once the parent lets go."""
    context = multiprocessing.get_context("fork")
    recorder = Recorder(path, block=10)
    record(recorder, 1, 10)
    done = context.Event()
    worker = context.Process(target=wait_for, args=(done,))
    worker.start()
    with pytest.raises(WorkspaceError, match="another recorder"):
        Recorder(path, resume=True)
    recorder._parts.release()
    last = Recorder(path, resume=True).last_step
    done.set()
    worker.join()

    assert (10, 0) == (last, worker.exitcode)


KILLED = """
import os, sys, time
from moetrace.record import Recorder

recorder = Recorder(sys.argv[1], block=1)
recorder.add(0, [1, 2])
recorder.step()
if not os.fork():
    print(os.getpid(), flush=True)  # by the worker, which has let go of the lock by then
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_worker_that_outlives_a_killed_run_does_not_keep_its_lock(path):
    """`resume=True` goes on while it still lives."""
    run = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    run.kill()
    run.wait()
    run.stdout.close()
    try:
        os.kill(worker, 0)
        assert 1 == Recorder(path, resume=True).last_step
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_child_may_record_to_a_path_of_its_own(path):
    """A recorder that the child opens is the child's."""
    recorder = Recorder(path, block=10)
    record(recorder, 1, 5)
    other = path.with_name("other.parquet")

    def own():
        with Recorder(other) as mine:
            record(mine, 1, 3)

    assert 0 == in_a_child(own)
    assert 3 == len(open_trace(other).steps)
    recorder.close()


@pytest.mark.slow
def test_of_many_that_begin_at_once_one_records(path):
    """Ranks that were given the same path: one has it, the others are told."""
    gate = time.time() + 0.3

    def begin():
        time.sleep(max(0, gate - time.time()))
        try:
            recorder = Recorder(path)
        except WorkspaceError:
            sys.exit(3)
        time.sleep(0.3)
        record(recorder, 1, 2)
        recorder.close()

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=begin) for _ in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join()

    assert [0, 3, 3, 3, 3, 3] == sorted(child.exitcode for child in children)
    assert [1, 2] == open_trace(path).steps.tolist()
