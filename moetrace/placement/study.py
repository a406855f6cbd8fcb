"""Everything about placing the experts of one trace: plans by every forecast, how often to plan, the plan to deploy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moetrace.analysis.states import STABLE, TRANSIENT
from moetrace.forecasting.backtest import Progress, Run, evaluate, in_turn
from moetrace.forecasting.predictors import label
from moetrace.forecasting.predictors.base import Predictor
from moetrace.forecasting.results import Results
from moetrace.forecasting.summary import means_frame
from moetrace.forecasting.windows import FIRST_CUTOFF, replanning_windows
from moetrace.placement.plan import Plan
from moetrace.placement.planning import FEWEST_STEPS, MOST_EXPERTS, STEPS, Planning
from moetrace.placement.replanning import plan_holds, replanning_frame, replanning_summary
from moetrace.placement.replay import MOST_REPLAYED, replayed
from moetrace.placement.simulate import best_strategy, ending_states, placement_summary, plans_frame, simulate
from moetrace.placement.verdict import Verdict, policies_frame, verdict
from moetrace.trace import LoadTrace

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Placement:
    """What came of placing the experts of a trace on GPUs.

    *frames* are ``summary``, ``plans`` and ``scores``, and ``replanning`` and ``stretches`` where that was asked;
    ``policies`` are those of `verdict.policies_frame`, and *verdict* is what they say, where that was asked.
    *best* is the predictor whose plans were best in the state that each layer ends in, by which the plan to
    deploy is made; it has *redundant* slots for replicas, and *loads* has the predicted share of each expert by layer.
    *holds* says by state for how many steps a plan holds, None for the rest of the trace.
    *computed* results are new, *reused* ones were kept. *first_expert* is the number of the first expert in the
    source. *judge* is what plans were judged by in the end: steps, or the mean. *notes* say what was left out of a
    trace that is very long or has very many experts.
    """

    trace: str
    frames: dict[str, pd.DataFrame]
    best: str
    redundant: int = 0
    loads: dict[int, list[float]] = field(default_factory=dict)
    holds: dict[str, int | None] = field(default_factory=dict)
    computed: int = 0
    reused: int = 0
    first_expert: int = 0
    verdict: Verdict | None = None
    judge: str = STEPS
    notes: tuple[str, ...] = ()

    @property
    def slots(self) -> dict[int, list[list[int]]]:
        """The plan to deploy: for each layer the experts in the slots of each GPU, from 0 on as systems count them."""
        found: dict[int, list[list[int]]] = {}
        for layer, own in self.frames["plans"][["layer", "experts"]].itertuples(index=False):
            found.setdefault(layer, []).append([expert - self.first_expert for expert in own])
        return found


def place(
    trace: LoadTrace,
    predictors: Sequence[Predictor],
    gpus: int,
    redundant: int = 0,
    horizon: int = 1000,
    cutoffs: Sequence[int] | None = None,
    progress: Progress | None = None,
    *,
    running: Mapping[int, Plan] | None = None,
    expert_bytes: float | None = None,
    policies: Sequence[int] = (),
    replan_every: Sequence[int] = (),
    first: int = FIRST_CUTOFF,
    train_on: Sequence[LoadTrace] = (),
    seed: int = 0,
    results: Results | None = None,
    run: Run = in_turn,
    **settings: Any,
) -> Placement:
    """Put the experts of *trace* on *gpus* by every forecast, and score the plans on the load that then came.

    *redundant* slots hold further replicas of busy experts. A plan is for the next *horizon* steps, and changes the
    one before, at first the one that is *running*, by layer, with the *settings* of `Planning`. An
    expert has so many *expert_bytes*. With *policies*, the trace is replayed under the policies of serving systems,
    with each of these numbers of redundant slots, and judged; planned is then with the number that is recommended, or
    *redundant* where none is. With *replan_every* the trace is replayed for one who
    plans so often, from *first* steps on. *cutoffs*, *train_on*, *results* and *run* are those of `evaluate`;
    *progress* is told of the layers that were replayed, then of results, then of the layers that were planned.
    Raises `SettingError` where the slots do not fill the GPUs evenly, or distances of plans do not fit.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> placed = mt.place(trace, [mt.WindowMean()], gpus=4, horizon=500)
    >>> [len(experts) for experts in placed.slots[0]]
    [2, 2, 2, 2]
    """
    for more in (redundant, *policies):
        Planning(gpus, more, **settings).check(trace.experts)
    windows = replanning_windows(trace, replan_every, first) if replan_every else {}
    judged: dict[str, pd.DataFrame] = {}
    said, stages = None, _Stages(progress)
    if policies:
        replay = replayed(trace, gpus, policies, first, stages.next(), run, **settings)
        judged["policies"] = policies_frame(replay, trace, expert_bytes)
        said = verdict(trace, replay, judged["policies"], gpus, seed, **settings)
        redundant = redundant if said.redundant is None else said.redundant
    planning = Planning(gpus, redundant, **settings)
    shared = {"train_on": train_on, "results": results, "run": run}
    test = evaluate(trace, predictors, [horizon], cutoffs, stages.next(), ahead=True, **shared)  # type: ignore[arg-type]
    scores = simulate(trace, test, gpus, redundant, running=running, progress=stages.next(), run=run, **settings)
    means = means_frame(test.forecasts(), horizon)
    able = list(dict.fromkeys(means["predictor"])) if len(means) else [label(predictors[0])]
    judge = planning.judged_by(trace.experts, len(trace.steps))
    best = best_strategy(scores, able, ending_states(trace), judge)
    slots = (trace.experts + redundant) * len(trace.layers)
    all_bytes = slots * (float("nan") if expert_bytes is None else expert_bytes)
    summary = placement_summary(scores, seed)
    frames = {
        "summary": summary.assign(moved_bytes=summary["moved"] * all_bytes),
        "plans": plans_frame(trace, means, best, planning, running),
        "scores": scores,
    } | judged
    done = Placement(
        trace.name, frames, best, redundant, _loads(means, best), {}, test.computed, test.reused,
        trace.info.first_expert, said, judge, tuple(_left_out(trace, planning, bool(policies))),
    )  # fmt: skip
    if not replan_every:
        return done
    again = evaluate(trace, predictors, sorted(set(replan_every)), windows, stages.next(), **shared)  # type: ignore[arg-type]
    stretches = replanning_frame(trace, again, gpus, redundant, **settings)
    replanning = replanning_summary(stretches, seed)
    replanning = replanning.assign(moved_bytes=replanning["moved"] * all_bytes)
    frames |= {"replanning": replanning, "stretches": stretches}
    planned_in = set(replanning.loc[replanning["strategy"] == best, "state"])
    holds = {state: plan_holds(replanning, best, state) for state in (TRANSIENT, STABLE) if state in planned_in}
    return replace(done, holds=holds, computed=test.computed + again.computed, reused=test.reused + again.reused)


@dataclass
class _Stages:
    """The *progress* of one stage after another, of which so many tasks are done *before* the latest, with *of*."""

    progress: Progress | None
    before: int = 0
    of: int = 0

    def next(self) -> Progress | None:
        """That of the next stage."""
        self.before, self.of = self.before + self.of, 0
        return self._told if self.progress else None

    def _told(self, done: int, of: int) -> None:
        self.of = of
        if self.progress:
            self.progress(self.before + done, self.before + of)


def _left_out(trace: LoadTrace, planning: Planning, replayed: bool) -> Iterator[str]:
    """What is not looked at, in sentences; of policies only where they are *replayed*."""
    if planning.judge != planning.judged_by(trace.experts, FEWEST_STEPS):
        yield f"{trace.experts:,} experts are more than {MOST_EXPERTS:,}: plans are judged by the mean, not by steps"
    logged = len(trace.steps)
    if replayed and logged > MOST_REPLAYED:
        yield f"policies are replayed on the last {MOST_REPLAYED:,} of {logged:,} logged steps"


def _loads(means: pd.DataFrame, predictor: str) -> dict[int, list[float]]:
    """The share of each expert that *predictor* expects, by layer."""
    found: dict[int, list[float]] = {}
    for name, layer, share in zip(*(means.get(column, ()) for column in ("predictor", "layer", "share"))):
        if name == predictor:
            found.setdefault(int(layer), []).append(float(share))
    return found


def placement_frames(
    trace: LoadTrace, predictors: Sequence[Predictor], gpus: int, *more: Any, **settings: Any
) -> dict[str, pd.DataFrame]:
    """What a report says of plans for *gpus*: the frames ``placement``, a summary, and ``plan_scores``; see `place`."""
    placed = place(trace, predictors, gpus, *more, **settings)
    return {"placement": placed.frames["summary"].assign(gpus=gpus), "plan_scores": placed.frames["scores"]}
