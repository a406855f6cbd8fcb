"""The predictors by name. A new one is one class and one line in `PREDICTORS`; others come from installed packages."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moetrace.settings import Plugin, installed, label, unknown, with_settings

if TYPE_CHECKING:
    from collections.abc import Collection

    from moetrace.forecasting.predictors.base import Predictor

__all__ = ["GROUP", "PREDICTORS", "QUICK", "label", "predictor"]

GROUP = "moetrace.predictors"
"""The entry points of predictors that installed packages add."""

# Where each lives, not the class itself: naming a predictor must not import what it computes with.
PREDICTORS = {
    "sw_avg": "moetrace.forecasting.predictors.averages:SwAvg",
    "arima": "moetrace.forecasting.predictors.arima:Arima",
    "lstm": "moetrace.forecasting.predictors.lstm:Lstm",
    "auto": "moetrace.forecasting.predictors.averages:Auto",
    "level": "moetrace.forecasting.predictors.averages:Level",
    "window_mean": "moetrace.forecasting.predictors.averages:WindowMean",
    "ema": "moetrace.forecasting.predictors.averages:Ema",
}
# The two are quick. No other covered half a point more as a resident set, tried on seven sample traces, and no plan by
# another had a balance more than 0.003 higher, on gpt-moe-8e-a, 8e-b and 32e-d.
QUICK = ("level", "window_mean")


def predictor(spec: str, seed: int | None = None) -> Predictor:
    """The predictor that *spec* names, ``name`` or ``name:setting=value:setting=value``.

    Beside ours, those of installed packages have names (`GROUP`), and ``package.module:Name`` is one at hand: its
    class, or one that was made there.
    One that has a seed gets *seed*, unless the spec gives another.
    Raises `SettingError` naming what there is instead.

    >>> import moetrace as mt
    >>> mt.predictor("sw_avg:window=300")
    SwAvg(window=300)
    """
    name, _, settings = spec.partition(":")
    if name in PREDICTORS:
        chosen = made(Plugin(PREDICTORS[name], "moetrace"))
    elif name in (known := installed(GROUP)):
        chosen = made(known[name], PREDICTORS)
    elif settings.partition(":")[0].isidentifier():
        own, _, settings = settings.partition(":")
        chosen = made(Plugin(f"{name}:{own}"), PREDICTORS)
    else:
        raise unknown("predictor", name, [*PREDICTORS, *known])
    if seed is not None and any(f.name == "seed" for f in fields(chosen)):
        chosen = replace(chosen, **{"seed": seed})
    return with_settings(chosen, settings)


def made(plugin: Plugin, taken: Collection[str] = ()) -> Predictor:
    """The predictor that *plugin* is, or is the class of; raises what `Plugin.made` does.

    A module is also looked for in the working directory where no package has it, and workers find it there, too.
    """
    from moetrace.forecasting.predictors.base import Predictor

    if not plugin.package and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    found: Predictor = plugin.made("moetrace.Predictor", lambda own: isinstance(own, Predictor), taken)
    return found
