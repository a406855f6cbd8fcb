"""Frames about plans: how even the load was that followed them, and which one to take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from moetrace.analysis.states import state_at
from moetrace.forecasting.backtest import Backtest, Progress, Run, counted, in_turn
from moetrace.forecasting.summary import DIFFERENCE, summarise
from moetrace.placement.plan import Plan
from moetrace.placement.planning import ByNode, Planning, spread
from moetrace.placement.policies import DIGITS
from moetrace.placement.step_peak import StepLoad
from moetrace.trace import LayerLoad, LoadTrace, Shares
from moetrace.words import BASELINE, DEFAULT, DEPLOYED, ORACLE

if TYPE_CHECKING:
    import pandas as pd

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
    planning: Planning,
    *,
    deployed: Mapping[int, Plan] | None = None,
    progress: Progress | None = None,
    run: Run = in_turn,
) -> pd.DataFrame:
    """One row per layer, horizon, cutoff and strategy: a plan made at the cutoff, on the load of the horizon after it.

    The strategies: ``default``, the default placement; the forecast of each predictor of *test*; ``window_mean``, the
    load of the last 1,000 steps; ``oracle``, the load that followed, whose plans are as even as possible. *moved* is
    the part of the slots that change from the plan of the cutoff before, at the first from ``default``, or from the
    *deployed* plan, by layer, which is then scored as ``deployed``. Of a trace with more than `MOST_LAYERS` layers so
    many are scored. A layer is a task for *run*; *progress* gets how many are done.
    Raises `SettingError` if the slots do not fill the GPUs evenly.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> test = mt.evaluate(trace, [mt.Level()], horizons=[500], cutoffs=[1000])
    >>> mt.simulate(trace, test, mt.Planning(gpus=4))["strategy"].tolist()
    ['default', 'level', 'window_mean', 'oracle']
    """
    import pandas as pd

    planning.check(trace.experts)
    states = test.scores.drop_duplicates(["layer", "cutoff"]).set_index(["layer", "cutoff"])["state"]
    layers = spread(trace.layers) if len(test.shares) else []
    plans = deployed or {}
    tasks = [
        LayerPlans(trace, layer, forecasts_of(test, layer), states[layer].to_dict(), planning, plans.get(layer))
        for layer in layers
    ]
    rows = dict(counted(run, tasks, progress))
    return pd.DataFrame([row for layer in layers for row in rows[layer]], columns=SCORE_COLUMNS)


def forecasts_of(test: Backtest, layer: int) -> Forecasts:
    """The forecast shares (experts,) that were tested of one layer, by predictor, horizon and cutoff."""
    own = test.shares[test.shares["layer"] == layer]
    forecasts = own.groupby(["predictor", "horizon", "cutoff"], sort=False)["forecast"]
    return {key: shares.to_numpy() for key, shares in forecasts}  # type: ignore[misc]  # Hashable


@dataclass(frozen=True, eq=False)
class LayerPlans:
    """The plans of one layer by each strategy, and what became of them: a task.

    *forecasts* are those of the predictors, *states* those of the layer by cutoff, *deployed* is its current plan.
    """

    trace: LoadTrace
    layer: int
    forecasts: Forecasts
    states: Mapping[int, str]
    planning: Planning
    deployed: Plan | None

    def run(self) -> tuple[int, list[tuple[Any, ...]]]:
        """The layer, and its rows of `SCORE_COLUMNS`."""
        load = self.trace.layer(self.layer)
        predictors = dict.fromkeys(name for name, _, _ in self.forecasts)
        strategies = dict.fromkeys([DEFAULT, *([DEPLOYED] if self.deployed else []), *predictors, BASELINE, ORACLE])
        horizons = dict.fromkeys(horizon for _, horizon, _ in self.forecasts)
        return self.layer, [row for h, name in product(horizons, strategies) for row in self._rows(load, h, name)]

    def _rows(self, load: LayerLoad, horizon: int, strategy: str) -> Iterator[tuple[Any, ...]]:
        default = self.planning.default(load.experts)
        last = default if strategy == DEFAULT or self.deployed is None else self.deployed
        for cutoff in sorted({cutoff for _, h, cutoff in self.forecasts if h == horizon}):
            before = last
            if strategy not in (DEFAULT, DEPLOYED):
                wanted = self._wanted(load, strategy, cutoff, horizon)
                if wanted is None:
                    continue
                last = self.planning.replan(before, wanted, 0.0 if strategy == ORACLE else None)
            key = (self.trace.name, self.layer, horizon, cutoff, self.states[cutoff], strategy)
            after = load.after(cutoff, horizon).counts
            found = self.planning.evenness(last, after), self.planning.by_node(last, after, self.trace.info.top_k)
            yield (*key, *found[0], *found[1], last.moved(before))

    def _wanted(self, load: LayerLoad, strategy: str, cutoff: int, horizon: int) -> StepLoad | None:
        """What *strategy* plans for: shares, and the single steps that are known; None where it has no forecast."""
        if strategy == ORACLE:
            seen = load.after(cutoff, horizon)
            return self.planning.load(seen.counts, seen.mean_shares)
        seen = load.until(cutoff).last(WINDOW)
        shares = self.forecasts.get((strategy, horizon, cutoff))
        if shares is None and strategy == BASELINE:
            shares = seen.mean_shares
        return None if shares is None else self.planning.load(seen.counts, shares)


def placement_summary(scores: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Means over layers and cutoffs, one row per trace, horizon, strategy and state, and for all.

    *above_oracle* is how much higher the peak is than with perfect foresight. *difference* is
    that of ``peak_over_mean`` from ``window_mean`` at the same layers and cutoffs, with a 95% interval
    from a paired bootstrap.
    """
    keys, cell = ["trace", "horizon", "strategy", "state"], ["trace", "layer", "horizon", "cutoff"]
    peaks = scores.pivot_table(index=cell, columns="strategy", values="peak_over_mean").reset_index()
    known = scores.merge(peaks[[*cell, BASELINE, ORACLE]], on=cell) if len(scores) else scores.assign(apart=[])
    if len(scores):
        known = known.assign(apart=known["peak_over_mean"] - known[BASELINE])

    def more(_group: pd.DataFrame, scored: pd.DataFrame) -> dict[str, Any]:
        return {"above_oracle": (scored["peak_over_mean"] - scored[ORACLE]).mean()}

    # A strategy that was too short in the first layer comes up after the oracle, which stays the last.
    order = [*(name for name in scores["strategy"].unique() if name != ORACLE), ORACLE]
    measures = ("peak_over_mean", "balance", *ByNode._fields, "moved")
    found = summarise(known, keys, measures, more, seed, order=order)
    columns = [*keys, "peak_over_mean", "above_oracle", *DIFFERENCE, *measures[1:], "cutoffs", "scored"]
    return found.reindex(columns=columns)


