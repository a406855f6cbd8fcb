"""The predictors by name. A new one is one module and one line in `PREDICTORS`."""

from __future__ import annotations

from dataclasses import fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, get_type_hints

from moetrace.errors import SettingError

if TYPE_CHECKING:
    from moetrace.forecasting.predictors.base import Predictor

# Where each lives, not the class itself: naming a predictor must not import what it computes with.
PREDICTORS = {
    "sw_avg": "moetrace.forecasting.predictors.sw_avg:SlidingWindowAverage",
    "arima": "moetrace.forecasting.predictors.arima:Arima",
    "lstm": "moetrace.forecasting.predictors.lstm:Lstm",
    "auto": "moetrace.forecasting.predictors.auto:Auto",
    "level": "moetrace.forecasting.predictors.level:LocalLevel",
    "window_mean": "moetrace.forecasting.predictors.window_mean:WindowMean",
    "ema": "moetrace.forecasting.predictors.ema:ExponentialAverage",
}
BASELINE = "window_mean"
"""The predictor that skill is measured against: what serving systems do today."""


def predictor(spec: str, seed: int | None = None) -> Predictor:
    """The predictor that *spec* names, ``name`` or ``name:setting=value:setting=value``.

    One that has a seed gets *seed*, unless the spec gives another.
    Raises `SettingError` naming what there is instead.
    """
    name, *settings = spec.split(":")
    if name not in PREDICTORS:
        raise SettingError(f"there is no predictor {name!r}; there are {', '.join(PREDICTORS)}")
    module, cls = PREDICTORS[name].split(":")
    made: Predictor = getattr(import_module(module), cls)()
    if seed is not None and any(f.name == "seed" for f in fields(made)):
        made = replace(made, **{"seed": seed})
    return replace(made, **dict(_setting(made, text) for text in settings))


def label(made: Predictor) -> str:
    """The shortest spec that makes *made* again: its name and the settings that are not the defaults."""
    default = type(made)()
    changed = [f.name for f in fields(made) if getattr(made, f.name) != getattr(default, f.name)]
    return ":".join([made.name, *(f"{name}={_shown(getattr(made, name))}" for name in changed)])


def _shown(value: object) -> str:
    return ",".join(str(part) for part in value) if isinstance(value, tuple) else str(value).lower()


def _setting(made: Predictor, text: str) -> tuple[str, object]:
    name, given, value = text.partition("=")
    types = {f.name: get_type_hints(type(made))[f.name] for f in fields(made)}
    if not given or name not in types:
        raise SettingError(f"{made.name} has no setting {name!r}; it has {', '.join(types) or 'none'}")
    try:
        return name, _parsed(value, types[name])
    except (KeyError, ValueError):
        raise SettingError(f"{made.name}:{name} is {_type_name(types[name])}, not {value!r}") from None


def _parsed(value: str, kind: object) -> object:
    if kind is bool:
        return {"true": True, "false": False}[value.lower()]
    if kind is int or kind is float:
        number = int(value) if kind is int else float(value)
        if not number >= (1 if kind is int else 0):
            raise ValueError
        return number
    p, d, q = (int(part) for part in value.split(","))
    if min(p, d, q) < 0:
        raise ValueError
    return p, d, q


def _type_name(kind: object) -> str:
    if kind is bool:
        return "true or false"
    if kind is int or kind is float:
        return "a whole number above 0" if kind is int else "a number, 0 or more"
    return "three whole numbers p,d,q"
