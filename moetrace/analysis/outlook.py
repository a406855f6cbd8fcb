"""How far the load of the steps to come may be from a good forecast of it, told from the past alone.

For a local level with noise n and drift d per step (`moetrace.analysis.variogram`), the mean share of expert e over
a horizon of H steps scatters around the estimated level with the variance

    var_e = p_e (1 - p_e) n / (E - 1) / H  +  p_e (f + d H / 3) / E

with f the variance of the estimated level in the steady state of the filter; like n and d it is a sum
over the E experts relative to their shares. The terms are sampling, the error of the estimated level, and
its random walk, whose mean over H steps has a third of the variance of its end.

A load that calms down is told too lively from a long past, and the drift over long distances is not seen in a
short one. So both are asked, and the answer is the geometric mean of the two.
"""

from __future__ import annotations

import numpy as np

from moetrace.analysis.variogram import BLOCK, FAR_LAGS, SHARE_FLOOR, motion
from moetrace.trace import LayerLoad, Shares

# Steps that noise and drift are read from: as for the level, and as long as the horizon that is mostly asked for.
# On gpt-moe-8e-a both together are right to a factor of 1.2 where either alone is to one of 1.5.
MEMORIES = (2500, 1000)
# The share of an expert is that of its last steps.
SHARE_WINDOW = 500


def deviation(history: LayerLoad, horizon: int) -> Shares:
    """Standard deviation of the mean share over *horizon* steps around a good forecast of it, shape (experts,)."""
    short, long = (_variance(history, horizon, memory) for memory in MEMORIES)
    expected: Shares = (short * long) ** 0.25
    return expected


def _variance(history: LayerLoad, horizon: int, memory: int) -> Shares:
    recent = history.last(memory)
    found, rows = motion(recent, lags=min(FAR_LAGS, memory // BLOCK // 2)), recent.rows(BLOCK)
    ahead = max(1, round(horizon / history.stride))
    level = found.gain(rows) * found.noise / rows
    share = np.maximum(history.last(SHARE_WINDOW).mean_shares, SHARE_FLOOR / history.experts)
    sampling = share * (1 - share) * found.noise / max(1, history.experts - 1) / ahead
    variance: Shares = sampling + share * (level + found.drift * ahead / 3) / history.experts
    return variance


def expected_movement(history: LayerLoad, horizon: int) -> float:
    """``sum_e E|difference|`` of a normal scatter that wide: the error of a good forecast, a fraction.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=4000)])
    >>> early, late = (mt.expected_movement(trace.layer(0).until(step), 1000) for step in (500, 4000))
    >>> early > 0.1, late < 0.04
    (True, True)
    """
    return total_error(deviation(history, horizon))


def total_error(deviation: Shares) -> float:
    """Expected sum of absolute errors of standard *deviation* (experts,), normally distributed."""
    return float(np.sqrt(2 / np.pi) * deviation.sum())
