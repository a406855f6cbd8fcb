"""What predictors learned at each cutoff: fitted as seldom as they ask for, for a layer or for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from moetrace.errors import SettingError
from moetrace.predictors import label
from moetrace.predictors.base import Fitted, Predictor
from moetrace.trace import LayerLoad, LoadTrace

Histories = Callable[[], Sequence[LayerLoad]]


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


def fits_at(
    made: Predictor, start: int, cutoffs: Iterable[int], histories: Callable[[int], Sequence[LayerLoad]]
) -> dict[int, Timed]:
    """What *made* has learned at each of *cutoffs* (increasing) where its history, from step *start*, is long enough.

    It is fitted anew only when its history has grown by its `refit_growth`, and moved forward in between.
    """
    found: dict[int, Timed] = {}
    fitted, at = None, start
    for cutoff in cutoffs:
        if not has_history(made, start, cutoff):
            continue
        began = time.perf_counter()
        if fitted is None or cutoff - start + 1 >= made.refit_growth * (at - start + 1):
            fitted, at = made.fit(histories(cutoff)), cutoff
        found[cutoff] = Timed(fitted, time.perf_counter() - began)
    return found


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
    if any(_same(other, trace) for other in train_on):
        raise SettingError(f"{trace.name} cannot be predicted by what was trained on {trace.name} itself")
    fits: dict[tuple[str, int], Timed] = {}
    for made in (made for made in predictors if made.pools_layers):
        if train_on:
            began = time.perf_counter()
            fitted = made.fit([load for other in train_on for load in other.by_layer()])
            own = dict.fromkeys(cutoffs, Timed(fitted, (time.perf_counter() - began) / max(1, len(cutoffs))))
        else:
            own = fits_at(
                made, int(trace.steps[0]), cutoffs, lambda cutoff: [load.until(cutoff) for load in trace.by_layer()]
            )
        for cutoff, timed in own.items():
            fits[label(made), cutoff] = Timed(timed.fitted, timed.seconds / len(trace.layers))
        tick()
    return fits


def _same(a: LoadTrace, b: LoadTrace) -> bool:
    return a.info.fingerprint == b.info.fingerprint if a.info.fingerprint else a.name == b.name
