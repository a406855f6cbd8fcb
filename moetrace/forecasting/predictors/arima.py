"""`arima`: ARIMA(p, d, q) on block means of the shares, through statsmodels."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moetrace.analysis.variogram import block_means, weights
from moetrace.forecasting.predictors.base import Fitted, Forecast, Predictor, by_expert, diverged, live
from moetrace.trace import LayerLoad, Shares, rows_of

# A root this close to the unit circle is an estimate that ran into the border: its forecasts explode
# or hardly react. statsmodels' own transformation keeps roots outside the circle, not away from it.
LEAST_ROOT = 1.001


@dataclass(frozen=True)
class Arima(Predictor):
    """ARIMA of *order* (p, d, q) on means of *block* steps over the last *history* steps.

    Without autoregression (p = 0, d = 1) the moving-average parameters are shared by the experts of a layer: their
    differenced, scaled series are fitted as one, which is steadier and takes one fit instead of one for each expert.
    With it, each expert has parameters of its own. Defaults by measurement on the sample trace gpt-moe-8e-a
    (`benchmarks/README.md`): (0,1,1), a local level, on means of 50 steps. The paper has (5,1,5) on single steps:
    ``arima:order=5,1,5:block=1``.
    """

    name = "arima"
    # Shared parameters move so slowly that fitting them more often made no forecast better on that trace.
    refit_growth = 1.15
    order: tuple[int, int, int] = (0, 1, 1)
    block: int = 50
    history: int = 2500

    def least_rows(self, stride: int) -> int:
        """Enough blocks for twice as many differences as parameters, and at least 8."""
        p, d, q = self.order
        return max(8, 2 * (p + q) + d) * rows_of(self.block, stride)

    @property
    def shares_parameters(self) -> bool:
        """Whether the experts of a layer have their parameters in common."""
        p, d, q = self.order
        return p == 0 and d == 1 and q > 0

    def fit(self, histories: Iterable[LayerLoad]) -> Fitted:
        """Estimate the moving-average parameters of all series together, where they are shared.

        The differences of each expert, over the square root of its share (which makes their variances alike), are laid
        end to end with q + 1 gaps between: no memory of a moving average reaches across.
        """
        if not self.shares_parameters:
            return FittedArima(self, None)
        q, pieces = self.order[2], []
        for blocks in map(self.means, histories):
            scaled = np.diff(blocks, axis=0) * np.sqrt(weights(blocks.mean(axis=0)))  # (blocks - 1, experts)
            gap = np.full((q + 1, scaled.shape[1]), np.nan)
            pieces.append(np.concatenate([scaled, gap]).T.ravel())
        series = np.concatenate(pieces)
        scale = np.nanstd(series)
        if not scale > 0:
            return FittedArima(self, None)
        # The variance follows from the others and is not searched for: half the time, the same parameters.
        parameters, problem = _estimate(series / scale, (0, 0, q), concentrate_scale=True)
        return FittedArima(self, None if problem else parameters)

    def means(self, history: LayerLoad) -> Shares:
        """The block means that are fitted, shape (blocks, experts)."""
        steps = max(self.history, self.least_rows(history.stride) * history.stride)
        return block_means(history.last(steps), history.rows(self.block))


@dataclass(frozen=True, eq=False)
class FittedArima(Fitted):
    """Shared *parameters* (q,), or None where their fit failed, or each expert is fitted when it is forecast."""

    settings: Arima
    parameters: np.ndarray[Any, np.dtype[np.float64]] | None

    def forecast(self, history: LayerLoad, horizon: int) -> Forecast:
        """Forecast block by block; an expert whose fit fails keeps the mean of its last 1,000 steps."""
        block_steps = history.rows(self.settings.block) * history.stride
        means = self.settings.means(history)
        blocks = -(-horizon // block_steps)
        if self.settings.shares_parameters:
            rows, failures = _forecast_together(means, self.parameters, blocks)
        else:
            rows, failures = _forecast_each(means, self.settings.order, blocks)
        return by_expert(rows, failures, history, block_steps, horizon)


def _estimate(
    series: Any, order: tuple[int, int, int], trend: str = "n", *, concentrate_scale: bool = False
) -> tuple[Any, str | None]:
    """Parameters and None, or None and the name of what went wrong."""
    from statsmodels.tsa.arima.model import ARIMA

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each is checked for below and named in the status
        try:
            fit = ARIMA(series, order=order, trend=trend, concentrate_scale=concentrate_scale).fit(cov_type="none")
        except (ValueError, np.linalg.LinAlgError):
            return None, "failed"
    if not np.isfinite(fit.params).all():
        return None, "failed"
    if not fit.mle_retvals["converged"]:
        return None, "not_converged"
    with np.errstate(divide="ignore"):  # a parameter of 0 has its root at infinity
        ar, ma = (np.abs(np.atleast_1d(roots)) for roots in (fit.arroots, fit.maroots))
    if min(ar.min(initial=np.inf), ma.min(initial=np.inf)) < LEAST_ROOT:
        return None, "not_invertible" if ma.min(initial=np.inf) < LEAST_ROOT else "not_stationary"
    return fit.params, None


def _forecast_together(means: Shares, moving: Any, blocks: int) -> tuple[Shares, dict[int, str]]:
    """The next *blocks* means of all experts, (blocks, experts), and what went wrong by expert.

    With p = 0, d = 1 the differences are a moving average with the parameters *moving* (q,), and what
    is expected of the next one is linear in the surprises before it (Brockwell and Davis 1991, section
    5.3), with the same weights for every expert: the exact filter, from the first block on.
    """
    from statsmodels.tsa.arima_process import arma_acovf
    from statsmodels.tsa.stattools import innovations_algo

    moved = np.diff(means, axis=0)  # (blocks - 1, experts)
    if moving is None:
        return np.repeat(means[-1:], blocks, axis=0), dict.fromkeys(live(means), "failed")
    n, q = len(moved), len(moving)
    # How much each of the last q surprises says of the next value, (n + q, q); the newest first, and without the
    # columns of last parameters that are 0.
    weight = innovations_algo(arma_acovf([1.0], [1.0, *moving], nobs=q + 1), nobs=n + q)[0]
    weight = np.pad(weight, ((0, 0), (0, q - weight.shape[1])))[:, ::-1]  # the oldest surprise first, as they lie
    surprises = np.zeros((q + n + q, means.shape[1]))  # none before the first, none after the last
    for i in range(n):
        surprises[q + i] = moved[i] - weight[i] @ surprises[i : i + q]
    coming = np.stack([weight[i] @ surprises[i : i + q] for i in range(n, n + q)])  # (q, experts)
    moves = np.zeros((blocks, means.shape[1]))
    moves[:q] = coming[:blocks]
    rows = means[-1] + np.cumsum(moves, axis=0)
    return rows, {expert: "diverged" for expert in live(means) if diverged(rows[:, expert], means[:, expert])}


def _forecast_each(means: Shares, order: tuple[int, int, int], blocks: int) -> tuple[Shares, dict[int, str]]:
    """The next *blocks* means of each expert by a fit of its own, (blocks, experts), and what went wrong by expert."""
    from statsmodels.tsa.arima.model import ARIMA

    rows, failures = np.repeat(means[-1:], blocks, axis=0), {}
    trend = "n" if order[1] else "c"
    for expert in live(means):
        series = means[:, expert]
        level, scale = series.mean(), series.std()
        scaled = (series - level) / scale  # shares of 1/256 are too small for the optimiser's tolerances
        parameters, problem = _estimate(scaled, order, trend)
        if problem:
            failures[expert] = problem
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about starting values, which are not used here
            values = ARIMA(scaled, order=order, trend=trend).filter(parameters, cov_type="none").forecast(blocks)
        values = level + scale * values
        if diverged(values, series):
            failures[expert] = "diverged"
        else:
            rows[:, expert] = values
    return rows, failures
