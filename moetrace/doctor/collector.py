"""What a stream shows as it passes, and a finished trace no longer does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.catalogue import FLOAT32_EXACT, found
from moetrace.trace import Counts, Finding


@dataclass
class Watch:
    """Collects findings while a dump streams by: of each name the first, and how often it came up.

    The one thing here that changes: a stream has no other way to speak than while it passes.
    """

    _first: dict[str, tuple[str, str]] = field(default_factory=dict)
    _times: dict[str, int] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget everything: the stream begins anew."""
        self._first.clear()
        self._times.clear()

    def say(self, name: str, place: str, evidence: str, times: int = 1) -> None:
        """Note the finding *name* of the catalogue."""
        self._first.setdefault(name, (place, evidence))
        self._times[name] = self._times.get(name, 0) + times

    def take(self, other: Watch) -> None:
        """Hear what *other* heard, which forgets it."""
        for name, (place, evidence) in other._first.items():
            self.say(name, place, evidence, other._times[name])
        other.clear()

    def counts(self, values: NDArray[Any], column: str, row: int) -> None:
        """Look at raw counts before they become integers; *row* is the number of the first of them."""
        if values.dtype == np.float32 and values.size and values.max() >= FLOAT32_EXACT:
            at = row + int(np.argwhere(values >= FLOAT32_EXACT)[0][0])
            self.say(
                "float32", f"column {column}, row {at}", "a float32 count beyond 2^24 no longer counts every token"
            )

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was noted so far."""
        return tuple(
            found(name, place, evidence + (f"; and {self._times[name] - 1} more" if self._times[name] > 1 else ""))
            for name, (place, evidence) in self._first.items()
        )


@dataclass
class Factor:
    """The greatest common divisor of all counts that passed, and how many of them were not 0."""

    divisor: int = 0
    counts: int = 0

    def add(self, counts: Counts) -> None:
        """Take in *counts* of any shape; costs nothing once the divisor is 1."""
        if self.divisor != 1:
            self.divisor = int(np.gcd.reduce(counts, axis=None, initial=self.divisor))
            self.counts += int(np.count_nonzero(counts))
