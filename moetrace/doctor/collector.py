"""Findings of a dump while it streams by: of what a finished trace no longer shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.catalogue import factor_findings, finding, rounding_findings
from moetrace.trace import FLOAT32_EXACT, Counts, Finding

# Significant bits of half-precision numbers, and the last up to which float16 holds every whole number.
HALVES = {"bfloat16": 8, "float16": 11}
FLOAT16_EXACT = 2**11


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
        """Note counts that their type does not hold exactly; *row* is the number of the first of *values*."""
        if values.dtype == np.float16 and values.size and np.nanmax(values) > FLOAT16_EXACT:
            self.note_half(values, FLOAT16_EXACT, "float16", column, row)
        if values.dtype == np.float32 and values.size and values.max() >= FLOAT32_EXACT:
            at = row + int(np.argwhere(values >= FLOAT32_EXACT)[0][0])
            self.note(
                "float32", f"column {column}, row {at}", "a float32 count beyond 2^24 no longer counts every token"
            )

    def note_half(self, values: NDArray[Any], exact: int, kind: str, column: str, row: int) -> None:
        """Note *values* beyond *exact*, the last up to which their half-precision type holds every whole number."""
        beyond = np.argwhere(values > exact)
        if len(beyond):
            place = f"column {column}, row {row + int(beyond[0][0])}"
            self.note("rounded", place, f"a {kind} count above {exact:,} is rounded, and lost tokens", len(beyond))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings so far."""
        return tuple(
            finding(name, place, evidence + (f"; and {self._times[name] - 1} more" if self._times[name] > 1 else ""))
            for name, (place, evidence) in self._first.items()
        )


@dataclass
class Factor:
    """The greatest common divisor of all counts so far, how many of them were not 0, and how precise they are.

    *bits* are the most significant bits of any count, *lengths* how many large counts have each number of bits.
    """

    divisor: int = 0
    counts: int = 0
    bits: int = 0
    lengths: Counts = field(default_factory=lambda: np.zeros(65, np.int64))

    def add(self, counts: Counts, largest: int) -> None:
        """Add *counts* of any shape, none above *largest*; costs nothing once the divisor is 1 and none is rounded."""
        if self.divisor != 1:
            self.divisor = int(np.gcd.reduce(counts, axis=None, initial=self.divisor))
            self.counts += int(np.count_nonzero(counts))
        # Rounding is possible only while all counts so far have no more bits than a half-precision type.
        bits = next((bits for bits in HALVES.values() if self.bits <= bits), None)
        if bits is None or largest < 1 << (bits + 1):
            return
        large = counts[counts >= 1 << (min(HALVES.values()) + 1)]
        lengths, significant = (np.frexp(of.astype(np.float64))[1] for of in (large, large // (large & -large)))
        self.lengths += np.bincount(lengths, minlength=65)
        self.bits = max(self.bits, int(significant.max(initial=0)))

    @property
    def findings(self) -> list[Finding]:
        """That counts were rounded, or else that all are multiples of one number."""
        for kind, bits in HALVES.items():
            if self.bits <= bits and (found := rounding_findings(kind, bits, self.lengths, self.divisor)):
                return found
        return factor_findings(self.divisor, self.counts)
