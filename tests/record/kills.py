"""Kills a recorder at random moments, or at every change it makes to the disk, goes on, and compares the trace.

python tests/record/kills.py --kills 50
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet  # noqa: F401 - so that the first block of a child is not late

from moetrace import open_trace
from moetrace.record import Recorder

BLOCK, SAVED = 5, 12
CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.chmod", "shutil.rmtree", "tempfile.mkstemp"}


def counts_of(step: int, layer: int) -> list[int]:
    """Counts that tell every step and layer apart."""
    return [step, layer, 1, 2]


class Training(NamedTuple):
    """A training of *steps* steps, recorded to *path*.

    It has a checkpoint of every step, and goes on where it was, or one of every twelfth, and *goes_back* to that.
    """

    path: Path
    steps: int
    goes_back: bool


def train(training: Training) -> float:
    """Train after what the training's own checkpoint says; returns when the trace began to be closed."""
    path, steps, goes_back = training
    checkpoint = path.with_suffix(".checkpoint")
    done = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with Recorder(path, block=BLOCK, resume=True) as recorder:
        if done or recorder.last_step is not None:  # killed before its first checkpoint, it begins anew
            recorder.resume_from(done)
        for step in range(done + 1, steps + 1):
            for layer in range(3):
                recorder.add(layer, counts_of(step, layer))
            recorder.step(step)
            if not goes_back or step % SAVED == 0:
                if goes_back:
                    recorder.flush()
                saved = checkpoint.with_suffix(".new")
                saved.write_text(str(step))
                saved.replace(checkpoint)
        return time.perf_counter()


def forked(work: Callable[[], object]) -> int:
    """The process that does *work* and ends."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """The exit code of a forked process, once it has ended; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(training: Training, seconds: float) -> bool:
    """Whether a training was killed *seconds* after its beginning, before it ended."""
    child = forked(lambda: train(training))
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return ended(child) != 0


def killed_at(training: Training, change: int) -> bool:
    """Whether a training was killed before the change to the disk of that number, and there was one."""

    def work() -> None:
        left = change

        def count(event: str, args: tuple[object, ...]) -> None:
            nonlocal left
            if event in CHANGES and str(training.path.parent) in str(args[0]):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        train(training)

    return ended(forked(work)) == -signal.SIGKILL


def outcome(training: Training) -> dict[str, object]:
    """What a training that goes on makes of what a killed one has left."""
    path, steps, goes_back = training
    if ended(forked(lambda: train(training))):
        return {"sound": False, "missing": None}
    trace = open_trace(path)
    missing = sorted(set(range(1, steps + 1)) - set(trace.steps.tolist()))
    expected = [[counts_of(step, layer) for layer in range(3)] for step in trace.steps.tolist()]
    one_block = not missing or missing[-1] - missing[0] < BLOCK
    there = {file.suffix for file in path.parent.iterdir()}
    sound = np.array_equal(expected, trace.counts) and one_block and not (goes_back and missing)
    return {"sound": sound and there == {".parquet", ".checkpoint"}, "missing": missing}


def seconds_taken(training: Training) -> tuple[float, float]:
    """How long a training takes until it closes, and until it ends."""
    began = time.perf_counter()
    closing = train(training)
    return closing - began, time.perf_counter() - began


def random_kills(kills: int, seed: int) -> Iterator[dict[str, object]]:
    """Kills at random moments, every other one while the trace is closed, each in a folder of its own."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        closing, end = min(seconds_taken(Training(Path(folder) / f"{i}.parquet", 60, False)) for i in range(5))
    for number in range(kills):
        with tempfile.TemporaryDirectory() as folder:
            training = Training(Path(folder) / "run.parquet", 60, goes_back=number % 4 >= 2)
            moment = rng.uniform(*((closing, end) if number % 2 else (0, end)))
            killed = killed_after(training, moment)
            closes = number % 2 == 1
            yield {"killed": killed, "closing": closes, "goes_back": training.goes_back, **outcome(training)}


def kills_at_changes() -> Iterator[dict[str, object]]:
    """A kill before each change to the disk that a training makes."""
    change, killed = 0, True
    while killed:
        with tempfile.TemporaryDirectory() as folder:
            training = Training(Path(folder) / "run.parquet", 7, goes_back=False)
            killed = killed_at(training, change)
            yield {"killed": killed, "change": change, **outcome(training)}
        change += 1


def main() -> None:
    """One line of JSON for each kill; the exit code is 1 when a trace was not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="0: one at each change to the disk")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sound = True
    for kill in random_kills(given.kills, given.seed) if given.kills else kills_at_changes():
        sys.stdout.write(json.dumps(kill) + "\n")
        sound = sound and bool(kill["sound"])
    sys.exit(not sound)


if __name__ == "__main__":
    main()
