"""The arguments of a recorder, validated when they are given: an error is one line that names the argument."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Collection, Mapping, Set
from datetime import date, time, timedelta
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import orjson
from numpy.typing import ArrayLike, NDArray

from moetrace.errors import SettingError, TraceError, printable
from moetrace.formats.canonical import LONGEST_NAME, is_trace_name
from moetrace.trace import FLOAT64_EXACT, Counts

# Columns of the canonical file: layers are 32-bit, and a float64 still tells steps of this size apart.
LAYERS = (0, 2**31 - 1)
STEPS = (-FLOAT64_EXACT, FLOAT64_EXACT)
SIZES = (1, 2**31 - 1)
# Tokens of a layer in a step: a thousand times the largest batches there are; the sum over eight million steps fits.
MOST_IN_A_STEP = 2**40
LONGEST_TEXT = 10_000
# Metadata are read whole with a trace, and written with each of its parts; Parquet readers refuse 100 MB.
MOST_BYTES = 16 << 20
MOST_ITEMS = MOST_BYTES // 2


def shortened(value: object) -> str:
    """*value* as it was written, shortened for a message."""
    try:
        return printable(reprlib.repr(value))
    except ValueError:  # integers of thousands of digits
        return f"a huge {type(value).__name__}"


def integer(value: Any, name: str, least: int, most: int, where: str | None = None) -> int:
    """*value* of the argument *name* as an integer from *least* to *most*.

    NumPy numbers and tensors of one number are accepted, and floats without a fraction; no truth values, no texts.
    Raises `TraceError` with *where* the value was given, or `SettingError` without it.
    """
    number, same = least, False
    if not isinstance(value, bool | np.bool_ | str | bytes) and not getattr(value, "ndim", 0):
        try:
            number = int(value)
            same = bool(number == value)
        except (TypeError, ValueError, ArithmeticError, RuntimeError):
            pass
    if same and least <= number <= most:
        return number
    if where is None:
        raise SettingError(f"{name}={shortened(value)}: must be an integer from {least:,} to {most:,}")
    raise TraceError(where, f"{name} {shortened(value)} is invalid", f"give an integer from {least:,} to {most:,}")


def text(value: Any, name: str) -> str:
    """The text *value* of the argument *name*; raises `SettingError` for anything else, or one that is too long."""
    if not isinstance(value, str) or not value or len(value) > LONGEST_TEXT:
        raise SettingError(f"{name}={shortened(value)}: must be a string of 1 to {LONGEST_TEXT:,} characters")
    return str.__str__(value)


def trace_name(value: Any) -> str:
    """The name of a trace; raises `SettingError` for one that a trace cannot have."""
    name = text(value, "name")
    if not is_trace_name(name):
        raise SettingError(
            f"name={shortened(value)}: give at most {LONGEST_NAME} characters, no / or \\, and no dot at the start"
        )
    return name


def trace_path(value: Any) -> Path:
    """The path of a trace to record; raises `SettingError` for what cannot be the name of a file."""
    try:
        path = Path(value)
        os.fspath(path.absolute()).encode()  # Arrow wants UTF-8
    except (TypeError, UnicodeEncodeError):
        raise SettingError(f"path={shortened(value)}: must be the path of a file, in UTF-8") from None
    if not path.name or "\0" in str(path) or path.suffix == ".parts":
        raise SettingError(
            f"path={shortened(value)}: must be the path of a file such as run.parquet; its parts go to run.parts"
        )
    return path


def step_counts(counts: ArrayLike, where: str, experts: int | None, earlier: Counts | None) -> Counts:
    """*counts* plus *earlier* ones of the step, shape (experts,), as 64-bit integers in an array of their own.

    Raises `TraceError` unless there is one non-negative integer for each of *experts*, any number of them where that
    is None, or where so many tokens come together that sums over steps would overflow.
    """
    way_out = "give one number of tokens for each expert"
    try:
        raw: NDArray[Any] = np.asarray(counts)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors on a device
        reason = printable(str(error).partition("\n")[0][:200])
        raise TraceError(where, f"counts cannot be read as an array: {reason}", way_out) from None
    if raw.ndim != 1 or not raw.size or raw.dtype.kind not in "iuf":
        raise TraceError(where, f"counts are {raw.dtype} of shape {raw.shape}", way_out)
    with np.errstate(invalid="ignore"):  # NaN and infinity become a number that differs
        tokens = raw.astype(np.int64)
    bad = np.flatnonzero((tokens < 0) | (tokens != raw))
    total = tokens.sum(dtype=np.float64) + (0 if earlier is None else earlier.sum())
    if bad.size:
        problem = f"expert {bad[0]} has {raw[bad[0]]} tokens"
        way_out = "counts are integers, 0 where an expert is idle"
    elif experts not in (None, len(tokens)):
        problem = f"{len(tokens)} experts where {experts} were before"
        way_out = "every layer of a trace has the same number: record layers that differ into another path"
    elif total > MOST_IN_A_STEP:
        problem = f"{total:.3g} tokens in one step"
        way_out = f"a layer has at most {MOST_IN_A_STEP} in a step: add what a step routes, not a running total"
    else:
        return tokens if earlier is None else tokens + earlier
    raise TraceError(where, problem, way_out)


def plain_notes(notes: Any) -> dict[str, Any]:
    """*notes* as JSON holds them, in containers of their own; raises `SettingError` for what JSON cannot hold.

    NumPy and torch numbers and arrays become numbers and lists, paths and dates texts, sets sorted lists.
    NaN and infinity become null.
    """
    if not isinstance(notes, Mapping):
        raise SettingError(f"notes={shortened(notes)}: must be a mapping of names to values")
    plain: dict[str, Any] = {}
    for name, value in notes.items():
        try:
            written = orjson.dumps({name: value}, _simpler, orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
        except TypeError as error:
            # What is at fault is in the cause where a conversion failed, else in orjson's own message.
            reason = str(error.__cause__ or error)[:200]
            raise SettingError(f"note {shortened(name)} cannot be stored as JSON: {printable(reason)}") from None
        plain |= orjson.loads(written)
    return plain


def _simpler(value: Any) -> Any:
    """*value*, of a type that orjson does not know, one step closer to types that it knows."""
    if isinstance(value, PurePath | timedelta):
        return str(value)
    if isinstance(value, date | time):  # of another library
        return value.isoformat()
    if isinstance(value, np.longdouble):
        return float(value)
    if isinstance(value, Mapping):
        return dict(value)
    countable = isinstance(value, Collection) and not isinstance(value, str | bytes | bytearray | memoryview)
    if not countable and not hasattr(value, "tolist"):
        raise TypeError(f"{shortened(value)} is a {type(value).__name__}; give numbers, texts, lists and mappings")
    if (math.prod(value.shape) if hasattr(value, "shape") else len(value)) > MOST_ITEMS:
        raise TypeError(f"a {type(value).__name__} of more than {MOST_ITEMS:,} items")
    if isinstance(value, Set):
        try:
            return sorted(value)
        except TypeError:
            return sorted(value, key=repr)
    try:
        return value.tolist() if hasattr(value, "tolist") else list(value)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:  # a tensor without data, a class
        raise TypeError(f"{shortened(value)}: {error}") from None
