"""Where the results of a backtest are cached, by kind: the protocol, and memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from moetrace.forecasting.evaluation import Result, SharedFit
from moetrace.forecasting.layers import EndForecast, TimedFit

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

Name = Result | SharedFit


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of results, each of which is a *T*."""

    name: str


SCORES: Kind[pd.DataFrame] = Kind("scores")
"""The rows of `Score` of a `Result`, one for each cutoff."""
SHARES: Kind[pd.DataFrame] = Kind("shares")
"""What they were computed from: `SHARE_COLUMNS`, one row for each cutoff and expert; of a `Result` with intervals."""
FORECAST: Kind[EndForecast] = Kind("forecast")
"""The forecast of the steps after the end, of a `Result`."""
FIT: Kind[TimedFit] = Kind("fit")
"""What was learned from all layers, of a `SharedFit`."""


class Results(Protocol):
    """Where results are cached, each by its kind and its name."""

    def has(self, kind: Kind[T], name: Name) -> bool:
        """Whether that result is cached."""

    def put(self, kind: Kind[T], name: Name, value: T) -> None:
        """Cache a result."""

    def get(self, kind: Kind[T], name: Name) -> T:
        """A result that is cached."""

    def begin(self, trace: str) -> None:
        """Get ready to cache results of the trace of that name."""

    def for_parent(self) -> Results | None:
        """What a worker hands to the process that asked it, None where that reads the same place."""

    def merge(self, other: Results | None) -> None:
        """Take in what a worker handed over."""


@dataclass(frozen=True)
class InMemory(Results):
    """Results cached in a dictionary."""

    cached: dict[tuple[str, Name], Any] = field(default_factory=dict)

    def has(self, kind: Kind[T], name: Name) -> bool:
        return (kind.name, name) in self.cached

    def put(self, kind: Kind[T], name: Name, value: T) -> None:
        self.cached[kind.name, name] = value

    def get(self, kind: Kind[T], name: Name) -> T:
        value: T = self.cached[kind.name, name]
        return value

    def begin(self, trace: str) -> None:
        pass

    def for_parent(self) -> InMemory:
        return self

    def merge(self, other: Results | None) -> None:
        if isinstance(other, InMemory) and other is not self:
            self.cached.update(other.cached)

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: a copy, as tasks are handed out in one thread while another merges."""
        return {"cached": dict(self.cached)}
