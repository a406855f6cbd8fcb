"""What a predictor is: immutable settings that fit a history, and what is fitted, that forecasts.

`check_predictor` tests that a new one keeps to what the backtest relies on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moetrace.trace import LayerLoad, LoadTrace, Shares

OK = "ok"
# Steps of each of the two windows a trend is measured between: shorter ones measure noise.
TREND_WINDOW = 1000
# Standard deviations of its history that a forecast of a series may move away from its mean.
LARGEST_MOVE = 20


@dataclass(frozen=True, eq=False)
class Forecast:
    """Predicted shares, one row for each of the *horizon* steps after the history.

    *shares* has shape (horizon, experts) and need be neither clipped nor normalised: whoever asked
    does that once, for all predictors. *status* is ``"ok"``, or names the fallback that stands in.
    """

    shares: Shares
    status: str = OK


class Fitted(ABC):
    """What a predictor learned; `forecast` may be given a newer history than the one it was fitted on."""

    @abstractmethod
    def forecast(self, history: LayerLoad, horizon: int) -> Forecast:
        """The shares of the *horizon* steps after the last one of *history*."""

    def save(self, path: Path) -> None:
        """Write what was learned to *path*, whole or not at all; needed where one fit serves all layers."""
        raise NotImplementedError(f"{type(self).__name__} cannot be saved")


@dataclass(frozen=True)
class Predictor(ABC):
    """A way to predict; its fields are its settings, reachable as ``name:setting=value``.

    *least_rows* says how many steps of the history must have been logged, *needs* how many there must be. It is fitted
    anew when the history has become *refit_growth* times as long as that of the last fit; in between, what was fitted
    is applied to the newer history. *pools_layers* says that one fit serves all layers of a trace, *by_horizon* that
    the forecast of a shorter horizon is not the beginning of that of a longer one.
    """

    name: ClassVar[str]
    refit_growth: ClassVar[float] = 1.0
    pools_layers: ClassVar[bool] = False
    by_horizon: ClassVar[bool] = False

    @property
    def needs(self) -> int:
        """The least number of steps of history: that of a log of every step, unless it says otherwise."""
        return self.least_rows(1)

    def least_rows(self, stride: int) -> int:  # noqa: ARG002 - of those that average over blocks
        """The least number of logged steps, where they are *stride* steps apart."""
        return 1

    def facts(self) -> dict[str, Any]:
        """What tells its forecasts from those of others of its class, as JSON has it: part of the key of a result."""
        return asdict(self)

    @abstractmethod
    def fit(self, histories: Iterable[LayerLoad]) -> Fitted:
        """Learn from the *histories* of one or many layers, of one run or of many; they may come one at a time.

        None of them is changed. Failing is no exception: `Forecast.status` reports it.
        """

    def load(self, path: Path) -> Fitted:
        """What `Fitted.save` wrote to *path*; raises `SettingError` for any other file."""
        raise NotImplementedError(f"{self.name} cannot be loaded")


@dataclass(frozen=True)
class Untrained(Predictor, Fitted):
    """A predictor with nothing to learn: its settings and the history are all it forecasts from."""

    def fit(self, histories: Iterable[LayerLoad]) -> Fitted:  # noqa: ARG002 - nothing to learn
        """Nothing to learn."""
        return self


def hold(rows: Shares, steps_per_row: int, horizon: int) -> Shares:
    """Each row kept for *steps_per_row* steps, the last one for the rest, shape (horizon, experts).

    A forecast made in logged rows, or in blocks of them, becomes one for every step.
    """
    index: NDArray[np.intp] = np.arange(horizon) // steps_per_row
    return rows[np.minimum(index, len(rows) - 1)]


def live(means: Shares) -> list[int]:
    """The experts whose share moves; a dead one above all does not, and keeps its share."""
    return np.flatnonzero(means.std(axis=0) > 0).tolist()


def diverged(values: NDArray[np.float64], series: NDArray[np.float64]) -> bool:
    """Whether the forecast *values* (rows,) of a *series* are no numbers, or go `LARGEST_MOVE` away from it."""
    return not np.isfinite(values).all() or bool(np.abs(values - series.mean()).max() > LARGEST_MOVE * series.std())


def by_expert(
    rows: Shares, failures: Mapping[int, str], history: LayerLoad, steps_per_row: int, horizon: int
) -> Forecast:
    """A forecast of *rows* (rows, experts), made for each expert apart, for every step of the *horizon*.

    An expert among *failures*, by the name of what went wrong, keeps the mean of its last 1,000 steps.
    """
    rows[:, list(failures)] = history.last(1000).mean_shares[list(failures)]
    status, why = OK, list(failures.values())
    if why:
        status = f"fallback:window_mean:{len(why)}/{history.experts}:{max(why, key=why.count)}"
    return Forecast(hold(rows, steps_per_row, horizon), status)


def ramp(level: Shares, history: LayerLoad, trend: float, horizon: int) -> Shares:
    """*level* (experts,) plus *trend* times the change between the last two 1,000 steps, shape (horizon, experts).

    The change is a slope between the middles of the two windows, carried on from the middle of the
    last one; without 1,500 steps of history there is none.
    """
    recent = history.last(TREND_WINDOW)
    border = int(recent.steps[0])
    before = history.between(border - TREND_WINDOW, border - 1)
    if not trend or len(before.steps) < history.rows(TREND_WINDOW) / 2:
        return constant(level, horizon)
    slope = (recent.mean_shares - before.mean_shares) / TREND_WINDOW
    ahead = TREND_WINDOW / 2 + np.arange(1, horizon + 1)
    return level + trend * ahead[:, None] * slope


def constant(shares: Shares, horizon: int) -> Shares:
    """The same *shares* (experts,) for every step, shape (horizon, experts); read-only."""
    return np.broadcast_to(shares, (horizon, len(shares)))


def is_constant(shares: Shares) -> bool:
    """Whether *shares* (horizon, experts) are those of `constant`: one row in memory, however many steps."""
    return len(shares) > 1 and shares.strides[0] == 0


def check_predictor(predictor: Predictor) -> None:
    """Raise `AssertionError` if a *predictor* breaks what the backtest relies on; for the tests of a plug-in.

    A forecast has a row of finite shares for every step, the same each time; it changes nothing that it was given,
    applies to a newer history and to another number of experts, holds a load that never moved, and the forecast of a
    shorter horizon is the beginning of a longer one unless the predictor is `by_horizon`.

    >>> import moetrace as mt
    >>> mt.check_predictor(mt.Level())
    """
    rng = np.random.default_rng(0)
    counts = (rng.multinomial(2000, rng.dirichlet(np.full(n, 5.0)), size=2000) for n in (8, 5))
    still_counts = np.tile([500, 300, 200, 0], (2000, 1))
    wide, narrow, still = (LoadTrace.from_counts(own[:, None]).layer(0) for own in (*counts, still_counts))
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
    held = predictor.fit([still]).forecast(still, 100).shares
    assert np.allclose([0.5, 0.3, 0.2, 0.0], held, atol=1e-6), "a load that never moved is not forecast where it is"
