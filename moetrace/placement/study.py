"""Everything about placing the experts of one trace: plans by every forecast, policies replayed, the plan to deploy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from moetrace.analysis.severity import health_frame
from moetrace.forecasting.backtest import Progress, Run, Stages, evaluate, in_turn
from moetrace.forecasting.evaluation import Results
from moetrace.forecasting.layers import has_history
from moetrace.forecasting.predictors.averages import WindowMean
from moetrace.forecasting.predictors.base import Predictor
from moetrace.forecasting.summary import means_frame
from moetrace.forecasting.windows import fitted
from moetrace.placement.knee import knee_frame, worth_from
from moetrace.placement.plan import Plan
from moetrace.placement.planning import MOST_LAYERS, Planning
from moetrace.placement.replay import MOST_REPLAYED, replayed
from moetrace.placement.simulate import best_strategy, ending_states, placement_summary, plans_frame, simulate
from moetrace.placement.systems.base import Deployment
from moetrace.placement.verdict import Verdict, policies_frame, verdict
from moetrace.trace import LoadTrace

if TYPE_CHECKING:
    import pandas as pd

# Steps that a plan is made for, unless a trace is too short.
HORIZON = 1000
# A saving that is worth an effort, for which the knee is reported.
WORTHWHILE = 0.05


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
