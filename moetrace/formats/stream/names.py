"""What the names of files say: their order, and the rank, the step and the layer that they are of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol, TypeVar

from moetrace.errors import TraceError, shown

# A file for each layer, its number in the name.
LAYER_IN_NAME = re.compile(r"(?:.*[_.-])?layer[_=.-]?(\d{1,15})", re.IGNORECASE)
# A file for each step, or range of steps.
STEP_IN_NAME = re.compile(r"(?:step|iter|iteration)[_=.-]?(\d{1,15})", re.IGNORECASE)


class Named(Protocol):
    """A path, or something like it."""

    @property
    def name(self) -> str:
        """Its last part."""

    @property
    def stem(self) -> str:
        """Its last part without the ending."""


AnyNamed = TypeVar("AnyNamed", bound=Named)


def by_rank(paths: Sequence[AnyNamed]) -> list[AnyNamed]:
    """Paths in the order of the numbers in their names, so that rank 10 comes after rank 9.

    What follows the dot in a time in seconds is the part of a second.
    """

    def parts(path: AnyNamed) -> list[str | tuple[int, str]]:
        split = re.split(r"((?<!\d)\d{9,}\.\d+|\d+)", str(path))
        return [_number(part) if i % 2 else part for i, part in enumerate(split)]

    return sorted(paths, key=parts)


def _number(text: str) -> tuple[int, str]:
    whole, _, fraction = text.partition(".")
    return int(whole), fraction


def rank_in(path: Named) -> int | None:
    found = re.search(r"rank[_-]?(\d{1,15})", path.stem, re.IGNORECASE)
    return int(found[1]) if found else None


def step_in(path: Named) -> int | None:
    found = STEP_IN_NAME.search(path.stem)
    return int(found[1]) if found else None


def layer_of(path: Named) -> int | None:
    """The layer in a file's name."""
    found = LAYER_IN_NAME.fullmatch(path.stem)
    return int(found[1]) if found else None


def rank_of(path: Named) -> int | None:
    """The rank in a file's name: the number after ``rank``, or else the last one, unless that is a layer."""
    found = rank_in(path)
    if found is not None or layer_of(path) is not None:
        return found
    last = re.search(r"(\d+)(?!.*\d)", path.stem)
    return int(last[1]) if last else None


def check_ranks(paths: Sequence[Named]) -> None:
    """Raise `TraceError` when a rank is missing between the first and the last, or there twice."""
    if any(rank_of(path) is None for path in paths):
        return
    ranks = sorted((rank_of(path) or 0, path) for path in paths)
    for (a, first), (b, second) in pairwise(ranks):
        if a == b:
            raise TraceError(str(first), f"is rank {a}, and so is {second}", "merge each rank once")
        if b > a + 1:
            raise TraceError(
                str(second),
                f"is rank {b}, but rank {shown(range(a + 1, b))} is missing before it",
                "merge all ranks of the run",
            )
