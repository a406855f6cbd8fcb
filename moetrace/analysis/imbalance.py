"""How unbalanced a load is, in the definition of every project under its own name, and how bad that is.

For the severity of a layer: max/mean up to 2 is what trained models show and serve. With the auxiliary loss MaxVio
(max/mean - 1) is 0.5 to 0.7 (Wang et al. 2024, arXiv 2408.15664, table 2), and GShard gives an expert the capacity of
twice the mean (Lepikhin et al. 2020, arXiv 2006.16668, section 2.2). Beyond twice that, more tokens are dropped or wait
than not. Experts in use are ``exp(entropy) / experts``, as NeMo Automodel reports it: below 0.3 most experts learn and
compute next to nothing, routing collapse (Shazeer et al. 2017, arXiv 1701.06538, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moetrace.analysis.variogram import BLOCK, block_means, cached_per_layer
from moetrace.frames import stacked
from moetrace.trace import LayerLoad, LoadTrace, Shares
from moetrace.words import COLLAPSED, MODERATE, OK, SEVERE, SEVERITIES

if TYPE_CHECKING:
    import pandas as pd

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


# --- severity ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thresholds:
    """Where severities begin.

    *moderate* and *severe* are max/mean; a layer is also severe with *idle* of its experts without a token, and
    collapsed with less than *in_use* experts in use (``exp(entropy) / experts``) or one *dominating* share among more
    than two experts.
    """

    moderate: float = 2.0
    severe: float = 4.0
    idle: float = 0.25
    in_use: float = 0.3
    dominating: float = 0.8


THRESHOLDS = Thresholds()


class Health(NamedTuple):
    """The load of a layer over its last steps: how bad it is, and the experts that it is about.

    *hottest* is the number of the expert with most load, *idle* how many have none, see also `in_use`. *since* is the
    first step of the block from which on it has been so bad, None where it always was; it is known to a block of
    `BLOCK` steps on either side.
    """

    severity: str
    max_over_mean: float
    hottest: int
    hottest_share: float
    idle: int
    in_use: float
    since: int | None


def in_use(share: Shares) -> float:
    """Experts in use, as a fraction: ``exp(entropy) / experts`` for the *share* (experts,) of each expert."""
    experts = len(share)
    return float(np.exp(entropy(share) * np.log(experts)) / experts)


def severity_of(share: Shares, thresholds: Thresholds = THRESHOLDS) -> str:
    """The severity of a load with *share* (experts,) of each expert.

    >>> severity_of(np.array([0.97, 0.01, 0.01, 0.01])), severity_of(np.full(8, 1 / 8))
    ('collapsed', 'ok')
    """
    experts, idle = len(share), float((share == 0).mean())
    if experts > 2 and (in_use(share) < thresholds.in_use or share.max() >= thresholds.dominating):
        return COLLAPSED
    peak = max_over_mean(share)
    if peak > thresholds.severe or idle >= thresholds.idle:
        return SEVERE
    return MODERATE if peak > thresholds.moderate or idle > 0 else OK


@cached_per_layer
def health(load: LayerLoad, last: int = RECENT, thresholds: Thresholds = THRESHOLDS) -> Health:
    """The health of a layer over its *last* steps.

    >>> import moetrace as mt
    >>> health(mt.synthetic_trace([mt.settling(500, steps=2000)]).layer(0)).severity
    'ok'
    """
    share = load.last(last).mean_shares
    severity, hottest = severity_of(share, thresholds), int(share.argmax())
    since = None
    if severity != OK:
        rows = min(load.rows(BLOCK), len(load.steps))
        means = block_means(load, rows)
        level = SEVERITIES.index(severity)
        better = [i for i, mean in enumerate(means) if SEVERITIES.index(severity_of(mean, thresholds)) < level]
        if better and better[-1] + 1 < len(means):
            since = int(load.steps[len(load.steps) - (len(means) - better[-1] - 1) * rows])
    number, idle = int(load.expert_numbers[hottest]), int((share == 0).sum())
    return Health(severity, max_over_mean(share), number, float(share[hottest]), idle, in_use(share), since)


def balance_frame(load: LayerLoad, last: int = RECENT) -> pd.DataFrame:
    """One row: the `Health` of a layer over its *last* steps, and over how many *steps* it is taken."""
    import pandas as pd

    recent = load.last(last)
    steps = int(recent.steps[-1] - recent.steps[0]) + 1
    row = {"trace": load.trace, "layer": load.layer, "steps": steps} | health(load, last)._asdict()
    return pd.DataFrame([row]).astype({"since": "Int64"})


def health_frame(trace: LoadTrace) -> pd.DataFrame:
    """The `balance_frame` of every layer of *trace*."""
    return stacked([balance_frame(load) for load in trace.by_layer()])
