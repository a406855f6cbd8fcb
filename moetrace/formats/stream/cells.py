"""What a format is: something that claims a file and streams its cells; and the cells selected of a source."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moetrace.doctor import Collector
from moetrace.trace import Counts, Finding, Steps
from moetrace.words import Merge


class Cells(NamedTuple):
    """A piece of a log, an entry for each step, layer and expert; all four arrays of shape (cells,)."""

    step: Steps
    layer: NDArray[np.int64]
    expert: NDArray[np.int64]
    count: Counts  # type: ignore[assignment]  # a tuple has a method of that name, which nobody needs here

    def part(self, start: int, end: int) -> Cells:
        """The entries from *start* up to *end*, not copied."""
        return Cells(*(column[start:end] for column in self))


def joined(pieces: Sequence[Cells]) -> Cells:
    """The cells of several pieces, one after the other."""
    return pieces[0] if len(pieces) == 1 else Cells(*(np.concatenate(columns) for columns in zip(*pieces)))


class Block(NamedTuple):
    """Consecutive steps, complete: *steps* (steps,), *counts* (steps, layers, experts)."""

    steps: Steps
    counts: Counts


@dataclass(frozen=True)
class ReadOptions:
    """What to take of a dump of any format, and which totals it should have.

    *tokens_per_step* is what one layer routes in one step, *top_k* times its *tokens*: totals are checked against it. A
    format that has settings called like it, *tokens*, *top_k* or *experts* (of a layer) gets them. *merge* is how
    several sources become one trace, *bin* how many passes one step; *layers*, *first* and *last* select from the
    source, before that. With *idle_experts* an expert without a row had no tokens; with *difference* the source holds
    counters that are not reset. *accept* names findings that do not stop the reading, *settings* are the format's own.
    """

    tokens_per_step: int | None = None
    tokens: int | None = None
    top_k: int | None = None
    merge: Merge | None = None
    bin: int | None = None
    layers: tuple[int, ...] = ()
    first: int | None = None
    last: int | None = None
    accept: tuple[str, ...] = ()
    experts: int | None = None
    first_expert: int | None = None
    idle_experts: bool = False
    difference: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def as_settings(self, format: str | None = None) -> dict[str, Any]:
        """The options that were given, and the spec of the format if there was one, for the trace's metadata."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        given = {key: value for key, value in plain.items() if value is not False and value not in (None, [], {})}
        return {**given, "from": format} if format else given

    @property
    def expected(self) -> int | None:
        """Tokens that a layer routes in a step, where the user gave it."""
        if self.tokens_per_step is not None:
            return self.tokens_per_step
        return self.tokens * self.top_k if self.tokens is not None and self.top_k is not None else None


@dataclass(frozen=True)
class Reading:
    """A dump about to be read: *cells* starts the stream anew each time it is called.

    *rows* is the number of cells where it is known, *where* names the dump in errors, *collector* gets what the stream
    shows. *steps_are_implicit* is whether steps are counted from 1, as the dump names none; *layer_findings* are those
    of some layers; *doubt* is what the numbers may be instead of counts, *part* what says that
    it is one of several parts. Rows of one expert are added up where it *adds*; else columns *apart* may tell them
    apart. Steps of a *clock* are numbered anew; *counters* grow until they are reset.
    """

    cells: Callable[[], Iterator[Cells]]
    rows: int | None = None
    assumptions: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    known: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    collector: Collector = field(default_factory=Collector)
    steps_are_implicit: bool = False
    doubt: str = ""
    part: str = ""
    apart: set[str] = field(default_factory=set)
    adds: bool = False
    clock: bool = False
    counters: bool = False
    layer_findings: Callable[[Sequence[int]], tuple[Finding, ...]] = lambda _: ()


@dataclass(frozen=True)
class Merged:
    """Several dumps that are one trace: *how* their steps, layers, experts or counts come together.

    *idle* is whether a part that lacks a step which another has was idle in it.
    """

    parts: tuple[Reading | Merged, ...]
    how: Merge
    where: str
    assumptions: tuple[str, ...] = ()
    idle: bool = False


Source = Reading | Merged


def readings_of(source: Source) -> tuple[Reading, ...]:
    """The dumps that a source reads."""
    if isinstance(source, Reading):
        return (source,)
    return tuple(reading for part in source.parts for reading in readings_of(part))


@runtime_checkable
class Format(Protocol):
    """One kind of dump: a frozen dataclass whose fields are its settings, reachable as ``name:setting=value``.

    *name* is what ``--from`` calls it, *needs* a line on what it reads.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]

    @property
    def needs(self) -> str:
        """What a dump of it is: the first paragraph of its docstring, unless it says otherwise."""
        return " ".join((self.__doc__ or "").partition("\n\n")[0].split())

    @abstractmethod
    def claims(self, path: Path) -> bool:
        """Whether *path*, a file or a folder, is a dump of this kind; never raises."""

    @abstractmethod
    def read(self, path: Any) -> Source:
        """Start reading *path*; raises `TraceError` for what the header shows."""


def starts_of(step: Steps) -> NDArray[np.intp]:
    """Where another step begins in *step* (cells,), which is not empty; shape (steps,)."""
    return np.flatnonzero(np.append(True, step[1:] != step[:-1]))


def dense_cells(steps: Steps, layers: Sequence[int] | NDArray[np.int64], counts: Counts) -> Cells:
    """The cells of *counts* (steps, layers, experts), in the order of `numpy.ravel`.

    >>> import moetrace as mt
    >>> import numpy as np
    >>> mt.dense_cells(np.array([7]), [3], np.array([[[5, 2]]])).count.tolist()
    [5, 2]
    """
    experts = counts.shape[2]
    return Cells(
        np.repeat(steps, counts.shape[1] * experts),
        np.tile(np.repeat(np.asarray(layers, np.int64), experts), len(steps)),
        np.tile(np.arange(experts), len(steps) * counts.shape[1]),
        counts.ravel(),
    )


# Numbers between NumPy and Arrow, without a copy and without pandas, which Arrow's own ways load.


def to_numpy(array: Any) -> NDArray[Any]:
    """An Arrow array of numbers, or a chunked one, without nulls; read-only where it was one chunk."""
    whole = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    values: NDArray[Any] = np.from_dlpack(whole)
    return values


def to_arrow(values: NDArray[Any]) -> pa.Array:
    """A one-dimensional array of numbers."""
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def to_lists(values: NDArray[Any], kind: pa.DataType | None = None) -> pa.Array:
    """The rows of *values* (rows, columns) as lists of the Arrow type *kind*, which may forbid nulls."""
    rows, columns = values.shape
    kind = kind or pa.list_(pa.from_numpy_dtype(values.dtype))
    offsets = np.arange(rows + 1, dtype=np.int32) * columns
    return pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(offsets)], children=[to_arrow(values.ravel())])
