"""How wrong a forecast is, and how unbalanced a load: every definition under its own name.

p[t, e] is the share of expert e in step t after the cutoff, n[t] the tokens of that step,
q[t, e] the predicted share; all for one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from moetrace.trace import Counts, Shares


class Errors(NamedTuple):
    """The errors of one forecast of one layer, as fractions.

    *error_rate* is ``sum_e |Q[e] - P[e]|``, with the shares of the load over the whole horizon
    ``P[e] = sum_t c[t, e] / sum_t n[t]`` and ``Q[e] = sum_t n[t] q[t, e] / sum_t n[t]``.
    Because shares sum to 1 it is the load-weighted relative error (WAPE).
    *step_error_rate* is ``mean_t sum_e |q[t, e] - p[t, e]|``.
    *mape* is ``mean_e |Q[e] - P[e]| / P[e]`` over the experts with any load; *idle_experts* counts the
    others. *abs_points* is ``mean_e |Q[e] - P[e]|``.
    """

    error_rate: float
    step_error_rate: float
    mape: float
    idle_experts: int
    abs_points: float


def errors(forecast: Shares, counts: Counts) -> Errors:
    """The errors of *forecast* against *counts*, both of shape (steps, experts)."""
    totals = counts.sum(axis=1)  # (steps,)
    predicted = totals @ forecast / totals.sum()  # (experts,)
    actual = counts.sum(axis=0) / totals.sum()  # (experts,)
    apart = np.abs(predicted - actual)
    loaded = actual > 0
    return Errors(
        error_rate=float(apart.sum()),
        step_error_rate=float(np.abs(forecast - counts / totals[:, None]).sum(axis=1).mean()),
        mape=float((apart[loaded] / actual[loaded]).mean()),
        idle_experts=int((~loaded).sum()),
        abs_points=float(apart.mean()),
    )


def mean_over_max(load: Shares) -> float:
    """Balancedness: 1 is best. *load* has shape (experts,) or (gpus,)."""
    return float(load.mean() / load.max())


def max_over_mean(load: Shares) -> float:
    """How much longer than the average the busiest one takes: 1 is best."""
    return float(load.max() / load.mean())


def max_violation(load: Shares) -> float:
    """(max - mean) / mean: 0 is best."""
    return float(load.max() / load.mean() - 1)


def cv(load: Shares) -> float:
    """Standard deviation over mean: 0 is best."""
    return float(load.std() / load.mean())


def entropy(load: Shares) -> float:
    """Entropy over that of equal loads: 1 is best."""
    if len(load) == 1:
        return 1.0
    share = load / load.sum()
    share = share[share > 0]  # after the division, in which the smallest loads become 0
    return float(-(share * np.log(share)).sum() / np.log(len(load)))


def dead_fraction(load: Shares) -> float:
    """Fraction without any load: 0 is best."""
    return float((load == 0).mean())


def gini(load: Shares) -> float:
    """Gini coefficient: 0 is best. ``sum_ij |x_i - x_j| / (2 n^2 mean)``, from the sorted loads."""
    n = len(load)
    rank = 2 * np.arange(1, n + 1) - n - 1
    return float((rank * np.sort(load)).sum() / (n * load.sum()))


IMBALANCE: Mapping[str, tuple[Callable[[Shares], float], str]] = {
    "mean_over_max": (mean_over_max, "vLLM, SGLang (balancedness)"),
    "max_over_mean": (max_over_mean, "OLMo-core, Megatron-LM (overload factor), LAER-MoE"),
    "max_violation": (max_violation, "TensorRT-LLM, MaxVio"),
    "cv": (cv, "MindSpeed, NeMo Automodel"),
    "entropy": (entropy, "TRL (normalised entropy)"),
    "dead_fraction": (dead_fraction, "NeMo Automodel"),
    "gini": (gini, "economics; in no framework"),
}
"""Every definition of imbalance by name, and whose it is."""
