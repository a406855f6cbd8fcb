"""Analyse expert load in Mixture-of-Experts models: imbalance, stability, predictability, placement.

`__init__.pyi` lists the public names. Each is imported when it is first used: `moetrace --help` must not wait for
NumPy and Arrow.
"""

from typing import Any

import lazy_loader

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name != "__version__":
        return _attribute(name)
    from importlib.metadata import version

    return version("moetrace")
