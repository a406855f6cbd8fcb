"""Watching a trace that is still being recorded: what changed between two looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from moetrace.analysis.states import classify
from moetrace.doctor.checks import idle_experts
from moetrace.errors import TraceError
from moetrace.formats.canonical import open_trace
from moetrace.formats.readers.parts import is_parts, read_parts
from moetrace.trace import LoadTrace
from moetrace.words import STABLE, UNKNOWN

# Steps after which a change is noticed, median and 90% quantile: `benchmarks/change_points.py`.
USUALLY_NOTICED = 250, 350


class Status(NamedTuple):
    """How a layer is: its *state*, the step that began with, and whether one expert has taken all."""

    state: str
    since: int
    collapsed: bool


class Change(NamedTuple):
    """What happened to a *layer*, as it could be told at *step*, and the step *since* which it holds.

    *what* is ``settled``, ``unsettled``, ``collapsed`` or ``recovered``.
    """

    step: int
    layer: int
    what: str
    since: int


class Look(NamedTuple):
    """One look at a recording: the last *step* so far, all layers, what changed, and whether it is over.

    *step* is None before the first block.
    """

    step: int | None
    layers: Mapping[int, Status]
    changes: tuple[Change, ...]
    closed: bool


def follow(path: str | Path, pause: Callable[[], None]) -> Iterator[Look]:
    """A look at the recording at *path* each time something new was written, until it is closed.

    *path* is the trace that will be, or the folder of its parts. *pause* is called between two looks.
    Every look reads all layers, one at a time.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> mt.save_trace(trace, "run.parquet")
    >>> [(look.step, look.closed) for look in mt.follow("run.parquet", pause=lambda: None)]
    [(2000, True)]
    """
    before: Look = Look(None, {}, (), False)
    while not before.closed:
        trace, closed = _recorded(Path(path))
        if trace is not None and (closed or trace.steps[-1] != before.step):
            layers = {load.layer: _status(trace, load.layer) for load in trace.by_layer()}
            step = int(trace.steps[-1])
            before = Look(step, layers, tuple(_changes(step, before.layers, layers)), closed)
            yield before
        if not before.closed:
            pause()


def _recorded(path: Path) -> tuple[LoadTrace | None, bool]:
    """What has been written so far, None if nothing was, and whether it is all."""
    folder = path if is_parts(path) else path.with_suffix(".parts")
    try:
        if is_parts(folder):
            return read_parts(folder), False
        return (open_trace(path), True) if path.is_file() else (None, False)
    except TraceError:
        # No block yet, or the parts became the trace between two glances; the next look tells.
        return None, False


def _status(trace: LoadTrace, layer: int) -> Status:
    load = trace.layer(layer)
    last = classify(load).runs[-1]
    collapsed = any(finding.name == "collapse" for finding in idle_experts(load))
    return Status(last.state, last.from_step, collapsed)


def _changes(step: int, before: Mapping[int, Status], now: Mapping[int, Status]) -> Iterator[Change]:
    for layer, status in now.items():
        old = before.get(layer, Status(UNKNOWN, status.since, False))
        if (old.state == STABLE) != (status.state == STABLE):
            yield Change(step, layer, "settled" if status.state == STABLE else "unsettled", status.since)
        if old.collapsed != status.collapsed:
            yield Change(step, layer, "collapsed" if status.collapsed else "recovered", step)
