"""Layers and steps selected from a source before anything else is done with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError, shown
from moetrace.formats.stream.cells import Cells, Merged, Reading, ReadOptions, Source


class NothingSelected(TraceError):
    """A source has none of the layers, or of the steps, that were asked for."""


@dataclass
class Seen:
    """The layers that passed by, and the first and the last step: what there was to choose from."""

    layers: set[int] = field(default_factory=set)
    first: int | None = None
    last: int | None = None

    def add(self, cells: Cells) -> None:
        """Go on with *cells*, which are not none."""
        self.layers.update(np.unique(cells.layer).tolist())
        low, high = int(cells.step.min()), int(cells.step.max())
        self.first = low if self.first is None else min(low, self.first)
        self.last = high if self.last is None else max(high, self.last)


@dataclass(frozen=True)
class Selection:
    """The *layers*, all if there are none, and the steps from *first* to *last* that are wanted of a source."""

    layers: tuple[int, ...]
    first: int | None
    last: int | None

    def of(self, source: Source, seen: Seen) -> Source:
        """The same source with these alone; *seen* gets what there was."""
        if isinstance(source, Merged):
            return replace(source, parts=tuple(self.of(part, seen) for part in source.parts))
        return replace(source, cells=lambda: self._cells(source, seen), rows=None)

    def _cells(self, reading: Reading, seen: Seen) -> Iterator[Cells]:
        mine, kept = Seen(), False
        for cells in reading.cells():
            if not len(cells.step):
                continue
            mine.add(cells)
            seen.add(cells)
            inside = self._inside(cells)
            if inside.any():
                kept = True
                yield cells if inside.all() else Cells(*(column[inside] for column in cells))
        if not kept and mine.layers:
            raise self._nothing(reading.where, mine)

    def _inside(self, cells: Cells) -> NDArray[np.bool_]:
        inside: NDArray[np.bool_] = np.isin(cells.layer, self.layers) if self.layers else np.ones(len(cells.step), bool)
        if self.first is not None:
            inside &= cells.step >= self.first
        if self.last is not None:
            inside &= cells.step <= self.last
        return inside

    def _nothing(self, where: str, seen: Seen) -> NothingSelected:
        if self.layers and seen.layers.isdisjoint(self.layers):
            return no_layer(where, min(self.layers), seen)
        return NothingSelected(where, "has no step left", f"choose other --steps: it has {seen.first} to {seen.last}")


def no_layer(where: str, layer: int, seen: Seen) -> NothingSelected:
    """That *where* has no such layer, and which it has."""
    return NothingSelected(where, f"has no layer {layer}", f"choose --layers among {shown(sorted(seen.layers), 20)}")


def selected(source: Source, options: ReadOptions, seen: Seen) -> Source:
    """The same source with the layers and steps of *options* alone; *seen* gets what there was.

    No first step is cut off where counters are subtracted: the one after it needs it.
    """
    selection = Selection(options.layers, None if options.difference else options.first, options.last)
    return source if selection == Selection((), None, None) else selection.of(source, seen)
