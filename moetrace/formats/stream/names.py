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


def merge_hint(paths: Sequence[Named]) -> str | None:
    """What files that are read one by one may be parts of, by what all their names tell; None for nothing.

    >>> from pathlib import Path
    >>> merge_hint([Path("rank0.jsonl"), Path("rank1.jsonl")])[:45]
    '2 files of ranks are 2 traces; one of all has'
    """
    ways = (
        (rank_in, "ranks", "--merge sum where ranks are replicas, or --merge experts where they hold other experts"),
        (layer_of, "layers", "--merge layers"),
        (_segment_in, "steps", "--merge steps"),
    )
    for number_in, what, way in ways:
        numbers = {number_in(path) for path in paths}
        if len(paths) > 1 and None not in numbers and len(numbers) > 1:
            return f"{len(paths)} files of {what} are {len(paths)} traces; one of all has {way}"
    return None


def _segment_in(path: Named) -> int | None:
    """The step, the window or the time in a file's name."""
    found = STEP_IN_NAME.search(path.stem) or re.search(r"(?<!\d)(\d{9,15})(?!\d)|moe_load_(\d{1,15})", path.stem)
    return int(next(group for group in found.groups() if group)) if found else None
