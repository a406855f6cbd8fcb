"""The shape of a load in parameters, for whoever makes a load like it: a simulator, a benchmark, a test.

Three families of shares are fitted to the experts of a layer by rank: a power law (Zipf: the share of rank r follows
``r^-s``), a log-normal (``exp(sigma z)``, normalised) and a symmetric Dirichlet distribution. A parameter is that at
which a statistic has its expected value: the mean log rank of a token, the deviation of the log shares, and their mean,
which is maximum likelihood for all three. Its interval, and how often a load of the family fits no better, come from
loads that are drawn with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy  # its modules are loaded when they are used
from numpy.typing import NDArray

from moetrace.analysis.imbalance import RECENT, entropy
from moetrace.analysis.variogram import HISTORY, weights
from moetrace.trace import LayerLoad, LoadTrace, Shares

if TYPE_CHECKING:
    import pandas as pd

# Loads drawn for an interval, and points of a table of parameters, which is interpolated.
DRAWS, POINTS = 400, 300
# Windows of an autocorrelation are so many times as long as the time that comes out (Sokal 1997).
SOKAL = 5
# Sizes of a batch in rows, whose experts are counted; of a part of a row they are only expected.
BATCHES = (1 / 64, 1 / 16, 1 / 4, 1, 4, 16)
EXPERTS_AT_A_TIME = 32
# Shares whose squared relative changes are below this do not change: they are rounding.
STILL = 1e-20


class Family(NamedTuple):
    """Shares of experts by rank that one *parameter* of *grid* describes.

    *statistic* of sorted shares (..., experts) is *known* at each point of the grid, for so many experts; so are the
    *logs* of shares (points, experts), up to a constant. *drawn* has those of random loads.
    """

    parameter: str
    grid: Shares
    statistic: Callable[[Shares], Shares]
    known: Callable[[Shares, int], Shares]
    logs: Callable[[Shares, int], Shares]
    drawn: Callable[[np.random.Generator, float, tuple[int, int]], Shares]


def _log_ranks(experts: int) -> Shares:
    ranks: Shares = np.log(np.arange(1, experts + 1))
    return ranks


def _middles(experts: int) -> Shares:
    """Where the experts by rank lie in their distribution, the most loaded first."""
    middles: Shares = 1 - (np.arange(experts) + 0.5) / experts
    return middles


def _normalised(logs: Shares) -> Shares:
    """Shares in proportion to the exponentials of *logs*, along the last axis, none of them 0."""
    shares: Shares = np.maximum(scipy.special.softmax(logs, axis=-1), np.finfo(float).tiny)
    return shares


FAMILIES = {
    "power_law": Family(
        "exponent",
        np.linspace(0, 8, POINTS),
        lambda shares: shares @ -_log_ranks(shares.shape[-1]),
        lambda grid, n: _normalised(-np.outer(grid, _log_ranks(n))) @ -_log_ranks(n),
        lambda grid, n: -np.outer(grid, _log_ranks(n)),
        lambda rng, exponent, size: -exponent * np.log(rng.random(size)),
    ),
    "log_normal": Family(
        "sigma",
        np.linspace(0, 8, POINTS),
        lambda shares: np.log(shares).std(axis=-1, ddof=1),
        lambda grid, _: grid,
        lambda grid, n: np.outer(grid, scipy.special.ndtri(_middles(n))),
        lambda rng, sigma, size: sigma * rng.normal(size=size),
    ),
    "dirichlet": Family(
        "concentration",
        np.geomspace(1e-2, 1e4, POINTS),
        lambda shares: np.log(shares).mean(axis=-1),
        lambda grid, n: scipy.special.digamma(grid) - scipy.special.digamma(grid * n),
        lambda grid, n: np.log(np.maximum(scipy.special.gammaincinv(grid[:, None], _middles(n)), np.finfo(float).tiny)),
        # A gamma variable of a small shape underflows; that of one more, times a power of a uniform one, does not.
        lambda rng, shape, size: np.log(rng.standard_gamma(shape + 1, size)) + np.log(rng.random(size)) / shape,
    ),
}


@lru_cache(maxsize=16)
def _table(name: str, experts: int) -> tuple[Shares, Shares]:
    """The expected statistic, which grows, and the shares at each point of the grid of a family."""
    family = FAMILIES[name]
    return family.known(family.grid, experts), _normalised(family.logs(family.grid, experts))


def fitted(name: str, shares: Shares) -> tuple[Shares, Shares]:
    """The parameter of that family for each row of sorted *shares* (loads, experts), and the distance of its shares.

    The distance is the total variation, half of the sum of absolute differences.
    """
    family, (known, made) = FAMILIES[name], _table(name, shares.shape[1])
    at = np.interp(family.statistic(shares), known, np.arange(POINTS))
    left = np.minimum(at.astype(int), POINTS - 2)
    part = (at - left)[:, None]
    errors = np.abs((1 - part) * made[left] + part * made[left + 1] - shares).sum(axis=1) / 2
    return np.interp(at, np.arange(POINTS), family.grid), errors


def fit(name: str, shares: Shares, seed: int = 0) -> dict[str, float]:
    """The parameter of a family for *shares* (experts,), none of them 0, with its 95% interval, and how well it fits.

    *NAME_fit* is the distance of the shares from those of the family, *NAME_p* how often a load drawn from the family
    is as far from what is fitted to it: below 0.05, the load is not of that family. Fewer than three experts have no
    shape: all are NaN.

    >>> load = np.random.default_rng(1).dirichlet(np.full(64, 2.0))
    >>> found = fit("dirichlet", load)
    >>> found["concentration_low"] < 2 < found["concentration_high"], found["dirichlet_p"] > 0.05
    (True, True)
    """
    family, experts = FAMILIES[name], len(shares)
    names = family.parameter, f"{family.parameter}_low", f"{family.parameter}_high", f"{name}_fit", f"{name}_p"
    if experts < 3:
        return dict.fromkeys(names, float("nan"))
    (value,), (error,) = fitted(name, -np.sort(-shares)[None])
    drawn = family.drawn(np.random.default_rng(seed), max(float(value), 1e-6), (DRAWS, experts))
    again, errors = fitted(name, -np.sort(-_normalised(drawn), axis=1))
    low, high = np.quantile(again, [0.025, 0.975])
    ends = [float(value**2 / end) if end > 0 else float("nan") for end in (high, low)]
    return dict(zip(names, (float(value), *ends, float(error), float((errors >= error).mean()))))


def shape_row(load: LayerLoad) -> dict[str, Any]:
    """The shape of the load of the last 1,000 steps: the three families, the best of them, and what batches look like.

    ``entropy`` is normalised; ``distinct`` experts are active in a step on average, of ``distinct_expected`` that
    independent choices by the mean shares would give; ``correlation_time`` is of the last 2,500 steps.
    """
    recent = load.last(RECENT)
    shares, tokens = recent.mean_shares, recent.counts.sum()
    # An expert without load has half a token, as its share is not 0 but less than one in all.
    positive = np.maximum(recent.counts.sum(axis=0), 0.5) / tokens
    row: dict[str, Any] = {"trace": load.trace, "layer": load.layer}
    for name in FAMILIES:
        row |= fit(name, positive / positive.sum())
    errors = {name: error for name in FAMILIES if (error := row[f"{name}_fit"]) == error}
    best = min(errors.items(), key=lambda fit: round(fit[1], 9), default=(None, float("nan")))
    row |= dict(zip(("best_fit", "best_fit_error"), best))
    row |= {"entropy": entropy(shares), "distinct": float((recent.counts > 0).sum(axis=1).mean())}
    row["distinct_expected"] = float(expected_distinct(shares, recent.totals).mean())
    return row | {"correlation_time": correlation_time(load)}


def distinct_frame(load: LayerLoad) -> pd.DataFrame:
    """How many experts a batch of so many choices has in the last 1,000 steps: a row for each of `BATCHES`.

    ``distinct`` is the mean, ``distinct_expected`` what independent choices by the mean shares would give.
    """
    import pandas as pd

    rows, load = [], load.last(RECENT)
    for size in BATCHES:
        number = max(1, round(size))
        whole = len(load.steps) // number * number
        if not whole:
            continue
        counts = load.counts[:whole].reshape(-1, number, load.experts).sum(axis=1)
        tokens = counts.sum(axis=1) * min(size, 1)
        seen = float((counts > 0).sum(axis=1).mean()) if size >= 1 else float("nan")
        row = {"trace": load.trace, "layer": load.layer, "batch": float(tokens.mean()), "distinct": seen}
        rows.append(row | {"distinct_expected": float(expected_distinct(load.mean_shares, tokens).mean())})
    return pd.DataFrame(rows)


def expected_distinct(shares: Shares, tokens: NDArray[Any]) -> Shares:
    """``sum_e 1 - (1 - p_e)^n``: experts with a token, of n *tokens* (batches,) that choose by *shares* (experts,)."""
    sizes, where = np.unique(tokens, return_inverse=True)
    with np.errstate(divide="ignore"):
        missed = np.exp(sizes[:, None] * np.log1p(-np.minimum(shares, 1.0)))  # (sizes, experts)
    found: Shares = (1 - missed).sum(axis=1)[where]
    return found


def correlation_time(load: LayerLoad, last: int = HISTORY) -> float:
    """Steps of the *last* ones that hold as much as one independent step: ``1 + 2 sum_k rho_k``, NaN for few rows.

    The integrated autocorrelation time of the shares, pooled over experts by their chi-square weights, with Sokal's
    window. The noise of single steps counts: 1 for independent steps.
    """
    recent = load.last(last)
    rows = len(recent.steps)
    if rows < 2 * SOKAL:
        return float("nan")
    weight, power = np.sqrt(weights(recent.mean_shares)), np.zeros(rows + 1)
    for first in range(0, load.experts, EXPERTS_AT_A_TIME):
        some = slice(first, first + EXPERTS_AT_A_TIME)
        values = (recent.shares[:, some] - recent.shares[:, some].mean(axis=0)) * weight[some]
        power += np.square(np.abs(np.fft.rfft(values, 2 * rows, axis=0))).sum(axis=1)
    lags = np.arange(rows)
    covariance = np.fft.irfft(power)[:rows] / (rows - lags)
    if covariance[0] < STILL:
        return float("nan")
    times = 2 * np.cumsum(covariance / covariance[0]) - 1
    window = int(np.argmax(lags >= SOKAL * times)) or rows // 2
    # What the mean of so few rows takes away (Wolff 2004, equation 49).
    return float(max(times[window] * (1 + (2 * window + 1) / rows), 1.0) * recent.stride)


def shape_frame(trace: LoadTrace) -> pd.DataFrame:
    """The `shape_row` of each layer; the last row has no layer: it is the mean over layers.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> mt.shape_frame(trace)["distinct"].tolist()
    [8.0, 8.0]
    """
    import pandas as pd

    rows = [shape_row(load) for load in trace.by_layer()]
    frame = pd.DataFrame(rows)
    whole = frame.drop(columns=["trace", "layer", "best_fit"]).mean()
    most = frame["best_fit"].mode()
    overall = {"trace": trace.name, "best_fit": most.iloc[0] if len(most) else None} | whole.to_dict()
    return pd.DataFrame([*rows, overall], columns=frame.columns).astype({"layer": "Int64"})
