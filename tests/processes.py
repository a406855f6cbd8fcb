"""Commands in processes of their own that need not load everything anew."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from moetrace.cli import main

FORKED = multiprocessing.get_context("forkserver")
# What every command loads: forked processes have it from the start.
FORKED.set_forkserver_preload(["pytest", "moetrace.cli", "pandas", "pyarrow.parquet", "scipy.optimize"])
END = "--then"
IN_TURN = f"""
import sys
from itertools import groupby
from moetrace.cli import main
for end, words in groupby(sys.argv[1:], lambda word: word == {END!r}):
    if not end:
        print(main(list(words)), {END!r}, file=sys.stderr)
"""


def forked(argv: Sequence[str], cwd: Path, out: Path, err: Path) -> BaseProcess:
    """A command that has begun in a process of its own, its streams into files."""
    process = FORKED.Process(target=_command, args=(argv, cwd, out, err))
    process.start()
    return process


def _command(argv: Sequence[str], cwd: Path, out: Path, err: Path) -> None:
    os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.exit(main(argv))


def exit_code(process: BaseProcess) -> int | None:
    """That of a command that has ended."""
    process.join()
    return process.exitcode


def in_turn(
    commands: Sequence[Sequence[str | bytes]], cwd: Path, env: Mapping[str, str] | None = None
) -> list[tuple[int, str]]:
    """The exit codes of *commands*, one after the other in one new process, and what each said on stderr."""
    argv = [sys.executable, "-c", IN_TURN, *(word for command in commands for word in (*command, END))]
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True)
    assert 0 == done.returncode, done.stderr
    said = done.stderr.decode(errors="replace").split(f" {END}\n")[:-1]
    assert len(commands) == len(said)
    return [(int(code), err) for err, _, code in (one.rpartition("\n") for one in (f"\n{text}" for text in said))]
