"""What a result depends on, as a short key: what has another input, other settings or other code has another key."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moetrace.forecasting.predictors.base import Predictor

# The rooms whose code computes results, and the libraries it computes with.
ROOMS = ("analysis", "forecasting")
LIBRARIES = ("numpy", "pandas", "scipy", "statsmodels", "jax", "equinox", "optax")


def key_of(*facts: Any) -> str:
    """The digest of *facts*, anything that JSON can say."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def settings_of(predictor: Predictor) -> list[Any]:
    """What tells one predictor from another: its class, all its settings, and what it is computed with."""
    kind = type(predictor)
    return [f"{kind.__module__}.{kind.__qualname__}", asdict(predictor), code_digest(), library_versions()]


@cache
def code_digest() -> str:
    """The digest of the source of every module that a result may depend on.

    Whoever changes a predictor sees new numbers, not kept ones; a version number would have to be thought of.
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (package / room).rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def library_versions() -> dict[str, str]:
    """The installed versions of `LIBRARIES`: another NumPy may give other numbers."""
    return {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
