"""How far apart the loads of two traces are, layer by layer, and what two samples of one load would show.

The distance is the total variation of the mean shares, ``sum_e |a_e - b_e| / 2``: the part of the token choices that
go to other experts. For two samples of one load it has the size of the noise floors of both means (`analysis.noise`,
autocorrelation included). How it scatters is drawn: differences of neighbouring blocks of steps have the noise and
nothing of the load, so that their sum with random weights is an error that the mean may have. The weights are the same
in all layers, whose errors are not independent: they are of the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moetrace.analysis.noise import GAP, mean_noise, pooled_shares
from moetrace.analysis.states import rank_correlation
from moetrace.residency.sets import ranked
from moetrace.trace import LayerLoad, LoadTrace, Shares

# Blocks whose differences are drawn from: so many, but of no fewer steps than those over which batches correlate,
# unless that leaves fewer than the least. So 0 to 7% of synthetic pairs of one load are called different, of every kind
# in tests/comparison from 200 steps on.
BLOCKS, LEAST_BLOCKS, DRAWS = 200, 10, 2000
# Loads are the same within this quantile of the draws, both by the mean over layers and by the layer that differs most.
QUANTILE = 1 - 0.05 / 2
# A rank correlation is not by chance from so many of its standard deviations on; experts are others where it is by
# chance, and could not be more than this.
CERTAIN, UNLIKE = 2.0, 0.5
SAME, PERMUTED, DIFFERENT, UNKNOWN = "same", "permuted", "different", "unknown"


@dataclass(frozen=True, eq=False)
class Sample:
    """The load of a layer over some steps.

    *shares* (experts,) are the means, *noise* is the expected ``sum_e |error_e|`` of them, NaN where unknown,
    *differences* (pairs, experts) are those of neighbouring blocks, and *halves* is the distance of the two halves.
    """

    layer: int
    shares: Shares
    noise: float
    differences: Shares
    halves: float

    @classmethod
    def of(cls, load: LayerLoad) -> Sample:
        """From all steps of *load*."""
        rows = len(load.steps)
        block = max(1, min(max(load.rows(GAP), rows // BLOCKS), rows // LEAST_BLOCKS))
        blocks = pooled_shares(load.counts, block)[::block]
        first, second = (own.sum(axis=0) / max(own.sum(), 1) for own in np.array_split(load.counts, 2))
        halves = total_variation(first, second) if rows > 1 else float("nan")
        return cls(load.layer, load.mean_shares, mean_noise(load, rows), np.diff(blocks, axis=0), halves)

    def errors(self, seed: int) -> Shares:
        """Errors that the mean may have, of the size of its noise, shape (draws, experts)."""
        drawn = np.random.default_rng(seed).normal(size=(DRAWS, len(self.differences))) @ self.differences
        size = np.abs(drawn).sum(axis=1).mean()
        errors: Shares = drawn * (self.noise / size if size else self.noise)
        return errors


def samples_of(trace: LoadTrace) -> list[Sample]:
    """That of each layer."""
    return [Sample.of(load) for load in trace.by_layer()]


def total_variation(one: Shares, other: Shares) -> float:
    """Half of the sum over experts of how far apart the two shares are."""
    return float(np.abs(one - other).sum() / 2)


class Distance(NamedTuple):
    """How far apart two loads are.

    *layers* has a row for each layer: ``layer``, ``distance``, ``noise`` (that of two samples of one load, on average),
    ``noise_high`` (97.5% of it), ``halves`` (the larger distance of the two halves of one of the traces),
    ``sorted_distance`` (of the shares by rank), ``rank_correlation`` (Spearman) and ``overlap``, the part of the *top*
    experts of one that are among those of the other. *distance*, *noise* and *sorted_distance* are means over layers;
    *same* is whether the loads are, None where it is unknown, and *order* whether experts mean the same in both.
    """

    layers: list[dict[str, Any]]
    top: int
    distance: float
    noise: float
    sorted_distance: float
    same: bool | None
    order: str


def distance_of(a: Sequence[Sample], b: Sequence[Sample], top: int) -> Distance:
    """That of two traces with the same layers and experts."""
    rows, drawn = [], []
    for one, other in zip(a, b):
        errors = np.abs(one.errors(0) - other.errors(1)).sum(axis=1) / 2
        drawn.append(errors)
        apart = total_variation(np.sort(one.shares), np.sort(other.shares))
        first, second = (ranked(own.shares)[:top] for own in (one, other))
        rows.append(
            {
                "layer": one.layer,
                "distance": total_variation(one.shares, other.shares),
                "noise": float(errors.mean()),
                "noise_high": float(np.quantile(errors, QUANTILE)),
                "halves": max(one.halves, other.halves),
                "sorted_distance": apart,
                "rank_correlation": float(rank_correlation(one.shares[None], other.shares[None], np.nan)[0]),
                "overlap": len(np.intersect1d(first, second)) / top,
            }
        )
    distances, sorted_distances = (np.array([row[name] for row in rows]) for name in ("distance", "sorted_distance"))
    errors = np.array(drawn)
    same = _within(distances, errors)
    order = _order([row["rank_correlation"] for row in rows], len(a[0].shares), same, _within(sorted_distances, errors))
    noise = float(np.mean([row["noise"] for row in rows]))
    return Distance(rows, top, float(distances.mean()), noise, float(sorted_distances.mean()), same, order)


def _within(distances: Shares, errors: Shares) -> bool | None:
    """Whether *distances* (layers,) are no larger than *errors* (layers, draws) make them; None where not known."""
    known = np.isfinite(errors).all(axis=1)
    if not known.any():
        return None
    size = errors[known].mean(axis=1)
    size[size == 0] = np.finfo(float).tiny  # a load without any noise: every distance is beyond it
    found, drawn = distances[known] / size, errors[known] / size[:, None]
    mean, most = (np.quantile(own, QUANTILE) for own in (drawn.mean(axis=0), drawn.max(axis=0)))
    return bool(found.mean() <= mean and found.max() <= most)


def _order(correlations: Sequence[float], experts: int, same: bool | None, same_sorted: bool | None) -> str:
    """Whether experts mean the same in two traces, by the rank correlation of every layer.

    For unrelated orders it has the mean 0 and the variance ``1 / (experts - 1)``.
    """
    known = np.array([value for value in correlations if value == value])
    if same or not len(known):
        return SAME if same else UNKNOWN
    chance = 1 / np.sqrt((experts - 1) * len(known))
    if known.mean() > CERTAIN * chance:
        return SAME
    if same_sorted:
        return PERMUTED
    return DIFFERENT if known.mean() + CERTAIN * chance < UNLIKE else UNKNOWN
