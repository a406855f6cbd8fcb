"""Two traces compared: how far apart their loads are, and whether the plan and the set of one serve the other.

The distance is the total variation of the mean shares, ``sum_e |a_e - b_e| / 2``: the part of the token choices that
go to other experts. For two samples of one load it has the size of the noise floors of both means
(`analysis.variogram`, autocorrelation included). How it scatters is drawn: differences of neighbouring blocks of steps
have the noise and nothing of the load, so that their sum with random weights is an error that the mean may have. The
weights are the same in all layers, whose errors are not independent: they are of the same tokens.

Plans and sets are scored on the same steps: the second half of the other trace. Its own plan and set are made from the
last steps of its first half, so that none of them has seen what it is scored on; those of the first trace are made from
its last steps. So they differ in nothing but the trace that they come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moetrace.analysis.states import rank_correlation
from moetrace.analysis.variogram import GAP, mean_noise, pooled_shares
from moetrace.errors import SettingError
from moetrace.forecasting.backtest import Progress
from moetrace.placement.planning import Planning, spread
from moetrace.placement.replay import BLOCK, BLOCKS
from moetrace.placement.step_time import BY_TOKENS, HIGHEST_RIDGE, StepTime
from moetrace.placement.verdict import saved_compared
from moetrace.residency.sets import Budget, ranked
from moetrace.trace import LayerLoad, LoadTrace, Shares
from moetrace.words import DEFAULT

if TYPE_CHECKING:
    import pandas as pd

# Blocks whose differences are drawn from: so many, but of no fewer steps than those over which batches correlate,
# unless that leaves fewer than the least. So 0 to 7% of synthetic pairs of one load are called different, of every kind
# in tests/comparison from 200 steps on.
PIECES, LEAST_PIECES, DRAWS = 200, 10, 2000
# Loads are the same within this quantile of the draws, both by the mean over layers and by the layer that differs most.
QUANTILE = 1 - 0.05 / 2
# A rank correlation is not by chance from so many of its standard deviations on; experts are others where it is by
# chance, and could not be more than this.
CERTAIN, UNLIKE = 2.0, 0.5
SAME, PERMUTED, DIFFERENT, UNKNOWN = "same", "permuted", "different", "unknown"
# Experts whose overlap is counted where no number of slots is given: a part of those of a layer.
TOP = 4
# Steps that a plan or a set is made from, as serving systems do.
WINDOW = 1000
OWN, OTHER = "own", "other"


@dataclass(frozen=True, eq=False)
class Comparison:
    """The loads of the traces *a* and *b*.

    *distance* says how far apart they are and whether that is noise, *frames* has its ``layers``, and *transfer* what a
    plan and a set from *a* do on *b*: the fields of ``transfer`` of ``compare --json``, empty if neither was asked for.
    """

    a: str
    b: str
    distance: Distance
    frames: dict[str, pd.DataFrame]
    transfer: dict[str, Any]

    @property
    def same(self) -> bool | None:
        """Whether both have one load as far as the noise floor shows, None where that is unknown."""
        return self.distance.same

    def as_row(self) -> dict[str, Any]:
        """What is said of both, without the layers and the transfer."""
        return {"a": self.a, "b": self.b} | {
            key: own for key, own in self.distance._asdict().items() if key != "layers"
        }


def compare(
    a: LoadTrace,
    b: LoadTrace,
    *,
    gpus: int | None = None,
    redundant: int = 0,
    slots: int | None = None,
    time: StepTime = BY_TOKENS,
    progress: Progress | None = None,
) -> Comparison:
    """How far apart the loads of *a* and *b* are, beyond noise, and whether what is made from one serves the other.

    Loads are the means over all steps of each: select steps first. With *gpus*, and so many *redundant* experts, a plan
    from the last 1,000 steps of *a* is scored on the second half of *b* beside *b*'s own plan, from the 1,000 steps
    before it, and the default placement, by the *time* of the busiest GPU; with *slots*, the sets of so many experts
    of every layer likewise. *progress* counts the layers of that.
    Raises `SettingError` where layers or experts are not the same number, both are steps of one trace that overlap, or
    the experts do not fill the GPUs or slots.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=6000)])
    >>> early, late = trace.select(last=3000), trace.select(first=3001)
    >>> found = mt.compare(early, late, gpus=4)
    >>> found.same, found.distance.distance < 0.03, found.transfer["slower_than_own"] < 0.03
    (False, True, True)
    """
    import pandas as pd

    check_comparable(a, b)
    planning = None if gpus is None else Planning(gpus, redundant, time=time)
    asked = gpus is not None or slots is not None
    transfer = transfer_of(a, b, planning, slots, progress) if asked else {}
    distance = distance_of(samples_of(a), samples_of(b), slots or max(1, a.experts // TOP))
    return Comparison(a.name, b.name, distance, {"layers": pd.DataFrame(distance.layers)}, transfer)


def check_comparable(a: LoadTrace, b: LoadTrace) -> None:
    """Raise `SettingError` unless both have as many layers and experts, and no step of one trace in common."""
    for what, own, other in (("layers", len(a.layers), len(b.layers)), ("experts", a.experts, b.experts)):
        if own != other:
            more = "; --layers selects some" if what == "layers" else ""
            raise SettingError(
                f"{a.name} has {own:,} {what} and {b.name} has {other:,}: loads of one shape compare{more}"
            )
    first, last = max(a.steps[0], b.steps[0]), min(a.steps[-1], b.steps[-1])
    read = [(own.info.source, own.info.fingerprint, own.info.settings) for own in (a, b)]
    one = a.digests == b.digests if a.digests else a.info.fingerprint is not None and read[0] == read[1]
    if one and first <= last:
        name, begin, end = a.name.partition(":")[0], min(a.steps[0], b.steps[0]), max(a.steps[-1], b.steps[-1])
        half = (begin + end) // 2
        raise SettingError(
            f"{a.name} and {b.name} are one trace and share the steps {first:,} to {last:,}: give parts that share "
            f"none, such as {name}:{begin}-{half} {name}:{half + 1}-{end}"
        )


def pairs_frame(traces: Sequence[LoadTrace]) -> pd.DataFrame:
    """How far apart each two of *traces* are that can be compared, a row for each pair, see `Comparison.as_row`."""
    import pandas as pd

    samples: dict[str, list[Sample]] = {}
    rows = []
    for a, b in combinations(traces, 2):
        try:
            check_comparable(a, b)
        except SettingError:
            continue
        for own in (a, b):
            samples[own.name] = samples.get(own.name) or samples_of(own)
        found = distance_of(samples[a.name], samples[b.name], max(1, a.experts // TOP))
        rows.append(Comparison(a.name, b.name, found, {}, {}).as_row())
    return pd.DataFrame(rows)


# --- how far apart -----------------------------------------------------------------------------


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
        block = max(1, min(max(load.rows(GAP), rows // PIECES), rows // LEAST_PIECES))
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


# --- what a plan and a set do on the other -----------------------------------------------------


def transfer_of(
    a: LoadTrace, b: LoadTrace, planning: Planning | None, slots: int | None, progress: Progress | None = None
) -> dict[str, Any]:
    """What plans as of *planning*, and sets of *slots* experts, from *a* do on *b*: ``transfer`` of ``compare --json``.

    Either may be None: not asked. Plans are of `spread` layers; *progress* counts layers.
    Raises `SettingError` if *b* is too short, slots do not fill the GPUs evenly, or a layer has fewer experts.
    """
    if len(b.steps) < 2:
        raise SettingError(
            f"{b.name} has one step; its own plan is made from some steps and scored on others: record more"
        )
    if planning is not None:
        planning.check(b.experts)
    Budget(slots).check(len(b.layers), b.experts)
    cutoff, end = int(b.steps[(len(b.steps) - 1) // 2]), int(b.steps[-1])
    planned = [] if planning is None else spread(b.layers)
    rows, covered = [], []
    for done, (one, other) in enumerate(zip(a.by_layer(), b.by_layer()), 1):
        seen, after = {OTHER: one.last(WINDOW), OWN: other.until(cutoff).last(WINDOW)}, other.between(cutoff + 1, end)
        if planning is not None and other.layer in planned:
            rows += list(_replayed(planning, seen, after))
        sets = [ranked(own.mean_shares)[:slots] for own in (*seen.values(), after)]
        covered.append([float(after.mean_shares[own].sum()) for own in sets])
        if progress:
            progress(done, len(b.layers))
    scored = {"from_step": int(b.steps[b.steps > cutoff][0]), "to_step": end}
    if slots is not None:
        rates = dict(zip(("hit_rate", "own_hit_rate", "best_hit_rate"), np.mean(covered, axis=0).tolist()))
        scored |= {"slots": slots} | rates | {"random_hit_rate": slots / b.experts}
    if planning is not None:
        scored |= {"gpus": planning.gpus, "redundant": planning.redundant} | _slower(rows)
    return scored


def _replayed(planning: Planning, seen: Mapping[str, LayerLoad], after: LayerLoad) -> Iterator[tuple[Any, ...]]:
    """Plan, block of steps, and the time of the busiest GPU in it: as planned, and where experts are memory-bound."""
    plans = {name: planning.place(planning.load(own.counts, own.mean_shares)) for name, own in seen.items()}
    bound = [] if planning.time.known else [replace(planning.time, ridge=HIGHEST_RIDGE)]
    splits = [replace(planning.split, time=time) for time in (planning.time, *bound)]
    edges = np.arange(0, len(after.steps), min(after.rows(BLOCK), max(1, len(after.steps) // BLOCKS)))
    for name, plan in (plans | {DEFAULT: planning.default(after.experts)}).items():
        peaks = [np.add.reduceat(split.peaks(plan.held, after.counts), edges) for split in splits]
        yield from ((name, *own) for own in zip(range(len(edges)), *peaks))


def _slower(rows: list[tuple[Any, ...]]) -> dict[str, Any]:
    """How much slower the plan of the other trace is, with 95% intervals over blocks of steps, from *rows*."""
    import pandas as pd

    names = ["plan", "step", "peak_load", "peak_memory_bound"]
    plans = dict(list(pd.DataFrame(rows, columns=names[: len(rows[0])]).groupby("plan")))
    found: dict[str, Any] = {}
    for name, than in (("slower_than_own", plans[OWN]), ("slower_than_default", plans[DEFAULT])):
        middle, low, high = saved_compared(than, plans[OTHER])
        found |= {name: -middle, f"{name}_low": -high, f"{name}_high": -low, f"{name}_memory_bound": None}
        if names[-1] in than:
            found[f"{name}_memory_bound"] = -saved_compared(than, plans[OTHER], load=names[-1])[0]
    return found
