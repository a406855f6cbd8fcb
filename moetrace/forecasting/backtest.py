"""The backtest: predictors, cutoffs, horizons, layers: the one loop that drives every predictor.

At each cutoff a predictor is given the history up to it and nothing else; what it forecasts of the steps
after it is compared with what then happened. The unit of work is a layer, or a fit that serves all
layers. Each result is kept as it is made, in memory or wherever a `Results` keeps it, under a name that
says what it depends on; what is kept already is not made again. Who does the work, this process or many,
is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from moetrace.errors import TooShortError
from moetrace.forecasting.evaluation import Evaluation, Result, SharedFit, evaluation
from moetrace.forecasting.fitting import Histories, TimedFit, fit, has_history, refits
from moetrace.forecasting.intervals import Experience
from moetrace.forecasting.layers import SHARE_COLUMNS, EndForecast, Reference, Score, forecast_end, score_layer
from moetrace.forecasting.predictors import label
from moetrace.forecasting.predictors.base import Predictor
from moetrace.forecasting.results import InMemory, Results
from moetrace.forecasting.windows import Windows
from moetrace.frames import stacked
from moetrace.trace import LoadTrace

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Progress = Callable[[int, int], None]
"""Called with the tasks done, and their number: a layer is one, and so is a fit that serves all layers."""


@dataclass(frozen=True, eq=False)
class Backtest:
    """What came of an evaluation, read when it is asked for.

    *computed* is the number of results that are new, *reused* of those that were kept already; the scores
    and the forecast of a layer by a predictor over a horizon are two.
    """

    evaluation: Evaluation
    results: Results
    computed: int
    reused: int

    @cached_property
    def scores(self) -> pd.DataFrame:
        """One row per `Score`, by layer, predictor, cutoff and horizon."""
        return self._frame(self.results.scores, Score._fields)

    @cached_property
    def shares(self) -> pd.DataFrame:
        """Predicted and actual share of each expert over each horizon, with intervals: `SHARE_COLUMNS`."""
        return self._frame(self.results.shares, SHARE_COLUMNS)

    def forecasts(self) -> Iterator[EndForecast]:
        """The forecast of the steps after the end, for each layer, predictor and horizon, one at a time."""
        return (self.results.forecast(result) for result in self.evaluation.forecast_ahead)

    def _frame(self, read: Callable[[Sequence[Result]], pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
        frame = read(self.evaluation.scored)
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

    *cutoffs* are the default ones if None; a mapping says which horizons are scored at which. With *ahead*
    the steps after the end of the trace are forecast too. Without *intervals* forecasts are scored alone: no intervals
    and expected errors, and no shares. Both frames are empty where the trace is too short
    for every horizon. Predictors with one fit for all layers learn from the runs *train_on* instead of from
    the history, where given. *results* keeps what is made and hands out what it has (memory, unless given);
    *run* runs the tasks (`moetrace.workspace.tasks` has cores and clusters).
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
    kept = InMemory() if results is None else results
    kept.begin(asked[0].trace.name)
    parts = [_parts(own, kept) for own in asked]
    layers = [
        LayerTask(asked[0].trace, layer, [own[layer] for own in parts if layer in own], kept)
        for layer in asked[0].trace.layers
        if any(layer in own for own in parts)
    ]
    fits = [task for own, by_layer in zip(asked, parts) for task in _fit_tasks(own, by_layer, kept)]
    for done, handed_over in enumerate(_run_all(fits, layers, run), 1):
        kept.merge(handed_over)
        if progress is not None:
            progress(done, len(fits) + len(layers))
    found = []
    for own, by_layer in zip(asked, parts):
        computed = sum(len(pending) for part in by_layer.values() for pending in part.pending)
        found.append(Backtest(own, kept, computed, len(own.scored) + len(own.forecast_ahead) - computed))
    return found


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


def _run_all(fits: Sequence[FitTask], layers: Sequence[LayerTask], run: Run) -> Iterator[Results | None]:
    """The fits that serve all layers first: the layers need them."""
    yield from run(fits)
    yield from run(layers)


@dataclass(frozen=True)
class Pending:
    """What is not kept yet of one predictor and layer: *scores*, and forecasts *ahead*."""

    predictor: Predictor
    scores: tuple[Result, ...]
    ahead: tuple[Result, ...]

    def __len__(self) -> int:
        return len(self.scores) + len(self.ahead)

    def windows(self, windows: Windows) -> Windows:
        """The part of *windows* whose horizons have to be scored."""
        return _of_horizons(windows, {result.horizon for result in self.scores})


def _of_horizons(windows: Windows, wanted: set[int]) -> Windows:
    own = {cutoff: [h for h in horizons if h in wanted] for cutoff, horizons in windows.items()}
    return {cutoff: horizons for cutoff, horizons in own.items() if horizons}


@dataclass(frozen=True, eq=False)
class FitRequest:
    """A fit for all layers, made at the cutoff *fitted_at* (None: on other runs), and the *part* of its seconds that
    one score bears.
    """

    name: SharedFit
    predictor: Predictor
    fitted_at: int | None
    part: float


@dataclass(frozen=True, eq=False)
class FitTask:
    """A fit for all layers of *traces*."""

    request: FitRequest
    traces: Sequence[LoadTrace]
    results: Results

    def run(self) -> Results | None:
        """Fit, and keep it."""
        histories = Histories(self.traces, self.request.fitted_at)
        self.results.put_fit(self.request.name, fit(self.request.predictor, histories))
        return self.results.handed_over()


@dataclass(frozen=True, eq=False)
class LayerPart:
    """The pending results of one layer in one evaluation, and by predictor and cutoff the shared fits that they need.

    Without *intervals* forecasts are scored alone.
    """

    windows: Windows
    pending: Sequence[Pending]
    fits: Mapping[tuple[str, int], FitRequest]
    intervals: bool

    def run(self, experience: Experience, results: Results) -> None:
        """Score and forecast, and keep each of the *results* as it is made."""
        scored = _of_horizons(self.windows, {result.horizon for own in self.pending for result in own.scores})
        reference = Reference.of(experience, scored, self.intervals) if scored else None
        for own in self.pending:
            shared_fits = self._shared_fits(own.predictor, results)
            if reference is not None and own.scores:
                scores, shares = score_layer(reference, own.predictor, own.windows(self.windows), shared_fits)
                for result in own.scores:
                    of_horizon = (frame[frame["horizon"] == result.horizon] for frame in (scores, shares))
                    results.put_scores(result, *of_horizon)
            for result in own.ahead:
                forecast = forecast_end(experience, own.predictor, result.horizon, shared_fits)
                results.put_forecast(result, forecast)

    def _shared_fits(self, predictor: Predictor, results: Results) -> dict[int, TimedFit] | None:
        """The fits for all layers by cutoff, each layer bearing its part of the seconds, of one that has such."""
        if not predictor.pools_layers:
            return None
        own = {cutoff: request for (by, cutoff), request in self.fits.items() if by == label(predictor)}
        learned = {request.name: results.fit(request.name, predictor) for request in own.values()}
        return {
            cutoff: TimedFit(learned[request.name].fitted, learned[request.name].seconds * request.part)
            for cutoff, request in own.items()
        }


@dataclass(frozen=True, eq=False)
class LayerTask:
    """All that is pending of one layer."""

    trace: LoadTrace
    layer: int
    parts: Sequence[LayerPart]
    results: Results

    def run(self) -> Results | None:
        """Read the layer, and do each part."""
        experience = Experience(self.trace.layer(self.layer))
        for part in self.parts:
            part.run(experience, self.results)
        return self.results.handed_over()


def _parts(asked: Evaluation, kept: Results) -> dict[int, LayerPart]:
    """What is pending of each layer, where anything is, with all the fits for all layers that it needs."""
    scores = {result for result in asked.scored if not kept.has_scores(result)}
    ahead = {result for result in asked.forecast_ahead if not kept.has_forecast(result)}
    pending: dict[int, list[Pending]] = {}
    for layer in asked.trace.layers:
        for predictor in asked.predictors:
            own = [asked.names[layer, label(predictor), horizon] for horizon in asked.horizons]
            part = Pending(predictor, tuple(r for r in own if r in scores), tuple(r for r in own if r in ahead))
            if len(part):
                pending.setdefault(layer, []).append(part)
    fits = _needed_fits(asked, [part for parts in pending.values() for part in parts])
    return {layer: LayerPart(asked.windows, own, fits, asked.intervals) for layer, own in pending.items()}


def _needed_fits(asked: Evaluation, pending: Sequence[Pending]) -> dict[tuple[str, int], FitRequest]:
    """The fits for all layers that the *pending* results need, by predictor and cutoff."""
    needed: dict[tuple[str, int], FitRequest] = {}
    for predictor in dict.fromkeys(part.predictor for part in pending if part.predictor.pools_layers):
        own = [part for part in pending if part.predictor == predictor]
        scored = list(_of_horizons(asked.windows, {result.horizon for part in own for result in part.scores}))
        needed |= _fits_at(asked, predictor, scored)
        if any(part.ahead for part in own):
            needed |= _fits_at(asked, predictor, [int(asked.trace.steps[-1])])
    return needed


def _fits_at(asked: Evaluation, predictor: Predictor, cutoffs: Sequence[int]) -> dict[tuple[str, int], FitRequest]:
    name, layers = label(predictor), len(asked.trace.layers)
    if asked.train_on:
        request = FitRequest(asked.shared_fit(predictor, None), predictor, None, 1 / max(1, len(cutoffs)) / layers)
        return {(name, cutoff): request for cutoff in cutoffs}
    serving = refits(predictor, asked.trace.steps, cutoffs)
    return {
        (name, cutoff): FitRequest(asked.shared_fit(predictor, at), predictor, at, (cutoff == at) / layers)
        for cutoff, at in serving.items()
    }


def _fit_tasks(asked: Evaluation, parts: Mapping[int, LayerPart], kept: Results) -> list[FitTask]:
    """The fits for all layers that are needed and not kept yet."""
    needed = {request.name: request for part in parts.values() for request in part.fits.values()}
    return [
        FitTask(request, asked.train_on if request.fitted_at is None else [asked.trace], kept)
        for name, request in needed.items()
        if not kept.has_fit(name)
    ]
