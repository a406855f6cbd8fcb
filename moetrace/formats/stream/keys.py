"""Counts in nested mappings and lists, whose keys and places are the numbers of steps, layers and experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError, shown
from moetrace.formats.errors import library_errors
from moetrace.formats.stream.cells import Cells, Reading
from moetrace.formats.stream.columns import OF_LAYER
from moetrace.formats.stream.names import Named, step_in
from moetrace.formats.stream.roles import LAYER_NAMES, STEP_NAMES
from moetrace.formats.stream.values import COUNT_NAMES, Values, simple_name
from moetrace.trace import FLOAT64_EXACT

AXES = ("step", "layer", "expert")
# What the key of a level says that it numbers, and where its number stands.
WORDS = {
    "expert": re.compile(r"experts?[._/\[-]?(\d{1,15})$|^e(\d{1,15})$", re.IGNORECASE),
    "layer": OF_LAYER,
    "step": re.compile(r"(?:step|iter|iteration|window|pass)[._/\[-]?(\d{1,15})", re.IGNORECASE),
}
BARE = re.compile(r"\d{1,15}")
# Lines taken at a time.
LINES = 1000


def keyed_reading(document: Any, path: Named, values: Values, needs: str) -> Reading:
    """Counts by step, layer and expert, or by layer and expert alone, as keys or places in lists.

    Keys that say what they number (``layer_3``, ``expert_7``) are taken at their word; others come in that order.
    Raises `TraceError`, saying what the document *needs*, where they number nothing.
    """
    where = str(path)
    paths = list(_walk(document, (), where, needs))
    if not paths or len({len(at) for at, _ in paths}) != 1 or len(paths[0][0]) < 2:
        names = shown(list(document)) if isinstance(document, dict) else "nothing"
        raise TraceError(where, f"holds {names}, and none is the counts", f"it needs {needs}")
    axes = _axes(list(paths[0][0]), where, needs)
    with library_errors(where, "holds numbers that are no counts", "counts are whole numbers of tokens"):
        numbers = {
            axis: np.array([_number(at[i], where, needs) for at, _ in paths], np.int64) for i, axis in enumerate(axes)
        }
        raw = np.array([count for _, count in paths])
    in_name = step_in(path)
    step = numbers.get("step", np.full(len(raw), 1 if in_name is None else in_name))
    order = np.lexsort((numbers["expert"], numbers["layer"], step))
    return Reading(
        lambda: _cells(step[order], numbers["layer"][order], numbers["expert"][order], raw[order], values, where),
        rows=len(raw),
        assumptions=(f"keys are {', '.join(axes)}" + ("" if "step" in axes else ": one step"),),
        where=where,
        collector=values.collector,
        numbered="step" not in axes and in_name is None,
    )


def _cells(
    step: NDArray[np.int64],
    layer: NDArray[np.int64],
    expert: NDArray[np.int64],
    raw: NDArray[Any],
    values: Values,
    where: str,
) -> Iterator[Cells]:
    yield Cells(step, layer, expert, values.counts(raw, "counts", 0, where))


@dataclass(frozen=True)
class _Line:
    """The keys of a line: *step*, *layer* if it has one, and the *parts* that hold its counts.

    A single part holds them itself; several are a layer each.
    """

    step: str
    layer: str | None
    parts: tuple[str, ...]

    @classmethod
    def of(cls, line: dict[str, Any], where: str, needs: str) -> _Line:
        """By the first *line*; raises `TraceError` where it has no step, or no such parts."""
        step = next((key for key in line if simple_name(key) in STEP_NAMES), None)
        layer = next((key for key in line if simple_name(key) in LAYER_NAMES), None)
        inside = [key for key, part in line.items() if isinstance(part, dict | list) and key not in (step, layer)]
        counts = [key for key in inside if simple_name(key) in (*COUNT_NAMES, "layers", "experts")]
        if step is None or step in inside or not (counts or len(inside) == 1 or all(map(OF_LAYER.search, inside))):
            raise TraceError(where, f"has lines with {shown(list(line))}", f"each needs a step, and {needs}")
        return cls(step, layer, tuple(counts[:1] or inside))

    @property
    def outer(self) -> tuple[str, ...]:
        """The keys of the numbers that hold for the whole line."""
        return (self.step,) if self.layer is None else (self.step, self.layer)

    def counts(self, line: dict[str, Any], where: str) -> Any:
        """What holds the counts of a line; raises `TraceError` for one without."""
        absent = [key for key in (*self.outer, *self.parts) if key not in line]
        if absent:
            raise TraceError(where, f"has a line without {absent[0]}", "write the same keys in every line")
        alone = len(self.parts) == 1 and not OF_LAYER.search(self.parts[0])
        return line[self.parts[0]] if alone else {key: line[key] for key in self.parts}


def keyed_lines(lines: Callable[[], Iterator[dict[str, Any]]], path: Named, values: Values, needs: str) -> Reading:
    """Objects with a step whose counts have experts, or layers and experts, as keys or in lists.

    Raises `TraceError` where the first of them has no step, or nothing of that kind.
    """
    where = str(path)
    line = _Line.of(next(lines(), {}), where, needs)

    def cells() -> Iterator[Cells]:
        return (_of_lines(part, line, values, where, needs) for part in _batches(lines()))

    said = f"the counts are in {shown(line.parts)}"
    return Reading(cells, assumptions=(said,), where=where, collector=values.collector)


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while part := list(islice(rows, LINES)):
        yield part


def _of_lines(lines: Sequence[dict[str, Any]], line: _Line, values: Values, where: str, needs: str) -> Cells:
    """The cells of some lines."""
    found: list[tuple[Key, ...]] = []
    counts: list[float] = []
    for row in lines:
        for at, count in _walk(line.counts(row, where), (), where, needs):
            found.append((*(row[key] for key in line.outer), *at))
            counts.append(count)
    depth = len(found[0]) if found else 0
    if not 2 <= depth <= 3 or any(len(at) != depth for at in found):
        raise TraceError(
            where, "has lines whose counts are nested unlike each other", f"each needs a step, and {needs}"
        )
    axes = ["step", *_axes(found[0][1:], where, needs)] if depth == 3 else ["step", "expert"]
    columns = {axis: np.array([_number(at[i], where, needs) for at in found], np.int64) for i, axis in enumerate(axes)}
    layers = columns.get("layer", np.zeros(len(found), np.int64))
    return Cells(columns["step"], layers, columns["expert"], values.counts(np.array(counts), "counts", 0, where))


Key = str | int


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
    said = [next((axis for axis, word in WORDS.items() if word.search(str(key))), None) for key in keys]
    left = [axis for axis in AXES[-len(keys) :] if axis not in said]
    axes = [axis or (left.pop(0) if left else "") for axis in said]
    if sorted(axes) != sorted(AXES[-len(keys) :]):
        problem = f"has keys such as {' > '.join(map(str, keys))[:80]}, which are no layers of experts"
        raise TraceError(where, problem, f"it needs {needs}")
    return axes


def _number(key: Any, where: str, needs: str) -> int:
    if isinstance(key, float) and key.is_integer():
        key = int(key)
    if isinstance(key, int) and not isinstance(key, bool) and abs(key) <= FLOAT64_EXACT:
        return key
    if not isinstance(key, str):
        raise TraceError(where, f"has {key!r:.40} where a step, a layer or an expert should be", f"it needs {needs}")
    found = BARE.fullmatch(key) or next((match for word in WORDS.values() if (match := word.search(key))), None)
    groups = [text for text in (found[0], *found.groups()) if text and text.isdecimal()] if found else []
    if not groups:
        raise TraceError(where, f"has a key {key[:60]!r} that numbers nothing", f"it needs {needs}")
    return int(groups[0])
