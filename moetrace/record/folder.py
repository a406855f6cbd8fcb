"""The folder of parts as its writer sees it: created, locked, filled, and removed once the trace is in place.

All that a recorder half-writes lies in this folder, including the trace that is made of the parts: what a kill
leaves is removed by the next recorder that holds the lock, whichever machine it runs on.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from moetrace.doctor import KINDS
from moetrace.errors import WorkspaceError
from moetrace.files import move, sweep, writing
from moetrace.formats import ReadOptions, convert, open_trace, save_trace
from moetrace.formats.readers.parts import MARKER, MARKER_TEXT, is_parts, part_after, part_paths
from moetrace.trace import LoadTrace, TraceInfo

try:
    import fcntl
except ImportError:  # not on Windows: there nothing keeps two recorders from writing the same parts
    fcntl = None  # type: ignore[assignment]

# The trace of all parts, for the moment between being written and being moved to its place.
WHOLE = "whole.parquet"
# Marks that what lies in that place is to be replaced, also after a kill that came before the first block.
REPLACES = "moetrace-replaces.txt"


class PartsFolder:
    """The parts of the trace that will lie at *path*, in ``<path without its suffix>.parts``.

    A symbolic link at *path* stays: the trace is moved to where it points. With *resume*, a closed trace at *path*
    becomes the first part. Raises `WorkspaceError` when there is something already and neither *resume* nor *force*
    is given, when another recorder writes it, and when the folder cannot be written to.
    """

    def __init__(self, path: Path, *, resume: bool, force: bool) -> None:
        self.path = path.absolute()  # a training may change its folder
        self._target = Path(os.path.realpath(self.path))
        self.folder = self.path.with_suffix(".parts")
        self.latest: LoadTrace | None = None
        """The part that was written last when the recorder began."""
        self._lock = Lock(self.folder / MARKER)
        self._before: Path | None = None
        self._known: list[Path] = []
        self._placed = False
        with writing(self.folder):
            if self.path.is_dir():
                raise WorkspaceError(f"{self.path} is a folder: give the path of a file")
            # Parts that did not become a trace yet: they have their marker, or it was removed and there is no trace.
            left = part_paths(self.folder)
            unfinished = is_parts(self.folder) or (bool(left) and not self.path.exists())
            taken = self.folder if unfinished else self.path
            if taken.exists() and not (resume or force):
                raise WorkspaceError(
                    f"{taken} exists: continue it with resume=True, replace it with force=True, or choose a new path"
                )
            if left and not unfinished:
                # Left over from a recorder that was stopped while it cleaned up, or is cleaning up at this moment:
                # then it may still remove parts of these numbers, so new ones get others.
                self._before = left[-1]
                self._remove_parts()
            self._take()
            try:
                self._begin(force)
            except BaseException:
                self.release()
                raise

    def _begin(self, force: bool) -> None:
        """Make the folder ready for the next part: empty, or with all that was recorded before."""
        self._tidy()
        if force:
            self._remove_parts()
            if self.path.exists():
                (self.folder / REPLACES).touch()
        elif self.path.exists() and not part_paths(self.folder) and not (self.folder / REPLACES).exists():
            open_trace(self.path)  # raises for anything but a trace, before it is moved
            move(self._target, part_after(self.folder, self._before))
        self._known = part_paths(self.folder)
        self.latest = open_trace(self._known[-1]) if self._known else None

    @property
    def empty(self) -> bool:
        """Whether no part was ever written."""
        return not self._known

    def append(self, trace: LoadTrace) -> bool:
        """Write *trace* as the next part; it is there whole or not at all.

        False when parts written before are gone. Raises `WorkspaceError` when it cannot be written.
        """
        with writing(self.folder):
            self._hold()
            self._placed = False
            written = part_paths(self.folder)
            part = part_after(self.folder, written[-1] if written else self._before)
            save_trace(trace, part)
        whole = set(self._known) <= set(written)
        self._known = [*written, part]
        return whole

    def compact(self, info: TraceInfo) -> None:
        """Make one trace of the parts, described by *info*, and remove them once it is in place.

        After an error it can be called again. Raises `WorkspaceError` when the trace cannot be written.
        """
        if not self._placed:
            with writing(self.folder):
                self._hold()
            parts = part_paths(self.folder)
            if not parts:
                raise WorkspaceError(f"{self.folder} was emptied while it was written: nothing is left of the trace")
            # What is known at the end describes the trace; a trace takes its description from the last part.
            last = open_trace(parts[-1])
            own = replace(info, tokens_per_step=last.info.tokens_per_step, findings=last.info.findings)
            if own != last.info:
                save_trace(replace(last, info=own), parts[-1])
            whole = self.folder / WHOLE
            # What a run recorded is kept whatever the doctor finds; the findings are in the trace.
            convert(self.folder, whole, name=info.name, options=ReadOptions(accept=tuple(KINDS)))
            move(whole, self._target)
            self._placed = True
        self.remove()

    def remove(self) -> None:
        """Remove the folder and the parts in it."""
        self._tidy()
        with writing(self.folder):
            (self.folder / REPLACES).unlink(missing_ok=True)
            # The marker goes first: without it the rest is not a source any more, only something to sweep.
            (self.folder / MARKER).unlink(missing_ok=True)
        with suppress(OSError):  # somebody put a file of their own there
            self._remove_parts()
            self.folder.rmdir()
        self.release()

    def release(self) -> None:
        """Let other recorders continue the parts."""
        self._known = part_paths(self.folder)
        self._lock.release()

    def _hold(self) -> None:
        """Make sure that the parts are this recorder's to write; its marker is put back if somebody removed it."""
        if self._lock.held and not is_parts(self.folder):
            self._lock.release()
            self._take()
        elif not self._lock.held:
            if is_parts(self.folder):
                self._take()
            if not self._lock.held or part_paths(self.folder) != self._known:
                self._lock.release()
                raise WorkspaceError(f"{self.folder} was continued by another recorder, or removed")

    def _take(self) -> None:
        """Put the marker into the folder and lock it; raises `WorkspaceError` when another recorder has it.

        A marker that is there already is not replaced: that would part it from its lock.
        """
        marker = self.folder / MARKER
        while not self._lock.held:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError, FileNotFoundError), marker.open("x", encoding="utf-8") as file:
                file.write(MARKER_TEXT)
            try:
                self._lock.take()
            except Taken:
                raise WorkspaceError(
                    f"{self.folder} is being written by another recorder: give each process a path of its own "
                    "(moetrace.record.distributed.rank_path), or let one record the sum of all"
                ) from None

    def _tidy(self) -> None:
        """Remove what was left half-written, here, and beside the trace by earlier versions."""
        sweep(self.folder, everyone=self._lock.exclusive)
        sweep(self.path.parent)
        with suppress(OSError):
            (self.folder / WHOLE).unlink(missing_ok=True)

    def _remove_parts(self) -> None:
        for part in part_paths(self.folder):
            part.unlink(missing_ok=True)


# --- the lock ---------------------------------------------------------------------------------


class Taken(Exception):
    """Another recorder, of this process or another, has the lock."""


class Lock:
    """A lock on the file *path* that forked children do not share, held from `take` to `release`, or to the end.

    `flock` belongs to an open file, and a child is born with the files of its parent open: a data-loader worker would
    keep the lock of a training that was killed, so a child closes its copy at once. POSIX record locks, which children
    do not get, would not keep two recorders of one process apart.
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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [*map(Lock.forget, tuple(_all))])
