"""When a predictor is fitted, and on what: as seldom as it asks for, on one layer or on all of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from moetrace.forecasting.predictors.base import Fitted, Predictor
from moetrace.trace import LayerLoad, LoadTrace, Steps, stride_of


@dataclass(frozen=True)
class TimedFit:
    """What was fitted, and the seconds it took; 0 where it is an earlier fit moved forward."""

    fitted: Fitted
    seconds: float


def fit(predictor: Predictor, histories: Sequence[LayerLoad]) -> TimedFit:
    """What *predictor* learns from *histories*."""
    began = time.perf_counter()
    return TimedFit(predictor.fit(histories), time.perf_counter() - began)


def has_history(predictor: Predictor, steps: Steps, cutoff: int) -> bool:
    """Whether the logged *steps* (steps,) up to *cutoff* are as many as the predictor needs."""
    rows = int(np.searchsorted(steps, cutoff, "right"))
    if not rows or cutoff - int(steps[0]) + 1 < predictor.needs:
        return False
    return rows >= predictor.least_rows(stride_of(steps[:rows]))


def refits(predictor: Predictor, steps: Steps, cutoffs: Iterable[int]) -> dict[int, int]:
    """The cutoff whose fit serves at each of *cutoffs* (increasing) where the history in *steps* is long enough.

    A predictor is fitted anew only when its history has grown by its `refit_growth`, and moved forward in between.
    """
    start = int(steps[0])
    serving: dict[int, int] = {}
    latest: int | None = None
    for cutoff in cutoffs:
        if not has_history(predictor, steps, cutoff):
            continue
        if latest is None or cutoff - start + 1 >= predictor.refit_growth * (latest - start + 1):
            latest = cutoff
        serving[cutoff] = latest
    return serving


def layer_fits(predictor: Predictor, load: LayerLoad, cutoffs: Iterable[int]) -> dict[int, TimedFit]:
    """The fit that serves one layer at each of *cutoffs* (increasing)."""
    fits: dict[int, TimedFit] = {}
    for cutoff, fitted_at in refits(predictor, load.steps, cutoffs).items():
        new = cutoff == fitted_at
        fits[cutoff] = fit(predictor, [load.until(cutoff)]) if new else TimedFit(fits[fitted_at].fitted, 0.0)
    return fits


@dataclass(frozen=True, eq=False)
class Histories(Sequence[LayerLoad]):
    """Every layer of *traces* up to the step *cutoff*, whole where that is None; each is read when it is asked for."""

    traces: Sequence[LoadTrace]
    cutoff: int | None = None

    def __len__(self) -> int:
        return sum(len(trace.layers) for trace in self.traces)

    @overload
    def __getitem__(self, index: int) -> LayerLoad: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerLoad]: ...
    def __getitem__(self, index: int | slice) -> LayerLoad | Sequence[LayerLoad]:
        places = [(trace, layer) for trace in self.traces for layer in trace.layers]
        if isinstance(index, slice):
            return [self._read(*place) for place in places[index]]
        return self._read(*places[index])

    def _read(self, trace: LoadTrace, layer: int) -> LayerLoad:
        load = trace.layer(layer)
        return load if self.cutoff is None else load.until(self.cutoff)
