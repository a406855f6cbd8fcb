"""How long a command takes and how much memory it needs, with all the processes that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

# Seconds between two looks at the memory of several processes together.
LOOK = 0.1


@dataclass(frozen=True)
class Run:
    """Seconds, peak memory in bytes and exit code of a command.

    Memory is the largest resident set, as the system reports it; of several processes the largest sum of
    theirs, looked at ten times a second.
    """

    seconds: float
    peak: int
    code: int


def run(command: Sequence[object]) -> Run:
    """Run *command* and wait for its end; what it prints is dropped, what it says on stderr is not."""
    began = time.perf_counter()
    child = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    together, ended = [0], Event()

    def look() -> None:
        while not ended.wait(LOOK):
            together.append(sum(map(resident, family(child.pid))))

    watcher = Thread(target=look)
    watcher.start()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    alone = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(seconds, max(alone, *together), child.returncode)


def family(pid: int) -> list[int]:
    """A process and those that it started, as Linux tells; elsewhere the process alone."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:  # it has just ended
        return [pid]
    return [pid, *(member for child in children for member in family(child))]


def resident(pid: int) -> int:
    """The resident set of a process in bytes, 0 of one that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0
