"""Columns of Arrow batches as arrays: numbers as they are or as people write them, lists, numbers in names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.formats.arrow import to_numpy
from moetrace.formats.errors import library_errors
from moetrace.trace import FLOAT64_EXACT

if TYPE_CHECKING:
    import pyarrow as pa

# A number of a step, a layer or an expert; and one with commas between its thousands, as spreadsheets write it.
BARE = re.compile(r"\d{1,15}")
BY_COMMAS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+")
# The number of a layer in the name of a module: what follows a word for it, or else the only number.
OF_LAYER = re.compile(r"(?:layers?|blocks?|(?<![a-z])h)[._/\[-]?(\d{1,15})", re.IGNORECASE)


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is one of text."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_list(kind: Any) -> bool:
    """Whether an Arrow type is one of lists."""
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def holds_lists(values: pa.Array) -> bool:
    """Whether the cells of a column are lists, or texts of which the first is written like one."""
    if is_list(values.type):
        return True
    first = next((text for text in values.slice(0, 100).to_pylist() if text), "") if is_text(values.type) else ""
    return first.lstrip().startswith("[")


def lists_in(values: pa.Array, name: str, row: int, where: str) -> pa.Array:
    """A column of lists; texts such as ``[3, 0, 5]`` become lists. Raises `TraceError` for any other text."""
    import pyarrow as pa

    if values.null_count:
        raise null(values, name, row, where)
    if is_list(values.type):
        return values
    if not is_text(values.type):
        raise TraceError(f"{where}, column {name}", f"holds {values.type}", "give a list in each row")
    lists = []
    for i, text in enumerate(values.to_pylist()):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list):
            problem = f"is not a list of numbers: {text[:60]!r}"
            way_out = "write lists as [3, 0, 5], or take them apart with --sql (docs/recipes.md)"
            raise TraceError(f"{where}, column {name}, row {row + i}", problem, way_out)
        lists.append(found)
    with library_errors(f"{where}, column {name}", "holds lists that are not of numbers", "write counts in them"):
        return pa.array(lists)


def column(batch: pa.RecordBatch, name: str, row: int, where: str, gaps: bool = False) -> NDArray[Any]:
    """A column (rows,); text that is numbers as people write them becomes numbers.

    Nulls are NaN if there may be *gaps*; else they raise `TraceError`, as do values that are no numbers.
    """
    import pyarrow as pa

    values = batch.column(name)
    if values.null_count and not gaps:
        raise null(values, name, row, where)
    if not values.null_count and (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return to_numpy(values)
    if pa.types.is_null(values.type):
        return np.full(len(values), np.nan)
    if pa.types.is_decimal(values.type):  # as databases add up integers
        values = values.cast(pa.int64() if values.type.scale == 0 else pa.float64())
    try:
        found = np.asarray(values.to_numpy(zero_copy_only=False))
    except (TypeError, NotImplementedError):
        raise TraceError(f"{where}, column {name}", f"holds {values.type}", "give numbers") from None
    return numbers_as_written(found, name, row, where) if is_text(values.type) else found


def null(values: Any, name: str, row: int, where: str) -> TraceError:
    """The error that a column has a gap, and where the first one is."""
    first = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
    return TraceError(f"{where}, column {name}, row {row + first}", "is null (or NaN)", "every row needs a value")


def numbers_as_written(texts: NDArray[Any], name: str, row: int, where: str) -> NDArray[Any]:
    """Texts that are numbers as spreadsheets write them as numbers, percentages as shares; other texts stay.

    A comma sets thousands apart where all of them do, and is a decimal comma otherwise. Raises `TraceError` where
    only some are percentages.
    """
    stripped = ["" if text is None else re.sub(r"[\s\u00a0\u202f']", "", text) for text in texts]
    percents = np.array([text.endswith("%") for text in stripped])
    if percents.any() and not percents[[bool(text) for text in stripped]].all():
        at = row + int(np.argmax(percents))
        raise TraceError(f"{where}, column {name}, row {at}", "is a percentage, and others are not", "write one kind")
    plain = [text.rstrip("%") for text in stripped]
    thousands = all(BY_COMMAS.fullmatch(text) for text in plain if "," in text)
    try:
        numbers = [float(text.replace(",", "" if thousands else ".") or "nan") for text in plain]
    except ValueError:
        return texts
    return np.array(numbers) / (100 if percents.any() else 1)


def numbers(
    batch: pa.RecordBatch, name: str, row: int, where: str, in_text: Callable[[str], int | None] | None = None
) -> NDArray[np.int64]:
    """A column of steps, layers or experts (rows,): whole numbers, or texts with one number each, like ``expert_3``.

    *in_text* finds the number of a text, if it is another one. Raises `TraceError` for what is no whole number.
    """

    def only_number(text: str) -> int | None:
        every = [text] if re.fullmatch(r"-\d{1,15}", text) else BARE.findall(text)
        return int(every[0]) if len(every) == 1 else None

    values = batch.column(name)
    if is_text(values.type) and not values.null_count:
        encoded = values.dictionary_encode()  # each different text is looked at once
        found = [(in_text or only_number)(text) for text in encoded.dictionary.to_pylist()]
        if None not in found:
            by_text: NDArray[np.int64] = np.array(found, np.int64)[to_numpy(encoded.indices)]
            return by_text
    array = column(batch, name, row, where)
    if array.dtype.kind == "O":  # hive partitions and dictionaries arrive as text
        try:
            array = array.astype(np.int64)
        except (TypeError, ValueError, OverflowError):
            raise TraceError(f"{where}, column {name}", "holds text, not numbers", "give whole numbers") from None
    if array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            bad = np.flatnonzero(~(np.abs(array) < FLOAT64_EXACT) | (np.floor(array) != array))
        if bad.size:
            at = f"{where}, column {name}, row {row + bad[0]}"
            raise TraceError(at, f"{array[bad[0]]} is not a whole number", "give whole numbers")
    if array.dtype.kind not in "iuf":
        raise TraceError(f"{where}, column {name}", f"holds {array.dtype}, not numbers", "give whole numbers")
    return array.astype(np.int64, copy=False)


def layers_in(batch: pa.RecordBatch, name: str, row: int, where: str) -> NDArray[np.int64]:
    """A column of layers (rows,), numbers or names of modules such as ``model.layers.3.mlp``."""

    def layer(text: str) -> int:
        found = OF_LAYER.search(text)
        every = BARE.findall(text)
        if found is None and len(every) != 1:
            problem = f"names no layer in {text[:60]!r}"
            raise TraceError(f"{where}, column {name}", problem, "name layers by numbers")
        return int(found[1] if found else every[0])

    return numbers(batch, name, row, where, layer)
