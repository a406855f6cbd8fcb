"""What predictors learned at each cutoff: fitted as seldom as they ask for, for a layer or for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from moetrace.errors import SettingError
from moetrace.forecasting.predictors import label
from moetrace.forecasting.predictors.base import Fitted, Predictor
from moetrace.trace import LayerLoad, LoadTrace


@dataclass(frozen=True)
class Timed:
    """What was fitted, and the seconds it took; 0 where it is an earlier fit moved forward."""

    fitted: Fitted
    seconds: float


Pooled = Mapping[tuple[str, int], Timed]
"""The fits that serve all layers of a trace, by predictor and cutoff."""


def has_history(made: Predictor, start: int, cutoff: int) -> bool:
    """Whether the steps from *start* to *cutoff* are as many as the predictor needs."""
    return cutoff - start + 1 >= made.needs


def fitted_when(made: Predictor, start: int, cutoffs: Iterable[int]) -> dict[int, int]:
    """The cutoff whose fit serves at each of *cutoffs* (increasing) where the history from *start* is long enough.

    It is fitted anew only when its history has grown by its `refit_growth`, and moved forward in between.
    """
    when: dict[int, int] = {}
    at: int | None = None
    for cutoff in cutoffs:
        if not has_history(made, start, cutoff):
            continue
        if at is None or cutoff - start + 1 >= made.refit_growth * (at - start + 1):
            at = cutoff
        when[cutoff] = at
    return when


def fits_at(
    made: Predictor, start: int, cutoffs: Iterable[int], histories: Callable[[int], Sequence[LayerLoad]]
) -> dict[int, Timed]:
    """What *made* has learned at each of *cutoffs* (increasing), fitted as seldom as `fitted_when` says."""
    found: dict[int, Timed] = {}
    for cutoff, at in fitted_when(made, start, cutoffs).items():
        if cutoff == at:
            found[cutoff] = timed_fit(made, histories(cutoff))
        else:
            found[cutoff] = Timed(found[at].fitted, 0.0)
    return found


def timed_fit(made: Predictor, histories: Sequence[LayerLoad]) -> Timed:
    """What *made* learns from *histories*."""
    began = time.perf_counter()
    return Timed(made.fit(histories), time.perf_counter() - began)


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


def pooled_fits(
    trace: LoadTrace,
    predictors: Sequence[Predictor],
    cutoffs: Sequence[int],
    train_on: Sequence[LoadTrace] = (),
    tick: Callable[[], None] = lambda: None,
) -> Pooled:
    """The fits of those *predictors* that have one for all layers; *tick* is called after each.

    With *train_on* they learn from the whole of those other runs, once, and are applied to *trace* as
    they are, as the paper does. Raises `SettingError` when *trace* is one of them.
    """
    check_other_runs(trace, train_on)
    fits: dict[tuple[str, int], Timed] = {}
    for made in (made for made in predictors if made.pools_layers):
        if train_on:
            learned = timed_fit(made, Histories(train_on))
            own = dict.fromkeys(cutoffs, Timed(learned.fitted, learned.seconds / max(1, len(cutoffs))))
        else:
            own = fits_at(made, int(trace.steps[0]), cutoffs, lambda cutoff: Histories([trace], cutoff))
        for cutoff, timed in own.items():
            fits[label(made), cutoff] = Timed(timed.fitted, timed.seconds / len(trace.layers))
        tick()
    return fits


def check_other_runs(trace: LoadTrace, train_on: Sequence[LoadTrace]) -> None:
    """Raise `SettingError` when *trace* is one of the runs to *train_on*."""
    if any(_same(other, trace) for other in train_on):
        raise SettingError(f"{trace.name} cannot be predicted by what was trained on {trace.name} itself")


def _same(a: LoadTrace, b: LoadTrace) -> bool:
    return a.info.fingerprint == b.info.fingerprint if a.info.fingerprint else a.name == b.name
