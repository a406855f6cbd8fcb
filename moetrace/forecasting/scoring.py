"""The error of a forecast: every definition under its own name.

p[t, e] is the share of expert e in step t after the cutoff, n[t] the tokens of that step,
q[t, e] the predicted share; all for one layer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moetrace.forecasting.predictors.base import is_constant
from moetrace.trace import Counts, Shares


class Errors(NamedTuple):
    """The errors of one forecast of one layer, as fractions.

    *error_rate* is ``sum_e |Q[e] - P[e]|``, with the shares of the load over the whole horizon
    ``P[e] = sum_t c[t, e] / sum_t n[t]`` and ``Q[e] = sum_t n[t] q[t, e] / sum_t n[t]``: as shares sum to 1, the
    load-weighted relative error (WAPE). *step_error_rate* is ``mean_t sum_e |q[t, e] - p[t, e]|``. *mape* is
    ``mean_e |Q[e] - P[e]| / P[e]`` over the experts with any load; *idle_experts* counts the others. *abs_points* is
    ``mean_e |Q[e] - P[e]|``.
    """

    error_rate: float
    step_error_rate: float
    mape: float
    idle_experts: int
    abs_points: float


def predicted_shares(forecast: Shares, totals: Counts) -> Shares:
    """Share of the load that *forecast* (steps, experts) predicts, each step weighed by *totals*, shape (experts,)."""
    predicted: Shares = forecast[0] if is_constant(forecast) else totals @ forecast / totals.sum()
    return predicted


def step_errors(forecast: Shares, shares: Shares) -> Shares:
    """``sum_e |q[t, e] - p[t, e]|`` of each step, shape (steps,); *forecast* and *shares* are (steps, experts)."""
    apart = forecast - shares
    total: Shares = np.abs(apart, out=apart).sum(axis=1)
    return total


def errors(predicted: Shares, actual: Shares, by_step: Shares) -> Errors:
    """The errors of *predicted* against *actual* shares, both (experts,); *by_step* (steps,) are the `step_errors`."""
    apart, loaded = np.abs(predicted - actual), actual > 0
    mape = float((apart[loaded] / actual[loaded]).mean())
    return Errors(float(apart.sum()), float(by_step.mean()), mape, int((~loaded).sum()), float(apart.mean()))
