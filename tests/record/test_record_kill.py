"""A recorder that is killed: at most one block is missing, and no file is damaged."""

import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from moetrace import open_trace
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


@pytest.mark.slow
def test_a_kill_loses_at_most_one_block(tmp_path):
    """`kill -9` at 20 random moments: every time a readable trace, at most five steps short, and right."""
    rng = np.random.default_rng(0)
    path = tmp_path / "run.parquet"
    for seconds in rng.uniform(0, 0.5, 20):
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
