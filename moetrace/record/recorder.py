"""The recorder: counts in, layer by layer and step by step; a canonical trace out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetrace.errors import SettingError, TraceError
from moetrace.record.folder import PartsFolder
from moetrace.trace import Counts, LoadTrace, TraceInfo

# At most this many steps are lost when the process is killed. Writing a block takes a few
# milliseconds, so 100 steps make it free even where a step takes a tenth of a second.
BLOCK_STEPS = 100


class Recorder:
    """Writes the trace of one run to *path*, from counts that are added layer by layer.

    Every *block* steps are written as one part to ``<path without its suffix>.parts``, a folder that
    can be read as it is; `close` makes one canonical trace of the parts. What a kill takes is at most
    the block that was not yet written. Memory holds one block.

    *model*, *top_k* and *notes* (anything JSON can say: a data card, a loss curve) go into the
    trace's metadata. *resume* goes on with what is there, if anything is; *force* replaces it.
    Raises `WorkspaceError` when *path* is taken, and `SettingError` for settings that make no sense.
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
    ) -> None:
        if block < 1 or (resume and force):
            raise SettingError(
                f"block={block}: a block needs at least one step"
                if block < 1
                else "resume goes on with a trace and force replaces it: give one of them"
            )
        self.path = Path(path)
        self._block_steps = block
        self._parts = PartsFolder(self.path, resume=resume, force=force)
        self._info = TraceInfo(
            name=name or self.path.stem, model=model, top_k=top_k, format="recorder", notes=dict(notes or {})
        )
        self._adding: dict[int, Counts] = {}
        self._steps: list[int] = []
        self._block: list[Counts] = []
        self._layers: tuple[int, ...] | None = None
        self._experts: int | None = None
        self._last: int | None = None
        self._closed = False
        self._go_on(self._parts.latest())

    # --- recording ----------------------------------------------------------------------------

    @property
    def last_step(self) -> int | None:
        """The step recorded last, None before the first."""
        return self._last

    def add(self, layer: int, counts: ArrayLike) -> None:
        """Add the tokens of each expert of *layer*, shape (experts,), to the step that is under way.

        Several adds of one layer within a step are summed: the micro-batches of gradient accumulation.
        Raises `TraceError` for counts that are negative or no whole numbers, for another number of
        experts than before, and after `close`.
        """
        if self._closed:
            raise TraceError(str(self.path), "is closed", "go on with it with Recorder(path, resume=True)")
        fresh = _whole(counts, f"{self._place()}, layer {layer}")
        if self._experts is None:
            self._experts = len(fresh)
        if len(fresh) != self._experts:
            raise TraceError(
                f"{self._place()}, layer {layer}",
                f"{len(fresh)} experts where {self._experts} were before",
                "every layer of a trace has the same number: record layers that differ into another path",
            )
        held = self._adding.get(layer)
        self._adding[layer] = fresh if held is None else held + fresh

    def step(self, step: int | None = None) -> None:
        """End the step with that number, the one after the last (from 1) unless given.

        Raises `TraceError` when a layer is missing, new, or without tokens, and when *step* is not
        after the last one.
        """
        number = (self._last or 0) + 1 if step is None else int(step)
        if self._last is not None and number <= self._last:
            raise TraceError(
                str(self.path),
                f"step {number} comes after step {self._last}",
                f"steps must increase; after a restart from a checkpoint call resume_from({number - 1}) first",
            )
        self._check_layers(number)
        layers = sorted(self._adding)
        self._layers = tuple(layers)
        self._steps.append(number)
        self._block.append(np.stack([self._adding[layer] for layer in layers]))
        self._adding = {}
        self._last = number
        if len(self._steps) >= self._block_steps:
            self.flush()

    def resume_from(self, step: int) -> None:
        """Go on after the checkpoint of *step*: what was recorded of later steps will be replaced.

        The trace's findings say which steps were recorded again. Nothing is removed before the
        first new block is written.
        """
        self.flush()
        self._adding = {}
        self._last = step

    # --- metadata -----------------------------------------------------------------------------

    def note(self, **notes: Any) -> None:
        """Add *notes* to the trace's metadata, as JSON can say them; the latest of a name counts."""
        self._info.notes.update(notes)

    def assume(self, assumption: str) -> None:
        """Say in the trace's metadata what is taken for granted about its counts."""
        if assumption not in self._info.assumptions:
            self._info = replace(self._info, assumptions=(*self._info.assumptions, assumption))

    # --- writing ------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write the steps held in memory as a part; call it whenever a checkpoint is saved."""
        if not self._steps:
            return
        counts = np.stack(self._block)  # (steps, layers, experts)
        steps = np.array(self._steps, np.int64)
        trace = LoadTrace.from_counts(counts, name=self._info.name, steps=steps, layers=self._layers)
        self._parts.append(_described(trace, self._info))
        self._steps, self._block = [], []

    def close(self) -> None:
        """Write what is held, make one trace of the parts at `path`, and remove them.

        A step that was begun but not ended is left out. Closing twice does nothing.
        Raises `TraceError` when no step was recorded.
        """
        if self._closed:
            return
        self.flush()
        self._closed = True
        if self._parts.latest() is None:
            self._parts.remove()
            raise TraceError(str(self.path), "no step was recorded", "call step() at the end of every step")
        self._parts.describe(self._info)
        self._parts.compact(self._info.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; after an error only write what is held, so that the run can be gone on with."""
        if kind is None:
            self.close()
        else:
            self.flush()
            self._parts.release()

    # --- checks -------------------------------------------------------------------------------

    def _go_on(self, latest: LoadTrace | None) -> None:
        if latest is None:
            return
        self._layers, self._experts, self._last = latest.layers, latest.experts, int(latest.steps[-1])
        known, given = latest.info, self._info
        self._info = replace(
            given,
            model=given.model or known.model,
            top_k=given.top_k or known.top_k,
            assumptions=known.assumptions,
            notes=known.notes | given.notes,
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


def _described(trace: LoadTrace, info: TraceInfo) -> LoadTrace:
    """*trace* with *info*, and its own tokens per step."""
    from dataclasses import replace

    return replace(trace, info=replace(info, tokens_per_step=trace.info.tokens_per_step))


def _whole(counts: ArrayLike, where: str) -> Counts:
    """*counts* as 64-bit integers in an array of their own, shape (experts,)."""
    raw: NDArray[Any] = np.asarray(counts)
    if raw.ndim != 1 or not raw.size or raw.dtype.kind not in "iuf":
        raise TraceError(
            where, f"counts are {raw.dtype} of shape {raw.shape}", "give one number of tokens for each expert"
        )
    with np.errstate(invalid="ignore"):  # NaN and infinity become a number that differs
        whole = raw.astype(np.int64)
    bad = (whole < 0) | (whole != raw)
    if bad.any():
        expert = int(np.flatnonzero(bad)[0])
        raise TraceError(
            where, f"expert {expert} has {raw[expert]} tokens", "counts are whole numbers, 0 where an expert is idle"
        )
    return whole
