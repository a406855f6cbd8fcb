"""`lstm`: one small network for all experts: the recent course of a share in, its next course out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from moetrace.analysis.variogram import block_means, gain_of, levels
from moetrace.errors import SettingError
from moetrace.files import replacing
from moetrace.forecasting.predictors.base import Fitted, Forecast, Predictor, hold
from moetrace.trace import LayerLoad, Shares, rows_of

if TYPE_CHECKING:
    from moetrace.forecasting.predictors.network import Network

# Keeps an idle expert, and a layer that never moves, from dividing by nothing.
FLOOR = 1e-6
# Blocks of the shortest window; what is missing of a whole one is filled with 0, the level.
LEAST_BLOCKS = 4


@dataclass(frozen=True)
class Lstm(Predictor):
    """An LSTM on means of *block* steps, with one set of weights for all experts of all layers.

    It sees the last *lookback* blocks of one expert, as the difference from its level (of `Level`), in units of how
    much the layer's experts moved in that time. It answers, in the same units, how far the next *segments* stretches
    of *segment* blocks will be from that level. That unit carries over to other runs and other numbers of experts, and
    keeps the network from expecting the liveliness of the early steps for ever.

    The last layer starts at 0, so that an untrained network forecasts the level; *updates* steps of training move it
    from there. Chosen on gpt-moe-8e-a: more updates or a larger network learn the past better and the future worse.
    """

    name = "lstm"
    refit_growth = 1.5
    pools_layers = True

    block: int = 50
    lookback: int = 20
    segments: int = 8
    segment: int = 5
    hidden: int = 8
    updates: int = 100
    seed: int = 0

    def least_rows(self, stride: int) -> int:
        """The blocks of the shortest window and the segment after it."""
        return (LEAST_BLOCKS + self.segment) * rows_of(self.block, stride)

    def fit(self, histories: Iterable[LayerLoad]) -> Fitted:
        """Train on windows drawn from all moments of all experts of *histories*; untrained where there is none."""
        from moetrace.forecasting.predictors.network import BATCH, train

        # Means are a fiftieth of the load; of the windows, which are many times that, only those drawn are made.
        courses = [TrainingCourse.of(history, self) for history in histories]
        windows = sum(course.windows for course in courses)
        shape = (self.updates if windows else 0, BATCH)
        drawn = np.random.default_rng(self.seed).integers(0, max(1, windows), shape)
        examples = drawn_windows(courses, drawn.ravel(), self)
        batches = [part.reshape(*shape, *part.shape[1:]) for part in examples]
        return FittedLstm(self, train(batches, self.hidden, self.segments, self.seed))

    def load(self, path: Path) -> Fitted:
        """The weights that `FittedLstm.save` wrote; raises `SettingError` for any other file."""
        from moetrace.forecasting.predictors.network import from_arrays

        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = dict(archive)
            settings = Lstm(**json.loads(str(arrays.pop("settings"))))
            return FittedLstm(settings, from_arrays(arrays, settings.hidden, settings.segments))
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise SettingError(f"{path} holds no weights that `FittedLstm.save` wrote: {error}") from error


class Examples(NamedTuple):
    """Training windows; *known* is 1 where the segment had passed by the end of the history.

    *inputs* (..., lookback), *targets* and *known* (..., segments), *weight* (...).
    """

    inputs: NDArray[np.float32]
    targets: NDArray[np.float32]
    known: NDArray[np.float32]
    weight: NDArray[np.float32]


def window_at(settings: Lstm, means: Shares, levels: Shares) -> tuple[Shares, Shares, Shares]:
    """The window that ends with the last of *means* and *levels*, both (blocks, experts); 0 before the first.

    Its inputs (experts, lookback), and for each expert (experts,) the level and the unit that they are measured in.
    """
    seen, base = means[-settings.lookback :], levels[-1]
    root = np.sqrt(np.maximum(base, FLOOR))
    moved = np.sqrt(np.square((seen - seen.mean(axis=0)) / root).mean())  # one number for the layer
    unit = root * max(float(moved), FLOOR)
    inputs = np.zeros((settings.lookback, means.shape[1]))
    inputs[-len(seen) :] = (seen - base) / unit
    return inputs.T, base, unit


@dataclass(frozen=True, eq=False)
class TrainingCourse:
    """The block means of a layer, (blocks, experts), and the gain of its level.

    *moments* are the ends of windows that have a whole segment after them.
    """

    means: Shares
    gain: float
    moments: range

    @classmethod
    def of(cls, history: LayerLoad, settings: Lstm) -> TrainingCourse:
        means = block_means(history, history.rows(settings.block))
        return cls(means, gain_of(history), range(LEAST_BLOCKS, len(means) - settings.segment + 1))

    @property
    def windows(self) -> int:
        """Windows of all experts, numbered moment by moment."""
        return len(self.moments) * int(self.means.shape[1])


def drawn_windows(courses: Sequence[TrainingCourse], drawn: NDArray[np.int64], settings: Lstm) -> Examples:
    """The windows of the numbers *drawn* (n,), counted through all *courses*."""
    n, segments, blocks = len(drawn), settings.segments, settings.segment
    shapes = ((n, settings.lookback), (n, segments), (n, segments), (n,))
    examples = Examples(*(np.zeros(shape, np.float32) for shape in shapes))
    start = 0
    for course in courses:
        own = np.flatnonzero((start <= drawn) & (drawn < start + course.windows))
        moment, expert = np.divmod(drawn[own] - start, course.means.shape[1])
        followed = levels(course.means, course.gain)
        for i in np.unique(moment):
            rows, experts, end = own[moment == i], expert[moment == i], course.moments[i]
            inputs, base, unit = window_at(settings, course.means[:end], followed[:end])
            examples.inputs[rows], examples.weight[rows] = inputs[experts], np.sqrt(base * len(base))[experts]
            for k, a in enumerate(range(end, min(end + segments * blocks, len(course.means) - blocks + 1), blocks)):
                target = (course.means[a : a + blocks].mean(axis=0) - base) / unit
                examples.targets[rows, k], examples.known[rows, k] = target[experts], 1
        start += course.windows
    return examples


@dataclass(frozen=True, eq=False)
class FittedLstm(Fitted):
    """Trained weights, good for any layer of any trace."""

    settings: Lstm
    network: Network

    def forecast(self, history: LayerLoad, horizon: int) -> Forecast:
        """All segments at once; the last one holds for steps beyond them."""
        from moetrace.forecasting.predictors.network import apply

        rows = history.rows(self.settings.block)
        means = block_means(history, rows)
        inputs, base, unit = window_at(self.settings, means, levels(means, gain_of(history)))
        moves = np.asarray(apply(self.network, inputs.astype(np.float32)), np.float64)
        shares = base + (moves * unit[:, None]).T  # (segments, experts)
        return Forecast(hold(shares, rows * history.stride * self.settings.segment, horizon))

    def save(self, path: Path) -> None:
        """Write settings and weights to *path*, a NumPy archive without pickles, atomically."""
        from moetrace.forecasting.predictors.network import arrays_of

        with replacing(path) as partial, partial.open("wb") as file:
            arrays: dict[str, Any] = arrays_of(self.network)
            np.savez(file, settings=np.array(json.dumps(asdict(self.settings))), **arrays)
