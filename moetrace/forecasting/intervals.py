"""How far the load of a horizon may be from its forecast: intervals from noise and drift, and how well they held.

For a local level with noise n and drift d per step (`moetrace.analysis.variogram`), the mean share of expert e over
a horizon of H steps scatters around the estimated level with the variance

    var_e = p_e (1 - p_e) n / (E - 1) / H  +  p_e (f + d H / 3) / E

with f the variance of the estimated level in the steady state of the filter; like n and d it is a sum
over the E experts relative to their shares. The terms are sampling, the error of the estimated level, and
its random walk, whose mean over H steps has a third of the variance of its end. The standard deviation is
scaled by how far off the same predictor was at earlier cutoffs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moetrace.analysis.variogram import BLOCK, FAR_LAGS, SHARE_FLOOR, motion
from moetrace.trace import LayerLoad, Shares

# The two intervals every forecast carries, and the quantiles of the normal distribution they reach to.
QUANTILES = {80: 1.2816, 95: 1.9600}
# Steps that noise and drift are read from, as for the level.
HISTORY = 2500
# The share of an expert is that of its last steps.
SHARE_WINDOW = 500
# How many earlier cutoffs it takes to outweigh the formula.
PRIOR_CUTOFFS = 2


def spread(history: LayerLoad, horizon: int) -> Shares:
    """Standard deviation of the mean share over *horizon* steps around a good forecast of it, shape (experts,)."""
    recent = history.last(HISTORY)
    variogram, rows = motion(recent, lags=FAR_LAGS), recent.rows(BLOCK)
    ahead = max(1, round(horizon / history.stride))
    level = variogram.gain(rows) * variogram.noise / rows
    share = np.maximum(history.last(SHARE_WINDOW).mean_shares, SHARE_FLOOR / history.experts)
    sampling = share * (1 - share) * variogram.noise / max(1, history.experts - 1) / ahead
    moving = share * (level + variogram.drift * ahead / 3) / history.experts
    forecast_std: Shares = np.sqrt(sampling + moving)
    return forecast_std


def squared_miss(predicted: Shares, actual: Shares, deviation: Shares) -> float:
    """Mean over experts of the squared error in units of *deviation*: 1 where the formula is right; all (experts,).

    Experts without deviation are left out.
    """
    known = deviation > 0
    z = (predicted - actual)[known] / deviation[known]
    return float(np.mean(np.square(z))) if known.any() else 0.0


def scale(misses: Sequence[float]) -> float:
    """The factor for the deviation of the formula, from `squared_miss` at earlier cutoffs; NaN where not known yet."""
    known = [miss for miss in misses if miss == miss]
    return float(np.sqrt((PRIOR_CUTOFFS + sum(known)) / (PRIOR_CUTOFFS + len(known))))


def bounds(predicted: Shares, deviation: Shares) -> dict[str, Shares]:
    """``low_80``, ``high_80``, ``low_95``, ``high_95`` for means and deviations (experts,), within 0 and 1."""
    ends = {}
    for percent, quantile in QUANTILES.items():
        ends[f"low_{percent}"] = np.clip(predicted - quantile * deviation, 0, 1)
        ends[f"high_{percent}"] = np.clip(predicted + quantile * deviation, 0, 1)
    return ends
