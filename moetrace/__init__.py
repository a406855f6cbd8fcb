"""Expert-load traces of Mixture-of-Experts models: how unbalanced, from when on stable, how predictable."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetrace.analysis.fluctuation import fluctuation
    from moetrace.analysis.states import classify, state_at
    from moetrace.analysis.variogram import horizon_noise, motion
    from moetrace.doctor.checks import examine
    from moetrace.errors import MoetraceError, SettingError, TooShortError, TraceError, WorkspaceError
    from moetrace.forecasting.backtest import Backtest, evaluate
    from moetrace.forecasting.forecasts import forecast_end
    from moetrace.forecasting.predictors import predictor
    from moetrace.formats import ReadOptions, open_trace, read_trace, save_trace
    from moetrace.record import Recorder
    from moetrace.trace import Finding, LayerLoad, LoadTrace, TraceInfo
    from moetrace.workspace.traces import Workspace

# Imported when first asked for: `moetrace --help` must not wait for NumPy and Arrow.
_HOME = {
    "Backtest": "forecasting.backtest", "evaluate": "forecasting.backtest", "forecast_end": "forecasting.forecasts",
    "examine": "doctor.checks",
    "MoetraceError": "errors", "SettingError": "errors", "TooShortError": "errors", "TraceError": "errors",
    "WorkspaceError": "errors",
    "ReadOptions": "formats", "open_trace": "formats", "read_trace": "formats", "save_trace": "formats",
    "horizon_noise": "analysis.variogram", "motion": "analysis.variogram",
    "predictor": "forecasting.predictors",
    "Recorder": "record",
    "classify": "analysis.states", "fluctuation": "analysis.fluctuation", "state_at": "analysis.states",
    "Finding": "trace", "LayerLoad": "trace", "LoadTrace": "trace", "TraceInfo": "trace",
    "Workspace": "workspace.traces",
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
