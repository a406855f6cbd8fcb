"""Frames about plans: how even the load was that came after them, and which one to take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from moetrace.analysis.states import state_at
from moetrace.forecasting.backtest import Backtest, Progress, Run, in_turn
from moetrace.forecasting.summary import DIFFERENCE, summarise
from moetrace.placement.plan import Load, Plan
from moetrace.placement.planning import MEAN, ByNode, Planning
from moetrace.trace import LayerLoad, LoadTrace, Shares

if TYPE_CHECKING:
    import pandas as pd

IN_ORDER = "in_order"
# The plan that runs today, where it was given; it is never changed.
IN_FORCE = "in_force"
WINDOW_MEAN = "window_mean"
ORACLE = "oracle"
# What serving systems plan by: the load of the last 1,000 passes (SGLang, vLLM).
WINDOW = 1000
SCORE_COLUMNS = (
    "trace", "layer", "horizon", "cutoff", "state", "strategy", "peak_over_mean", "balance", *ByNode._fields, "moved",
)  # fmt: skip

Forecasts = Mapping[tuple[str, int, int], Shares]
"""Shares (experts,) by predictor, horizon and cutoff."""


def simulate(
    trace: LoadTrace,
    test: Backtest,
    gpus: int,
    redundant: int = 0,
    *,
    running: Mapping[int, Plan] | None = None,
    progress: Progress | None = None,
    run: Run = in_turn,
    **settings: Any,
) -> pd.DataFrame:
    """One row per layer, horizon, cutoff and strategy: a plan made at the cutoff, on the load of the horizon after it.

    The strategies: ``in_order``, neighbours together; the forecast of each predictor of *test*;
    ``window_mean``, the load of the last 1,000 steps; ``oracle``, the load that came. *moved* is the
    part of the slots that change from the plan of the cutoff before, at the first from ``in_order``, or from the plan
    that is *running*, by layer, which is then scored as ``in_force``. The other *settings* are those of `Planning`;
    the plans of the oracle are as even as can be.
    A layer is a task for *run*; *progress* is told how many are done.
    Raises `SettingError` where the slots do not fill the *gpus* evenly.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> test = mt.evaluate(trace, [mt.Level()], horizons=[500], cutoffs=[1000])
    >>> mt.simulate(trace, test, gpus=4, judge="mean")["strategy"].tolist()
    ['in_order', 'level', 'window_mean', 'oracle']
    """
    import pandas as pd

    planning = Planning(gpus, redundant, **settings)
    planning.check(trace.experts)
    states = test.scores.drop_duplicates(["layer", "cutoff"]).set_index(["layer", "cutoff"])["state"]
    tasks = [
        _LayerPlans(
            trace, layer, forecasts_of(test, layer), states[layer].to_dict(), planning, (running or {}).get(layer)
        )
        for layer in (trace.layers if len(test.shares) else ())
    ]
    rows: dict[int, list[tuple[Any, ...]]] = {}
    for layer, own in run(tasks):
        rows[layer] = own
        if progress:
            progress(len(rows), len(tasks))
    return pd.DataFrame([row for layer in trace.layers for row in rows.get(layer, ())], columns=SCORE_COLUMNS)


@dataclass(frozen=True, eq=False)
class _LayerPlans:
    """The plans of one layer, and what became of them: a task.

    *forecasts* are those of `Strategies`, *states* those of the layer by cutoff, *running* is its plan in force.
    """

    trace: LoadTrace
    layer: int
    forecasts: Forecasts
    states: Mapping[int, str]
    planning: Planning
    running: Plan | None

    def run(self) -> tuple[int, list[tuple[Any, ...]]]:
        """The layer, and its rows of `SCORE_COLUMNS`."""
        known = Strategies(self.trace.layer(self.layer), self.forecasts, self.planning)
        strategies = [IN_ORDER, *([IN_FORCE] if self.running else []), *known.strategies[1:]]
        return self.layer, [
            row for h, strategy in product(known.horizons, strategies) for row in self._rows(known, h, strategy)
        ]

    def _rows(self, known: Strategies, horizon: int, strategy: str) -> Iterator[tuple[Any, ...]]:
        plain = self.planning.in_order(self.trace.experts)
        last = plain if strategy == IN_ORDER or self.running is None else self.running
        for cutoff in known.cutoffs(horizon):
            if strategy not in (IN_ORDER, IN_FORCE) and known.shares(strategy, cutoff, horizon) is None:
                continue
            before, last = last, known.replanned(last, strategy, cutoff, horizon)
            key = (self.trace.name, self.layer, horizon, cutoff, self.states[cutoff], strategy)
            after = known.load.after(cutoff, horizon).counts
            found = self.planning.evenness(last, after), self.planning.by_node(last, after, self.trace.info.top_k)
            yield (*key, *found[0], *found[1], last.moved(before))


def forecasts_of(test: Backtest, layer: int) -> Forecasts:
    """The forecast shares (experts,) that were tested of one layer, by predictor, horizon and cutoff."""
    own = test.shares[test.shares["layer"] == layer]
    forecasts = own.groupby(["predictor", "horizon", "cutoff"], sort=False)["forecast"]
    return {key: shares.to_numpy() for key, shares in forecasts}  # type: ignore[misc]  # Hashable


@dataclass(frozen=True, eq=False)
class Strategies:
    """What each strategy plans by for one layer: *forecasts*, or the load itself."""

    load: LayerLoad
    forecasts: Forecasts
    planning: Planning

    @property
    def horizons(self) -> list[int]:
        """The horizons there are forecasts for."""
        return list(dict.fromkeys(horizon for _, horizon, _ in self.forecasts))

    def cutoffs(self, horizon: int) -> list[int]:
        """The cutoffs at which some predictor has a forecast of *horizon*, increasing."""
        return sorted({cutoff for _, h, cutoff in self.forecasts if h == horizon})

    @property
    def strategies(self) -> list[str]:
        """All of them, the predictors in the order they were tested in."""
        return list(dict.fromkeys([IN_ORDER, *(name for name, _, _ in self.forecasts), WINDOW_MEAN, ORACLE]))

    def shares(self, strategy: str, cutoff: int, horizon: int) -> Shares | None:
        """The shares that *strategy* plans by, None where it has no forecast or does not plan."""
        if strategy == ORACLE:
            return self.load.after(cutoff, horizon).mean_shares
        if strategy == WINDOW_MEAN and (strategy, horizon, cutoff) not in self.forecasts:
            return self.load.until(cutoff).last(WINDOW).mean_shares
        return self.forecasts.get((strategy, horizon, cutoff))

    def planned_for(self, strategy: str, cutoff: int, horizon: int) -> Load | None:
        """The same, and the single steps that are known: those up to the cutoff, for the oracle the horizon."""
        shares = self.shares(strategy, cutoff, horizon)
        if shares is None:
            return None
        seen = self.load.after(cutoff, horizon) if strategy == ORACLE else self.load.until(cutoff).last(WINDOW)
        return self.planning.load(seen.counts, shares)

    def replanned(self, before: Plan, strategy: str, cutoff: int, horizon: int) -> Plan:
        """The plan *before* as *strategy* changes it at *cutoff*, itself where it does not plan."""
        load = self.planned_for(strategy, cutoff, horizon)
        return before if load is None else self.planning.replan(before, load, 0.0 if strategy == ORACLE else None)


def placement_summary(scores: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Means over layers and cutoffs, one row per trace, horizon, strategy and state, and for all.

    *above_oracle* is how much higher the peak is than with a plan that knew the load. *difference* is
    that of ``peak_over_mean`` from ``window_mean`` at the same layers and cutoffs, with a 95 % interval
    from a paired bootstrap.
    """
    keys, cell = ["trace", "horizon", "strategy", "state"], ["trace", "layer", "horizon", "cutoff"]
    peaks = scores.pivot_table(index=cell, columns="strategy", values="peak_over_mean").reset_index()
    known = scores.merge(peaks[[*cell, WINDOW_MEAN, ORACLE]], on=cell) if len(scores) else scores.assign(apart=[])
    if len(scores):
        known = known.assign(apart=known["peak_over_mean"] - known[WINDOW_MEAN])

    def more(_group: pd.DataFrame, scored: pd.DataFrame) -> dict[str, Any]:
        return {"above_oracle": (scored["peak_over_mean"] - scored[ORACLE]).mean()}

    # A strategy that was too short in the first layer comes up after the oracle, which stays the last.
    order = [*(name for name in scores["strategy"].unique() if name != ORACLE), ORACLE]
    measures = ("peak_over_mean", "balance", *ByNode._fields, "moved")
    found = summarise(known, keys, measures, more, seed, order=order)
    columns = [*keys, "peak_over_mean", "above_oracle", *DIFFERENCE, *measures[1:], "cutoffs", "scored"]
    return found.reindex(columns=columns)


