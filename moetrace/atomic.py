"""Files that are there whole or not at all, and folders that are gone when nobody needs them."""

from __future__ import annotations

import os
import shutil
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
    handle, name = tempfile.mkstemp(prefix=_prefix(), suffix=path.suffix, dir=path.parent)
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


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder inside *folder* that is gone, with all in it, when the block ends."""
    inside = Path(tempfile.mkdtemp(prefix=_prefix(), dir=folder))
    _being_written.add(inside)
    try:
        yield inside
    finally:
        _remove(inside)
        _being_written.discard(inside)


def discard() -> None:
    """Remove what this process has half-written; for leaving without unwinding."""
    for partial in _being_written:
        _remove(partial)


def _prefix() -> str:
    """How the names of temporary files begin: by machine and process, so that a sweep knows whose they are."""
    return f"{PREFIX}{os.uname().nodename}-{os.getpid()}-"


def _remove(partial: Path) -> None:
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial, ignore_errors=True)
    else:
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
            _remove(partial)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
