"""What a format is: something that claims a file and streams its cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moetrace.trace import Counts, Finding, Steps


class Cells(NamedTuple):
    """A piece of a log, one entry per (step, layer, expert); all four arrays of shape (cells,)."""

    step: Steps
    layer: NDArray[np.int64]
    expert: NDArray[np.int64]
    count: Counts  # type: ignore[assignment]  # a tuple has a method of that name, which nobody needs here


class Block(NamedTuple):
    """Consecutive steps, complete: *steps* (steps,), *counts* (steps, layers, experts)."""

    steps: Steps
    counts: Counts


@dataclass(frozen=True)
class ReadOptions:
    """What the user says about a dump that the dump does not say itself.

    *tokens_per_step* turns shares into counts: the tokens routed in one layer in one step.
    """

    tokens_per_step: int | None = None

    def as_settings(self) -> dict[str, Any]:
        """The options that were given, for the trace's metadata."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Reading:
    """A dump about to be read: *cells* starts the stream anew each time it is called.

    *rows* is the number of cells where the format knows it beforehand, for progress.
    """

    cells: Callable[[], Iterator[Cells]]
    rows: int | None = None
    assumptions: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    known: Mapping[str, Any] = field(default_factory=dict)


class Format(Protocol):
    """One kind of dump. Modules of this package are its implementations."""

    name: str
    needs: str

    def claims(self, path: Path) -> bool:
        """Whether *path*, a file or a folder, is a dump of this kind; never raises."""

    def read(self, path: Path, options: ReadOptions) -> Reading:
        """Start reading *path*; raises `TraceError` for what can be told from the header."""
