"""What a recorder is given, checked where it is given: a mistake is one line that names the argument."""

from __future__ import annotations

import os
import reprlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetrace.errors import SettingError, TraceError, printable
from moetrace.formats.metadata import LONGEST_NAME
from moetrace.trace import FLOAT64_EXACT, Counts

# Columns of the canonical file: layers are 32-bit, and a float64 still tells steps of this size apart.
LAST_LAYER = 2**31 - 1
LAST_STEP = FLOAT64_EXACT
# Tokens of a layer in a step: a thousand times the largest batches there are, and the sum over eight million
# steps still fits into 64 bits.
MOST_TOKENS = 2**40
LONGEST_TEXT = 10_000


def short(value: object) -> str:
    """*value* as it was written, cut short, for a message."""
    try:
        return printable(reprlib.repr(value))
    except ValueError:  # whole numbers of thousands of digits
        return f"a huge {type(value).__name__}"


def whole(value: Any, least: int, most: int) -> int | None:
    """*value* as a whole number from *least* to *most*, None where it is none.

    Numbers of NumPy and tensors of one number are taken, and floats without a fraction; no truth values, no texts.
    """
    if isinstance(value, bool | np.bool_ | str | bytes) or (hasattr(value, "ndim") and value.ndim):
        return None
    try:
        number = int(value)
        same = bool(number == value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return None
    return number if same and least <= number <= most else None


def layer_number(value: Any, where: str) -> int:
    """The number of a layer; raises `TraceError` for what is none."""
    layer = whole(value, 0, LAST_LAYER)
    if layer is None:
        raise TraceError(where, f"layer {short(value)} is not the number of a layer", f"give 0 to {LAST_LAYER}")
    return layer


def step_number(value: Any, where: str) -> int:
    """The number of a step; raises `TraceError` for what is none."""
    step = whole(value, -LAST_STEP, LAST_STEP)
    if step is None:
        raise TraceError(
            where, f"step {short(value)} is not the number of a step", f"give a whole number up to {LAST_STEP}"
        )
    return step


def setting_number(value: Any, name: str) -> int:
    """The whole number, at least 1, of the setting *name*; raises `SettingError` for what is none."""
    number = whole(value, 1, LAST_LAYER)
    if number is None:
        raise SettingError(f"{name}={short(value)}: give a whole number of at least 1")
    return number


def text(value: Any, name: str) -> str:
    """The text *value* of the argument *name*; raises `SettingError` for what is none, or too long."""
    if not isinstance(value, str) or not value or len(value) > LONGEST_TEXT:
        raise SettingError(f"{name}={short(value)}: give a text of 1 to {LONGEST_TEXT:,} characters")
    return str.__str__(value)


def trace_name(value: Any) -> str:
    """A name for a trace; raises `SettingError` for one that a trace cannot have."""
    name = text(value, "name")
    if len(name) > LONGEST_NAME or "/" in name or "\\" in name or name.startswith("."):
        raise SettingError(
            f"name={short(value)}: give at most {LONGEST_NAME} characters, no / and no \\, and no dot at the start"
        )
    return name


def trace_path(value: Any) -> Path:
    """The path of a trace to be; raises `SettingError` for what no file can be called."""
    try:
        path = Path(value)
        os.fspath(path).encode()  # Arrow wants UTF-8
    except (TypeError, UnicodeEncodeError):
        raise SettingError(f"path={short(value)}: give the path of a file, in UTF-8") from None
    if not path.name or "\0" in str(path) or path.suffix == ".parts":
        raise SettingError(
            f"path={short(value)}: give the path of a file such as run.parquet; its parts go to run.parts"
        )
    return path


def whole_counts(counts: ArrayLike, where: str) -> Counts:
    """*counts* as 64-bit integers in an array of their own, shape (experts,).

    Raises `TraceError` for what is no count of tokens of each expert.
    """
    raw = _array(counts, where)
    with np.errstate(invalid="ignore"):  # NaN and infinity become a number that differs
        tokens = raw.astype(np.int64)
    bad = (tokens < 0) | (tokens != raw)
    if bad.any():
        expert = int(np.flatnonzero(bad)[0])
        raise TraceError(
            where, f"expert {expert} has {raw[expert]} tokens", "counts are whole numbers, 0 where an expert is idle"
        )
    return tokens


def _array(counts: ArrayLike, where: str) -> NDArray[Any]:
    way_out = "give one number of tokens for each expert"
    try:
        raw: NDArray[Any] = np.asarray(counts)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors on a device
        reason = printable(str(error).partition("\n")[0][:200])
        raise TraceError(where, f"counts cannot be read as an array: {reason}", way_out) from None
    if raw.ndim != 1 or not raw.size or raw.dtype.kind not in "iuf":
        raise TraceError(where, f"counts are {raw.dtype} of shape {raw.shape}", way_out)
    return raw


def check_total(counts: Counts, where: str) -> None:
    """Raise `TraceError` where *counts* (experts,) of a step are so many that sums over steps would overflow."""
    if counts.max() > MOST_TOKENS or counts.sum(dtype=np.float64) > MOST_TOKENS:
        total = counts.sum(dtype=np.float64)
        raise TraceError(
            where,
            f"{total:.3g} tokens in one step",
            f"a layer has at most {MOST_TOKENS} in a step: add what a step routes, not a running total",
        )
