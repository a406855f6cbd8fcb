"""The recorder: counts in, layer by layer and step by step; a canonical trace out.

It sits inside runs that cost more than anything it writes. So a mistake in what it is given is an error where it is
given, at the first call; what happens later, a full disk above all, is a warning, and the run continues.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetrace.errors import MoetraceError, SettingError, TraceError
from moetrace.record import arguments
from moetrace.record.folder import PartsFolder
from moetrace.trace import Counts, LoadTrace, Steps, TraceInfo

# At most this many steps are lost when the process is killed. Writing a block takes a few
# milliseconds, so 100 steps make it free even where a step takes a tenth of a second.
BLOCK_STEPS = 100
# What a recorder may hold while nothing can be written: far less than a training has, and 2,000 steps of a
# small model.
MOST_BLOCKS = 20
MOST_WAITING = 64 << 20
OnError = Literal["warn", "raise"]


class Block(NamedTuple):
    """Consecutive steps: *steps* (steps,), *counts* (steps, layers, experts).

    *after_restart* marks the first block after the run went back: steps recorded earlier, from its first one on,
    no longer count.
    """

    steps: Steps
    counts: Counts
    after_restart: bool


def steps_text(blocks: Iterable[Block]) -> str:
    """The steps of *blocks* for a message: ``steps 101 to 200, 301 to 400``; neighbours are one."""
    spans: list[tuple[int, int]] = []
    for block in blocks:
        first, last = int(block.steps[0]), int(block.steps[-1])
        if spans and spans[-1][1] == first - 1:
            first = spans.pop()[0]
        spans.append((first, last))
    texts = [f"{first} to {last}" for first, last in spans[:5]]
    return "steps " + ", ".join(texts) + (f", ... ({len(spans)} spans)" if len(spans) > 5 else "")


class RecordingWarning(UserWarning):
    """Something could not be written, or is missing from a trace; the run goes on."""


class Recorder:
    """Writes the trace of one run to *path*, from counts that are added layer by layer.

    Every *block* steps are written as one part to ``<path without its suffix>.parts``, a folder that
    can be read as it is; `close` makes one canonical trace of the parts. What a kill takes is at most
    the block that was not yet written. Memory holds one block, and while nothing can be written up to 20.

    *model*, *top_k* and *notes* (a data card, a loss curve) go into the trace's metadata. *resume* continues
    what is there, if anything is; *force* replaces it. *on_error* decides what happens when a block or a trace
    cannot be written: with ``"warn"`` a `RecordingWarning`, and the next block tries again; with
    ``"raise"`` a `WorkspaceError`. Raises `WorkspaceError` when *path* is taken or cannot be written to, and
    `SettingError` for invalid settings, either way.

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
            raise SettingError("resume continues a trace and force replaces it: give one of them")
        if on_error not in get_args(OnError):
            raise SettingError(f"on_error={arguments.shortened(on_error)}: must be 'warn' or 'raise'")
        self.path = arguments.trace_path(path)
        self._info = TraceInfo(
            name=self.path.stem if name is None else arguments.trace_name(name),
            model=None if model is None else arguments.text(model, "model"),
            top_k=None if top_k is None else arguments.integer(top_k, "top_k", *arguments.SIZES),
            format="recorder",
        )
        self._describe({} if notes is None else arguments.plain_notes(notes), ())
        self._block_steps = arguments.integer(block, "block", *arguments.SIZES)
        self._raises = on_error == "raise"
        self._owner = os.getpid()
        self._adding: dict[int, Counts] = {}
        self._steps: list[int] = []
        self._block: list[Counts] = []
        self._waiting: list[Block] = []  # to be written, in the order of recording
        self._lost: list[Block] = []  # as there were too many
        self._layers: tuple[int, ...] | None = None
        self._experts: int | None = None
        self._last: int | None = None
        self._after_restart = self._failing = self._torn = self._closed = False
        self._parts = PartsFolder(self.path, resume=resume, force=force)
        if (latest := self._parts.latest) is not None:
            self._layers, self._experts, self._last = latest.layers, latest.experts, int(latest.steps[-1])
            known, given = latest.info, self._info
            self._info = replace(given, model=given.model or known.model, top_k=given.top_k or known.top_k)
            try:
                self._describe(known.notes | given.notes, known.assumptions)
            except BaseException:
                self._parts.release()
                raise

    # --- recording ----------------------------------------------------------------------------

    @property
    def last_step(self) -> int | None:
        """The step recorded last, None before the first."""
        return self._last

    def add(self, layer: int, counts: ArrayLike) -> None:
        """Add the tokens of each expert of *layer*, shape (experts,), to the step in progress.

        Several adds of one layer within a step are summed: the micro-batches of gradient accumulation.
        Raises `TraceError` for counts that are not non-negative integers, for another number of
        experts than before, for more than 2**40 tokens, and after `close`.
        """
        self._check_open()
        where = f"{self.path}, " + ("the first step" if self._last is None else f"the step after {self._last}")
        number = arguments.integer(layer, "layer", *arguments.LAYERS, where)
        earlier = self._adding.get(number)
        self._adding[number] = arguments.step_counts(counts, f"{where}, layer {number}", self._experts, earlier)
        self._experts = len(self._adding[number])

    def add_layers(self, layers: Sequence[int], counts: NDArray[np.int64]) -> None:
        """Add the tokens of each expert of all *layers*, shape (layers, experts), as `add` does, in less time.

        Raises `TraceError` as `add` does.
        """
        whole = counts.dtype == np.int64 and counts.shape[1] == self._experts and not self._adding and not self._closed
        if whole and self._is_mine() and counts.min() >= 0 and counts.sum() <= arguments.MOST_IN_A_STEP:
            self._adding = dict(zip(layers, counts.copy()))
            return
        for layer, tokens in zip(layers, counts):  # the first of all, or one with a mistake to name
            self.add(layer, tokens)

    def step(self, step: int | None = None) -> None:
        """End the step with that number, the one after the last (from 1) unless given.

        Raises `TraceError` when a layer is missing, new, or without tokens, and when *step* is not
        an integer after the last one.
        """
        self._check_open()
        number = arguments.integer(
            (self._last or 0) + 1 if step is None else step, "step", *arguments.STEPS, str(self.path)
        )
        where = f"{self.path}, step {number}"
        if self._last is not None and number <= self._last:
            way_out = f"steps must increase; after a restart from a checkpoint call resume_from({number - 1}) first"
            raise TraceError(str(self.path), f"step {number} comes after step {self._last}", way_out)
        layers = tuple(sorted(self._adding))
        expected = self._layers or layers
        if not layers:
            raise TraceError(where, "no layer was added", "call add() for every layer before step()")
        if missing := set(expected) - set(layers):
            raise TraceError(where, f"layer {min(missing)} is missing", "add every layer in every step")
        if new := set(layers) - set(expected):
            raise TraceError(where, f"layer {min(new)} was not there before", "add it from the first step")
        for layer in layers:
            if not self._adding[layer].any():
                raise TraceError(f"{where}, layer {layer}", "no expert has any tokens", "leave such a step out")
        self._block.append(np.stack([self._adding[layer] for layer in layers]))
        self._steps.append(number)
        self._layers, self._last, self._adding = layers, number, {}
        if len(self._steps) >= self._block_steps:
            self.flush()

    def resume_from(self, step: int) -> None:
        """Continue after the checkpoint of *step*: what was recorded of later steps will be replaced.

        The trace's findings list the steps that were recorded again. Nothing is removed before the
        first new block is written.
        """
        self._check_open()
        number = arguments.integer(step, "step", *arguments.STEPS, f"{self.path}, resume_from")
        self._end_block()
        self._adding, self._last, self._after_restart = {}, number, True
        self.flush()

    # --- metadata -----------------------------------------------------------------------------

    def note(self, **notes: Any) -> None:
        """Add *notes* to the trace's metadata; the latest of a name counts.

        Arrays and tensors become lists, paths and dates texts; NaN and infinity become null.
        Raises `SettingError` for values that JSON cannot store, and beyond 16 MiB.
        """
        self._check_open()
        self._describe(self._info.notes | arguments.plain_notes(notes), self._info.assumptions)

    def assume(self, assumption: str) -> None:
        """Record in the trace's metadata what is assumed about its counts."""
        self._check_open()
        assumed = arguments.text(assumption, "assumption")
        self._describe(self._info.notes, tuple(dict.fromkeys((*self._info.assumptions, assumed))))

    def _describe(self, notes: dict[str, Any], assumptions: tuple[str, ...]) -> None:
        """Make them the metadata; raises `SettingError` where they are too large for the metadata of a file."""
        size = len(json.dumps([notes, assumptions]))
        if size > arguments.MOST_BYTES:
            raise SettingError(
                f"notes and assumptions take {size >> 20} MiB, and a trace has room for {arguments.MOST_BYTES >> 20}: "
                "keep long curves in a file of their own"
            )
        self._info = replace(self._info, notes=notes, assumptions=assumptions)

    # --- writing ------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write the steps held in memory as a part; call it whenever a checkpoint is saved."""
        if self._is_mine() and not self._closed:
            self._end_block()
            self._attempt(self._write)

    def close(self) -> None:
        """Write what is held, make one trace of the parts at `path`, and remove them.

        A step that was begun but not ended is left out. Where it could not be done, it can be called again;
        afterwards it does nothing. Raises `TraceError` when no step was recorded.
        """
        if self._closed or not self._is_mine():
            return
        self._end_block()
        if self._parts.empty and not self._waiting:
            self._closed = True
            self._attempt(self._parts.remove)
            raise TraceError(str(self.path), "no step was recorded", "call step() at the end of every step")

        self._failing = False  # what is not closed is reported in any case
        self._closed = self._attempt(self._write, partial(self._parts.compact, self._info))
        if self._closed and self._lost:
            lost = steps_text(self._lost)
            reason = "they could not be written, and memory was full"
            warnings.warn(f"{self.path}: {lost} are missing: {reason}", RecordingWarning, stacklevel=2)

    def release(self) -> None:
        """Write what is held, and let another recorder of this path continue, as after a kill."""
        if not self._is_mine():
            return
        try:
            self.flush()
            if waiting := self._waiting:
                message = f"{self.path}: {steps_text(waiting)} could not be written, and end with the process"
                warnings.warn(message, RecordingWarning, stacklevel=2)
        finally:
            self._parts.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; after an error, which is not replaced by another, only write what is held: the run can be resumed."""
        if not self._is_mine():
            return
        try:
            if error is None:
                self.close()
                return
            self.release()
        except (MoetraceError, OSError, RecordingWarning) as failure:  # a warning where warnings are errors
            if error is None:
                raise
            error.add_note(f"moetrace: {failure}")
        finally:
            self._parts.release()

    def _end_block(self) -> None:
        """Make the steps held so far a block that waits, of which there are few enough afterwards."""
        if not self._steps:
            return
        self._waiting.append(Block(np.array(self._steps, np.int64), np.stack(self._block), self._after_restart))
        self._steps, self._block, self._after_restart = [], [], False
        while len(self._waiting) > MOST_BLOCKS or sum(held.counts.nbytes for held in self._waiting) > MOST_WAITING:
            if not self._drop_oldest():
                return

    def _drop_oldest(self) -> bool:
        """Drop the oldest block that waits, and keep its steps as lost; false where none may go.

        The first step after a restart is kept: without it, the steps of the run before the restart would stand in
        the place of those dropped. The newest block stays.
        """
        spare = (i for i, held in enumerate(self._waiting[:-1]) if not held.after_restart or len(held.steps) > 1)
        oldest = next(spare, None)
        if oldest is None:
            return False
        dropped = self._waiting.pop(oldest)
        if dropped.after_restart:
            self._waiting.insert(oldest, Block(dropped.steps[:1].copy(), dropped.counts[:1].copy(), True))
            dropped = Block(dropped.steps[1:], dropped.counts[1:], False)
        self._lost.append(dropped._replace(counts=dropped.counts[:0].copy()))  # the steps are enough
        return True

    def _write(self) -> None:
        """Write the blocks that wait, oldest first; those that are not written when an error comes stay."""
        while blocks := self._waiting:
            block = blocks[0]
            trace = LoadTrace.from_counts(block.counts, name=self._info.name, steps=block.steps, layers=self._layers)
            info = replace(self._info, tokens_per_step=trace.info.tokens_per_step)
            if not self._parts.append(replace(trace, info=info)):
                self._torn = True
            del blocks[0]

    def _attempt(self, *writes: Callable[[], None]) -> bool:
        """Whether *writes* succeeded; the first failure in a row is a warning, and each an error where asked for."""
        try:
            for write in writes:
                write()
        except (MoetraceError, OSError) as error:
            if self._raises:
                raise
            if not self._failing:
                self._failing = True
                kept = "no step is written yet" if self._parts.empty else f"{self._parts.folder} has what was written"
                kept += f", memory has {steps_text(self._waiting)}" if self._waiting else ""
                message = f"{error}; the run goes on; {kept}: call close() to try again, each block does as well"
                warnings.warn(message, RecordingWarning, stacklevel=3)
            return False
        self._failing = False
        if self._torn:
            self._torn = False
            message = f"{self._parts.folder}: parts that were written before are gone; somebody removed them"
            warnings.warn(message, RecordingWarning, stacklevel=3)
        return True

    # --- the process and the state --------------------------------------------------------------

    def _is_mine(self) -> bool:
        """Whether this is the process that opened the recorder, and not one that was forked from it."""
        return os.getpid() == self._owner

    def _check_open(self) -> None:
        if self._closed:
            raise TraceError(str(self.path), "is closed", "continue it with Recorder(path, resume=True)")
        if not self._is_mine():
            problem = f"was opened by process {self._owner}, and this is its child {os.getpid()}"
            raise TraceError(str(self.path), problem, "record in the process that opens the recorder")
