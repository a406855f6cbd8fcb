"""One layer: what resident sets and caches cover of the load that followed each cutoff."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetrace.analysis.states import state_at
from moetrace.residency.caches import Hits, replayed
from moetrace.residency.sets import BY_LOAD, EQUAL, ranked
from moetrace.trace import LayerLoad, LoadTrace, Shares

# Methods that are no predictor: the best set in hindsight, and Belady's cache.
ORACLE_STATIC, ORACLE, REFRESHED = "oracle_static", "oracle", "refreshed"
SCORE_COLUMNS = (
    "trace", "layer", "horizon", "cutoff", "state", "method", "allocation", "slots", "hit_rate", "active_hit_rate",
    "active", "loads",
)  # fmt: skip

Forecasts = Mapping[str, Shares]
"""Forecast shares (cutoffs, experts) by predictor, NaN where the history was too short."""


class LayerScores(NamedTuple):
    """What came of a layer.

    *rows* are those of `SCORE_COLUMNS`; *curves* by method are hit rate and active hit rate of each number of experts,
    mean over cutoffs, shape (2, experts); *ages* have a row for each set and later horizon: predictor, state at the
    set's cutoff, age, hit rate and hit rate of a new set. *tokens* go to an expert in a step, on average after the
    first cutoff; *ends* is the state at the end.
    """

    layer: int
    rows: list[tuple[Any, ...]]
    curves: dict[str, Shares]
    ages: list[tuple[str, str, int, float, float]]
    tokens: float
    ends: str


class Windows(NamedTuple):
    """The load of a layer after each cutoff.

    *shares* are those of the token choices, *active* those of the uses, an expert's steps with tokens over those of
    all experts, each (cutoffs, experts); *rows* (cutoffs, 2) are the first of the window and the first after it.
    *uses* (cutoffs,) is how many experts are active in a step.
    """

    shares: Shares
    active: Shares
    rows: NDArray[np.int64]
    uses: Shares


def windows_of(load: LayerLoad, cutoffs: Sequence[int], horizon: int) -> Windows:
    """The *horizon* steps after each of *cutoffs*."""
    rows = np.searchsorted(load.steps, np.array(cutoffs)[:, None] + [1, horizon + 1])
    tokens = np.array([load.counts[a:b].sum(axis=0) for a, b in rows])
    uses = np.array([(load.counts[a:b] > 0).sum(axis=0) for a, b in rows])
    totals = uses.sum(axis=1, keepdims=True)
    mean = (totals / np.diff(rows))[:, 0]
    return Windows(tokens / tokens.sum(axis=1, keepdims=True), uses / totals, rows, mean)


@dataclass(frozen=True, eq=False)
class LayerSets:
    """The resident sets of one layer by each forecast, the caches, and what each covered: a task.

    *states* are those of the layer at *cutoffs*. Every layer has each of *sizes* slots, the first of which was asked
    for, or for a method of *divided* its own number at each cutoff. Refreshed sets are chosen every *refresh* steps
    from the last *window*.
    """

    trace: LoadTrace
    layer: int
    forecasts: Forecasts
    states: Mapping[int, str]
    horizon: int
    sizes: Sequence[int]
    divided: Mapping[str, Sequence[int]]
    refresh: int
    window: int

    def run(self) -> LayerScores:
        """Read the layer, and score every method."""
        load = self.trace.layer(self.layer)
        after = windows_of(load, list(self.states), self.horizon)
        covered = {ORACLE_STATIC: _best(after)} | {name: _covered(after, own) for name, own in self.forecasts.items()}
        rows = [row for name, pair in covered.items() for row in self._static(name, pair, after)]
        every, last = (load.rows(steps) for steps in (self.refresh, self.window))
        for name, hits in replayed(load.counts, self.sizes, every, last).items():
            rows += self._cached(name, hits, load, after)
        curves = {name: np.nanmean(pair, axis=1) for name, pair in covered.items()}
        ages = [row for name, own in self.forecasts.items() for row in self._ages(name, own, after)]
        tokens = float(load.totals[after.rows[0, 0] :].mean() / load.experts)
        return LayerScores(self.layer, rows, curves, ages, tokens, state_at(load, int(load.steps[-1])))

    def _static(self, method: str, covered: Shares, after: Windows) -> Iterator[tuple[Any, ...]]:
        """The rows of sets that stay as they are over the horizon, *covered* as of `_covered`."""
        for i, (cutoff, state) in enumerate(self.states.items()):
            asked = [(EQUAL, size) for size in self.sizes]
            asked += [(BY_LOAD, self.divided[method][i])] if method in self.divided else []
            for allocation, size in asked if not np.isnan(covered[0, i, 0]) else ():
                hit, active = covered[:, i, size - 1] if size else (0.0, 0.0)
                key = (self.trace.name, self.layer, self.horizon, cutoff, state, method, allocation, size)
                yield (*key, float(hit), float(active), float(after.uses[i]), float(after.uses[i] * (1 - active)))

    def _cached(self, method: str, hits: Hits, load: LayerLoad, after: Windows) -> Iterator[tuple[Any, ...]]:
        """The rows of a cache, or of a set that is refreshed, which has all steps before the cutoff behind it."""
        sums = [np.concatenate([np.zeros_like(own[:1]), np.cumsum(own, axis=0)]) for own in hits]
        for i, ((cutoff, state), (a, b)) in enumerate(zip(self.states.items(), after.rows)):
            tokens, active, entered = (own[b] - own[a] for own in sums)
            uses = after.uses[i]
            for k, size in enumerate(self.sizes):
                key = (self.trace.name, self.layer, self.horizon, cutoff, state, method, EQUAL, size)
                missed = uses - active[k] / (b - a) + entered[k] / (b - a)
                found = tokens[k] / load.totals[a:b].sum(), active[k] / (b - a) / uses, uses, missed
                yield (*key, *map(float, found))

    def _ages(self, method: str, forecast: Shares, after: Windows) -> Iterator[tuple[str, str, int, float, float]]:
        """The rows of sets by *forecast*, each on the horizon after its own cutoff and after every later one."""
        order = ranked(np.nan_to_num(forecast))[:, : self.sizes[0]]
        # (windows, sets): the share of the window's token choices that the set of each cutoff covers
        covered = np.array([own[order].sum(axis=1) for own in after.shares])
        cutoffs = list(self.states.items())
        for i, (chosen, state) in enumerate(cutoffs):
            for j, (later, _) in enumerate(cutoffs[i:], i) if not np.isnan(forecast[i, 0]) else ():
                yield method, state, later - chosen, float(covered[j, i]), float(covered[j, j])


def _covered(after: Windows, forecast: Shares) -> Shares:
    """Hit rate and active hit rate of the first n experts by *forecast*, for every n: shape (2, cutoffs, experts)."""
    order = ranked(np.nan_to_num(forecast))
    taken = np.array([np.take_along_axis(own, order, axis=1) for own in (after.shares, after.active)])
    curves: Shares = np.cumsum(taken, axis=2)
    curves[:, np.isnan(forecast[:, 0])] = np.nan
    return curves


def _best(after: Windows) -> Shares:
    """What the best set in hindsight covers, see `_covered`: for each of the two rates the best by itself."""
    return np.cumsum(-np.sort(-np.array([after.shares, after.active]), axis=2), axis=2)
