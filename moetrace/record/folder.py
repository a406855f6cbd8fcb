"""The folder of parts as its writer sees it: begun, locked, filled, and gone once the trace is in place."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from moetrace.doctor.catalogue import KINDS
from moetrace.errors import WorkspaceError
from moetrace.files import replacing, sweep
from moetrace.formats import ReadOptions, convert, open_trace, save_trace
from moetrace.formats.readers.parts import MARKER, MARKER_TEXT, is_parts, part_path, part_paths
from moetrace.trace import LoadTrace, TraceInfo

try:
    import fcntl
except ImportError:  # not on Windows: there nothing keeps two recorders from writing the same parts
    fcntl = None  # type: ignore[assignment]


class PartsFolder:
    """The parts of the trace that will lie at *path*, in ``<path without its suffix>.parts``.

    With *resume*, a closed trace at *path* becomes the first part. Raises `WorkspaceError` when there
    is something already and neither *resume* nor *force* says what to do with it, and when another
    process writes it.
    """

    def __init__(self, path: Path, *, resume: bool, force: bool) -> None:
        self.path = path
        self.folder = path.with_suffix(".parts")
        taken = self.folder if is_parts(self.folder) else path
        if taken.exists() and not (resume or force):
            raise WorkspaceError(
                f"{taken} exists: go on with it with resume=True, replace it with force=True, or record into a new path"
            )
        self._begin()
        self._lock()
        sweep(self.folder)
        if force:
            self._remove_parts()
        elif path.exists() and not part_paths(self.folder):
            open_trace(path)  # raises for what is no trace, before it is moved
            path.replace(part_path(self.folder, 1))

    def latest(self) -> LoadTrace | None:
        """The part written last, if there is one."""
        written = part_paths(self.folder)
        return open_trace(written[-1]) if written else None

    def append(self, trace: LoadTrace) -> None:
        """Write *trace* as the next part; it is there whole or not at all."""
        written = part_paths(self.folder)
        number = int(written[-1].stem.removeprefix("part-")) + 1 if written else 1
        save_trace(trace, part_path(self.folder, number))

    def describe(self, info: TraceInfo) -> None:
        """Give the last part *info* as its metadata: what is known at the end is what is known of the trace."""
        part = part_paths(self.folder)[-1]
        trace = open_trace(part)
        own = replace(info, tokens_per_step=trace.info.tokens_per_step, findings=trace.info.findings)
        if own != trace.info:
            save_trace(replace(trace, info=own), part)

    def compact(self, name: str) -> None:
        """Make one trace of the parts, and remove them once it is in place."""
        # What a run recorded is kept whatever the doctor says of it; the findings are in the trace.
        convert(self.folder, self.path, name=name, options=ReadOptions(accept=tuple(KINDS)))
        self.remove()

    def remove(self) -> None:
        """Remove the folder and the parts in it."""
        # The marker goes first: without it the rest is no source any more, only something to sweep.
        (self.folder / MARKER).unlink()
        self._remove_parts()
        self.release()
        with suppress(OSError):  # somebody put a file of their own there
            self.folder.rmdir()

    def release(self) -> None:
        """Let other processes write the parts."""
        self._unlock()

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not is_parts(self.folder):
            self._remove_parts()  # left over from a recorder that was stopped while it cleaned up
            with replacing(self.folder / MARKER) as partial:
                partial.write_text(MARKER_TEXT)

    def _lock(self) -> None:
        """Two writers would overwrite each other's parts; the lock ends with the process. No `fcntl`, no lock."""
        descriptor = os.open(self.folder / MARKER, os.O_RDONLY)
        self._unlock = weakref.finalize(self, os.close, descriptor)
        if fcntl is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise WorkspaceError(
                f"{self.folder} is being written by another recorder: give each process a path of its own "
                "(moetrace.record.distributed.rank_path), or let one record the sum of all"
            ) from None

    def _remove_parts(self) -> None:
        for part in part_paths(self.folder):
            part.unlink()
