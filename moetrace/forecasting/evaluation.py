"""What to compute of a trace, the name of each result by all that it depends on, and where results are cached."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import numpy as np

from moetrace.errors import SettingError, check_several
from moetrace.forecasting.keys import key_of, settings_of
from moetrace.forecasting.layers import EndForecast, TimedFit, has_history, refits
from moetrace.forecasting.predictors import label
from moetrace.forecasting.predictors.base import Predictor
from moetrace.forecasting.windows import Windows, evaluation_windows
from moetrace.trace import LoadTrace

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """The name of the results of one layer; *predictor* is the label, *key* the digest of what they depend on.

    Without *intervals* there are the scores alone.
    """

    trace: str
    predictor: str
    layer: int
    horizon: int
    key: str
    intervals: bool = True


@dataclass(frozen=True)
class SharedFit:
    """The name of a fit that serves all layers, on the history up to *fitted_at*, or on other runs if None."""

    trace: str
    predictor: Predictor
    fitted_at: int | None
    key: str


# --- where results are cached -----------------------------------------------------------------

Name = Result | SharedFit


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of results, each of which is a *T*."""

    name: str


SCORES: Kind[pd.DataFrame] = Kind("scores")
"""The rows of `Score` of a `Result`, one for each cutoff."""
SHARES: Kind[pd.DataFrame] = Kind("shares")
"""What they were computed from: `SHARE_COLUMNS`, one row for each cutoff and expert; of a `Result` with intervals."""
FORECAST: Kind[EndForecast] = Kind("forecast")
"""The forecast of the steps after the end, of a `Result`."""
FIT: Kind[TimedFit] = Kind("fit")
"""What was learned from all layers, of a `SharedFit`."""


class Results(Protocol):
    """Where results are cached, each by its kind and its name."""

    def has(self, kind: Kind[T], name: Name) -> bool:
        """Whether that result is cached."""

    def put(self, kind: Kind[T], name: Name, value: T) -> None:
        """Cache a result."""

    def get(self, kind: Kind[T], name: Name) -> T:
        """A result that is cached."""

    def begin(self, trace: str) -> None:
        """Get ready to cache results of the trace of that name."""

    def for_parent(self) -> Results | None:
        """What a worker hands to the process that asked it, None where that reads the same place."""

    def merge(self, other: Results | None) -> None:
        """Take in what a worker handed over."""


