"""The predictors by name. A new one is one module and one line in `PREDICTORS`."""

from __future__ import annotations

from dataclasses import fields, replace
from importlib import import_module
from typing import TYPE_CHECKING

from moetrace.settings import label, unknown, with_settings

if TYPE_CHECKING:
    from moetrace.forecasting.predictors.base import Predictor

__all__ = ["BASELINE", "PREDICTORS", "label", "predictor"]

# Where each lives, not the class itself: naming a predictor must not import what it computes with.
PREDICTORS = {
    "sw_avg": "moetrace.forecasting.predictors.sw_avg:SwAvg",
    "arima": "moetrace.forecasting.predictors.arima:Arima",
    "lstm": "moetrace.forecasting.predictors.lstm:Lstm",
    "auto": "moetrace.forecasting.predictors.auto:Auto",
    "level": "moetrace.forecasting.predictors.level:Level",
    "window_mean": "moetrace.forecasting.predictors.window_mean:WindowMean",
    "ema": "moetrace.forecasting.predictors.ema:Ema",
}
"""The predictor that skill is measured against: what serving systems do today."""


def predictor(spec: str, seed: int | None = None) -> Predictor:
    """The predictor that *spec* names, ``name`` or ``name:setting=value:setting=value``.

    One that has a seed gets *seed*, unless the spec gives another.
    Raises `SettingError` naming what there is instead.

    >>> import moetrace as mt
    >>> mt.predictor("sw_avg:window=300")
    SwAvg(window=300)
    """
    name, _, settings = spec.partition(":")
    if name not in PREDICTORS:
        raise unknown("predictor", name, PREDICTORS)
    module, cls = PREDICTORS[name].split(":")
    chosen: Predictor = getattr(import_module(module), cls)()
    if seed is not None and any(f.name == "seed" for f in fields(chosen)):
        chosen = replace(chosen, **{"seed": seed})
    return with_settings(chosen, settings)
