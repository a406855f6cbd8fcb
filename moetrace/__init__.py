"""Expert-load traces of Mixture-of-Experts models: how unbalanced, from when on stable, how predictable."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetrace.backtest import Backtest, evaluate
    from moetrace.checks import examine
    from moetrace.errors import MoetraceError, SettingError, TooShortError, TraceError, WorkspaceError
    from moetrace.forecasts import forecast_end
    from moetrace.formats import ReadOptions, open_trace, read_trace, save_trace
    from moetrace.noise import horizon_noise, motion
    from moetrace.predictors import predictor
    from moetrace.record import Recorder
    from moetrace.sliding import fluctuation
    from moetrace.states import classify, state_at
    from moetrace.trace import Finding, LayerLoad, LoadTrace, TraceInfo
    from moetrace.workspace import Workspace

# Imported when first asked for: `moetrace --help` must not wait for NumPy and Arrow.
_HOME = {
    "Backtest": "backtest", "evaluate": "backtest", "forecast_end": "forecasts",
    "examine": "checks",
    "MoetraceError": "errors", "SettingError": "errors", "TooShortError": "errors", "TraceError": "errors",
    "WorkspaceError": "errors",
    "ReadOptions": "formats", "open_trace": "formats", "read_trace": "formats", "save_trace": "formats",
    "horizon_noise": "noise", "motion": "noise",
    "predictor": "predictors",
    "Recorder": "record",
    "classify": "states", "fluctuation": "sliding", "state_at": "states",
    "Finding": "trace", "LayerLoad": "trace", "LoadTrace": "trace", "TraceInfo": "trace",
    "Workspace": "workspace",
}  # fmt: skip

__all__ = [
    "Backtest",
    "Finding",
    "LayerLoad",
    "LoadTrace",
    "MoetraceError",
    "ReadOptions",
    "Recorder",
    "SettingError",
    "TooShortError",
    "TraceError",
    "TraceInfo",
    "Workspace",
    "WorkspaceError",
    "classify",
    "evaluate",
    "examine",
    "fluctuation",
    "forecast_end",
    "horizon_noise",
    "motion",
    "open_trace",
    "predictor",
    "read_trace",
    "save_trace",
    "state_at",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("moetrace")
    if name in _HOME:
        return getattr(import_module(f"moetrace.{_HOME[name]}"), name)
    raise AttributeError(f"module 'moetrace' has no attribute {name!r}")
