"""What a recorder is told about a run, as JSON can say it; what JSON cannot say is refused where it is given."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence, Set
from datetime import date, time, timedelta
from pathlib import PurePath
from typing import Any

import numpy as np

from moetrace.errors import SettingError
from moetrace.record.arguments import short

# Metadata are read whole with a trace, and written with each of its parts; Parquet readers refuse 100 MB.
MOST_BYTES = 16 << 20
MOST_ITEMS = MOST_BYTES // 2
# Deep enough for any data card; what contains itself is deeper.
DEEPEST = 32
MOST_BITS = 1024


def plain_notes(notes: Any) -> dict[str, Any]:
    """*notes* as JSON can say them, in containers of their own; raises `SettingError` naming what it cannot say.

    NumPy and torch numbers and arrays become numbers and lists, paths and dates texts, sets lists in order.
    NaN and infinity, which JSON has not, become null.
    """
    if not isinstance(notes, Mapping):
        raise SettingError(f"notes={short(notes)}: give a mapping of names to what they say")
    return {_key(name, "notes"): plain(value, f"note {short(name)}") for name, value in notes.items()}


def check_size(notes: Mapping[str, Any], assumptions: Sequence[str]) -> None:
    """Raise `SettingError` where all that is told is too much for the metadata of a file."""
    size = len(json.dumps([notes, assumptions], allow_nan=False))
    if size > MOST_BYTES:
        raise SettingError(
            f"notes and assumptions take {size >> 20} MiB, and a trace has room for {MOST_BYTES >> 20}: "
            "keep long curves in a file of their own"
        )


def plain(value: Any, place: str, depth: int = 0) -> Any:
    """*value* as JSON can say it, for the note at *place*; raises `SettingError` for what it cannot say."""
    if depth > DEEPEST:
        raise SettingError(f"{place} is nested more than {DEEPEST} deep, or contains itself")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and value.bit_length() <= MOST_BITS:
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(float(value)) else None
    said = _dated(value)
    return _contained(value, place, depth + 1) if said is None else said


def _dated(value: Any) -> str | None:
    """The text of a path, a date or a time; None for anything else."""
    if isinstance(value, PurePath):
        return os.fspath(value)
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value) if isinstance(value, timedelta | np.datetime64 | np.timedelta64) else None


def _contained(value: Any, place: str, depth: int) -> Any:
    """The contents of a mapping, an array, a set or a list."""
    if isinstance(value, Mapping):
        texts = {_key(key, place): plain(part, place, depth) for key, part in value.items()}
        if len(texts) < len(value):
            raise SettingError(f"{place} has two keys that are the same text: {short(value)}")
        return texts
    if isinstance(value, bytes | bytearray | memoryview | int):
        raise _unsayable(value, place)
    if hasattr(value, "tolist"):
        return plain(_listed(value, place), place, depth)
    if isinstance(value, Collection) and len(value) <= MOST_ITEMS:
        parts = [plain(part, place, depth) for part in value]
        return _ordered(parts) if isinstance(value, Set) else parts
    raise _unsayable(value, place)


def _listed(value: Any, place: str) -> Any:
    """An array or scalar of NumPy, torch or jax as numbers and lists of Python."""
    try:
        if math.prod(getattr(value, "shape", ())) > MOST_ITEMS:
            raise _unsayable(value, place)
        # As numbers, dates of nanoseconds would be large integers.
        dates = isinstance(value, np.ndarray) and value.dtype.kind in "mM"
        return value.astype(str).tolist() if dates else value.tolist()
    except (TypeError, ValueError, AttributeError, RuntimeError):  # a tensor without data, a class instead of an object
        raise _unsayable(value, place) from None


def _ordered(parts: list[Any]) -> list[Any]:
    try:
        return sorted(parts)
    except TypeError:
        return sorted(parts, key=json.dumps)


def _key(key: Any, place: str) -> str:
    said = plain(key, place)
    if isinstance(said, str):
        return said
    if isinstance(said, int | float) and not isinstance(said, bool):
        return str(said)
    raise SettingError(f"{place} has the key {short(key)}: give texts")


def _unsayable(value: Any, place: str) -> SettingError:
    kind = type(value).__name__
    return SettingError(
        f"{place} holds {short(value)} ({kind}), which JSON cannot say: give numbers, texts, lists and mappings"
    )
