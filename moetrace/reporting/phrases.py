"""The parts of sentences: numbers, lists and differences as people read them, and what a card holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SAME = "no clear difference"
NOTHING = "-"  # where there is no number


@dataclass(frozen=True)
class Answer:
    """What a card says: a *question*, its answer as a *number* and a *sentence*, and the *evidence* in a line.

    *severity* is one of `SEVERITIES` where the answer is about an imbalance, and colours the card. An answer is *fine*
    where nothing has to be done: a page folds the figures that it rests on.
    """

    question: str
    number: str
    sentence: str
    evidence: str = ""
    severity: str = ""
    fine: bool = False


def percent(fraction: float, digits: int | None = None) -> str:
    """A fraction with so many *digits*, or as people read it: 0.0162 is ``1.62%``, 0.187 is ``18.7%``."""
    if fraction != fraction:
        return NOTHING
    return f"{100 * fraction:.{(2 if abs(fraction) < 0.03 else 1) if digits is None else digits}f}%"


def points(middle: float, low: float, high: float) -> str:
    """A difference of two errors in percentage points, with its interval; `SAME` where that holds 0."""
    if middle != middle:
        return NOTHING
    if low != low:
        return f"{100 * middle:+.2f} points"
    if low <= 0 <= high:
        return SAME
    digits = 2 if abs(middle) < 0.03 else 1
    return f"{100 * middle:+.{digits}f} points [{100 * low:+.{digits}f}, {100 * high:+.{digits}f}]"


def count_of(number: int, thing: str) -> str:
    """``one layer``, ``4 traces``: a number with its noun."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def listed(names: Sequence[Any], most: int = 4) -> str:
    """``2``, ``2 and 4``, ``2, 4, 6 and 3 more``."""
    shown = [str(name) for name in names[:most]]
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most:,} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def capitalised(text: str) -> str:
    """*text* with a capital first letter; the rest stays as it is."""
    return text[:1].upper() + text[1:]


def bytes_of(size: float) -> str:
    """``14 GB``: so many bytes in the largest unit that has at least one."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= one:
            return f"{size / one:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
