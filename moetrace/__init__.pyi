"""The public names, each written once: lazy-loader, type checkers and editors read them here."""

from .analysis.imbalance import IMBALANCE as IMBALANCE
from .analysis.variogram import horizon_noise as horizon_noise
from .analysis.variogram import expected_movement as expected_movement
from .analysis.shape import shape_frame as shape_frame
from .analysis.states import classify as classify, state_at as state_at
from .analysis.tables import fluctuation as fluctuation, states_tables as states_tables
from .analysis.variogram import noise_and_drift as noise_and_drift
from .comparison import Comparison as Comparison
from .doctor import examine as examine
from .errors import (
    MoetraceError as MoetraceError,
    SettingError as SettingError,
    TooShortError as TooShortError,
    TraceError as TraceError,
    WorkspaceError as WorkspaceError,
)
from .forecasting.backtest import Backtest as Backtest, evaluate as evaluate
from .forecasting.predictors import predictor as predictor
from .forecasting.predictors.adapted import from_forecaster as from_forecaster
from .forecasting.predictors.arima import Arima as Arima
from .forecasting.predictors.base import Fitted as Fitted, Forecast as Forecast, Predictor as Predictor
from .forecasting.predictors.base import check_predictor as check_predictor
from .forecasting.predictors.averages import Auto as Auto
from .forecasting.predictors.averages import Ema as Ema
from .forecasting.predictors.averages import Level as Level
from .forecasting.predictors.lstm import Lstm as Lstm
from .forecasting.predictors.averages import SwAvg as SwAvg
from .forecasting.predictors.averages import WindowMean as WindowMean
from .forecasting.study import Study as Study, study as study
from .forecasting.summary import means_frame as means_frame, summary_frame as summary_frame
from .formats import (
    ReadOptions as ReadOptions,
    check_format as check_format,
    from_frame as from_frame,
    open_trace as open_trace,
    read_trace as read_trace,
    save_trace as save_trace,
)
from .formats.conversion import export_trace as export_trace
from .formats.stream.cells import (
    Cells as Cells,
    Format as Format,
    Reading as Reading,
    dense_cells as dense_cells,
)
from .placement.plan import Plan as Plan
from .placement.planning import Planning as Planning
from .placement.planning import rebalance_experts as rebalance_experts
from .placement.study import simulate as simulate
from .placement.step_time import StepTime as StepTime, read_curve as read_curve
from .placement.study import Placement as Placement
from .record import Recorder as Recorder
from .record.follow import follow as follow
from .reporting.study import write_report as write_report
from .residency.study import Residency as Residency
from .synthetic import Course as Course, settling as settling, synthetic_trace as synthetic_trace
from .trace import Finding as Finding, LayerLoad as LayerLoad, LoadTrace as LoadTrace, TraceInfo as TraceInfo
from .workspace.commands import (
    check as check,
    compare as compare,
    hot as hot,
    place as place,
    predict as predict,
    states as states,
)
from .workspace.contents import (
    explain as explain,
    export as export,
    ingest as ingest,
    list as list,  # noqa: A004 - the name of the command
    remove as remove,
)
from .workspace.found import Found as Found
from .workspace.pages import report as report
from .workspace.results import ResultFolder as ResultFolder
from .workspace.tasks import runner as runner
from .workspace.traces import Workspace as Workspace

__version__: str
