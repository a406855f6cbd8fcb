"""`moetrace place`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moetrace.cli.predict import Protocol, computed, steps_of, tested
from moetrace.cli.shared import Shared, Table, with_options
from moetrace.errors import WorkspaceError

if TYPE_CHECKING:
    import pandas as pd

    from moetrace.forecasting.windows import Covered
    from moetrace.workspace.work import Work

SUMMARY_COLUMNS = (
    "strategy", "state", "peak_over_mean", "above_oracle", "difference", "difference_low", "difference_high",
    "balance", "moved", "scored", "cutoffs",
)  # fmt: skip

REPLANNING_COLUMNS = (
    "state", "replan_every", "peak_over_mean", "difference", "difference_low", "difference_high",
    "balance", "moved", "moved_per_1000", "scored", "cutoffs",
)  # fmt: skip


@with_options
def place(
    protocol: Protocol,
    shared: Shared,
    gpus: Annotated[int, typer.Option(min=2, help="GPUs that share the experts of a layer.")],
    traces: Annotated[list[str] | None, typer.Argument(help="Names or paths; all of the workspace if none.")] = None,
    redundant: Annotated[int, typer.Option(min=0, help="Slots for second and further copies of experts.")] = 0,
    horizon: Annotated[int, typer.Option(min=1, help="Steps that a plan is made for.")] = 1000,
    least_gain: Annotated[
        float,
        typer.Option(min=0, help="Keep a plan that no new one betters by this part of the mean load.", metavar="PART"),
    ] = 0.0,
    replan: Annotated[
        str | None,
        typer.Option(help="Compare plans made every so many steps, such as 500,1000,4000.", metavar="STEPS"),
    ] = None,
) -> None:
    """Put experts on GPUs by the forecast, and score the plans on the load that then came.

    At every cutoff each predictor's forecast becomes a plan, and so do the load of the last 1,000
    steps, which serving systems plan by (window_mean), and the load that came (oracle). Scored is the
    busiest GPU: its load over that of the mean one, over the whole horizon (peak_over_mean; 1 is
    even), and the mean over the busiest where every step waits for its own (balance).

    The plan for the steps after the end is written for the predictor whose plans were best, as
    vllm-ascend, MindIE, SGLang and TensorRT-LLM read it.

    \b
    Example: moetrace place gpt-moe-8e-a --gpus 4 --predictor auto --predictor sw_avg
    """
    from moetrace.analysis.tables import stacked
    from moetrace.report.tables import records

    study = Study(shared, protocol, gpus, redundant, horizon, least_gain, steps_of(replan) if replan else [])
    done = shared.each(shared.place().chosen(traces or []), study.of)
    frames = {name: stacked([placed.frames[name] for placed in done]) for name in done[0].frames}
    protocol.note_training(shared)
    tables = {
        "summary": Table(f"Experts on {gpus} GPUs", frames["summary"], SUMMARY_COLUMNS, by=("trace", "horizon")),
        "plans": Table("Plan for the steps to come", frames["plans"], printed=False),
        "scores": Table("Scores", frames["scores"], printed=False),
    }
    if study.replan:
        printed = list(chain.from_iterable(placed.frames["replanning"]["strategy"] == placed.best for placed in done))
        tables["replanning"] = Table(
            "How often to plan", frames["replanning"], REPLANNING_COLUMNS, by=("trace", "strategy"), rows=printed
        )
        tables["stretches"] = Table("Stretches between plans", frames["stretches"], printed=False)
    document: dict[str, Any] = {"gpus": gpus, "redundant": redundant, "horizon": horizon}
    document["files"] = [file for placed in done for file in placed.files]
    document["figures"] = [file for placed in done for file in placed.figures]
    document["trained_on"] = [other.path.stem for other in protocol.others(shared)]
    shared.emit(tables, document | {name: records(table.frame) for name, table in tables.items()})


class Placed(NamedTuple):
    """What came of a trace: frames by the names of their tables, the *best* predictor, and what was written."""

    frames: dict[str, pd.DataFrame]
    best: str
    files: list[str]
    figures: list[str]


@dataclass(frozen=True)
class Study:
    """What is asked of every trace; *taken* are the paths of those that are done."""

    shared: Shared
    protocol: Protocol
    gpus: int
    redundant: int
    horizon: int
    least_gain: float
    replan: list[int]
    taken: set[Path] = field(default_factory=set)

    def of(self, name: str) -> Placed:
        """Scores, summary and plans of a trace, and how often to plan if that is asked; its files are written."""
        from moetrace.forecasting.predictors import label
        from moetrace.forecasting.summary import means_frame
        from moetrace.forecasting.windows import replanning_cutoffs
        from moetrace.placement.plan import slots_of
        from moetrace.placement.simulate import best_strategy, placement_frame, placement_summary, plans_frame
        from moetrace.workspace.results import safe

        given = self.shared.open(name)
        slots_of(given.experts, self.gpus, self.redundant)
        covered = replanning_cutoffs(given, self.replan, self.protocol.first) if self.replan else {}
        results = tested(self.shared, name, self.protocol, [self.horizon], ahead=True)
        trace = results.work.trace
        with self.shared.progress(f"plans of {trace.name}"):
            scores = placement_frame(trace, results.backtest, self.gpus, self.redundant, self.least_gain)
            summary = placement_summary(scores, self.protocol.seed)
            means = means_frame(results.forecasts(), self.horizon)
            able = list(dict.fromkeys(means["predictor"])) if len(means) else [label(self.protocol.predictors()[0])]
            best = best_strategy(scores, able)
            plans = plans_frame(trace, means, best, self.gpus, self.redundant)
        often = self._replanned(results.work, covered, best) if self.replan else {}
        path = self.shared.place().result_path("place", f"{safe(trace.name)}-{self.gpus}-gpus")
        if path in self.taken:
            raise WorkspaceError(f"{path} is of another trace of this name: place them one by one")
        self.taken.add(path)
        frames = {"summary": summary, "plans": plans, "scores": scores} | often
        return Placed(frames, best, self._write(path, trace.name, plans), self._draw(path, frames, best))

    def _write(self, path: Path, trace: str, plans: pd.DataFrame) -> list[str]:
        """The plan for the steps to come, in every format there is; the files."""
        from moetrace.placement.expert_maps import MAPS
        from moetrace.workspace.traces import write_bytes

        if self.shared.layers is not None:
            self.shared.note(f"{trace}: no plan is written, which takes all layers: leave --layers out")
            return []
        if not len(plans):
            return []
        slots = {layer: plans.loc[plans["layer"] == layer, "experts"].tolist() for layer in plans["layer"].unique()}
        by, coming = plans["predictor"].iloc[0], f"the next {self.horizon:,} steps"
        self.shared.note(f"wrote the plan by {by} for {coming} to {path.parent}, in it:")
        files = []
        for kind in MAPS:
            at = write_bytes(path.with_name(path.name + kind.ending), kind.text(slots).encode())
            files.append(str(at))
            self.shared.note(f"  {at.name} for {kind.readers}")
        return files

    def _draw(self, path: Path, frames: dict[str, pd.DataFrame], best: str) -> list[str]:
        """The scores as a figure, and how often to plan; the file, none where nothing was scored."""
        from moetrace.report.placement import plans
        from moetrace.report.style import png
        from moetrace.workspace.traces import write_bytes

        if not len(frames["scores"]):
            return []
        often = frames.get("replanning")
        own = None if often is None or often.empty else often[often["strategy"] == best]
        at = write_bytes(path.with_name(f"{path.name}.png"), png(plans(frames["scores"], own, self.gpus)))
        self.shared.note(f"drew the scores to {at}")
        return [str(at)]

    def _replanned(self, work: Work, covered: Covered, best: str) -> dict[str, pd.DataFrame]:
        """How often to plan: the means, and a row for each stretch between two plans."""
        from moetrace.placement.replanning import replanning_frame, replanning_summary

        again = replace(work, horizons=sorted(set(self.replan)), covered=covered, ahead=False)
        results = computed(self.shared, again, self.protocol)
        with self.shared.progress(f"plans of {work.trace.name}, how often"):
            stretches = replanning_frame(work.trace, results.backtest, self.gpus, self.redundant, self.least_gain)
            summary = replanning_summary(stretches, self.protocol.seed)
        self._note_holding(work.trace.name, summary, best)
        return {"replanning": summary, "stretches": stretches}

    def _note_holding(self, trace: str, summary: pd.DataFrame, best: str) -> None:
        """Say for how long a plan holds."""
        from moetrace.analysis.states import STABLE, TRANSIENT
        from moetrace.placement.replanning import ENOUGH, plan_holds

        shortest, longest = min(self.replan), max(self.replan)
        own = summary.loc[summary["strategy"] == best, "state"]
        said = []
        for state in (state for state in (TRANSIENT, STABLE) if (own == state).any()):
            holds = plan_holds(summary, best, state)
            more = {shortest: " or less", longest: " or more"}.get(holds or 0, "") if shortest < longest else ""
            said.append(f"one made while {state} " + ("to the end" if holds is None else f"{holds:,} steps{more}"))
        if said:
            within = f"the busiest GPU within {ENOUGH:.0%} of the mean load of planning every {shortest:,}"
            self.shared.note(f"{trace}: how long a plan by {best} holds, {within}: {'; '.join(said)}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(place)
