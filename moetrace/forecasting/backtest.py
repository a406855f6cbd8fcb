"""The backtest: predictors, cutoffs, horizons, layers: the one loop that drives every predictor.

At each cutoff a predictor is given the history up to it and nothing else; what it forecasts of the steps after it is
compared with what followed. The unit of work is a layer, or a fit that serves all layers. Each result is cached as it
is made, in memory or wherever a `Results` keeps it, under a name that says what it depends on; what is cached already
is not computed again. Who does the work, this process or many, is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np

from moetrace.analysis.variogram import BLOCK, cache_block_means
from moetrace.errors import TooShortError
from moetrace.forecasting.evaluation import (
    FIT,
    FORECAST,
    SCORES,
    SHARES,
    Evaluation,
    InMemory,
    Kind,
    Result,
    Results,
    SharedFit,
    evaluation,
)
from moetrace.forecasting.intervals import ErrorCalibration
from moetrace.forecasting.layers import (
    SHARE_COLUMNS,
    EndForecast,
    Score,
    TimedFit,
    fit,
    forecast_end,
    has_history,
    score_layer,
)
from moetrace.forecasting.predictors import label
from moetrace.forecasting.predictors.base import Predictor
from moetrace.forecasting.windows import Windows
from moetrace.frames import stacked
from moetrace.trace import LoadTrace

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Progress = Callable[[int, int], None]
"""Called with the tasks done, and their number: a layer is one, and so is a fit that serves all layers."""


class Stages:
    """The *progress* of stages one after another in percent of the whole, of which each takes about a *part*.

    The whole is 100 from the start: the number of tasks of a later stage is not known by then.
    """

    def __init__(self, progress: Progress | None, *parts: int) -> None:
        self._progress, self._parts, self._before = progress, iter(parts), 0

    def next(self) -> Progress | None:
        """That of the next stage."""
        if self._progress is None:
            return None
        before, part, tell = self._before, next(self._parts), self._progress
        self._before += part
        return lambda done, of: tell(before + part * done // max(of, 1), 100)


@dataclass(frozen=True, eq=False)
class Backtest:
    """What came of an evaluation, read when it is asked for.

    *computed* is the number of results that are new, *reused* of those that were cached already; the scores
    and the forecast of a layer by a predictor over a horizon are two.
    """

    evaluation: Evaluation
    results: Results
    computed: int
    reused: int

    @cached_property
    def scores(self) -> pd.DataFrame:
        """One row per `Score`, by layer, predictor, cutoff and horizon."""
        return self._frame(SCORES, self.evaluation.scored, Score._fields)

    @cached_property
    def shares(self) -> pd.DataFrame:
        """Predicted and actual share of each expert over each horizon, with intervals: `SHARE_COLUMNS`."""
        return self._frame(SHARES, [result for result in self.evaluation.scored if result.intervals], SHARE_COLUMNS)

    def forecasts(self) -> Iterator[EndForecast]:
        """The forecast of the steps after the end, for each layer, predictor and horizon, one at a time."""
        return (self.results.get(FORECAST, result) for result in self.evaluation.forecast_ahead)

    def _frame(self, kind: Kind[pd.DataFrame], results: Sequence[Result], columns: Sequence[str]) -> pd.DataFrame:
        frame = stacked([self.results.get(kind, result) for result in results])
        if not len(frame):
            return stacked([], columns)
        turn = frame["predictor"].map({label(by): i for i, by in enumerate(self.evaluation.predictors)})
        # A stable sort, so that the experts of a cutoff stay in their order.
        order = np.lexsort((frame["horizon"], frame["cutoff"], turn, frame["layer"]))
        return frame.iloc[order].reset_index(drop=True)


# --- the loop ---------------------------------------------------------------------------------


class Task(Protocol[T_co]):
    """A unit of work that can be sent to another process."""

    def run(self) -> T_co:
        """Do it, and hand over what comes of it."""


class Run(Protocol):
    """Runs tasks and yields what each hands over when it is done, whatever their order."""

    def __call__(self, tasks: Sequence[Task[T]], /) -> Iterable[T]:
        """Run them."""


def in_turn(tasks: Sequence[Task[T]]) -> Iterator[T]:
    """Run *tasks* one after the other in this process."""
    return (task.run() for task in tasks)


def counted(run: Run, tasks: Sequence[Task[T]], progress: Progress | None) -> Iterator[T]:
    """What comes of *tasks* that *run* does; *progress* gets how many are done."""
    for done, found in enumerate(run(tasks), 1):
        yield found
        if progress is not None:
            progress(done, len(tasks))


def evaluate(
    trace: LoadTrace,
    predictors: Sequence[Predictor],
    horizons: Sequence[int],
    cutoffs: Sequence[int] | Windows | None = None,
    progress: Progress | None = None,
    *,
    ahead: bool = False,
    intervals: bool = True,
    train_on: Sequence[LoadTrace] = (),
    results: Results | None = None,
    run: Run = in_turn,
) -> Backtest:
    """Score *predictors* at every one of *cutoffs* and *horizons* that the trace covers.

    *cutoffs* are the default ones if None; a mapping says which horizons are scored at which. With *ahead* the steps
    after the end of the trace are forecast too. Without *intervals* forecasts are scored alone: no intervals and
    expected errors, and no shares. Both frames are empty where the trace is too short for every horizon. Predictors
    with one fit for all layers learn from the runs *train_on* instead of from the history, where given. *results* keeps
    what is made and hands out what it has (memory, unless given); *run* runs the tasks (`moetrace.workspace.tasks` has
    cores and clusters).
    Raises `SettingError` for a horizon that is not positive, a predictor given twice, or a trace that is one
    of *train_on*; `TooShortError` when *ahead* is asked and the trace is too short for every predictor.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> test = mt.evaluate(trace, [mt.SwAvg(window=300)], horizons=[500], cutoffs=[1000])
    >>> test.scores[["predictor", "cutoff", "horizon"]].to_dict("records")
    [{'predictor': 'sw_avg:window=300', 'cutoff': 1000, 'horizon': 500}]
    """
    asked = evaluation(trace, predictors, horizons, cutoffs, ahead=ahead, intervals=intervals, train_on=train_on)
    return evaluate_all([asked], progress, results=results, run=run)[0]


def evaluate_all(
    asked: Sequence[Evaluation], progress: Progress | None = None, *, results: Results | None = None, run: Run = in_turn
) -> list[Backtest]:
    """What came of each of several evaluations of one trace; each layer is read once for all of them.

    The other arguments, and what is raised, are those of `evaluate`.
    """
    for own in asked:
        if own.ahead:
            check_able(own.trace, own.predictors)
    trace, cached = asked[0].trace, InMemory() if results is None else results
    cached.begin(trace.name)
    pending = [_pending(own, cached) for own in asked]
    fits: dict[SharedFit, FitTask] = {}
    layers: dict[int, list[Pending]] = {layer: [] for layer in trace.layers}
    for own, parts in zip(asked, pending):
        for layer, part in parts:
            layers[layer].append(part)
            for name in part.fits.values():
                if name not in fits and not cached.has(FIT, name):
                    fits[name] = FitTask(name, own.train_on if name.fitted_at is None else [trace], cached)
    tasks = [LayerTask(trace, layer, parts, cached) for layer, parts in layers.items() if parts]
    done = 0
    for some in (list(fits.values()), tasks):  # the layers need the fits
        for from_worker in run(some):
            cached.merge(from_worker)
            done += 1
            if progress is not None:
                progress(done, len(fits) + len(tasks))
    computed = [sum(len(part.scores) + len(part.ahead) for _, part in parts) for parts in pending]
    return [
        Backtest(own, cached, new, len(own.scored) + len(own.forecast_ahead) - new) for own, new in zip(asked, computed)
    ]


def check_able(trace: LoadTrace, predictors: Sequence[Predictor]) -> None:
    """Raise `TooShortError` when the whole of *trace* is too short a history for every one of *predictors*."""
    start, end = int(trace.steps[0]), int(trace.steps[-1])
    if not any(has_history(predictor, trace.steps, end) for predictor in predictors):
        least = min(predictors, key=lambda predictor: predictor.needs)
        raise TooShortError(
            f"{trace.name} has {end - start + 1} steps, {len(trace.steps)} of them logged, and {least.name} needs "
            f"{least.needs}, {least.least_rows(trace.stride)} of them logged, to fit: "
            "record more steps, or use --predictor window_mean"
        )


class Pending(NamedTuple):
    """What is not cached yet of one layer by one predictor: *scores* at the cutoffs of *windows*, forecasts *ahead*.

    *fits* are the fits for all layers that these need, by cutoff, of a predictor that has such.
    """

    predictor: Predictor
    windows: Windows
    scores: Sequence[Result]
    ahead: Sequence[Result]
    fits: Mapping[int, SharedFit]


def _pending(asked: Evaluation, cached: Results) -> list[tuple[int, Pending]]:
    """What is not cached yet, each with its layer."""
    scored, ahead = set(asked.scored), set(asked.forecast_ahead)
    end = int(asked.trace.steps[-1])
    pending = []
    for layer, predictor in product(asked.trace.layers, asked.predictors):
        own = [asked.names[layer, label(predictor), horizon] for horizon in asked.horizons]
        kinds = (SCORES, SHARES) if asked.intervals else (SCORES,)
        scores = [name for name in own if name in scored and not all(cached.has(kind, name) for kind in kinds)]
        coming = [name for name in own if name in ahead and not cached.has(FORECAST, name)]
        if not scores and not coming:
            continue
        wanted = {name.horizon for name in scores}
        windows = {cutoff: [h for h in horizons if h in wanted] for cutoff, horizons in asked.windows.items()}
        windows = {cutoff: horizons for cutoff, horizons in windows.items() if horizons}
        fits: dict[int, SharedFit] = {}
        if predictor.pools_layers:
            serving = asked.shared_fits(predictor, list(asked.windows))
            fits = {cutoff: name for cutoff, name in serving.items() if cutoff in windows}
            fits |= asked.shared_fits(predictor, [end]) if coming else {}
        pending.append((layer, Pending(predictor, windows, scores, coming, fits)))
    return pending


@dataclass(frozen=True, eq=False)
class FitTask:
    """The fit of that *name* for all layers of *traces*, each read when it is learned from."""

    name: SharedFit
    traces: Sequence[LoadTrace]
    results: Results

    def run(self) -> Results | None:
        """Fit, and cache it."""
        cutoff, loads = self.name.fitted_at, (load for trace in self.traces for load in trace.by_layer())
        histories = (load if cutoff is None else load.until(cutoff) for load in loads)
        self.results.put(FIT, self.name, fit(self.name.predictor, histories))
        return self.results.for_parent()


@dataclass(frozen=True, eq=False)
class LayerTask:
    """All that is *pending* of one layer."""

    trace: LoadTrace
    layer: int
    pending: Sequence[Pending]
    results: Results

    def run(self) -> Results | None:
        """Read the layer, score and forecast, and cache each result as it is made."""
        load = self.trace.layer(self.layer)
        cache_block_means(load, load.rows(BLOCK))  # for every history that is cut from the layer
        calibration = ErrorCalibration(load)
        for part in self.pending:
            fits = self._fits(part) if part.predictor.pools_layers else None
            if part.scores:
                expect = part.scores[0].intervals
                scores, shares = score_layer(calibration, part.predictor, part.windows, fits, expect=expect)
                kinds = ((SHARES, shares), (SCORES, scores)) if expect else ((SCORES, scores),)
                for result, (kind, frame) in product(part.scores, kinds):
                    own = frame[frame["horizon"] == result.horizon]
                    self.results.put(kind, result, own.reset_index(drop=True))
            for result in part.ahead:
                forecast = forecast_end(calibration, part.predictor, result.horizon, fits)
                self.results.put(FORECAST, result, forecast)
        return self.results.for_parent()

    def _fits(self, part: Pending) -> dict[int, TimedFit]:
        """The fits for all layers by cutoff; layers and cutoffs share the seconds."""
        served = list(part.fits.values())
        learned = {name: self.results.get(FIT, name) for name in dict.fromkeys(served)}
        fits = {}
        for cutoff, name in part.fits.items():
            # One on the history is made for its cutoff and moved forward to later ones.
            borne = 1 / served.count(name) if name.fitted_at is None else cutoff == name.fitted_at
            seconds = learned[name].seconds * borne / len(self.trace.layers)
            fits[cutoff] = TimedFit(learned[name].fitted, seconds)
        return fits
