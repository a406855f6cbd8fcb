"""What a result depends on, as a short key: what has another input, other settings or other code has another key."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moetrace.forecasting.predictors.base import Predictor

# Where results are computed: these modules, and all of the package that they import.
ROOTS = ("forecasting.layers", "forecasting.predictors")
# Modules that hold no number that a result depends on, only messages.
MESSAGES = ("errors", "settings")
LIBRARIES = ("numpy", "pandas", "scipy", "statsmodels", "jax", "equinox", "optax")


def key_of(*facts: Any) -> str:
    """The digest of *facts*, anything that JSON can say."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def settings_of(predictor: Predictor) -> list[Any]:
    """What makes one predictor another: its class, all its settings, and what it is computed with."""
    kind = type(predictor)
    own = [] if kind.__module__.startswith("moetrace.") else [source_of(kind)]  # of a plug-in
    return [f"{kind.__module__}.{kind.__qualname__}", predictor.facts(), code_digest(), library_versions(), *own]


def source_of(kind: type) -> str:
    """The source of the module of *kind*, on which its results depend; of the class alone where there is no file."""
    for part in (inspect.getmodule(kind), kind):
        with suppress(OSError, TypeError):
            return inspect.getsource(part)  # type: ignore[arg-type]
    return ""


@cache
def code_digest(package: Path = Path(__file__).parent.parent) -> str:
    """The digest of the code of every module that a result depends on, without comments and docstrings.

    A change of a predictor gives new numbers, not cached ones; a version number would have to be maintained by hand.
    """
    digest = hashlib.sha256()
    for name, tree in sorted(used_modules(package).items()):
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(f"{name}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()


def used_modules(package: Path) -> dict[str, ast.Module]:
    """The parsed modules in the folder *package* that `ROOTS` import, and what these import, by name."""
    files = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    waiting = [name for name in files if any(name == root or name.startswith(f"{root}.") for root in ROOTS)]
    found: dict[str, ast.Module] = {}
    while waiting:
        name = waiting.pop()
        if name in found or name in MESSAGES:
            continue
        found[name] = ast.parse(files[name].read_bytes())
        for node in ast.walk(found[name]):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moetrace."):
                module = node.module.removeprefix("moetrace.")  # type: ignore[union-attr]
                names = [module, f"{module}.__init__", *(f"{module}.{alias.name}" for alias in node.names)]
                waiting += [each for each in names if each in files]
    return found


@cache
def library_versions() -> dict[str, str]:
    """The installed versions of `LIBRARIES`: another NumPy may give other numbers."""
    versions = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
