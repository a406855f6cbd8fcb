"""What to compute of a trace, and the name of each result by all that it depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import cast

import numpy as np

from moetrace.errors import SettingError, check_several
from moetrace.forecasting.fitting import has_history, refits
from moetrace.forecasting.keys import key_of, settings_of
from moetrace.forecasting.predictors import label
from moetrace.forecasting.predictors.base import Predictor
from moetrace.forecasting.windows import Windows, evaluation_windows
from moetrace.trace import LoadTrace, Steps


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


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What to compute of a trace: *predictors* at every cutoff and horizon of *windows*.

    With *ahead* the steps after the end of the trace are forecast too, for each of *horizons*, by the
    predictors that the whole trace is history enough for. *train_on* are the runs that predictors with
    one fit for all layers learn from instead. Without *intervals* forecasts are scored alone.
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
        name = self.trace.name
        labels = [label(predictor) for predictor in self.predictors]
        if len(set(labels)) != len(labels):
            raise SettingError(f"predictor {next(n for n in labels if labels.count(n) > 1)} is given twice")
        mark = self.trace.info.fingerprint
        if any(run.info.fingerprint == mark if run.info.fingerprint else run.name == name for run in self.train_on):
            raise SettingError(f"{name} cannot be predicted by what was trained on {name} itself")

    @cached_property
    def names(self) -> Mapping[tuple[int, str, int], Result]:
        """The name of every result by layer, label of the predictor and horizon, in the order of the frames."""
        steps, trained, first_expert = self._steps_digest, self._trained_on, self.trace.info.first_expert
        cutoffs = {horizon: self.cutoffs(horizon) for horizon in self.horizons}
        names = {}
        for layer, predictor in product(self.trace.layers, self.predictors):
            name, counts = label(predictor), self.trace.digest(layer)
            learned = [self._all_layers, trained] if predictor.pools_layers else []
            for horizon in self.horizons:
                facts = layer, first_expert, horizon, counts, steps, cutoffs[horizon], learned, self.intervals
                key = key_of(settings_of(predictor), *facts)
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
        if not self.ahead:
            return []
        steps = self.trace.steps
        able = {label(predictor) for predictor in self.predictors if has_history(predictor, steps, int(steps[-1]))}
        return [result for result in self.names.values() if result.predictor in able]

    def shared_fits(self, predictor: Predictor, cutoffs: Sequence[int]) -> dict[int, SharedFit]:
        """The fit for all layers that serves at each of *cutoffs* (increasing), on the history or the other runs."""
        serving: Mapping[int, int | None] = refits(predictor, self.trace.steps, cutoffs)
        if self.train_on:
            serving = dict.fromkeys(cutoffs)
        fits = {}
        for cutoff, fitted_at in serving.items():
            other_runs = fitted_at is None
            learned_from = [self._trained_on] if other_runs else [self._all_layers, self._steps_digest, fitted_at]
            key = key_of(settings_of(predictor), learned_from)
            fits[cutoff] = SharedFit(self.trace.name, predictor, fitted_at, key)
        return fits

    @cached_property
    def _steps_digest(self) -> str:
        return _digest(self.trace.steps)

    @cached_property
    def _all_layers(self) -> str:
        return key_of([self.trace.digest(layer) for layer in self.trace.layers])

    @cached_property
    def _trained_on(self) -> str:
        return key_of([[_digest(run.steps), [run.digest(layer) for layer in run.layers]] for run in self.train_on])


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


def _digest(steps: Steps) -> str:
    return hashlib.sha256(np.ascontiguousarray(steps, "<i8").data).hexdigest()
