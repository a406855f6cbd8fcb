"""The folder of parts as its writer sees it: begun, locked, filled, and gone once the trace is in place.

All that a recorder half-writes lies in this folder, also the trace that comes of the parts: what a kill leaves is
removed by the next recorder that holds the lock, whichever machine it runs on.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from moetrace.doctor.catalogue import KINDS
from moetrace.errors import WorkspaceError
from moetrace.files import move, sweep, writing
from moetrace.formats import ReadOptions, convert, open_trace, save_trace
from moetrace.formats.readers.parts import MARKER, MARKER_TEXT, is_parts, part_number, part_path, part_paths
from moetrace.record.lock import Lock, Taken
from moetrace.trace import LoadTrace, TraceInfo

# The trace of all parts, for the moment between being written and being moved to its place.
WHOLE = "whole.parquet"
# Says that what lies in that place is to be replaced, also after a kill that came before the first block.
REPLACES = "moetrace-replaces.txt"


class PartsFolder:
    """The parts of the trace that will lie at *path*, in ``<path without its suffix>.parts``.

    With *resume*, a closed trace at *path* becomes the first part. Raises `WorkspaceError` when there
    is something already and neither *resume* nor *force* says what to do with it, when another
    recorder writes it, and when the folder cannot be written to.
    """

    def __init__(self, path: Path, *, resume: bool, force: bool) -> None:
        self.path = path.absolute()  # a training may change its folder
        self.folder = self.path.with_suffix(".parts")
        self._lock = Lock(self.folder / MARKER)
        self._first = 1
        self._known: list[Path] = []
        self._placed = False
        with writing(self.folder):
            self._check(resume or force)
            self._begin()
            try:
                self._tidy()
                self._start_over() if force else self._take_closed()
            except BaseException:
                self.release()
                raise
        self._known = part_paths(self.folder)

    @property
    def empty(self) -> bool:
        """Whether no part was ever written."""
        return not self._known

    def latest(self) -> LoadTrace | None:
        """The part written last, if there is one."""
        written = part_paths(self.folder)
        return open_trace(written[-1]) if written else None

    def append(self, trace: LoadTrace) -> bool:
        """Write *trace* as the next part; it is there whole or not at all.

        False when parts written before are gone. Raises `WorkspaceError` when it cannot be written.
        """
        with writing(self.folder):
            self._hold()
            self._placed = False
            written = part_paths(self.folder)
            part = part_path(self.folder, part_number(written[-1]) + 1 if written else self._first)
            save_trace(trace, part)
        whole = set(self._known) <= set(written)
        self._known = [*written, part]
        return whole

    def describe(self, info: TraceInfo) -> None:
        """Give the last part *info* as its metadata: what is known at the end is what is known of the trace."""
        part = part_paths(self.folder)[-1]
        trace = open_trace(part)
        own = replace(info, tokens_per_step=trace.info.tokens_per_step, findings=trace.info.findings)
        if own != trace.info:
            save_trace(replace(trace, info=own), part)

    def compact(self, info: TraceInfo) -> None:
        """Make one trace of the parts, described by *info*, and remove them once it is in place.

        After an error it can be called again. Raises `WorkspaceError` when the trace cannot be written.
        """
        if not self._placed:
            with writing(self.folder):
                self._hold()
            if not part_paths(self.folder):
                raise WorkspaceError(f"{self.folder} was emptied while it was written: nothing is left of the trace")
            self.describe(info)
            whole = self.folder / WHOLE
            # What a run recorded is kept whatever the doctor says of it; the findings are in the trace.
            convert(self.folder, whole, name=info.name, options=ReadOptions(accept=tuple(KINDS)))
            move(whole, self.path)
            self._placed = True
        self.remove()

    def remove(self) -> None:
        """Remove the folder and the parts in it."""
        self._tidy()
        with writing(self.folder):
            (self.folder / REPLACES).unlink(missing_ok=True)
            # The marker goes first: without it the rest is no source any more, only something to sweep.
            (self.folder / MARKER).unlink(missing_ok=True)
        with suppress(OSError):  # somebody put a file of their own there
            self._remove_parts()
            self.folder.rmdir()
        self.release()

    def release(self) -> None:
        """Let other recorders go on with the parts."""
        self._known = part_paths(self.folder)
        self._lock.release()

    # --- beginning ----------------------------------------------------------------------------

    def _check(self, told: bool) -> None:
        """Raise `WorkspaceError` for a folder, and where something is there and nobody *told* what to do with it."""
        if self.path.is_dir():
            raise WorkspaceError(f"{self.path} is a folder: give the path of a file")
        taken = self.folder if self._unfinished() else self.path
        if taken.exists() and not told:
            raise WorkspaceError(
                f"{taken} exists: go on with it with resume=True, replace it with force=True, or record into a new path"
            )

    def _unfinished(self) -> bool:
        """Whether there are parts that did not become a trace yet; where the marker is gone the trace tells."""
        return is_parts(self.folder) or (bool(part_paths(self.folder)) and not self.path.exists())

    def _begin(self) -> None:
        if not self._unfinished():
            # Left over from a recorder that was stopped while it cleaned up, or is cleaning up at this moment:
            # then it may still remove parts of these numbers, so new ones get others.
            left = part_paths(self.folder)
            self._first = part_number(left[-1]) + 1 if left else 1
            self._remove_parts()
        self._mark()
        while not self._take():
            self._mark()

    def _mark(self) -> None:
        """Put the marker into the folder, unless it is there: replacing it would part it from its lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = self.folder / MARKER
        with suppress(FileExistsError, FileNotFoundError), marker.open("x", encoding="utf-8") as file:
            file.write(MARKER_TEXT)

    def _start_over(self) -> None:
        self._remove_parts()
        if self.path.exists():
            (self.folder / REPLACES).touch()

    def _take_closed(self) -> None:
        """Make the closed trace, if there is one, the first part."""
        if self.path.exists() and not part_paths(self.folder) and not (self.folder / REPLACES).exists():
            open_trace(self.path)  # raises for what is no trace, before it is moved
            move(self.path.resolve(), part_path(self.folder, self._first))

    # --- going on -----------------------------------------------------------------------------

    def _hold(self) -> None:
        """Make sure that the parts are this recorder's to write; its marker is put back where somebody removed it."""
        if not self._lock.held:
            self._hold_again()
        elif not is_parts(self.folder):
            self._lock.release()
            self._mark()
            self._take()

    def _hold_again(self) -> None:
        if not self._take() or part_paths(self.folder) != self._known:
            self._lock.release()
            raise WorkspaceError(f"{self.folder} was gone on with, or removed, since this recorder let go of it")

    def _take(self) -> bool:
        """Whether the marker is there and its lock is taken; raises `WorkspaceError` when another recorder has it."""
        try:
            return self._lock.take()
        except Taken:
            raise WorkspaceError(
                f"{self.folder} is being written by another recorder: give each process a path of its own "
                "(moetrace.record.distributed.rank_path), or let one record the sum of all"
            ) from None

    # --- removing -----------------------------------------------------------------------------

    def _tidy(self) -> None:
        """Remove what was left half-written, here, and beside the trace by earlier versions."""
        sweep(self.folder, everyone=self._lock.sure)
        sweep(self.path.parent)
        with suppress(OSError):
            (self.folder / WHOLE).unlink(missing_ok=True)

    def _remove_parts(self) -> None:
        for part in part_paths(self.folder):
            part.unlink(missing_ok=True)
