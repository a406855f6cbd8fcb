"""Expert-load traces of Mixture-of-Experts models: how unbalanced, from when on stable, how predictable."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetrace.analysis.fluctuation import fluctuation
    from moetrace.analysis.imbalance import IMBALANCE
    from moetrace.analysis.noise import horizon_noise
    from moetrace.analysis.outlook import expected_movement
    from moetrace.analysis.states import classify, state_at
    from moetrace.analysis.tables import states_tables
    from moetrace.analysis.variogram import motion
    from moetrace.doctor.checks import examine
    from moetrace.errors import MoetraceError, SettingError, TooShortError, TraceError, WorkspaceError
    from moetrace.forecasting.backtest import Backtest, evaluate
    from moetrace.forecasting.predictors import predictor
    from moetrace.forecasting.predictors.arima import Arima
    from moetrace.forecasting.predictors.auto import Auto
    from moetrace.forecasting.predictors.ema import Ema
    from moetrace.forecasting.predictors.level import Level
    from moetrace.forecasting.predictors.lstm import Lstm
    from moetrace.forecasting.predictors.sw_avg import SwAvg
    from moetrace.forecasting.predictors.window_mean import WindowMean
    from moetrace.forecasting.study import Study, study
    from moetrace.forecasting.summary import means_frame, summary_frame
    from moetrace.formats import ReadOptions, from_frame, open_trace, read_trace, save_trace
    from moetrace.formats.export import export_trace
    from moetrace.placement.plan import Plan
    from moetrace.placement.planning import Planning
    from moetrace.placement.rebalance import rebalance_experts
    from moetrace.placement.replanning import replanning_frame
    from moetrace.placement.simulate import simulate
    from moetrace.placement.study import Placement, place
    from moetrace.record import Recorder
    from moetrace.record.follow import follow
    from moetrace.report.study import write_report
    from moetrace.synthetic import Course, settling, synthetic_trace
    from moetrace.trace import Finding, LayerLoad, LoadTrace, TraceInfo
    from moetrace.workspace.results import ResultFolder
    from moetrace.workspace.tasks import runner
    from moetrace.workspace.traces import Workspace

# Imported when first asked for: `moetrace --help` must not wait for NumPy and Arrow.
_HOMES = {
    "analysis.fluctuation": ("fluctuation",),
    "analysis.imbalance": ("IMBALANCE",),
    "analysis.noise": ("horizon_noise",),
    "analysis.outlook": ("expected_movement",),
    "analysis.states": ("classify", "state_at"),
    "analysis.tables": ("states_tables",),
    "analysis.variogram": ("motion",),
    "doctor.checks": ("examine",),
    "errors": ("MoetraceError", "SettingError", "TooShortError", "TraceError", "WorkspaceError"),
    "forecasting.backtest": ("Backtest", "evaluate"),
    "forecasting.predictors": ("predictor",),
    "forecasting.predictors.arima": ("Arima",),
    "forecasting.predictors.auto": ("Auto",),
    "forecasting.predictors.ema": ("Ema",),
    "forecasting.predictors.level": ("Level",),
    "forecasting.predictors.lstm": ("Lstm",),
    "forecasting.predictors.sw_avg": ("SwAvg",),
    "forecasting.predictors.window_mean": ("WindowMean",),
    "forecasting.study": ("Study", "study"),
    "forecasting.summary": ("means_frame", "summary_frame"),
    "formats": ("ReadOptions", "from_frame", "open_trace", "read_trace", "save_trace"),
    "formats.export": ("export_trace",),
    "placement.plan": ("Plan",),
    "placement.planning": ("Planning",),
    "placement.rebalance": ("rebalance_experts",),
    "placement.replanning": ("replanning_frame",),
    "placement.simulate": ("simulate",),
    "placement.study": ("Placement", "place"),
    "record": ("Recorder",),
    "record.follow": ("follow",),
    "report.study": ("write_report",),
    "synthetic": ("Course", "settling", "synthetic_trace"),
    "trace": ("Finding", "LayerLoad", "LoadTrace", "TraceInfo"),
    "workspace.results": ("ResultFolder",),
    "workspace.tasks": ("runner",),
    "workspace.traces": ("Workspace",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "IMBALANCE",
    "Arima",
    "Auto",
    "Backtest",
    "Course",
    "Ema",
    "Finding",
    "LayerLoad",
    "Level",
    "LoadTrace",
    "Lstm",
    "MoetraceError",
    "Placement",
    "Plan",
    "Planning",
    "ReadOptions",
    "Recorder",
    "ResultFolder",
    "SettingError",
    "Study",
    "SwAvg",
    "TooShortError",
    "TraceError",
    "TraceInfo",
    "WindowMean",
    "Workspace",
    "WorkspaceError",
    "classify",
    "evaluate",
    "examine",
    "expected_movement",
    "export_trace",
    "fluctuation",
    "follow",
    "from_frame",
    "horizon_noise",
    "means_frame",
    "motion",
    "open_trace",
    "place",
    "predictor",
    "read_trace",
    "rebalance_experts",
    "replanning_frame",
    "runner",
    "save_trace",
    "settling",
    "simulate",
    "state_at",
    "states_tables",
    "study",
    "summary_frame",
    "synthetic_trace",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("moetrace")
    if name in _HOME:
        return getattr(import_module(f"moetrace.{_HOME[name]}"), name)
    raise AttributeError(f"module 'moetrace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