@dataclass(frozen=True)
class InMemory(Results):
    """Results cached in a dictionary."""

    cached: dict[tuple[str, Name], Any] = field(default_factory=dict)

    def has(self, kind: Kind[T], name: Name) -> bool:
        return (kind.name, name) in self.cached

    def put(self, kind: Kind[T], name: Name, value: T) -> None:
        self.cached[kind.name, name] = value

    def get(self, kind: Kind[T], name: Name) -> T:
        value: T = self.cached[kind.name, name]
        return value

    def begin(self, trace: str) -> None:
        pass

    def for_parent(self) -> InMemory:
        return self

    def merge(self, other: Results | None) -> None:
        if isinstance(other, InMemory) and other is not self:
            self.cached.update(other.cached)

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: a copy, as tasks are handed out in one thread while another merges."""
        return {"cached": dict(self.cached)}


# --- what to compute --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What to compute of a trace: *predictors* at every cutoff and horizon of *windows*.

    With *ahead* the steps after the end of the trace are forecast too, for each of *horizons*, by the predictors that
    the whole trace is history enough for. *train_on* are the runs that predictors with one fit for all layers learn
    from instead. Without *intervals* forecasts are scored alone.
    """

    trace: LoadTrace
    predictors: Sequence[Predictor]
    horizons: Sequence[int]
    windows: Windows
    ahead: bool = False
    train_on: Sequence[LoadTrace] = ()
    intervals: bool = True

    def __post_init__(self) -> None:
        check_several(self.predictors, "predictors", "[mt.Level()]")
        for one in cast("Sequence[object]", self.predictors):
            if isinstance(one, type):
                raise SettingError(f"{one.__name__} is a class: {one.__name__}() makes a predictor")
            if not hasattr(one, "fit"):
                raise SettingError(f"{one!r} is no predictor: mt.predictor({one!r}) makes one of its name")
        name, mark = self.trace.name, self.trace.info.fingerprint
        labels = [label(predictor) for predictor in self.predictors]
        if len(set(labels)) != len(labels):
            raise SettingError(f"predictor {next(n for n in labels if labels.count(n) > 1)} is given twice")
        if any(run.info.fingerprint == mark if run.info.fingerprint else run.name == name for run in self.train_on):
            raise SettingError(f"{name} cannot be predicted by what was trained on {name} itself")

    @cached_property
    def names(self) -> Mapping[tuple[int, str, int], Result]:
        """The name of every result by layer, label of the predictor and horizon, in the order of the frames."""
        whole, trained = self._digests
        names = {}
        for layer, predictor, horizon in product(self.trace.layers, self.predictors, self.horizons):
            learned = [whole, trained] if predictor.pools_layers else []
            counts, first, cutoffs = self.trace.digest(layer), self.trace.info.first_expert, self.cutoffs(horizon)
            facts = layer, first, horizon, counts, whole[0], cutoffs, learned, self.intervals
            key, name = key_of(settings_of(predictor), *facts), label(predictor)
            names[layer, name, horizon] = Result(self.trace.name, name, layer, horizon, key, self.intervals)
        return names

    def cutoffs(self, horizon: int) -> list[int]:
        """The cutoffs at which *horizon* is scored."""
        return [cutoff for cutoff, horizons in self.windows.items() if horizon in horizons]

    @property
    def scored(self) -> list[Result]:
        """The results that have scores."""
        horizons = {horizon for horizon in self.horizons if self.cutoffs(horizon)}
        return [result for result in self.names.values() if result.horizon in horizons]

    @property
    def forecast_ahead(self) -> list[Result]:
        """The results that have a forecast of the steps after the end."""
        steps = self.trace.steps
        able = {label(by) for by in self.predictors if self.ahead and has_history(by, steps, int(steps[-1]))}
        return [result for result in self.names.values() if result.predictor in able]

    def shared_fits(self, predictor: Predictor, cutoffs: Sequence[int]) -> dict[int, SharedFit]:
        """The fit for all layers that serves at each of *cutoffs* (increasing), on the history or the other runs."""
        serving: Mapping[int, int | None] = refits(predictor, self.trace.steps, cutoffs)
        if self.train_on:
            serving = dict.fromkeys(cutoffs)
        whole, trained = self._digests
        fits = {}
        for cutoff, fitted_at in serving.items():
            learned_from = trained if fitted_at is None else [whole, fitted_at]
            key = key_of(settings_of(predictor), learned_from)
            fits[cutoff] = SharedFit(self.trace.name, predictor, fitted_at, key)
        return fits

    @cached_property
    def _digests(self) -> tuple[list[str], list[list[str]]]:
        """Of the steps and all layers of the trace, and the same of each run that is learned from."""

        def of(trace: LoadTrace) -> list[str]:
            steps = hashlib.sha256(np.ascontiguousarray(trace.steps, "<i8").data).hexdigest()
            return [steps, *(trace.digest(layer) for layer in trace.layers)]

        return of(self.trace), [of(run) for run in self.train_on]


def evaluation(
    trace: LoadTrace,
    predictors: Sequence[Predictor],
    horizons: Sequence[int],
    cutoffs: Sequence[int] | Windows | None = None,
    *,
    ahead: bool = False,
    intervals: bool = True,
    train_on: Sequence[LoadTrace] = (),
) -> Evaluation:
    """What `evaluate` computes when asked so; raises what it does."""
    windows = cutoffs if isinstance(cutoffs, Mapping) else evaluation_windows(trace, horizons, cutoffs)
    return Evaluation(trace, predictors, sorted(set(horizons)), windows, ahead, train_on, intervals)
