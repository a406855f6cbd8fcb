"""How unbalanced a load is, in the definition of every project, under its own name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from moetrace.trace import Shares

# Steps at the end that stand for the present load.
RECENT = 1000


def max_over_mean(load: Shares) -> float:
    """How much longer than the average the busiest one takes: 1 is best. *load* has shape (experts,) or (gpus,)."""
    return float(load.max() / load.mean())


def entropy(load: Shares) -> float:
    """Entropy over that of equal loads: 1 is best."""
    if len(load) == 1:
        return 1.0
    share = load / load.sum()
    share = share[share > 0]  # after the division, in which the smallest loads become 0
    return float(-(share * np.log(share)).sum() / np.log(len(load)))


def gini(load: Shares) -> float:
    """Gini coefficient: 0 is best. ``sum_ij |x_i - x_j| / (2 n^2 mean)``, from the sorted loads."""
    n = len(load)
    rank = 2 * np.arange(1, n + 1) - n - 1
    return float((rank * np.sort(load)).sum() / (n * load.sum()))


IMBALANCE: Mapping[str, tuple[Callable[[Shares], float], str]] = {
    "mean_over_max": (lambda load: float(load.mean() / load.max()), "vLLM, SGLang (balancedness)"),
    "max_over_mean": (max_over_mean, "OLMo-core, Megatron-LM (overload factor), LAER-MoE"),
    "max_violation": (lambda load: float(load.max() / load.mean() - 1), "TensorRT-LLM, MaxVio"),
    "cv": (lambda load: float(load.std() / load.mean()), "MindSpeed, NeMo Automodel"),
    "entropy": (entropy, "TRL (normalised entropy)"),
    "dead_fraction": (lambda load: float((load == 0).mean()), "NeMo Automodel"),
    "gini": (gini, "economics; in no framework"),
}
"""Every definition of imbalance by name, and whose it is; mean_over_max and entropy are best at 1, the others low."""
