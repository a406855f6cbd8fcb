"""Predictors of others: of installed packages (entry points of `GROUP`), or of a module at hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moetrace.forecasting.predictors.base import Predictor
from moetrace.settings import Plugin
from moetrace.trace import LayerLoad

if TYPE_CHECKING:
    from collections.abc import Collection

    from moetrace.trace import Counts

GROUP = "moetrace.predictors"


def made(plugin: Plugin, taken: Collection[str] = ()) -> Predictor:
    """The predictor that *plugin* is, or is the class of; raises what `Plugin.made` does.

    A module is also looked for in the working directory where no package has it, and workers find it there, too.
    """
    if not plugin.package and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    found: Predictor = plugin.made("moetrace.Predictor", lambda own: isinstance(own, Predictor), taken)
    return found


def check_predictor(predictor: Predictor) -> None:
    """Raise `AssertionError` if a *predictor* breaks what the backtest relies on; for the tests of a plug-in.

    A forecast has a row of finite shares for every step, the same each time; it changes nothing that it was given,
    applies to a newer history and to another number of experts, holds a load that never moved, and the forecast of a
    shorter horizon is the beginning of a longer one unless the predictor is `by_horizon`.

    >>> import moetrace as mt
    >>> mt.check_predictor(mt.Level())
    """
    rng = np.random.default_rng(0)
    wide, narrow = (_layer(rng.multinomial(2000, rng.dirichlet(np.full(n, 5.0)), size=2000)) for n in (8, 5))
    before, fitted = wide.counts.copy(), predictor.fit([wide.until(1500)])
    found = fitted.forecast(wide, 130)
    assert found.shares.shape == (130, 8), f"a forecast of 130 steps of 8 experts has the shape {found.shares.shape}"
    assert np.isfinite(found.shares).all(), "a forecast has shares that are no numbers"
    assert np.allclose(found.shares.sum(axis=1), 1, atol=0.1), "the shares of a step do not sum to 1"
    again = predictor.fit([wide.until(1500)]).forecast(wide, 130).shares
    assert np.array_equal(found.shares, again), "the same history has another forecast the second time"
    assert np.array_equal(before, wide.counts), "the history was changed"
    assert fitted.forecast(narrow, 40).shares.shape == (40, 5), "another number of experts cannot be forecast"
    if not predictor.by_horizon:
        shorter = fitted.forecast(wide, 70).shares
        assert np.array_equal(found.shares[:70], shorter), "a shorter horizon has another forecast: set by_horizon"
    still = _layer(np.tile([500, 300, 200, 0], (2000, 1)))
    held = predictor.fit([still]).forecast(still, 100).shares
    assert np.allclose([0.5, 0.3, 0.2, 0.0], held, atol=1e-6), "a load that never moved is not forecast where it is"


def _layer(counts: Counts) -> LayerLoad:
    """One layer of *counts* (steps, experts), from step 1 on."""
    return LayerLoad("check", 0, np.arange(1, len(counts) + 1), counts.astype(np.int64), 0)
