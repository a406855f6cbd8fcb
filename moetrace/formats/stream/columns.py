"""Columns of Arrow batches as arrays: numbers as they are or as people write them, lists, numbers in names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.formats.arrow import to_numpy
from moetrace.trace import FLOAT64_EXACT

if TYPE_CHECKING:
    import pyarrow as pa

# A number with its thousands apart, by commas or by dots, as spreadsheets write it.
BY_COMMAS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+")
BY_DOTS = re.compile(r"[+-]?[1-9]\d{0,2}(?:\.\d{3})+")
# What begins a list, or a mapping, that was written as text.
LIST = re.compile(r"\s*(?:\w+\()*\s*[\[({]|\s*\d+(?:[ ;|/]+\d+)+\s*$")
# The number of a layer in the name of a module: what follows a word for it, or else the only number.
OF_LAYER = re.compile(r"(?:layers?|blocks?|(?<![a-z])h)[._/\[-]?(\d{1,15})", re.IGNORECASE)


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is one of text."""
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def column(batch: pa.RecordBatch, name: str, row: int, where: str) -> NDArray[Any]:
    """A column without nulls, shape (rows,); text that is numbers as people write them becomes numbers."""
    values = batch.column(name)
    if values.null_count:
        raise null(values, name, row, where)
    return with_gaps(batch, name, row, where)


def with_gaps(batch: pa.RecordBatch, name: str, row: int, where: str) -> NDArray[Any]:
    """The same, with NaN for nulls."""
    import pyarrow as pa

    values = batch.column(name)
    if not values.null_count and (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return to_numpy(values)
    if pa.types.is_null(values.type):
        return np.full(len(values), np.nan)
    try:
        found = np.asarray(values.to_numpy(zero_copy_only=False))
    except (TypeError, NotImplementedError):
        raise TraceError(f"{where}, column {name}", f"holds {values.type}", "give numbers") from None
    return as_written(found, name, row, where) if is_text(values.type) else found


def null(values: Any, name: str, row: int, where: str) -> TraceError:
    """That a column has a gap, and where the first one is."""
    first = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
    return TraceError(f"{where}, column {name}, row {row + first}", "is null (or NaN)", "every row needs a value")


def as_written(texts: NDArray[Any], name: str, row: int, where: str) -> NDArray[Any]:
    """Texts that are numbers as spreadsheets write them as numbers, percentages as shares; other texts stay.

    Raises `TraceError` where only some are percentages.
    """
    stripped = [None if text is None else re.sub(r"[\s\u00a0\u202f']", "", text) for text in texts]
    percents = np.array([(text or "").endswith("%") for text in stripped])
    if percents.any() and not percents[[bool(text) for text in stripped]].all():
        at = row + int(np.argmax(percents))
        raise TraceError(f"{where}, column {name}, row {at}", "is a percentage, and others are none", "write one kind")
    plain = [text.rstrip("%") if text else text for text in stripped]
    with_comma = [text for text in plain if text and "," in text]
    if not all(map(BY_COMMAS.fullmatch, with_comma)):  # so it is a decimal point
        plain = [text.replace(",", ".") if text and text.count(",") == 1 else text for text in plain]
    dots = written_with_dots([text for text in plain if text])
    numbers: list[float] = []
    for text in plain:
        if not text:
            numbers.append(np.nan)
            continue
        try:
            whole = text.replace(",", "") if BY_COMMAS.fullmatch(text) else text.replace(".", "") if dots else text
            numbers.append(float(whole))
        except ValueError:
            return texts
    return np.array(numbers) / (100 if percents.any() else 1)


def written_with_dots(texts: list[str]) -> bool:
    """Whether dots in *texts* set thousands apart: ``15.000`` and ``987``, but not ``15.000`` and ``7.500``."""
    dotted = [text for text in texts if "." in text]
    if not dotted or not all(BY_DOTS.fullmatch(text) for text in dotted):
        return False
    whole = all("." in text or re.fullmatch(r"[+-]?\d{1,3}", text) for text in texts)
    # With three digits everywhere and zeros alone behind the dot, they are decimals that say nothing.
    plain = len(dotted) == len(texts) and all(text.endswith(".000") and text.count(".") == 1 for text in dotted)
    return whole and not plain


def numbers(batch: pa.RecordBatch, name: str, row: int, where: str) -> NDArray[np.int64]:
    """A column of whole numbers (step, layer, expert), shape (rows,)."""
    values = column(batch, name, row, where)
    if values.dtype.kind == "O":  # hive partitions and dictionaries arrive as text
        try:
            values = values.astype(np.int64)
        except (TypeError, ValueError, OverflowError):
            raise TraceError(f"{where}, column {name}", "holds text, not numbers", "give whole numbers") from None
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            bad = np.flatnonzero(~(np.abs(values) < FLOAT64_EXACT) | (np.floor(values) != values))
        if bad.size:
            raise TraceError(
                f"{where}, column {name}, row {row + bad[0]}",
                f"{values[bad[0]]} is not a whole number",
                "give whole numbers",
            )
    if values.dtype.kind not in "iuf":
        raise TraceError(f"{where}, column {name}", f"holds {values.dtype}, not numbers", "give whole numbers")
    return values.astype(np.int64, copy=False)


def layers_in(batch: pa.RecordBatch, name: str, row: int, where: str) -> NDArray[np.int64]:
    """A column of layers (rows,), numbers or names of modules such as ``model.layers.3.mlp``."""

    values = batch.column(name)
    if not is_text(values.type) or values.null_count:
        return numbers(batch, name, row, where)
    encoded = values.dictionary_encode()
    of_name = np.array([module_layer(text, f"{where}, column {name}") for text in encoded.dictionary.to_pylist()])
    layers: NDArray[np.int64] = of_name[to_numpy(encoded.indices)]
    return layers


def module_layer(text: str, where: str) -> int:
    """The number of the layer in the name of a module; raises `TraceError` where there is none."""
    found = OF_LAYER.search(text)
    numbers = re.findall(r"\d{1,15}", text)
    if found is None and len(numbers) != 1:
        raise TraceError(where, f"names no layer in {text[:60]!r}", "name layers by numbers")
    return int(found[1] if found else numbers[0])


def numbered(batch: pa.RecordBatch, name: str, row: int, where: str) -> NDArray[np.int64]:
    """A column of steps or experts (rows,), numbers or texts with one number each, such as ``expert_3``."""
    values = batch.column(name)
    if not is_text(values.type) or values.null_count:
        return numbers(batch, name, row, where)
    encoded = values.dictionary_encode()
    found = [re.findall(r"\d{1,15}", text) for text in encoded.dictionary.to_pylist()]
    if any(len(those) != 1 for those in found):
        return numbers(batch, name, row, where)
    experts: NDArray[np.int64] = np.array([int(those[0]) for those in found], np.int64)[to_numpy(encoded.indices)]
    return experts
