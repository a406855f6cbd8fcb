"""Documents of any keys: what lies at a key such as ``stats.layers.counts``, and which keys there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moetrace.errors import TraceError
from moetrace.formats.stream.columns import OF_LAYER

# Keys that are listed where none is known, and levels that are looked into for them.
MOST_SHOWN, MOST_LEVELS = 6, 6


def dig(value: Any, key: str | None, where: str) -> Any:
    """What lies at *key* in a document, all of it if it is None; raises `TraceError` with the keys that there are.

    A level that is numbered, a list or keys such as ``layer_3``, is not in *key*: each of its parts is looked into.
    """
    if key is None or (isinstance(value, Mapping) and key in value):
        return value if key is None else value[key]
    found = value
    for name in key.split("."):
        try:
            found = _inside(found, name)
        except (KeyError, TypeError):
            raise TraceError(where, f"has nothing at {key}", keys_in(value) or "check --key") from None
    return found


def _inside(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        if name in value:
            return value[name]
        if not all(map(_is_number, value)):
            raise KeyError(name)
        return {key: _inside(part, name) for key, part in value.items()}
    if not isinstance(value, list | tuple) or not value:
        raise KeyError(name)
    return [_inside(part, name) for part in value]


def _is_number(key: Any) -> bool:
    return isinstance(key, int) or key.isdecimal() or OF_LAYER.search(key) is not None


def keys_in(document: Any) -> str:
    """The way out that names the keys under which *document* holds numbers, with their shapes; empty for none."""
    found = [f"{key} ({' x '.join(map(str, shape))})" for key, shape in _leaves(document, (), ()) if key]
    more = f", ... ({len(found)})" if len(found) > MOST_SHOWN else ""
    return f"say where the numbers are with --key: {', '.join(found[:MOST_SHOWN])}{more}" if found else ""


def _leaves(value: Any, at: tuple[str, ...], shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The key and the shape of what holds numbers, the first part of each level that is numbered looked into."""
    numbered = isinstance(value, Mapping) and len(value) > 0 and all(map(_is_number, value))
    listed = isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], Mapping)
    if len(at) + len(shape) > MOST_LEVELS:
        return
    if numbered or listed:
        yield from _leaves(next(iter(value.values())) if numbered else value[0], at, (*shape, len(value)))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(part, (*at, str(key)), shape)
    elif hasattr(value, "shape") or isinstance(value, list):
        try:
            here = tuple(value.shape) if hasattr(value, "shape") else np.asarray(value).shape
        except ValueError:
            return
        if here and (hasattr(value, "shape") or np.asarray(value).dtype.kind in "iuf"):
            yield ".".join(at), (*shape, *here)
