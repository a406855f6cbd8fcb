"""A lock of one process on a file, which its forked children do not share.

`flock` belongs to an open file, and a child is born with the files of its parent open: a data-loader worker would
keep the lock of a training that was killed. So a child closes its copy as soon as it is there. POSIX record locks,
which children do not get, would not keep two recorders of one process apart, and the first to close would give up
the lock of both.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows: there nothing keeps two recorders from writing the same parts
    fcntl = None  # type: ignore[assignment]


class Taken(Exception):
    """Another recorder, of this process or another, has the lock."""


class Lock:
    """A lock on the file *path*, held from `take` to `release`, or until the process ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._close: weakref.finalize[[int], Lock] | None = None
        self.sure = False
        """Whether the system keeps others out while it is held; not every file system has locks."""

    @property
    def held(self) -> bool:
        """Whether it was taken, and not released since."""
        return self._descriptor is not None

    def take(self) -> bool:
        """Take the lock; False when the file is gone, or another by now. Raises `Taken`, and `OSError`."""
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        self._close = weakref.finalize(self, os.close, self._descriptor)
        _all.add(self)
        self.sure = self._exclude(self._descriptor)
        if self._is_there(self._descriptor):
            return True
        self.release()
        return False

    def release(self) -> None:
        """Let others take it, also where a child that was not told to still has the file open."""
        if self._descriptor is not None and self.sure:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self.forget()

    def forget(self) -> None:
        """Close this process's copy of the file: in a child the lock stays its parent's."""
        if self._close is not None:
            self._close()  # at most once
        self._descriptor = self._close = None
        self.sure = False

    def _exclude(self, descriptor: int) -> bool:
        """Whether the lock is held now; not where there are no locks, on some file systems of clusters."""
        if fcntl is None:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.forget()
            raise Taken from None
        except OSError:
            return False
        return True

    def _is_there(self, descriptor: int) -> bool:
        """Whether the path still names the file: another recorder may have removed it before the lock was there."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))  # noqa: PTH116 - beside fstat
        except FileNotFoundError:
            return False


_all: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_all() -> None:
    for lock in tuple(_all):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
