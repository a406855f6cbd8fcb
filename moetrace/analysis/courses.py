"""The course of a layer's load in few numbers: its peak, and its hottest experts beside the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moetrace.analysis.imbalance import RECENT
from moetrace.analysis.variogram import BLOCK, block_means
from moetrace.trace import LayerLoad, Shares, Steps

if TYPE_CHECKING:
    import pandas as pd

# Moments of a course: more than a map or a small figure can show.
MOMENTS = 240
COURSE_MOMENTS = 120
# Experts that a figure can tell apart.
HOTTEST = 5
# The rest is shown by these quantiles of their shares.
REST = {"low": 0.1, "middle": 0.5, "high": 0.9}


def peaks_frame(load: LayerLoad) -> pd.DataFrame:
    """The load of the hottest expert in mean loads, one row for each block of steps: at most `MOMENTS` rows."""
    import pandas as pd

    ends, means = course(load, MOMENTS)
    peak = means.max(axis=1) * load.experts  # shares of a step sum to 1
    return pd.DataFrame({"trace": load.trace, "layer": load.layer, "step": ends, "peak_over_mean": peak})


def hottest_frame(load: LayerLoad) -> pd.DataFrame:
    """The shares of the `HOTTEST` experts of the last 1,000 steps, and quantiles of all others, by block of steps.

    One row for each *series* and moment: a series is an expert by its number, or ``low``, ``middle``, ``high``.
    """
    import pandas as pd

    ends, means = course(load, COURSE_MOMENTS)
    order = np.argsort(-load.last(RECENT).mean_shares, kind="stable")
    hot, rest = order[:HOTTEST], order[HOTTEST:]
    series = {str(load.expert_numbers[expert]): means[:, expert] for expert in hot}
    if len(rest):
        series |= dict(zip(REST, np.quantile(means[:, rest], list(REST.values()), axis=1)))
    rows = {"trace": load.trace, "layer": load.layer, "step": ends}
    return pd.concat([pd.DataFrame({**rows, "series": name, "share": share}) for name, share in series.items()])


def course(load: LayerLoad, moments: int) -> tuple[Steps, Shares]:
    """The last step and the mean shares of each of at most *moments* blocks, shape (blocks, experts)."""
    rows = max(load.rows(BLOCK), -(-len(load.steps) // moments))
    rows = min(rows, max(1, len(load.steps) // 2))
    means = block_means(load, rows)
    return load.steps[len(load.steps) - len(means) * rows :].reshape(-1, rows)[:, -1], means
