"""Watching a trace that is still being recorded: what changed since it was last read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from moetrace.analysis.states import classify
from moetrace.doctor import idle_experts
from moetrace.errors import TraceError
from moetrace.formats.canonical import open_trace
from moetrace.formats.readers.parts import is_parts, read_parts
from moetrace.words import STABLE, UNKNOWN

# Steps after which a change is noticed, median and 90% quantile: `benchmarks/change_points.py`.
USUALLY_NOTICED = 250, 400


class Status(NamedTuple):
    """The *state* of a layer, the step where it began, and whether one expert has taken nearly all of the load."""

    state: str
    since: int
    collapsed: bool


class Change(NamedTuple):
    """What happened to a *layer*, as known at *step*, and the step *since* which it holds.

    *what* is ``settled``, ``unsettled``, ``collapsed`` or ``recovered``.
    """

    step: int
    layer: int
    what: str
    since: int


class Snapshot(NamedTuple):
    """A recording at one moment: its last *step*, all layers, what changed, and whether it is *closed*.

    *step* is None before the first block.
    """

    step: int | None
    layers: Mapping[int, Status]
    changes: tuple[Change, ...]
    closed: bool


def follow(path: str | Path, pause: Callable[[], None]) -> Iterator[Snapshot]:
    """A snapshot of the recording at *path* each time something new was written, until it is closed.

    *path* is the trace to be, or the folder of its parts. *pause* is called before the files are checked again.
    Every snapshot reads all layers, one at a time.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> mt.save_trace(trace, "run.parquet")
    >>> [(snapshot.step, snapshot.closed) for snapshot in mt.follow("run.parquet", pause=lambda: None)]
    [(2000, True)]
    """
    path, last = Path(path), Snapshot(None, {}, (), False)
    while not last.closed:
        folder, trace, closed = path if is_parts(path) else path.with_suffix(".parts"), None, False
        with suppress(TraceError):  # no block yet, or the parts became the trace in between; the next snapshot shows it
            if is_parts(folder):
                trace = read_parts(folder)
            elif path.is_file():
                trace, closed = open_trace(path), True
        if trace is not None and (closed or trace.steps[-1] != last.step):
            step, layers, changes = int(trace.steps[-1]), {}, []
            for load in trace.by_layer():
                run = classify(load).runs[-1]
                collapsed = any(finding.name == "collapse" for finding in idle_experts(load))
                now = layers[load.layer] = Status(run.state, run.from_step, collapsed)
                before = last.layers.get(load.layer, Status(UNKNOWN, now.since, False))
                if (before.state == STABLE) != (now.state == STABLE):
                    what = "settled" if now.state == STABLE else "unsettled"
                    changes.append(Change(step, load.layer, what, now.since))
                if before.collapsed != now.collapsed:
                    changes.append(Change(step, load.layer, "collapsed" if now.collapsed else "recovered", step))
            last = Snapshot(step, layers, tuple(changes), closed)
            yield last
        if not last.closed:
            pause()
