"""What there is to compute of a trace, and the name of every result by all that it depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from moetrace.analysis.tables import stacked
from moetrace.forecasting.backtest import SHARE_COLUMNS, Backtest, Score
from moetrace.forecasting.fits import check_other_runs, has_history
from moetrace.forecasting.forecasts import Coming
from moetrace.forecasting.predictors import label
from moetrace.forecasting.predictors.base import Predictor
from moetrace.forecasting.windows import Covered
from moetrace.formats import open_trace
from moetrace.trace import LoadTrace
from moetrace.workspace.results import Fit, Result, Store, key_of, layer_digests, settings_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Source:
    """Where a trace lies, and which *layers* and steps of it are meant, None for all: what a worker is told."""

    path: Path
    layers: tuple[int, ...] | None = None
    first: int | None = None
    last: int | None = None

    def open(self) -> LoadTrace:
        """The trace, reduced to what is meant."""
        return open_trace(self.path).select(self.layers, self.first, self.last)


@dataclass(frozen=True, eq=False)
class Work:
    """What to compute of a trace: *predictors* at every cutoff and horizon *covered*.

    With *ahead* the steps after the end of the trace are forecast too, for each of *horizons*, by the
    predictors that the whole trace is history enough for. *train_on* are the runs that predictors with
    one fit for all layers learn from instead.
    """

    source: Source
    predictors: Sequence[Predictor]
    horizons: Sequence[int]
    covered: Covered
    ahead: bool = False
    train_on: Sequence[Source] = ()

    @cached_property
    def trace(self) -> LoadTrace:
        """The trace itself."""
        return self.source.open()

    @cached_property
    def digests(self) -> Mapping[int, str]:
        """What each layer holds."""
        return layer_digests(self.source.path)

    @cached_property
    def others(self) -> str:
        """What the runs to train on hold; raises `SettingError` when the trace is one of them."""
        runs = [(other.open(), layer_digests(other.path)) for other in self.train_on]
        check_other_runs(self.trace, [run for run, _ in runs])
        return key_of([[run.steps.tolist(), [digests[layer] for layer in run.layers]] for run, digests in runs])

    @cached_property
    def span(self) -> str:
        """Which steps are meant."""
        return key_of(self.trace.steps.tolist())

    @cached_property
    def every_layer(self) -> str:
        """What all layers hold that are meant."""
        return key_of([self.digests[layer] for layer in self.trace.layers])

    def __len__(self) -> int:
        """How many results it has."""
        scored = sum(bool(self.cutoffs(horizon)) for horizon in self.horizons)
        ahead = sum(self.ahead_of(made) for made in self.predictors) * len(self.horizons)
        return len(self.trace.layers) * (scored * len(self.predictors) + ahead)

    def cutoffs(self, horizon: int) -> list[int]:
        """The cutoffs at which *horizon* is scored."""
        return [cutoff for cutoff, horizons in self.covered.items() if horizon in horizons]

    def result(self, made: Predictor, layer: int, horizon: int) -> Result:
        """The name of a result, by all that it depends on."""
        learned = [self.every_layer, self.others] if made.pools_layers else []
        facts = [self.trace.name, settings_of(made), self.digests[layer], self.span, self.cutoffs(horizon), learned]
        return Result(self.trace.name, label(made), layer, horizon, key_of(layer, horizon, *facts))

    def fit(self, made: Predictor, at: int | None) -> Fit:
        """The name of the fit for all layers, on the history up to *at*, or on the other runs where that is None."""
        learned = [self.others] if at is None else [self.every_layer, self.span, at]
        return Fit(self.trace.name, label(made), key_of(settings_of(made), learned))

    @property
    def end(self) -> int:
        """The last step."""
        return int(self.trace.steps[-1])

    @property
    def start(self) -> int:
        """The first step."""
        return int(self.trace.steps[0])

    def ahead_of(self, made: Predictor) -> bool:
        """Whether the steps after the end are to be forecast by a predictor, and the trace is history enough for it."""
        return self.ahead and has_history(made, self.start, self.end)


@dataclass(frozen=True, eq=False)
class Results:
    """The results of some work, read from the store when they are asked for.

    *made* is the number of results that are new, *found* of those that were there already; scores and
    forecast of a layer by a predictor over a horizon are two.
    """

    work: Work
    store: Store
    made: int
    found: int

    @property
    def scores(self) -> pd.DataFrame:
        """All scores, ordered as `evaluate` orders them."""
        return stacked(list(self._frames(self.store.scores)), Score._fields)

    @property
    def backtest(self) -> Backtest:
        """Scores and shares, as `evaluate` gives them."""
        return Backtest(self.scores, stacked(list(self._frames(self.store.shares)), SHARE_COLUMNS))

    def forecasts(self) -> Iterator[tuple[str, Coming]]:
        """Trace and forecast of the steps after its end, for each layer and predictor, one at a time."""
        return ((result.trace, self.store.forecast(result)) for result in self.ahead())

    def statuses(self) -> Iterator[dict[str, object]]:
        """``trace, predictor, layer, status`` of each forecast of the steps after the end."""
        for result in self.ahead():
            named = {"trace": result.trace, "predictor": result.predictor, "layer": result.layer}
            yield named | {"status": self.store.status(result)}

    def ahead(self) -> Iterator[Result]:
        """The results that have a forecast, in their order."""
        for layer, made in self._pairs():
            if self.work.ahead_of(made):
                yield from (self.work.result(made, layer, horizon) for horizon in self.work.horizons)

    def _pairs(self) -> Iterator[tuple[int, Predictor]]:
        return ((layer, made) for layer in self.work.trace.layers for made in self.work.predictors)

    def _frames(self, read: Callable[[Result], pd.DataFrame]) -> Iterator[pd.DataFrame]:
        scored = [horizon for horizon in self.work.horizons if self.work.cutoffs(horizon)]
        for layer, made in self._pairs():
            parts = [read(self.work.result(made, layer, horizon)) for horizon in scored]
            both = stacked(parts, ["cutoff", "horizon"])
            # Stable, so that the experts of a cutoff stay in their order.
            yield both.sort_values(["cutoff", "horizon"], kind="stable", ignore_index=True)
