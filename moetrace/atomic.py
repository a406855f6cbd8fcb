"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = ".partial-"
_being_written: set[Path] = set()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside *path* that takes its place when the block ends without an error.

    The file is synced, then moved: a reader sees the old file or the new one, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f"{PREFIX}{os.uname().nodename}-{os.getpid()}-", suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    partial = Path(name)
    _being_written.add(partial)
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # mkstemp makes files that nobody else may read
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
        _being_written.discard(partial)


def discard() -> None:
    """Remove what this process has half-written; for leaving without unwinding."""
    for partial in _being_written:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what processes of this machine that no longer live left half-written in *folder*."""
    mine = f"{PREFIX}{os.uname().nodename}-"
    for partial in folder.glob(f"{mine}*"):
        process = partial.name.removeprefix(mine).partition("-")[0]
        if process.isdigit() and not _lives(int(process)):
            partial.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
