"""Lists and mappings of counts that were written into cells as text, by Python, NumPy or torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.formats.stream.columns import LIST, is_text, null
from moetrace.trace import FLOAT64_EXACT

if TYPE_CHECKING:
    import pyarrow as pa

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|nan|inf"
NUMBERS = re.compile(NUMBER, re.IGNORECASE)
# A key of a mapping, with or without a word before its number, and its count.
PAIR = re.compile(rf"[\"']?[a-z_]*(\d{{1,15}})[\"']?\s*:\s*({NUMBER})", re.IGNORECASE)
INNER = re.compile(r"[\[(]([^\[\]()]*)[\])]")


class Texts(NamedTuple):
    """What cells of text hold: for each count its *row*, its *layer* in the cell, its *expert*; all (counts,).

    *nested* is whether a cell holds all layers, in the order of their numbers.
    """

    row: NDArray[np.int64]
    layer: NDArray[np.int64]
    expert: NDArray[np.int64]
    value: NDArray[np.float64]
    nested: bool


def is_list_text(values: pa.Array) -> bool:
    """Whether the first text of a column is a list or a mapping."""
    if not is_text(values.type):
        return False
    first = next((text for text in values.slice(0, 100).to_pylist() if text), "")
    return bool(LIST.match(first))


def texts_in(values: pa.Array, name: str, row: int, where: str) -> Texts:
    """Lists such as ``[1, 2, 3]``, lists of them, or mappings such as ``{0: 5, 2: 3}``, in a column of text.

    Raises `TraceError` for what is none, and for what NumPy left out with dots.
    """
    if values.null_count:
        raise null(values, name, row, where)
    found: list[tuple[int, int, int, float]] = []
    nested = False
    for i, text in enumerate(values.to_pylist()):
        if not LIST.match(text) or "..." in text:
            way = "write whole lists, such as [3, 0, 5]"
            raise TraceError(f"{where}, column {name}, row {row + i}", f"is no list of numbers: {text[:60]!r}", way)
        nested = nested or text.count("[") > 1
        found += [(i, *cell) for cell in _cells(text)]
    if not found:
        raise TraceError(f"{where}, column {name}, row {row}", "is an empty list", "log a count for each expert")
    at = np.array([cell[:3] for cell in found], np.int64)
    return Texts(at[:, 0], at[:, 1], at[:, 2], np.array([cell[3] for cell in found]), nested)


def lists_in(values: pa.Array, name: str, row: int, where: str) -> pa.Array:
    """The same where each cell is a list, as lists of numbers."""
    import pyarrow as pa

    texts = texts_in(values, name, row, where)
    sizes = np.bincount(texts.row, minlength=len(values))
    whole = texts.value.astype(np.int64) if are_whole(texts.value) else texts.value
    return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(sizes)).astype(np.int32)), pa.array(whole))


def are_whole(values: NDArray[np.floating]) -> bool:
    """Whether all of *values* are whole numbers that a float holds exactly."""
    return bool((np.isfinite(values) & (np.abs(values) <= FLOAT64_EXACT) & (values == np.floor(values))).all())


def _cells(text: str) -> Iterator[tuple[int, int, float]]:
    """Layer, expert and count of what is in one cell; lists in a list are layers."""
    if ":" in text:
        yield from ((0, int(key), float(count)) for key, count in PAIR.findall(text))
        return
    inside = INNER.findall(text)
    lists = inside if len(inside) > 1 and text.count("[") > 1 else [re.sub(r"^\s*(?:\w+\()+", "", text)]
    for layer, part in enumerate(lists):
        # What follows the list is its type.
        numbers = NUMBERS.findall(re.sub(r",?\s*(?:dtype|device)\s*=.*", "", part))
        yield from ((layer, expert, float(number)) for expert, number in enumerate(numbers))
