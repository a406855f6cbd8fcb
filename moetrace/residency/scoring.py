"""What resident sets and caches cover of the load that followed each cutoff: of a layer, in means, and in an answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetrace.analysis.states import state_at
from moetrace.forecasting.summary import DIFFERENCE, paired_interval, summarise
from moetrace.residency.sets import BY_LOAD, EQUAL, Hits, ranked, replayed
from moetrace.trace import LayerLoad, LoadTrace, Shares
from moetrace.words import BASELINE

if TYPE_CHECKING:
    import pandas as pd

# Methods that are no predictor: the best set in hindsight, and Belady's cache.
ORACLE_STATIC, ORACLE, REFRESHED = "oracle_static", "oracle", "refreshed"
SCORE_COLUMNS = (
    "trace", "layer", "horizon", "cutoff", "state", "method", "allocation", "slots", "hit_rate", "active_hit_rate",
    "active", "loads",
)  # fmt: skip

Forecasts = Mapping[str, Shares]
"""Forecast shares (cutoffs, experts) by predictor, NaN where the history was too short."""
# What a resident set is good for: it saves loading experts, it saves computing with those that are not resident, an LRU
# cache does better, or it covers hardly more than as many experts taken at random.
LOADING, COMPUTE, CACHE, NEITHER, UNKNOWN = "loading", "compute", "cache", "neither", "unknown"
UNTESTED = "untested"  # no set could be scored
# By how much a rate has to be above that of random experts: less than a twentieth would not repay the work.
WORTH = 0.05
# A set holds as long as it covers at most so much less than a new one.
ENOUGH = 0.01
RATES = ("hit_rate", "active_hit_rate")
AGE_COLUMNS = ("trace", "method", "state", "age", "hit_rate", "fresh", "lost")
NAN = float("nan")
SUMMARY_COLUMNS = (
    "trace", "horizon", "method", "allocation", "slots", "state",
    *(f"{rate}{end}" for rate in RATES for end in ("", "_low", "_high")),
    *DIFFERENCE, "worst_layer", "active", "loads", "ms_per_step", "cutoffs", "scored",
)  # fmt: skip


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

    @classmethod
    def of(cls, load: LayerLoad, cutoffs: Sequence[int], horizon: int) -> Windows:
        """The *horizon* steps after each of *cutoffs*."""
        edges = np.searchsorted(load.steps, np.array(cutoffs)[:, None] + [1, horizon + 1])
        tokens = np.array([load.counts[a:b].sum(axis=0) for a, b in edges])
        uses = np.array([(load.counts[a:b] > 0).sum(axis=0) for a, b in edges])
        totals = uses.sum(axis=1, keepdims=True)
        return cls(tokens / tokens.sum(axis=1, keepdims=True), uses / totals, edges, (totals / np.diff(edges))[:, 0])


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
        after = Windows.of(load, list(self.states), self.horizon)
        covered = {ORACLE_STATIC: _best(after)} | {name: _covered(after, own) for name, own in self.forecasts.items()}
        rows = [row for name, pair in covered.items() for row in self._static(name, pair, after)]
        every, last = (load.rows(steps) for steps in (self.refresh, self.window))
        for name, hits in replayed(load.counts, self.sizes, every, last).items():
            rows += self._cached(name, hits, load, after)
        curves = {name: np.nanmean(pair, axis=1) for name, pair in covered.items()}
        ages = [row for name, own in self.forecasts.items() for row in self._ages(name, own, after)]
        each = float(load.totals[after.rows[0, 0] :].mean() / load.experts)
        return LayerScores(self.layer, rows, curves, ages, each, state_at(load, int(load.steps[-1])))

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


def _best(after: Windows) -> Shares:
    """As `_covered` of the best set in hindsight, for each of the two rates by itself."""
    curves: Shares = np.cumsum(-np.sort(-np.array([after.shares, after.active]), axis=2), axis=2)
    return curves


def _covered(after: Windows, forecast: Shares) -> Shares:
    """Hit rate and active hit rate of the first n experts by *forecast*, for every n: shape (2, cutoffs, experts)."""
    order = ranked(np.nan_to_num(forecast))
    taken = np.array([np.take_along_axis(own, order, axis=1) for own in (after.shares, after.active)])
    curves: Shares = np.cumsum(taken, axis=2)
    curves[:, np.isnan(forecast[:, 0])] = np.nan
    return curves


# --- means and the answer ----------------------------------------------------------------------


def summary_frame(
    scores: pd.DataFrame, mean: float, layers: int, transfer: float | None = None, seed: int = 0
) -> pd.DataFrame:
    """Means over layers and cutoffs, one row per method, allocation, number of slots and state, and for all states.

    Of the *mean* number of slots per layer that was asked for, rates have 95% intervals from a bootstrap over cutoffs
    and layers, and *difference* is that of ``hit_rate`` from ``window_mean`` at the same layers and cutoffs, with that
    of the pairs. *ms_per_step* is the time to load the missing experts of all *layers* in a step, each in *transfer*
    seconds.
    """
    shown = scores.assign(slots=np.where(scores["allocation"] == BY_LOAD, mean, scores["slots"]))
    keys = ["trace", "horizon", "strategy", "allocation", "slots", "state"]
    cell = ["trace", "layer", "cutoff", "allocation", "slots"]
    base = shown.loc[shown["method"] == BASELINE, [*cell, "hit_rate"]].rename(columns={"hit_rate": "base"})
    known = shown.merge(base, on=cell, how="left").rename(columns={"method": "strategy"})
    asked = np.isclose(known["slots"], max(1, int(mean))) | (known["allocation"] == BY_LOAD)
    known = known.assign(apart=(known["hit_rate"] - known["base"]).where(asked), asked=asked)

    def more(_group: pd.DataFrame, scored: pd.DataFrame) -> dict[str, Any]:
        found: dict[str, Any] = {"worst_layer": scored.groupby("layer")["hit_rate"].mean().min()}
        for rate in RATES if scored["asked"].all() else ():
            low, _, high = paired_interval(scored.assign(apart=scored[rate]), seed)
            found |= {f"{rate}_low": low, f"{rate}_high": high}
        return found

    found = summarise(known, keys, (*RATES, "active", "loads"), more, seed)
    seconds = float("nan") if transfer is None else transfer
    found = found.assign(ms_per_step=found["loads"] * layers * seconds * 1000)
    return found.rename(columns={"strategy": "method"}).reindex(columns=list(SUMMARY_COLUMNS))


def asked_for(summary: pd.DataFrame, allocation: str, slots: float) -> dict[str, dict[str, Any]]:
    """The rows of all states with that *allocation* and number of *slots*, by method."""
    own = summary[(summary["state"] == "all") & (summary["allocation"] == allocation)]
    rows = own[np.isclose(own["slots"].astype(float), slots)].to_dict("records")
    return {row["method"]: {str(name): value for name, value in row.items()} for row in rows}


def curve_frame(trace: str, found: Sequence[LayerScores], best: str) -> pd.DataFrame:
    """Coverage by the number of resident experts per layer, for sets by *best*: means over cutoffs.

    *hit_rate* and *active_hit_rate* are means over layers, *median_layer* and *worst_layer* hit rates, *hindsight* is
    that of the best sets.
    """
    import pandas as pd

    own, hindsight = (np.array([layer.curves[name] for layer in found]) for name in (best, ORACLE_STATIC))
    rates = dict(zip(RATES, own.mean(axis=0)))
    layers = {"median_layer": np.median(own[:, 0], axis=0), "worst_layer": own[:, 0].min(axis=0)}
    slots = np.arange(1, own.shape[2] + 1)
    return pd.DataFrame(
        {"trace": trace, "method": best, "slots": slots, **rates, **layers, "hindsight": hindsight[:, 0].mean(axis=0)}
    )


def ages_frame(trace: str, found: Sequence[LayerScores], horizon: int) -> pd.DataFrame:
    """Hit rate by the *age* of a set: steps from its cutoff to the one that it is scored after, in whole horizons.

    The first cutoff may lie between those of a horizon each, so ages are rounded up. *fresh* is that of a set chosen at
    the latter, and *lost* the difference; means over layers and cutoffs, by the state when the set was chosen, and for
    all states.
    """
    import pandas as pd

    rows = [row for own in found for row in own.ages]
    table = pd.DataFrame(rows, columns=["method", "state", "age", "hit_rate", "fresh"])
    table["age"] = -(-table["age"] // horizon) * horizon
    both = pd.concat([table, table.assign(state="all")])
    means = both.groupby(["method", "state", "age"], sort=False).mean().reset_index()
    means = means.assign(lost=means["fresh"] - means["hit_rate"]).sort_values(["method", "state", "age"], kind="stable")
    return means.assign(trace=trace)[list(AGE_COLUMNS)].reset_index(drop=True)


@dataclass(frozen=True)
class Answer:
    """What is said of the experts that a trace should keep.

    *worth* is what a resident set is good for, by the 95% intervals of its rates: ``loading``, ``compute``, nothing
    beside a ``cache``, ``neither``, or ``unknown`` where they are too wide or not known. *slots* per layer, a mean
    where the *allocation* is ``by_load``, by the forecast of *best*, cover *hit_rate* of the token choices,
    *worst_layer* of those of the worst layer, and *active_hit_rate* of the experts active in a step, of which there
    are *active* of *experts*, with *tokens* per expert. *hindsight* is the hit rate of the best set. To the hit
    rate, a set that is chosen anew every *refresh* steps adds *refresh_adds*, an LRU cache *lru_adds*, and dividing
    the slots by load *by_load_adds*, None where layers cannot have as many. *lru* and *oracle* are active hit rates
    of caches. *above_mean* experts have more than the mean load; a set chosen in the state that most layers end in,
    *ends*, *holds* for so many steps, None to the end of the trace, which is *reach* steps.
    """

    trace: str
    best: str
    allocation: str
    slots: float
    layers: int
    experts: int
    above_mean: int
    horizon: int = 0
    refresh: int = 0
    worth: str = UNKNOWN
    hit_rate: float = NAN
    hit_rate_low: float = NAN
    hit_rate_high: float = NAN
    active_hit_rate: float = NAN
    active_hit_rate_low: float = NAN
    active_hit_rate_high: float = NAN
    worst_layer: float = NAN
    active: float = NAN
    tokens: float = NAN
    hindsight: float = NAN
    refresh_adds: float = NAN
    lru_adds: float = NAN
    by_load_adds: float | None = None
    lru: float = NAN
    oracle: float = NAN
    ends: str = UNKNOWN
    holds: int | None = None
    reach: int = 0

    def as_row(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def answer_of(frames: Mapping[str, pd.DataFrame], found: Sequence[LayerScores], asked: Mapping[str, Any]) -> Answer:
    """The answer that the *frames* of a residency give, with the fields of *asked*: those up to ``refresh``."""
    summary, best, slots = frames["summary"], asked["best"], asked["slots"]
    own = asked_for(summary, asked["allocation"], slots)
    equal = asked_for(summary, EQUAL, max(1, int(slots)))
    row = own[best]
    by_load = asked_for(summary, BY_LOAD, slots)[best]["hit_rate"]
    adds = {name: float(own["hit_rate"] - equal[best]["hit_rate"]) for name, own in equal.items()}
    ends = Counter(layer.ends for layer in found).most_common(1)[0][0]
    ages = frames["ages"][frames["ages"]["method"] == best]
    ages = ages[ages["state"] == (ends if (ages["state"] == ends).any() else "all")]
    late = ages["lost"].to_numpy() > ENOUGH
    rates: dict[str, Any] = {rate + end: float(row[rate + end]) for rate in RATES for end in ("", "_low", "_high")}
    return Answer(
        **asked,
        **rates,
        worth=_worth(row, equal["lru"], slots / asked["experts"]),
        worst_layer=float(row["worst_layer"]),
        active=float(row["active"]),
        tokens=float(np.mean([layer.tokens for layer in found])),
        hindsight=float(own[ORACLE_STATIC]["hit_rate"]),
        refresh_adds=adds[REFRESHED],
        lru_adds=adds["lru"],
        by_load_adds=float(by_load - equal[best]["hit_rate"]) if slots == int(slots) else None,
        lru=float(equal["lru"]["active_hit_rate"]),
        oracle=float(equal[ORACLE]["active_hit_rate"]),
        ends=ends,
        holds=int(ages["age"].iloc[int(np.argmax(late)) - 1]) + asked["horizon"] if late.any() else None,
        reach=int(ages["age"].max()) + asked["horizon"],
    )


def _worth(row: Mapping[str, Any], lru: Mapping[str, Any], chance: float) -> str:
    """What a set with the rates of *row* is good for beside an *lru* cache; random experts have *chance* of both."""
    if lru["active_hit_rate_low"] - max(row["active_hit_rate"], chance) >= WORTH:
        return CACHE
    if row["active_hit_rate_low"] - chance >= WORTH:
        return LOADING
    if row["hit_rate_low"] - chance >= WORTH:
        return COMPUTE
    return NEITHER if row["hit_rate_high"] - chance < WORTH else UNKNOWN
