"""A lock of one process on a file, which its forked children do not share.

`flock` belongs to an open file, and a child is born with the files of its parent open: a data-loader worker would
keep the lock of a training that was killed. So a child closes its copy as soon as it is there. POSIX record locks,
which children do not get, would not keep two recorders of one process apart, and the first to close would give up
the lock of both.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there nothing keeps two recorders from writing the same parts
    fcntl = None  # type: ignore[assignment]


class Taken(Exception):
    """Another recorder, of this process or another, has the lock."""


class Lock:
    """A lock on the file *path*, held from `take` to `release`, or until the process ends.

    *held* is True between the two, *exclusive* where the file system keeps others out meanwhile: not all have locks.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._close: weakref.finalize[[int], Lock] | None = None
        self.held = self.exclusive = False

    def take(self) -> bool:
        """Take the lock; False when the file is gone, or another by now. Raises `Taken`, and `OSError`."""
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self.held = True
        _all.add(self)
        if fcntl is not None:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.exclusive = True
            except BlockingIOError:
                self.forget()
                raise Taken from None
            except OSError:  # no locks, as on some file systems of clusters
                pass
        with suppress(FileNotFoundError):  # another recorder may have removed the file before the lock was there
            if os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):  # noqa: PTH116 - beside fstat
                return True
        self.release()
        return False

    def release(self) -> None:
        """Let others take it, even if a child that did not run `forget` still has the file open."""
        if self.exclusive:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self.forget()

    def forget(self) -> None:
        """Close this process's copy of the file: in a child the lock stays its parent's."""
        if self._close is not None:
            self._close()  # at most once
        self._close = None
        self.held = self.exclusive = False


_all: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in tuple(_all):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