def best_strategy(
    scores: pd.DataFrame, predictors: list[str], ends: Mapping[int, str] | None = None, judge: str = MEAN
) -> str:
    """The one of *predictors* whose plans were best where all of them were scored, else the first.

    By what plans are judged: the lowest peak over the mean load, or the highest balance of single steps.

    *ends* has the state that each layer ends in: a plan for what comes is judged by those that were made in that
    state, by all if there are none.
    """
    own = scores[scores["strategy"].isin(predictors)]
    in_state = own[own["state"] == own["layer"].map(ends)] if ends else own
    for part in (in_state, own):
        measure = "peak_over_mean" if judge == MEAN else "balance"
        cells = part.pivot_table(index=["layer", "horizon", "cutoff"], columns="strategy", values=measure)
        shared = cells.reindex(columns=predictors).dropna()
        if len(shared):
            return str(shared.mean().idxmin() if judge == MEAN else shared.mean().idxmax())
    return predictors[0]


def ending_states(trace: LoadTrace) -> dict[int, str]:
    """By layer the state that *trace* ends in."""
    return {load.layer: state_at(load, int(load.steps[-1])) for load in trace.by_layer()}


def plans_frame(
    trace: LoadTrace,
    means: pd.DataFrame,
    predictor: str,
    planning: Planning,
    running: Mapping[int, Plan] | None = None,
) -> pd.DataFrame:
    """The plan of each layer for the steps after the end of *trace*: one row per layer and GPU, with its experts.

    They have the numbers that they have in the source. *means* is that of `means_frame`. *expected* is the part of
    the layer's load on the GPU if the forecast is right. Planned from nothing, or from the plan that is *running*.
    """
    import pandas as pd

    own = means[(means["trace"] == trace.name) & (means["predictor"] == predictor)]
    rows = []
    for layer, experts in own.groupby("layer", sort=False):
        share = experts["share"].to_numpy()
        number = int(str(layer))
        load = planning.load(trace.layer(number).last(WINDOW).counts, share)
        plain = planning.in_order(len(share))
        plan = planning.replan(running[number], load) if running else planning.place(load, plain)
        key = {"trace": trace.name, "layer": layer, "predictor": predictor}
        for gpu, (held, expected) in enumerate(zip(plan.experts, planning.split.loads(plan.held, share[None])[0])):
            numbers = [trace.info.first_expert + expert for expert in held]
            rows.append(key | {"gpu": gpu, "experts": numbers, "expected": float(expected)})
    return pd.DataFrame(rows, columns=["trace", "layer", "predictor", "gpu", "experts", "expected"])
