"""Forecasters of other libraries as predictors: a fit for each expert, of scikit-learn's, sktime's or Nixtla's kind."""

from __future__ import annotations

import re
import sys
import warnings
from copy import deepcopy
from dataclasses import dataclass, field
from inspect import signature
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from moetrace.analysis.variogram import block_means
from moetrace.errors import SettingError, lacks_memory
from moetrace.forecasting.keys import source_of
from moetrace.forecasting.predictors import PREDICTORS
from moetrace.forecasting.predictors.base import Forecast, Untrained, by_expert, diverged, live
from moetrace.trace import LayerLoad, rows_of

# Blocks of history that any forecaster has at least, as many as `arima`.
LEAST_BLOCKS = 8
NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Adapted(Untrained):
    """A *forecaster* of another library, *called* so, on means of *block* steps over the last *history* steps.

    Each expert is a series of its own, in mean loads of an expert, fitted anew at every cutoff by a copy of the
    forecaster. One that does not move is held; one whose fit fails keeps the mean of its last 1,000 steps.
    """

    # Some have a model for each step ahead, and other ones for another horizon.
    by_horizon = True
    forecaster: Any = field(default=None, compare=False)
    called: str = field(default="", compare=False)
    # In the key of what cannot be recognised again: no other run makes it.
    once: str = field(default_factory=lambda: uuid4().hex, compare=False, repr=False)
    block: int = 50
    history: int = 2500

    @property
    def name(self) -> str:  # type: ignore[override]
        """What it is called."""
        return self.called

    def least_rows(self, stride: int) -> int:
        """`LEAST_BLOCKS` of logged steps."""
        return LEAST_BLOCKS * rows_of(self.block, stride)

    def facts(self) -> dict[str, Any]:
        """The class, source and parameters of the forecaster, or *once* where they are unknown."""
        try:
            known = _described(self.forecaster)
        except TypeError:
            known = self.once
        return {"forecaster": known, "block": self.block, "history": self.history}

    def forecast(self, history: LayerLoad, horizon: int) -> Forecast:
        """Forecast expert by expert, in blocks."""
        rows = history.rows(self.block)
        steps = max(self.history, self.least_rows(history.stride) * history.stride)
        means = block_means(history.last(steps), rows)  # (blocks, experts)
        blocks = -(-horizon // (rows * history.stride))
        found, failures = np.repeat(means[-1:], blocks, axis=0), {}
        for expert in live(means):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what went wrong is in the status
                    values = _values(self.forecaster, history.experts * means[:, expert], blocks) / history.experts
            except Exception as error:  # libraries of others raise anything
                if lacks_memory(error):
                    raise
                failures[expert] = type(error).__name__
                continue
            if values.shape != (blocks,):
                failures[expert] = "shape"
            elif diverged(values, means[:, expert]):
                failures[expert] = "diverged"
            else:
                found[:, expert] = values
        return by_expert(found, failures, history, rows * history.stride, horizon)


def _values(forecaster: Any, series: NDArray[np.float64], ahead: int) -> NDArray[np.float64]:
    """The next *ahead* values of a *series* by a copy of the *forecaster*."""
    import pandas as pd

    own = deepcopy(forecaster)
    if not hasattr(own, "predict") or "h" in signature(own.predict).parameters:  # Nixtla's models
        return np.asarray(own.forecast(y=series, h=ahead)["mean"], float)
    horizon = np.arange(1, ahead + 1)
    known = {"fh": horizon} if "fh" in signature(own.fit).parameters else {}  # which some need when they are fitted
    own.fit(pd.Series(series), **known)
    return np.asarray(own.predict(horizon), float).ravel()


def _described(thing: Any) -> Any:
    """*thing* as JSON has it: parameters, or an estimator with its own; raises `TypeError` for anything else."""
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, np.generic):
        return thing.item()
    if isinstance(thing, list | tuple):
        return [_described(part) for part in thing]
    if isinstance(thing, dict):
        return {str(key): _described(part) for key, part in thing.items()}
    kind = type(thing)
    if hasattr(thing, "get_params"):
        own = thing.get_params(deep=False)
    elif hasattr(thing, "forecast"):  # Nixtla's models: what is not fitted has its parameters as attributes
        own = vars(thing)
    else:
        raise TypeError(kind)
    version = getattr(sys.modules.get(kind.__module__.partition(".")[0]), "__version__", "")
    return [f"{kind.__module__}.{kind.__qualname__}", version, source_of(kind), _described(own)]


def from_forecaster(forecaster: object, name: str | None = None, *, block: int = 50, history: int = 2500) -> Adapted:
    """A predictor of a *forecaster* of another library, to be scored beside ours.

    It has scikit-learn's or sktime's interface, ``fit(y)`` or ``fit(y, fh=...)`` and ``predict(fh)`` with the steps
    ahead (1, 2, ...), or that of Nixtla's models, ``forecast(y, h)``. Each expert is a series: the means of *block*
    steps over the last *history* steps, in mean loads of an expert (1 is even); *name* is that of its class unless
    given. Shares are clipped and normalised. Results are cached by its parameters (``get_params``); where one is a
    function or an array, which cannot be recognised, they are computed anew in each run.
    Raises `SettingError` for any other interface, and for a name that moetrace uses itself.

    >>> import moetrace as mt
    >>> class Last:
    ...     def fit(self, y):
    ...         self.value = y.iloc[-1]
    ...     def predict(self, fh):
    ...         return [self.value for _ in fh]
    >>> mt.from_forecaster(Last(), "last", block=100).name
    'last'
    """
    called = name or type(forecaster).__name__
    if isinstance(forecaster, type):
        raise SettingError(f"{forecaster.__name__} is a class: {forecaster.__name__}() makes a forecaster")
    if not hasattr(forecaster, "forecast") and not (hasattr(forecaster, "fit") and hasattr(forecaster, "predict")):
        raise SettingError(f"{called} is no forecaster: it needs fit(y) and predict(fh), or forecast(y, h)")
    if not NAME.fullmatch(called):
        raise SettingError(f"{called!r} is no name: it has letters, digits, and _ . - alone")
    if called in PREDICTORS:
        raise SettingError(f"{called} is a predictor of moetrace: give the forecaster another name")
    if min(block, history) < 1:
        raise SettingError(f"block and history are steps, 1 or more, not {block} and {history}")
    return Adapted(forecaster, called, block=block, history=history)
