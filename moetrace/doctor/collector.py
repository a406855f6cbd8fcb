"""Findings of a dump while it streams by: of what a finished trace no longer shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.catalogue import finding
from moetrace.trace import FLOAT32_EXACT, Counts, Finding


@dataclass
class Collector:
    """Collects findings while a dump streams by: of each name the first, and how often it came up.

    It is mutable, because a stream is read only once.
    """

    _first: dict[str, tuple[str, str]] = field(default_factory=dict)
    _times: dict[str, int] = field(default_factory=dict)

    def clear(self) -> None:
        """Remove all findings, before the stream is read again."""
        self._first.clear()
        self._times.clear()

    def note(self, name: str, place: str, evidence: str, times: int = 1) -> None:
        """Note the finding *name* of the catalogue."""
        self._first.setdefault(name, (place, evidence))
        self._times[name] = self._times.get(name, 0) + times

    def merge(self, other: Collector) -> None:
        """Move the findings of *other* here."""
        for name, (place, evidence) in other._first.items():
            self.note(name, place, evidence, other._times[name])
        other.clear()

    def check_precision(self, values: NDArray[Any], column: str, row: int) -> None:
        """Note counts that float32 does not hold exactly; *row* is the number of the first of *values*."""
        if values.dtype == np.float32 and values.size and values.max() >= FLOAT32_EXACT:
            at = row + int(np.argwhere(values >= FLOAT32_EXACT)[0][0])
            self.note(
                "float32", f"column {column}, row {at}", "a float32 count beyond 2^24 no longer counts every token"
            )

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings so far."""
        return tuple(
            finding(name, place, evidence + (f"; and {self._times[name] - 1} more" if self._times[name] > 1 else ""))
            for name, (place, evidence) in self._first.items()
        )


@dataclass
class Factor:
    """The greatest common divisor of all counts so far, and how many of them were not 0."""

    divisor: int = 0
    counts: int = 0

    def add(self, counts: Counts) -> None:
        """Add *counts* of any shape; costs nothing once the divisor is 1."""
        if self.divisor != 1:
            self.divisor = int(np.gcd.reduce(counts, axis=None, initial=self.divisor))
            self.counts += int(np.count_nonzero(counts))
