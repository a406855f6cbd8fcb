"""Which experts of a trace to keep in fast memory: sets by every forecast, caches, and what both covered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.errors import SettingError, check_several
from moetrace.forecasting.backtest import Backtest, Progress, Run, Stages, counted, evaluate, in_turn
from moetrace.forecasting.evaluation import Results
from moetrace.forecasting.predictors import predictor
from moetrace.forecasting.predictors.base import Predictor
from moetrace.forecasting.summary import means_frame
from moetrace.forecasting.windows import checked_cutoffs, default_cutoffs, scorable
from moetrace.residency.scoring import (
    AGE_COLUMNS,
    ORACLE_STATIC,
    SCORE_COLUMNS,
    SUMMARY_COLUMNS,
    UNTESTED,
    Answer,
    LayerScores,
    LayerSets,
    ages_frame,
    answer_of,
    asked_for,
    curve_frame,
    summary_frame,
)
from moetrace.residency.sets import EQUAL, Budget, Slots, divided, knee, ranked
from moetrace.trace import LoadTrace, Shares
from moetrace.words import BASELINE

if TYPE_CHECKING:
    import pandas as pd

# A refreshed set is chosen from so many steps, as window_mean is and serving systems plan.
WINDOW = 1000
# Steps between two choices of it: near the 128 decode steps between exllamav3's sweeps (EXL3_MOE_CPU_SWAP_INTERVAL).
REFRESH = 100
HORIZON = 1000
# With fewer cutoffs there is no interval (`forecasting.summary.LEAST_CUTOFFS`).
FEWEST_CUTOFFS = 3
# Parts of the experts of a layer that every method is scored at too, for the table of capacities.
PARTS = (16, 8, 4, 2)
COLD_COLUMNS = ("trace", "layer", "expert", "share", "high_95", "cold_windows")
# The sets are compared to so many digits: of equally good predictors the first is taken.
COMPARED = 4


@dataclass(frozen=True, eq=False)
class Residency:
    """The experts of a trace to keep in fast memory.

    *frames* are ``sets``, the experts of each layer, most loaded first; ``scores``, what every method covered after
    each cutoff; ``summary``, their means by state with intervals; ``curve``, coverage by the number of experts;
    ``ages``, coverage by the age of a set; and ``cold``, the experts with the least load. *best* is the predictor whose
    sets covered most, which chose ``sets``; *answer* has what is said of them. *computed* results are new, *reused*
    ones were cached.
    """

    trace: str
    frames: dict[str, pd.DataFrame]
    best: str
    answer: Answer
    shares: Mapping[int, list[float]]
    first_expert: int = 0
    computed: int = 0
    reused: int = 0

    @property
    def sets(self) -> dict[int, list[int]]:
        """The resident experts of each layer, most loaded first, from 0 on as runtimes count them."""
        rows = self.frames["sets"][["layer", "experts"]].itertuples(index=False)
        return {layer: [expert - self.first_expert for expert in experts] for layer, experts in rows}


def hot(
    trace: LoadTrace,
    predictors: Sequence[Predictor] = (),
    *,
    slots: int | None = None,
    total: int | None = None,
    cover: float | None = None,
    cold: int = 0,
    horizon: int | None = None,
    cutoffs: Sequence[int] | None = None,
    refresh: int | None = None,
    transfer: float | None = None,
    progress: Progress | None = None,
    train_on: Sequence[LoadTrace] = (),
    seed: int = 0,
    results: Results | None = None,
    run: Run = in_turn,
) -> Residency:
    """Which experts of *trace* to keep in fast memory, and what they covered of the load that followed each cutoff.

    So many *slots* in every layer, *total* over all of them, or as few experts as *cover* a share of the token choices;
    the knee of the curve by default. A set by each of *predictors* (`window_mean` always is one) stays for *horizon*
    steps, 1,000 unless the trace is short; one is chosen anew every *refresh* steps, 100 unless the horizon is shorter.
    *cold* experts with the least load of each layer are named too. Of a trace of up to `FEWEST_CUTOFFS` steps, such as
    one window of counts, or of steps more than 1,000 apart, sets are made from its mean load, and not scored. One
    expert takes *transfer* seconds to load. The other arguments are those of `evaluate`; *progress* gets percent.
    Raises `SettingError` for more slots than experts, or a horizon that the trace does not reach.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> found = mt.hot(trace, slots=3)
    >>> len(found.sets[0]), round(found.answer.hit_rate, 2)
    (3, 0.49)
    """
    check_several(predictors, "predictors", "[mt.Level()]")
    check_several([] if cutoffs is None else cutoffs, "cutoffs", "[3000]")
    budget = Budget(slots, total, cover)
    budget.check(len(trace.layers), trace.experts)
    if not 0 <= cold < trace.experts:
        raise SettingError(f"cold must be from 0 to {trace.experts - 1} (one expert has to stay), got {cold}")
    fitted = horizon is None and cutoffs is None
    if fitted and (len(trace.steps) <= FEWEST_CUTOFFS or trace.stride > HORIZON):
        return _untested(trace, budget, cold)
    horizon, cutoffs = _windows(trace, horizon, cutoffs)
    refresh = min(REFRESH, horizon) if refresh is None else refresh
    if refresh < 1:
        raise SettingError(f"refresh must be at least 1 step, got {refresh}")
    layers, stages = len(trace.layers), Stages(progress, 60, 40)
    baseline = predictor(BASELINE)
    several = [*predictors] if baseline in predictors else [*predictors, baseline]
    test = evaluate(
        trace, several, [horizon], cutoffs, stages.next(), ahead=True, train_on=train_on, results=results, run=run
    )
    means = means_frame(test.forecasts(), horizon)
    size = budget.size(_shares(trace, means, means["predictor"].iloc[0]))
    tasks = _tasks(trace, test, horizon, size, refresh)
    found = sorted(counted(run, tasks, stages.next()), key=lambda own: own.layer)
    asked = {"trace": trace.name, "slots": size / layers, "layers": layers, "experts": trace.experts}
    asked |= {"allocation": budget.allocation, "horizon": horizon, "refresh": refresh}
    return _residency(trace, test, means, found, asked, cold, transfer, seed)


def residency_frames(found: Residency) -> dict[str, pd.DataFrame]:
    """What a report shows of a residency: ``kept``, its answer, ``kept_curve``, ``kept_ages`` and ``kept_summary``."""
    import pandas as pd

    own = {f"kept_{name}": found.frames[name] for name in ("curve", "ages", "summary")}
    return {"kept": pd.DataFrame([found.answer.as_row()]), **own}


def _untested(trace: LoadTrace, budget: Budget, cold: int) -> Residency:
    """Sets by the mean load of a *trace* that does not allow to score any: coverage is that of the trace itself."""
    import pandas as pd

    shares = np.array([load.mean_shares for load in trace.by_layer()])
    (layers, experts), size = shares.shape, budget.size(shares)
    numbers = np.full(layers, size // layers) if budget.allocation == EQUAL else divided(shares, size)
    covered = np.cumsum(-np.sort(-shares, axis=1), axis=1)  # (layers, slots)
    kept = np.array([own[max(number, 1) - 1] * (number > 0) for own, number in zip(covered, numbers)])
    active = float(np.mean([(load.counts > 0).sum(axis=1).mean() for load in trace.by_layer()]))
    curve = {"hit_rate": covered.mean(axis=0), "active_hit_rate": np.nan, "median_layer": np.median(covered, axis=0)}
    curve |= {"worst_layer": covered.min(axis=0), "hindsight": covered.mean(axis=0)}
    coldest = [
        (trace.name, layer, trace.info.first_expert + int(expert), float(own[expert]), np.nan, np.nan)
        for layer, own in zip(trace.layers, shares)
        for expert in ranked(own)[::-1][:cold]
    ]
    frames = {
        "summary": pd.DataFrame(columns=list(SUMMARY_COLUMNS)),
        "sets": _sets(trace, shares, numbers, BASELINE),
        "scores": pd.DataFrame(columns=list(SCORE_COLUMNS)),
        "curve": pd.DataFrame({"trace": trace.name, "method": BASELINE, "slots": np.arange(1, experts + 1), **curve}),
        "ages": pd.DataFrame(columns=list(AGE_COLUMNS)),
        "cold": pd.DataFrame(coldest, columns=list(COLD_COLUMNS)),
    }
    answer = Answer(
        trace.name, BASELINE, budget.allocation, size / layers, layers, experts, knee(shares), worth=UNTESTED,
        hit_rate=float(kept.mean()), worst_layer=float(kept.min()), active=active,
        tokens=float(np.mean([load.counts.mean() for load in trace.by_layer()])),
    )  # fmt: skip
    by_layer = dict(zip(trace.layers, shares.tolist()))
    return Residency(trace.name, frames, BASELINE, answer, by_layer, trace.info.first_expert)


def _residency(
    trace: LoadTrace,
    test: Backtest,
    means: pd.DataFrame,
    found: Sequence[LayerScores],
    asked: dict[str, Any],
    cold: int,
    transfer: float | None,
    seed: int,
) -> Residency:
    """The frames and the answer of what was *found* of the layers, and the sets by the best forecast of *means*."""
    import pandas as pd

    layers, slots = asked["layers"], asked["slots"]
    scores = pd.DataFrame([row for own in found for row in own.rows], columns=SCORE_COLUMNS)
    summary = summary_frame(scores, slots, layers, transfer, seed)
    rates = {
        name: round(row["hit_rate"], COMPARED) for name, row in asked_for(summary, asked["allocation"], slots).items()
    }
    best = max(map(str, means["predictor"].unique()), key=lambda name: rates.get(name, 0.0))
    shares = _shares(trace, means, best)
    equal = asked["allocation"] == EQUAL
    numbers = np.full(layers, int(slots)) if equal else divided(shares, round(slots * layers))
    frames = {
        "summary": summary,
        "sets": _sets(trace, shares, numbers, best),
        "scores": scores,
        "curve": curve_frame(trace.name, found, best),
        "ages": ages_frame(trace.name, found, asked["horizon"]),
        "cold": _cold(means[means["predictor"] == best], test, cold),
    }
    known = answer_of(frames, found, asked | {"best": best, "above_mean": knee(shares)})
    by_layer = dict(zip(trace.layers, shares.tolist()))
    return Residency(trace.name, frames, best, known, by_layer, trace.info.first_expert, test.computed, test.reused)


def _shares(trace: LoadTrace, means: pd.DataFrame, name: str) -> Shares:
    """The forecast share of each expert by the predictor of that *name*, shape (layers, experts)."""
    own = means.loc[means["predictor"] == name, "share"]
    return own.to_numpy().reshape(len(trace.layers), trace.experts)


def default_horizon(trace: LoadTrace) -> int:
    """Steps that a set stays, unless given: 1,000, or less of a short *trace*, for enough cutoffs."""
    length = int(trace.steps[-1] - trace.steps[0]) + 1
    return max(trace.stride, min(HORIZON, length // (FEWEST_CUTOFFS + 1)))


def _windows(trace: LoadTrace, horizon: int | None, cutoffs: Sequence[int] | None) -> tuple[int, list[int]]:
    """*horizon* and *cutoffs*, or those that *trace* is long enough for.

    Raises `SettingError`, with the longest horizon, if no cutoff can be scored.
    """
    start, end = int(trace.steps[0]), int(trace.steps[-1])
    horizon = horizon or default_horizon(trace)
    if cutoffs is None:
        cutoffs = default_cutoffs(trace)
        if len(scorable(trace, cutoffs, horizon)) < FEWEST_CUTOFFS:
            cutoffs = list(range(start - 1 + horizon, end - horizon + 1, horizon)) or [start + (end - start) // 4]
    return horizon, scorable(trace, checked_cutoffs(trace, [horizon], cutoffs), horizon)


def _tasks(trace: LoadTrace, test: Backtest, horizon: int, total: int, refresh: int) -> list[LayerSets]:
    """A task for each layer; *total* slots are divided over layers by what each method knows of all of them."""
    states = test.scores.drop_duplicates(["layer", "cutoff"]).set_index(["layer", "cutoff"])["state"]
    cutoffs = sorted(set(test.scores["cutoff"]))
    known = {str(name): own for name, own in test.shares.groupby("predictor", sort=False)}
    forecasts = {name: _by_cutoff(own, "forecast", trace, cutoffs) for name, own in known.items()}
    # The baseline has a forecast at every cutoff, and so the load that followed.
    methods = forecasts | {ORACLE_STATIC: _by_cutoff(known[BASELINE], "actual", trace, cutoffs)}
    layers = range(len(trace.layers))
    numbers = {name: [divided(np.nan_to_num(at), total) for at in own] for name, own in methods.items()}
    sizes = [max(1, total // len(layers)), *(max(1, trace.experts // part) for part in PARTS)]
    return [
        LayerSets(
            trace,
            layer,
            {name: own[:, i] for name, own in forecasts.items()},
            states[layer].to_dict(),
            horizon,
            list(dict.fromkeys(sizes)),
            {name: [int(at[i]) for at in own] for name, own in numbers.items()},
            refresh,
            WINDOW,
        )
        for i, layer in zip(layers, trace.layers)
    ]


def _by_cutoff(own: pd.DataFrame, column: str, trace: LoadTrace, cutoffs: Sequence[int]) -> Shares:
    """A *column* of the shares of one predictor as (cutoffs, layers, experts), NaN where it has none."""
    found = np.full((len(cutoffs), len(trace.layers), trace.experts), np.nan)
    first = own.iloc[:: trace.experts]
    at = np.searchsorted(cutoffs, first["cutoff"]), np.searchsorted(trace.layers, first["layer"])
    found[at] = own[column].to_numpy().reshape(-1, trace.experts)
    return found


def _sets(trace: LoadTrace, shares: Shares, numbers: Slots, best: str) -> pd.DataFrame:
    """The resident experts of each layer for the steps after the end, numbered as in the source, by *shares* of each.

    *expected* is the part of the layer's token choices that they cover if the forecast is right.
    """
    import pandas as pd

    rows = []
    for layer, own, number in zip(trace.layers, shares, numbers):
        experts = ranked(own)[:number]
        named = (trace.info.first_expert + experts).tolist()
        rows.append((trace.name, layer, best, int(number), named, float(own[experts].sum())))
    return pd.DataFrame(rows, columns=["trace", "layer", "method", "slots", "experts", "expected"])


def _cold(means: pd.DataFrame, test: Backtest, number: int) -> pd.DataFrame:
    """The *number* experts of each layer with the smallest forecast share, and how sure that is.

    *high_95* is the upper end of the share's 95% interval, *cold_windows* the part of the horizons after the cutoffs
    in which the expert was among as many with the least load.
    """
    by = ["trace", "layer"]
    coldest = means.assign(rank=means.groupby(by)["share"].rank(method="first"))
    coldest = coldest[coldest["rank"] <= number].sort_values([*by, "rank"], kind="stable")
    after = test.shares[test.shares["predictor"] == BASELINE]
    rank = after.groupby(["layer", "cutoff"])["actual"].rank(method="first")
    often = (rank <= number).groupby([after["layer"], after["expert"]]).mean().rename("cold_windows").reset_index()
    return coldest.merge(often, on=["layer", "expert"], how="left")[list(COLD_COLUMNS)]
