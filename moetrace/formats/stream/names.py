"""What the names of files say: their order, and the rank, the step and the layer that they are of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from moetrace.errors import TraceError, shown
from moetrace.formats.location import Location

# A file for each layer, its number in the name.
LAYER_IN_NAME = re.compile(r"(?:.*[_.-])?layer[_=.-]?(\d{1,15})", re.IGNORECASE)
# A file for each step, or range of steps.
STEP_IN_NAME = re.compile(r"(?:step|iter|iteration)[_=.-]?(\d{1,15})", re.IGNORECASE)
RANK_IN_NAME = re.compile(r"rank[_-]?(\d{1,15})", re.IGNORECASE)
# A step, the number of a window, or a time.
SEGMENT_IN_NAME = re.compile(rf"{STEP_IN_NAME.pattern}|(?<!\d)(\d{{9,15}})(?!\d)|moe_load_(\d{{1,15}})", re.IGNORECASE)


AnyLocation = TypeVar("AnyLocation", bound=Location)


def by_rank(paths: Sequence[AnyLocation]) -> list[AnyLocation]:
    """Paths in the order of the numbers in their names, so that rank 10 comes after rank 9.

    What follows the dot in a time in seconds is the part of a second.
    """

    def parts(path: AnyLocation) -> list[str | tuple[int, str]]:
        split = re.split(r"((?<!\d)\d{9,}\.\d+|\d+)", str(path))
        numbers = [part.partition(".") for part in split]
        return [(int(numbers[i][0]), numbers[i][2]) if i % 2 else part for i, part in enumerate(split)]

    return sorted(paths, key=parts)


def rank_files(path: Path, name: re.Pattern[str]) -> list[Path]:
    """The files of such a *name* that *path* is or holds, in the order of their ranks."""
    inside = path.iterdir() if path.is_dir() else [path]
    return by_rank([child for child in inside if name.fullmatch(child.name) and child.is_file()])


def _number_in(path: Location, pattern: re.Pattern[str]) -> int | None:
    found = pattern.search(path.stem)
    return int(next(group for group in found.groups() if group)) if found else None


def rank_in_name(path: Location) -> int | None:
    return _number_in(path, RANK_IN_NAME)


def step_in_name(path: Location) -> int | None:
    return _number_in(path, STEP_IN_NAME)


def layer_in_name(path: Location) -> int | None:
    found = LAYER_IN_NAME.fullmatch(path.stem)
    return int(found[1]) if found else None


def rank_or_last_number(path: Location) -> int | None:
    """The rank in a file's name: the number after ``rank``, or else the last one, unless that is a layer."""
    found = rank_in_name(path)
    if found is not None or layer_in_name(path) is not None:
        return found
    last = re.search(r"(\d+)(?!.*\d)", path.stem)
    return int(last[1]) if last else None


def check_ranks(paths: Sequence[Location]) -> None:
    """Raise `TraceError` when a rank is missing between the first and the last, or there twice."""
    numbers = [rank_or_last_number(path) for path in paths]
    if None in numbers:
        return
    ranks = sorted((number or 0, path) for number, path in zip(numbers, paths))
    for (a, first), (b, second) in pairwise(ranks):
        if a == b:
            raise TraceError(str(first), f"is rank {a}, and so is {second}", "merge each rank once")
        if b > a + 1:
            missing = f"is rank {b}, but rank {shown(range(a + 1, b))} is missing before it"
            raise TraceError(str(second), missing, "merge all ranks of the run")


def merge_hint(paths: Sequence[Location]) -> str | None:
    """What files that are read one by one may be parts of, by the numbers in all their names; None for nothing.

    >>> from pathlib import Path
    >>> merge_hint([Path("rank0.jsonl"), Path("rank1.jsonl")])[:45]
    '2 files of ranks are 2 traces; one of all has'
    """
    of_ranks = "--merge sum where ranks are replicas, or --merge experts where they hold other experts"
    ways = (
        ([rank_in_name(path) for path in paths], "ranks", of_ranks),
        ([layer_in_name(path) for path in paths], "layers", "--merge layers"),
        ([_number_in(path, SEGMENT_IN_NAME) for path in paths], "steps", "--merge steps"),
    )
    for numbers, what, way in ways:
        if len(paths) > 1 and None not in numbers and len(set(numbers)) > 1:
            return f"{len(paths)} files of {what} are {len(paths)} traces; one of all has {way}"
    return None
