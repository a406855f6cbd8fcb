"""The level of a layer: an exponential average of its load, as slow as its noise and drift ask for."""

from __future__ import annotations

import numpy as np

from moetrace.analysis.variogram import BLOCK, FAR_LAGS, motion
from moetrace.trace import LayerLoad, Shares

# The smallest gain: means of the last 100 blocks, 5,000 steps, on average.
LEAST_GAIN = 0.02
# Steps that a level is an average of: at the least gain, older blocks have a weight below 1e-17.
REMEMBERED = 100_000
# Steps that noise and drift are read from: long enough for 30 pairs of blocks 1,000 steps apart, short
# enough to belong to the present. 1,500 and 4,000 err more on gpt-moe-8e-a.
HISTORY = 2500


def gain_of(history: LayerLoad, last: int = HISTORY) -> float:
    """The weight of the newest block of `BLOCK` steps, from noise and drift of the *last* steps."""
    recent = history.last(last)
    gain = motion(recent, lags=FAR_LAGS).gain(recent.rows(BLOCK))
    return float(np.clip(gain, LEAST_GAIN, 1))


def last_level(means: Shares, weight: float) -> Shares:
    """The last of `levels`, shape (experts,), without the others."""
    each = (1 - weight) ** np.arange(len(means))[::-1]
    level: Shares = each @ means / each.sum()
    return level


def levels(means: Shares, weight: float) -> Shares:
    """The level after each of *means*, both (blocks, experts): their exponential average, the newest weighing *weight*.

    The weights are scaled to sum to 1 from the first block on.
    """
    import pandas as pd

    return pd.DataFrame(means).ewm(alpha=weight).mean().to_numpy()
