"""Everything about placing the experts of one trace: plans by every forecast, policies replayed, the plan to deploy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from moetrace.analysis.imbalance import health_frame
from moetrace.analysis.states import state_at
from moetrace.forecasting.backtest import Backtest, Progress, Run, Stages, counted, evaluate, in_turn
from moetrace.forecasting.evaluation import Results
from moetrace.forecasting.layers import has_history
from moetrace.forecasting.predictors.averages import WindowMean
from moetrace.forecasting.predictors.base import Predictor
from moetrace.forecasting.summary import DIFFERENCE, means_frame, summarise
from moetrace.forecasting.windows import fitted
from moetrace.placement.plan import Plan
from moetrace.placement.planning import MOST_LAYERS, ByNode, Planning, spread
from moetrace.placement.policies import DIGITS
from moetrace.placement.replay import MOST_REPLAYED, replayed
from moetrace.placement.step_peak import StepLoad
from moetrace.placement.systems.base import Deployment
from moetrace.placement.verdict import Verdict, knee_frame, policies_frame, verdict, worth_from
from moetrace.trace import LayerLoad, LoadTrace, Shares
from moetrace.words import BASELINE, DEFAULT, DEPLOYED, ORACLE

if TYPE_CHECKING:
    import pandas as pd

# Steps that a plan is made for, unless a trace is too short.
HORIZON = 1000
# A saving that is worth an effort, for which the knee is reported.
WORTHWHILE = 0.05
# What serving systems plan by: the load of the last 1,000 passes (SGLang, vLLM).
WINDOW = 1000
SCORE_COLUMNS = (
    "trace", "layer", "horizon", "cutoff", "state", "strategy", "peak_over_mean", "balance", *ByNode._fields, "moved",
)  # fmt: skip

Forecasts = Mapping[tuple[str, int, int], Shares]
"""Shares (experts,) by predictor, horizon and cutoff."""


@dataclass(frozen=True, eq=False)
class Placement:
    """The experts of a trace placed on GPUs.

    *frames* are ``summary``, ``plans``, ``scores``, ``balance``, ``knee`` (`knee_frame`) and ``policies``, those of
    `policies_frame`, from which the *verdict* is drawn. *best* is the predictor whose plans were best in the state that
    each layer ends in, by which the plan to deploy is made, as *planning* does; *loads* has the predicted share of each
    expert by layer. *computed* results are new, *reused* ones were cached. *first_expert* is the number of the first
    expert in the source. *notes* name what was left out of a trace that is very long.
    """

    trace: str
    frames: dict[str, pd.DataFrame]
    best: str
    planning: Planning
    verdict: Verdict
    loads: dict[int, list[float]] = field(default_factory=dict)
    computed: int = 0
    reused: int = 0
    first_expert: int = 0
    notes: tuple[str, ...] = ()

    @property
    def redundant(self) -> int:
        """Redundant experts of the plan to deploy."""
        return self.planning.redundant

    @property
    def slots(self) -> dict[int, list[list[int]]]:
        """The plan to deploy: for each layer the experts in the slots of each GPU, from 0 on as systems count them."""
        found: dict[int, list[list[int]]] = {}
        for layer, own in self.frames["plans"][["layer", "experts"]].itertuples(index=False):
            found.setdefault(layer, []).append([expert - self.first_expert for expert in own])
        return found

    def deployment(self, model_layers: int = 0, first_layer: int | None = None) -> Deployment:
        """The plan to deploy as files need it, for a model of so many layers, see `Deployment`."""
        own = self.planning
        plan = Deployment(self.slots, self.loads, model_layers, own.dispatch, own.groups, own.nodes)
        return plan.with_first_layer(first_layer)


def place(
    trace: LoadTrace,
    predictors: Sequence[Predictor],
    planning: Planning | int,
    horizon: int | None = None,
    cutoffs: Sequence[int] | None = None,
    progress: Progress | None = None,
    *,
    redundants: Sequence[int] | None = None,
    deployed: Mapping[int, Plan] | None = None,
    expert_bytes: float | None = None,
    systems: Sequence[str] = (),
    first: int | None = None,
    train_on: Sequence[LoadTrace] = (),
    seed: int = 0,
    results: Results | None = None,
    run: Run = in_turn,
) -> Placement:
    """Place the experts of *trace* as *planning* does, by every forecast, and score the plans on what followed.

    A number for *planning* is the number of GPUs. A plan is for the next *horizon* steps, and changes the one before,
    at first the *deployed* one, by layer. An expert has so many *expert_bytes*. The trace is replayed from *first*
    steps on under the policies of serving systems, with each of *redundants* redundant experts (that of *planning* by
    default), which gives the verdict; the plan to deploy has the recommended number. *horizon*, *first* and *cutoffs*
    are those of `fitted` if None. Where no predictor is able to learn from the trace, plans are made by its mean.
    Only policies of these *systems* compete where they are named, beside one plan and ours.
    *train_on*, *results* and *run* are those of `evaluate`; *progress* gets percent.
    Raises `SettingError` if the slots do not fill the GPUs evenly.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> placed = mt.place(trace, [mt.WindowMean()], 4, horizon=500)
    >>> [len(experts) for experts in placed.slots[0]]
    [2, 2, 2, 2]
    """
    planning = planning if isinstance(planning, Planning) else Planning(planning)
    redundants = [planning.redundant] if redundants is None else redundants
    for number in redundants:
        planning.with_redundant(number).check(trace.experts)
    asked, early, usual = fitted(trace, [HORIZON if horizon is None else horizon], first)
    horizon = asked[0] if horizon is None else horizon
    cutoffs = usual if cutoffs is None else cutoffs
    stages = Stages(progress, 60, 25, 15)  # as long as they take on the serving sample
    replay = replayed(trace, planning, redundants, early, stages.next(), run, systems)
    policies = policies_frame(replay, trace, expert_bytes)
    judged = verdict(trace, replay, policies, planning, seed)
    planning = planning.with_redundant(redundants[0] if judged.redundant is None else judged.redundant)
    able = [own for own in predictors if has_history(own, trace.steps, int(trace.steps[-1]))] or [WindowMean()]
    test = evaluate(
        trace, able, [horizon], cutoffs, stages.next(), ahead=True, train_on=train_on, results=results, run=run
    )
    scores = simulate(trace, test, planning, deployed=deployed, progress=stages.next(), run=run)
    means = means_frame(test.forecasts(), horizon)
    best = best_strategy(scores, list(dict.fromkeys(means["predictor"])), ending_states(trace))
    size = float("nan") if expert_bytes is None else expert_bytes
    all_bytes = (trace.experts + planning.redundant) * len(trace.layers) * size
    summary = placement_summary(scores, seed)
    frames = {
        "summary": summary.assign(moved_bytes=summary["moved"] * all_bytes),
        "plans": plans_frame(trace, means, best, planning, deployed),
        "scores": scores,
        "policies": policies,
        "balance": health_frame(trace),
        "knee": knee_frame(trace, planning),
    }
    own = means[means["predictor"] == best]
    loads = {int(str(layer)): part["share"].tolist() for layer, part in own.groupby("layer", sort=False)}
    judged = replace(judged, worth_from=worth_from(frames["knee"], WORTHWHILE) if len(frames["knee"]) else None)
    logged, notes = len(trace.steps), tuple[str, ...]()
    if logged > MOST_REPLAYED:
        notes += (f"policies are replayed on the last {MOST_REPLAYED:,} of {logged:,} logged steps",)
    if len(trace.layers) > MOST_LAYERS:
        notes += (f"plans by each forecast are scored on {MOST_LAYERS} of {len(trace.layers)} layers",)
    return Placement(
        trace.name, frames, best, planning, judged, loads, test.computed, test.reused, trace.info.first_expert, notes
    )


def placement_frames(placed: Placement) -> dict[str, pd.DataFrame]:
    """What a report shows of a placement: ``placement``, ``plan_scores``, ``policies``, ``knee``, ``verdict``."""
    import pandas as pd

    gpus = placed.planning.gpus
    return {
        "placement": placed.frames["summary"].assign(gpus=gpus),
        "plan_scores": placed.frames["scores"],
        "policies": placed.frames["policies"].assign(gpus=gpus),
        "knee": placed.frames["knee"],
        "verdict": pd.DataFrame([placed.verdict.as_row() | {"gpus": gpus}]),
    }


# --- plans by each forecast, scored -----------------------------------------------------------


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
