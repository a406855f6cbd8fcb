"""The recorder: counts in, layer by layer and step by step; a canonical trace out.

It sits inside runs that cost more than anything it writes. So a mistake in what it is given is an error where it is
given, at the first call; what happens later, a full disk above all, is a warning, and the run goes on.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import ArrayLike

from moetrace.errors import MoetraceError, SettingError, TraceError
from moetrace.record.arguments import (
    check_total,
    layer_number,
    setting_number,
    short,
    step_number,
    text,
    trace_name,
    trace_path,
    whole_counts,
)
from moetrace.record.backlog import Backlog, Held, spans_text
from moetrace.record.folder import PartsFolder
from moetrace.record.notes import check_size, plain_notes
from moetrace.trace import Counts, LoadTrace, TraceInfo

# At most this many steps are lost when the process is killed. Writing a block takes a few
# milliseconds, so 100 steps make it free even where a step takes a tenth of a second.
BLOCK_STEPS = 100
OnError = Literal["warn", "raise"]


class RecordingWarning(UserWarning):
    """Something could not be written, or is missing from a trace; the run goes on."""


class Recorder:
    """Writes the trace of one run to *path*, from counts that are added layer by layer.

    Every *block* steps are written as one part to ``<path without its suffix>.parts``, a folder that
    can be read as it is; `close` makes one canonical trace of the parts. What a kill takes is at most
    the block that was not yet written. Memory holds one block, and while nothing can be written up to 20.

    *model*, *top_k* and *notes* (a data card, a loss curve) go into the trace's metadata. *resume* goes on
    with what is there, if anything is; *force* replaces it. *on_error* says what becomes of a block or a trace
    that cannot be written: with ``"warn"`` a `RecordingWarning`, and the next block tries again; with
    ``"raise"`` a `WorkspaceError`. Raises `WorkspaceError` when *path* is taken or cannot be written to, and
    `SettingError` for settings that make no sense, either way.

    A child that was forked from the process that opened a recorder writes nothing of it and closes nothing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        model: str | None = None,
        top_k: int | None = None,
        notes: Mapping[str, Any] | None = None,
        block: int = BLOCK_STEPS,
        resume: bool = False,
        force: bool = False,
        on_error: OnError = "warn",
    ) -> None:
        if resume and force:
            raise SettingError("resume goes on with a trace and force replaces it: give one of them")
        if on_error not in get_args(OnError):
            raise SettingError(f"on_error={short(on_error)}: give 'warn' or 'raise'")
        self.path = trace_path(path)
        self._info = TraceInfo(
            name=self.path.stem if name is None else trace_name(name),
            model=None if model is None else text(model, "model"),
            top_k=None if top_k is None else setting_number(top_k, "top_k"),
            format="recorder",
            notes={} if notes is None else plain_notes(notes),
        )
        check_size(self._info.notes, ())
        self._block_steps = setting_number(block, "block")
        self._raises = on_error == "raise"
        self._owner = os.getpid()
        self._adding: dict[int, Counts] = {}
        self._steps: list[int] = []
        self._block: list[Counts] = []
        self._backlog = Backlog()
        self._layers: tuple[int, ...] | None = None
        self._experts: int | None = None
        self._last: int | None = None
        self._again = self._failing = self._torn = self._closed = False
        self._parts = PartsFolder(self.path, resume=resume, force=force)
        try:
            self._go_on(self._parts.latest())
        except BaseException:
            self._parts.release()
            raise

    # --- recording ----------------------------------------------------------------------------

    @property
    def last_step(self) -> int | None:
        """The step recorded last, None before the first."""
        return self._last

    def add(self, layer: int, counts: ArrayLike) -> None:
        """Add the tokens of each expert of *layer*, shape (experts,), to the step that is under way.

        Several adds of one layer within a step are summed: the micro-batches of gradient accumulation.
        Raises `TraceError` for counts that are negative or no whole numbers, for another number of
        experts than before, for more than 2**40 tokens, and after `close`.
        """
        self._check_open()
        number = layer_number(layer, self._place())
        where = f"{self._place()}, layer {number}"
        fresh = whole_counts(counts, where)
        if self._experts not in (None, len(fresh)):
            raise TraceError(
                where,
                f"{len(fresh)} experts where {self._experts} were before",
                "every layer of a trace has the same number: record layers that differ into another path",
            )
        check_total(fresh, where)
        if number in self._adding:
            fresh += self._adding[number]
            check_total(fresh, where)
        self._experts = len(fresh)
        self._adding[number] = fresh

    def step(self, step: int | None = None) -> None:
        """End the step with that number, the one after the last (from 1) unless given.

        Raises `TraceError` when a layer is missing, new, or without tokens, and when *step* is not
        a whole number after the last one.
        """
        self._check_open()
        number = step_number((self._last or 0) + 1 if step is None else step, str(self.path))
        if self._last is not None and number <= self._last:
            raise TraceError(
                str(self.path),
                f"step {number} comes after step {self._last}",
                f"steps must increase; after a restart from a checkpoint call resume_from({number - 1}) first",
            )
        self._check_layers(number)
        layers = sorted(self._adding)
        self._block.append(np.stack([self._adding[layer] for layer in layers]))
        self._steps.append(number)
        self._layers = tuple(layers)
        self._adding = {}
        self._last = number
        if len(self._steps) >= self._block_steps:
            self.flush()

    def resume_from(self, step: int) -> None:
        """Go on after the checkpoint of *step*: what was recorded of later steps will be replaced.

        The trace's findings say which steps were recorded again. Nothing is removed before the
        first new block is written.
        """
        self._check_open()
        number = step_number(step, f"{self.path}, resume_from")
        self._end_block()
        self._adding, self._last, self._again = {}, number, True
        self.flush()

    # --- metadata -----------------------------------------------------------------------------

    def note(self, **notes: Any) -> None:
        """Add *notes* to the trace's metadata; the latest of a name counts.

        Arrays and tensors become lists, paths and dates texts; NaN and infinity, which JSON has not, null.
        Raises `SettingError` for what JSON cannot say, and beyond 16 MiB.
        """
        self._check_open()
        self._tell(self._info.notes | plain_notes(notes), self._info.assumptions)

    def assume(self, assumption: str) -> None:
        """Say in the trace's metadata what is taken for granted about its counts."""
        self._check_open()
        assumed = text(assumption, "assumption")
        self._tell(self._info.notes, tuple(dict.fromkeys((*self._info.assumptions, assumed))))

    def _tell(self, notes: dict[str, Any], assumptions: tuple[str, ...]) -> None:
        check_size(notes, assumptions)
        self._info = replace(self._info, notes=notes, assumptions=assumptions)

    # --- writing ------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write the steps held in memory as a part; call it whenever a checkpoint is saved."""
        if self._is_mine() and not self._closed:
            self._end_block()
            self._try(self._write_blocks)

    def close(self) -> None:
        """Write what is held, make one trace of the parts at `path`, and remove them.

        A step that was begun but not ended is left out. Where it could not be done, it can be called again;
        afterwards it does nothing. Raises `TraceError` when no step was recorded.
        """
        if self._closed or not self._is_mine():
            return
        self._end_block()
        if self._parts.empty and not self._backlog:
            self._closed = True
            self._try(self._parts.remove)
            raise TraceError(str(self.path), "no step was recorded", "call step() at the end of every step")
        self._failing = False  # what is not closed is told in any case
        self._closed = self._try(self._finish)
        if self._closed and self._backlog.lost:
            lost = spans_text(self._backlog.lost)
            self._warn(f"{self.path}: {lost} are missing: they could not be written, and memory holds only so much")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; after an error, which stays what it is, only write what is held: the run can be gone on with."""
        if not self._is_mine():
            return
        try:
            self.close() if error is None else self._leave(error)
        finally:
            self._parts.release()

    def _leave(self, error: BaseException) -> None:
        try:
            self.flush()
            if self._backlog:
                self._warn(
                    f"{self.path}: {spans_text(self._backlog.spans)} could not be written, and end with the process"
                )
        except (MoetraceError, OSError, RecordingWarning) as failure:  # a warning where warnings are errors
            error.add_note(f"moetrace: {failure}")

    def _end_block(self) -> None:
        """Make the steps held so far a block that waits to be written."""
        if self._steps:
            held = Held(np.array(self._steps, np.int64), np.stack(self._block), self._again)
            self._steps, self._block, self._again = [], [], False
            self._backlog.add(held)

    def _write_blocks(self) -> None:
        self._backlog.write(self._write)

    def _write(self, block: Held) -> None:
        trace = LoadTrace.from_counts(block.counts, name=self._info.name, steps=block.steps, layers=self._layers)
        info = replace(self._info, tokens_per_step=trace.info.tokens_per_step)
        if not self._parts.append(replace(trace, info=info)):
            self._torn = True

    def _finish(self) -> None:
        self._write_blocks()
        self._parts.compact(self._info)

    def _try(self, write: Callable[[], None]) -> bool:
        """Whether *write* could write; where it could not, the first time in a row is told, or raised every time."""
        try:
            write()
        except (MoetraceError, OSError) as error:
            if self._raises:
                raise
            if not self._failing:
                self._failing = True
                self._warn(
                    f"{error}; the run goes on; {self._kept()}: call close() to try again, each block does as well"
                )
            return False
        self._failing = False
        if self._torn:
            self._torn = False
            self._warn(f"{self._parts.folder}: parts that were written before are gone; somebody removed them")
        return True

    def _kept(self) -> str:
        """Where what was recorded is, for a message."""
        written = "no step is written yet" if self._parts.empty else f"{self._parts.folder} has what was written"
        return f"{written}, memory has {spans_text(self._backlog.spans)}" if self._backlog else written

    def _warn(self, message: str) -> None:
        warnings.warn(message, RecordingWarning, stacklevel=4)

    # --- checks -------------------------------------------------------------------------------

    def _go_on(self, latest: LoadTrace | None) -> None:
        if latest is None:
            return
        self._layers, self._experts, self._last = latest.layers, latest.experts, int(latest.steps[-1])
        known, given = latest.info, self._info
        self._info = replace(given, model=given.model or known.model, top_k=given.top_k or known.top_k)
        # Earlier versions wrote NaN as such.
        self._tell(plain_notes(known.notes) | given.notes, known.assumptions)

    def _is_mine(self) -> bool:
        """Whether this is the process that opened the recorder, and not one that was forked from it."""
        return os.getpid() == self._owner

    def _check_open(self) -> None:
        if self._closed:
            raise TraceError(str(self.path), "is closed", "go on with it with Recorder(path, resume=True)")
        if not self._is_mine():
            raise TraceError(
                str(self.path),
                f"was opened by process {self._owner}, and this is its child {os.getpid()}",
                "record in the process that opens the recorder",
            )

    def _place(self) -> str:
        return f"{self.path}, " + ("the first step" if self._last is None else f"the step after {self._last}")

    def _check_layers(self, number: int) -> None:
        expected, found = set(self._layers or self._adding), set(self._adding)
        where = f"{self.path}, step {number}"
        if not found:
            raise TraceError(where, "no layer was added", "call add() for every layer before step()")
        if expected - found:
            missing = min(expected - found)
            raise TraceError(where, f"layer {missing} is missing", "add every layer in every step")
        if found - expected:
            raise TraceError(where, f"layer {min(found - expected)} was not there before", "add it from the first step")
        empty = [layer for layer, counts in sorted(self._adding.items()) if not counts.any()]
        if empty:
            raise TraceError(f"{where}, layer {empty[0]}", "no expert has any tokens", "leave such a step out")
