"""Options that several commands share, as Python has them: which part of which trace, how to backtest, the hardware."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrace.errors import SettingError, TraceError, check_several
from moetrace.forecasting.predictors import PREDICTORS, predictor
from moetrace.forecasting.predictors.base import Predictor
from moetrace.forecasting.windows import FIRST_CUTOFF, checked_cutoffs, cutoffs_apart, default_cutoffs, fitted, thinned
from moetrace.formats import from_frame, read_trace
from moetrace.placement.step_time import StepTime, read_curve
from moetrace.trace import LoadTrace
from moetrace.words import DEFAULT_WORKSPACE, WORKSPACE
from moetrace.workspace.tasks import runner
from moetrace.workspace.traces import Workspace

if TYPE_CHECKING:
    import pandas as pd

    Traced = LoadTrace | pd.DataFrame | str | Path
    """A trace, its path or its name in the workspace, or a data frame as `from_frame` takes it."""

Note = Callable[[str], None]
"""Gets a line about what was chosen for the user."""


def silent(_text: str) -> None:
    """Say nothing."""


def reused_line(trace: str, computed: int, reused: int) -> str:
    """How many results of *trace* were cached; empty if none were."""
    which = f"all {reused}" if not computed else f"{reused} of {reused + computed}"
    return f"{trace}: reusing {which} cached results" if reused else ""


def workspace_of(workspace: Workspace | str | Path | None) -> Workspace:
    """The workspace at that path; ``./moetrace-out``, or what ``MOETRACE_WORKSPACE`` says, by default."""
    if isinstance(workspace, Workspace):
        return workspace
    return Workspace(Path(workspace or os.environ.get(WORKSPACE) or DEFAULT_WORKSPACE))


@dataclass(frozen=True)
class Selection:
    """Which part of a trace: some *layers*, and *steps* as a pair of the first and the last, None where not limited."""

    layers: Sequence[int] | None = None
    steps: tuple[int | None, int | None] | None = None
    workspace: Workspace | str | Path | None = None

    def open(self, trace: Traced) -> LoadTrace:
        """That part of *trace*, where a dump is read as `ingest` does; raises `SettingError` if it is no trace."""
        if isinstance(trace, str | Path):
            path = Path(trace)
            try:
                trace = workspace_of(self.workspace).parts([str(trace)])[0]
            except TraceError:
                if not path.is_file():
                    raise
                trace = read_trace(path)
        if not isinstance(trace, LoadTrace):
            if not hasattr(trace, "__arrow_c_stream__"):
                raise SettingError(
                    f"a trace is a LoadTrace, a data frame, a path or a name, not a {type(trace).__name__}"
                )
            trace = from_frame(trace)
        if self.steps is not None and (isinstance(self.steps, str) or len(self.steps) != 2):
            raise SettingError(f"steps are a pair such as (1000, 9000), not {self.steps!r}")
        return trace.select(self.layers, *(self.steps or (None, None)))


def decode_of(trace: LoadTrace, workspace: Workspace | str | Path | None) -> LoadTrace | None:
    """The decode tokens of the passes of *trace*, where the workspace has them as another trace, ``NAME-decode``."""
    within, name = workspace_of(workspace), f"{trace.name}-decode"
    if name not in within.names():
        return None
    found = within.open(name)
    if found.experts != trace.experts or not {*trace.layers} <= {*found.layers} or found.steps[0] > trace.steps[-1]:
        return None
    return found.select(trace.layers, int(trace.steps[0]), int(trace.steps[-1]))


@dataclass(frozen=True)
class Backtesting:
    """How to backtest, and where it runs.

    *predictor* has names, ``name:setting=value``, or predictors. *cutoffs* are
    scored, or *first* and one after *every* so many steps. A lstm may learn from the traces *train_on*. *jobs*
    processes work, or the cluster at the address *dask*. Results are cached in the *workspace* where one is given.
    """

    predictor: Sequence[str | Predictor] | None = None
    cutoffs: Sequence[int] | None = None
    first: int | None = None
    every: int | None = None
    train_on: Sequence[Any] = ()
    seed: int = 0
    jobs: int = 1
    dask: str | None = None
    workspace: Workspace | str | Path | None = None

    def predictors(self, default: Iterable[str] = PREDICTORS) -> list[Predictor]:
        """Those asked for, or the *default* ones; with the seed where they take one."""
        check_several(self.predictor or (), "predictor", "['level', mt.Ema()]")
        return [predictor(own, self.seed) if isinstance(own, str) else own for own in self.predictor or default]

    def trained_on(self, note: Note, default: Iterable[str] = PREDICTORS) -> list[str]:
        """The names of the runs to train on; a note says which predictors were, of those `predictors` gives."""
        names = [Selection(workspace=self.workspace).open(own).name for own in self.train_on]
        trained = [own.name for own in self.predictors(default) if own.pools_layers]
        if names and trained:
            note(f"{', '.join(trained)} was trained on {', '.join(names)} and on nothing else")
        return names

    def windows(
        self, trace: LoadTrace, horizons: Sequence[int] | None, default: Sequence[int], note: Note, option: str
    ) -> tuple[list[int], list[int]]:
        """The horizons and the cutoffs; the *default* ones where no *horizons* are given, fitted to a short trace.

        *note* gets a line where they were fitted, which names the *option* for horizons, and where cutoffs are further
        apart than usual. Raises `SettingError` if a given horizon or cutoff cannot be scored.
        """
        check_several(self.cutoffs or (), "cutoffs", "[3000, 4000]")
        asked = list(self.cutoffs) if self.cutoffs else None
        if horizons is None and asked is None and self.every is None:
            found, _, cutoffs = fitted(trace, default, self.first)
            if found != list(default):
                note(
                    f"{trace.name}: {len(trace.steps):,} steps are too few for a horizon of {min(default):,}; the "
                    f"horizon is a quarter of them, {found[0]:,} ({option} sets it)"
                )
        else:
            # A horizon that was asked for is scored at least once wherever the trace allows it.
            longest = int(trace.steps[-1] - trace.steps[0]) + 1 - min(horizons or default)
            first = self.first or max(1, min(FIRST_CUTOFF, longest))
            found, cutoffs = list(horizons or default), asked or default_cutoffs(trace, first, self.every) or [first]
            checked_cutoffs(trace, found, cutoffs, explicit=asked is not None)
        if not (asked or self.every) and thinned(trace):
            note(f"{trace.name}: cutoffs {cutoffs_apart(trace):,} steps apart, for its length (--every sets it)")
        return found, cutoffs

    def settings(self, note: Note = silent) -> dict[str, Any]:
        """The arguments of `evaluate` and all that is built on it, besides trace, predictors, horizons and cutoffs."""
        opened = [Selection(workspace=self.workspace).open(own) for own in self.train_on]
        results = None if self.workspace is None else workspace_of(self.workspace).results(note)
        return {"train_on": opened, "results": results, "run": runner(self.jobs, self.dask)}


@dataclass(frozen=True)
class Device:
    """How long a GPU takes for an expert: the *hardware* by name, its *ridge*, or a measured curve, *expert_time*.

    A step of the trace holds *passes_per_step* forward passes; *expert_bytes* gives moves in bytes and time in µs.
    """

    hardware: str | None = None
    ridge: float | None = None
    expert_time: str | Path | StepTime | None = None
    passes_per_step: int = 1
    expert_bytes: float | None = None

    def time(self) -> StepTime:
        """The time of an expert by its tokens; raises `SettingError` where several are given."""
        if self.expert_time is None:
            return StepTime.of(self.hardware or "", self.ridge, self.passes_per_step, self.expert_bytes)
        if self.hardware or self.ridge is not None:
            raise SettingError("--expert-time goes without --hardware and --ridge: a curve says all of it")
        if isinstance(self.expert_time, StepTime):
            return self.expert_time
        return read_curve(Path(self.expert_time), self.passes_per_step)
