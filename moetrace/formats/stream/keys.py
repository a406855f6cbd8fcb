"""Counts in nested mappings and lists, whose keys and places are the numbers of steps, layers and experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError, shown
from moetrace.formats.errors import library_errors
from moetrace.formats.location import Location
from moetrace.formats.stream.cells import Cells, Reading
from moetrace.formats.stream.columns import BARE, OF_LAYER
from moetrace.formats.stream.names import step_in_name
from moetrace.formats.stream.tables import LAYER_NAMES, STEP_NAMES
from moetrace.formats.stream.values import COUNT_NAMES, Values, simple_name
from moetrace.trace import FLOAT64_EXACT

AXES = ("step", "layer", "expert")
# What the key of a level says that it numbers, and where its number stands.
WORDS = {
    "expert": re.compile(r"experts?[._/\[-]?(\d{1,15})$|^e(\d{1,15})$", re.IGNORECASE),
    "layer": OF_LAYER,
    "step": re.compile(r"(?:step|iter|iteration|window|pass)[._/\[-]?(\d{1,15})", re.IGNORECASE),
}
# Lines taken at a time.
LINES = 1000

Key = str | int


def keyed_reading(document: Any, path: Location, values: Values, needs: str) -> Reading:
    """Counts by step, layer and expert, or by layer and expert alone, as keys or places in lists.

    Keys that say what they number (``layer_3``, ``expert_7``) are taken at their word; others come in that order.
    Raises `TraceError`, saying what the document *needs*, where they number nothing.
    """
    where = str(path)
    found = list(_walk(document, (), where, needs))
    depths = {len(at) for at, _ in found}
    if len(depths) != 1 or min(depths) < 2:
        names = shown(list(document)) if isinstance(document, dict) else "nothing"
        raise TraceError(where, f"holds {names}, and none is the counts", f"it needs {needs}")
    axes = _axes(found[0][0], where, needs)
    with library_errors(where, "holds numbers that are not counts", "counts are whole numbers of tokens"):
        numbers = _numbers([at for at, _ in found], axes, where, needs)
        raw = np.array([count for _, count in found])
    in_name = step_in_name(path)
    step = numbers.get("step", np.full(len(raw), 1 if in_name is None else in_name))
    order = np.lexsort((numbers["expert"], numbers["layer"], step))
    at = step[order], numbers["layer"][order], numbers["expert"][order]
    return Reading(
        lambda: iter([Cells(*at, values.counts(raw[order], "counts", 0, where))]),
        rows=len(raw),
        assumptions=(f"keys are {', '.join(axes)}" + ("" if "step" in axes else ": one step"),),
        where=where,
        collector=values.collector,
        steps_are_implicit="step" not in axes and in_name is None,
    )


def keyed_lines(lines: Callable[[], Iterator[dict[str, Any]]], path: Location, values: Values, needs: str) -> Reading:
    """Objects with a step whose counts have experts, or layers and experts, as keys or in lists.

    Raises `TraceError` where the first of them has no step, or nothing of that kind.
    """
    where = str(path)
    first = next(lines(), {})
    step = next((key for key in first if simple_name(key) in STEP_NAMES), None)
    layer = next((key for key in first if simple_name(key) in LAYER_NAMES), None)
    inside = [key for key, part in first.items() if isinstance(part, dict | list) and key not in (step, layer)]
    counts = [key for key in inside if simple_name(key) in (*COUNT_NAMES, "layers", "experts")]
    of_layers = all(map(OF_LAYER.search, inside))
    if step is None or step in inside or not (counts or len(inside) == 1 or of_layers):
        raise TraceError(where, f"has lines with {shown(list(first))}", f"each needs a step, and {needs}")
    # One part holds all counts, or several are a layer each.
    parts = tuple(counts[:1] or inside)
    outer = (step,) if layer is None else (step, layer)
    alone = len(parts) == 1 and not OF_LAYER.search(parts[0])

    def cells() -> Iterator[Cells]:
        rows = lines()
        while batch := list(islice(rows, LINES)):
            found: list[tuple[tuple[Key, ...], float]] = []
            for row in batch:
                absent = [key for key in (*outer, *parts) if key not in row]
                if absent:
                    raise TraceError(where, f"has a line without {absent[0]}", "write the same keys in every line")
                held = row[parts[0]] if alone else {key: row[key] for key in parts}
                found += [((*(row[key] for key in outer), *at), n) for at, n in _walk(held, (), where, needs)]
            depths = {len(at) for at, _ in found}
            if len(depths) != 1 or not depths <= {2, 3}:
                problem = "has lines whose counts are nested unlike each other"
                raise TraceError(where, problem, f"each needs a step, and {needs}")
            axes = ["step", *_axes(found[0][0][1:], where, needs)] if depths == {3} else ["step", "expert"]
            at = _numbers([at for at, _ in found], axes, where, needs)
            layers = at.get("layer", np.zeros(len(found), np.int64))
            raw = np.array([count for _, count in found])
            yield Cells(at["step"], layers, at["expert"], values.counts(raw, "counts", 0, where))

    assumption = f"the counts are in {shown(parts)}"
    return Reading(cells, assumptions=(assumption,), where=where, collector=values.collector)


def _walk(value: Any, at: tuple[Key, ...], where: str, needs: str) -> Iterator[tuple[tuple[Key, ...], float]]:
    """Every number in *value*, with the keys, or places in lists, that lead to it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield at, value
        return
    if not isinstance(value, list | dict):
        raise TraceError(where, f"holds {value!r:.40} where a count should be", f"it needs {needs}")
    if len(at) == len(AXES):
        raise TraceError(where, "is nested more than three deep", f"it needs {needs}")
    for key, part in enumerate(value) if isinstance(value, list) else value.items():
        yield from _walk(part, (*at, key), where, needs)


def _axes(keys: Sequence[Key], where: str, needs: str) -> list[str]:
    """What each level numbers: by its word, or else what is left, in the order of steps, layers, experts."""
    named = [next((axis for axis, word in WORDS.items() if word.search(str(key))), None) for key in keys]
    left = [axis for axis in AXES[-len(keys) :] if axis not in named]
    axes = [axis or (left.pop(0) if left else "") for axis in named]
    if sorted(axes) != sorted(AXES[-len(keys) :]):
        problem = f"has keys such as {' > '.join(map(str, keys))[:80]}, which are not layers of experts"
        raise TraceError(where, problem, f"it needs {needs}")
    return axes


def _numbers(
    keys: Sequence[tuple[Any, ...]], axes: Sequence[str], where: str, needs: str
) -> dict[str, NDArray[np.int64]]:
    """The numbers in the *keys* of all counts, by axis; raises `TraceError` for a key without one."""

    def number(key: Any) -> int:
        if isinstance(key, float) and key.is_integer():
            key = int(key)
        if isinstance(key, int) and not isinstance(key, bool) and abs(key) <= FLOAT64_EXACT:
            return key
        if not isinstance(key, str):
            problem = f"has {key!r:.40} where a step, a layer or an expert should be"
            raise TraceError(where, problem, f"it needs {needs}")
        found = BARE.fullmatch(key) or next((match for word in WORDS.values() if (match := word.search(key))), None)
        groups = [text for text in (found[0], *found.groups()) if text and text.isdecimal()] if found else []
        if not groups:
            raise TraceError(where, f"has a key {key[:60]!r} that numbers nothing", f"it needs {needs}")
        return int(groups[0])

    return {axis: np.array([number(at[i]) for at in keys], np.int64) for i, axis in enumerate(axes)}