def best_strategy(scores: pd.DataFrame, predictors: list[str], ends: Mapping[int, str] | None = None) -> str:
    """The one of *predictors* whose plans had the highest balance where all of them were scored, else the first.

    *ends* has the state that each layer ends in: a plan for the steps after the end is judged by those that were made
    in that state, by all if there are none.
    """
    own = scores[scores["strategy"].isin(predictors)]
    in_state = own[own["state"] == own["layer"].map(ends)] if ends else own
    for part in (in_state, own):
        cells = part.pivot_table(index=["layer", "horizon", "cutoff"], columns="strategy", values="balance")
        shared = cells.reindex(columns=predictors).dropna()
        if len(shared):
            return str(shared.mean().round(DIGITS).idxmax())
    return predictors[0]


def ending_states(trace: LoadTrace) -> dict[int, str]:
    """By layer the state that *trace* ends in."""
    return {load.layer: state_at(load, int(load.steps[-1])) for load in trace.by_layer()}


def plans_frame(
    trace: LoadTrace,
    means: pd.DataFrame,
    predictor: str,
    planning: Planning,
    deployed: Mapping[int, Plan] | None = None,
) -> pd.DataFrame:
    """The plan of each layer for the steps after the end of *trace*: one row per layer and GPU, with its experts.

    Experts are numbered as in the source. *means* is that of `means_frame`. *expected* is the part of the layer's load
    on the GPU if the forecast is right. Planned from scratch, or from the *deployed* plan.
    """
    import pandas as pd

    own = means[(means["trace"] == trace.name) & (means["predictor"] == predictor)]
    rows = []
    for layer, experts in own.groupby("layer", sort=False):
        share, load = experts["share"].to_numpy(), trace.layer(int(str(layer)))
        wanted = planning.load(load.last(WINDOW).counts, share)
        if deployed:
            plan = planning.replan(deployed[load.layer], wanted)
        else:
            plan = planning.place(wanted, planning.default(len(share)))
        key = {"trace": trace.name, "layer": load.layer, "predictor": predictor}
        expected = planning.split.by_tokens.loads(plan.held, share[None])[0]
        for gpu, held in enumerate(plan.experts):
            numbers = load.expert_numbers[held].tolist()
            rows.append(key | {"gpu": gpu, "experts": numbers, "expected": float(expected[gpu])})
    return pd.DataFrame(rows, columns=["trace", "layer", "predictor", "gpu", "experts", "expected"])
