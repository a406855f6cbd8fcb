"""Frames about the load itself: states, fluctuation, imbalance, and the courses figures are drawn from.

What the paper looks at is computed here, too: the sliding variance and range of each expert's share (arXiv 2404.16914).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from moetrace.analysis.imbalance import IMBALANCE, RECENT, balance_frame, health
from moetrace.analysis.shape import distinct_frame
from moetrace.analysis.states import RULE, LayerStates, classify, classify_expert, rank_runs, settle_step_of
from moetrace.analysis.variogram import BLOCK, block_means, mean_noise, step_scatter
from moetrace.errors import check_several
from moetrace.frames import stacked
from moetrace.trace import LayerLoad, LoadTrace, Shares, Steps

if TYPE_CHECKING:
    import pandas as pd

# Points of a curve beyond which a figure shows no more and a file only grows.
CURVE_POINTS = 600
# Moments of a course: more than a map or a small figure can show.
MOMENTS = 240
COURSE_MOMENTS = 120
# Experts that a figure can tell apart.
HOTTEST = 5
# The rest is shown by these quantiles of their shares.
REST = {"low": 0.1, "middle": 0.5, "high": 0.9}
# The window of the layers table: the paper's middle one.
LAYER_WINDOW = 100
# Expected range of so many draws from a normal distribution, in standard deviations (Tippett 1925).
NORMAL_RANGE = {10: 3.078, 100: 5.015, 200: 5.492}
# The two detectors differ where their settle steps are further apart than this, twice the hold of the rule.
DETECTORS_APART = 1000
# What the table `sensitivity` varies: windows in steps, and the movement below which a layer settles.
SENSITIVITY_WINDOWS = (100, 200, 400)
SENSITIVITY_THRESHOLDS = (0.02, 0.03, 0.04, 0.06, 0.08)
# The paper's windows (its figures of sliding variance and range).
WINDOWS = (10, 100, 200)
THREADS = 2
# Block values worked on at a time, so that they and what is computed from them stay in the processor's cache.
CACHED_VALUES = 1 << 16

# Mean, variance, minimum and maximum of spans of consecutive blocks, each of shape (spans, experts).
Spans = tuple[Shares, Shares, Shares, Shares]


def layer_row(load: LayerLoad, states: LayerStates) -> dict[str, Any]:
    """When a layer settled, its state now, its fluctuation before and after, and its `Health`.

    *settle_step_low* and *settle_step_high* are the ends of the interval of the settle step, *unsettled_step_low* and
    *unsettled_step_high* those of where it became unstable again; *rank_settle_step* is what the order of the experts
    alone says, *detectors* whether the two ``agree``. *movement* is the relative change of the load from one window of
    200 steps to the next, noise taken off; *variance_100* and *range_100* are the paper's, for windows of 100 steps,
    mean over experts; *step_noise* is what one step scatters. NaN where there is no before or after.
    """
    first, last = int(load.steps[0]), int(load.steps[-1])
    settled, by_ranks = states.settle_step, settle_step_of(rank_runs(load))
    border = last + 1 if settled is None else settled
    low, high = states.settle_interval or (None, None)
    again = states.unsettled_interval or (None, None)
    # The shorter window makes the longer one slide by its length.
    sides = {"before": load.between(first, border - 1), "after": load.between(border, last)}
    found = {side: fluctuation(part, [LAYER_WINDOW // 10, LAYER_WINDOW])[1:] for side, part in sides.items()}
    fluctuations = {
        f"{measure}_{LAYER_WINDOW}_{side}": float(getattr(windows[0], measure).mean()) if windows else float("nan")
        for measure, (side, windows) in product(("variance", "range"), found.items())
    }
    return {
        "trace": load.trace,
        "layer": load.layer,
        "settle_step": settled,
        "settle_step_low": low,
        "settle_step_high": high,
        "state": states.state,
        "outcome": states.outcome,
        "unsettled_step": states.unsettled_step,
        "unsettled_step_low": again[0],
        "unsettled_step_high": again[1],
        "rank_settle_step": by_ranks,
        "detectors": "agree" if _agree(settled, by_ranks) else "differ",
        "movement_before": states.movement_in(first, border - 1),
        "movement_after": states.movement_in(border, last),
        **fluctuations,
        "step_noise": mean_noise(load, 1),
        **health(load, RECENT)._asdict(),
    }


def _agree(by_movement: int | None, by_ranks: int | None) -> bool:
    """Whether the two detectors say the same of the settle step."""
    if by_movement is None or by_ranks is None:
        return by_movement is by_ranks
    return abs(by_movement - by_ranks) <= DETECTORS_APART


def states_tables(
    trace: LoadTrace,
    also: Iterable[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, pd.DataFrame]:
    """The frames ``layers``, ``windows``, ``depth`` and ``movement``, and *also* those of `BY_LAYER` with these names.

    One layer at a time.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> mt.states_tables(trace)["windows"]["state"].tolist()
    ['transient', 'stable']
    """
    import pandas as pd

    parts: dict[str, list[pd.DataFrame]] = {name: [] for name in ("movement", *also)}
    states: list[LayerStates] = []
    rows: list[dict[str, Any]] = []
    for done, load in enumerate(trace.by_layer(), 1):
        found = classify(load)
        rows.append(layer_row(load, found))
        states.append(found)
        parts["movement"].append(movement_frame(load, found))
        for name in parts.keys() & BY_LAYER.keys():
            parts[name].append(BY_LAYER[name](load))
        if progress is not None:
            progress(done, len(trace.layers))
    steps = [f"{name}_step{end}" for name in ("settle", "unsettled") for end in ("", "_low", "_high")]
    layers = pd.DataFrame(rows).astype(dict.fromkeys([*steps, "rank_settle_step", "since"], "Int64"))
    rest = {name: stacked(frames) for name, frames in parts.items()}
    return {"layers": layers, "windows": windows_frame(states), **rest, "depth": depth_frame(layers)}


def windows_frame(states: Iterable[LayerStates]) -> pd.DataFrame:
    """One row per window of each layer: from step, to step, state."""
    import pandas as pd

    runs = [(found.trace, found.layer, *run) for found in states for run in found.runs]
    return pd.DataFrame(runs, columns=["trace", "layer", "from_step", "to_step", "state"])


def movement_frame(load: LayerLoad, found: LayerStates) -> pd.DataFrame:
    """The course that the state rule judges, movement averaged over the hold, and its two thresholds."""
    some = slice(None, None, -(-len(found.judged) // CURVE_POINTS) or 1)
    judged = {"step": found.steps[: len(found.judged)][some], "movement": found.judged[some]}
    return _rows(load, **judged, settle_below=RULE.settle_below, unsettle_above=RULE.unsettle_above)


def table_by_layer(trace: LoadTrace, name: str) -> pd.DataFrame:
    """The table *name* of `BY_LAYER` for all layers of *trace*."""
    return stacked([BY_LAYER[name](load) for load in trace.by_layer()])


def depth_frame(layers: pd.DataFrame) -> pd.DataFrame:
    """The paper's observation in numbers: shallow, middle and deep thirds of the layers, from a layers frame.

    The means over the layers of each third; *settled* counts those that settle.
    """
    import pandas as pd

    measures = ["settle_step", "movement_before", "movement_after", "variance_100_after", "range_100_after"]
    rows = []
    for trace, frame in layers.groupby("trace", sort=False):
        ordered, parts = frame.sort_values("layer", kind="stable"), min(3, len(frame))
        names = ["shallow", "middle", "deep"] if parts == 3 else ["shallow", "deep"][:parts]
        for name, part in zip(names, np.array_split(np.arange(len(frame)), parts)):
            third = ordered.iloc[part]
            low, high = third["layer"].min(), third["layer"].max()
            row = {"trace": trace, "depth": name, "layers": f"{low} to {high}" if low != high else f"{low}"}
            means = {measure: third[measure].astype(float).mean() for measure in measures}
            rows.append(row | {"settled": int(third["settle_step"].notna().sum())} | means)
    return pd.DataFrame(rows)


def sensitivity_frame(load: LayerLoad) -> pd.DataFrame:
    """How the answer depends on the numbers of the rule: one row per window and threshold.

    The threshold of unsettling stays half as high again as that of settling.
    """
    import pandas as pd

    rows = []
    for window, threshold in product(SENSITIVITY_WINDOWS, SENSITIVITY_THRESHOLDS):
        found = classify(load, replace(RULE, window=window, settle_below=threshold, unsettle_above=1.5 * threshold))
        rows.append((load.trace, load.layer, window, threshold, found.settle_step, found.outcome))
    columns = ["trace", "layer", "window", "settle_below", "settle_step", "outcome"]
    return pd.DataFrame(rows, columns=columns).astype({"settle_step": "Int64"})


def _rows(load: LayerLoad, **columns: Any) -> pd.DataFrame:
    """A frame of *columns* about a layer."""
    import pandas as pd

    return pd.DataFrame({"trace": load.trace, "layer": load.layer, **columns})


def experts_frame(load: LayerLoad) -> pd.DataFrame:
    """One row per expert and window: mean sliding variance and range of its share, its share, its own state."""
    own = [classify_expert(load, expert) for expert in range(load.experts)]
    known = {"settle_step": [found.settle_step for found in own], "state": [found.state for found in own]}
    parts = []
    for found in fluctuation(load):
        means = {"variance": found.variance.mean(axis=0), "range": found.range.mean(axis=0)}
        experts = {"expert": load.expert_numbers, "window": found.window, "share": load.mean_shares}
        parts.append(_rows(load, **experts, **means, **known).astype({"settle_step": "Int64"}))
    return stacked(parts)


def load_frame(load: LayerLoad) -> pd.DataFrame:
    """The course of the load: one row per expert and moment, shares averaged over blocks of steps."""
    ends, means = course(load, CURVE_POINTS)
    moments, experts = (index.ravel() for index in np.indices(means.shape))
    return _rows(load, expert=load.expert_numbers[experts], step=ends[moments], share=means.ravel())


def peaks_frame(load: LayerLoad) -> pd.DataFrame:
    """The load of the hottest expert over the mean load, one row for each block of steps: at most `MOMENTS` rows."""
    ends, means = course(load, MOMENTS)
    return _rows(load, step=ends, peak_over_mean=means.max(axis=1) * load.experts)  # shares of a step sum to 1


def hottest_frame(load: LayerLoad) -> pd.DataFrame:
    """The shares of the `HOTTEST` experts of the last 1,000 steps, and quantiles of all others, by block of steps.

    One row for each *series* and moment: a series is an expert by its number, or ``low``, ``middle``, ``high``.
    """
    ends, means = course(load, COURSE_MOMENTS)
    order = np.argsort(-load.last(RECENT).mean_shares, kind="stable")
    hot, rest = order[:HOTTEST], order[HOTTEST:]
    series = {str(load.expert_numbers[expert]): means[:, expert] for expert in hot}
    if len(rest):
        series |= dict(zip(REST, np.quantile(means[:, rest], list(REST.values()), axis=1)))
    return stacked([_rows(load, step=ends, series=name, share=share) for name, share in series.items()])


def course(load: LayerLoad, moments: int) -> tuple[Steps, Shares]:
    """The last step and the mean shares of each of at most *moments* blocks, shape (blocks, experts)."""
    rows = max(load.rows(BLOCK), -(-len(load.steps) // moments))
    rows = min(rows, max(1, len(load.steps) // 2))
    means = block_means(load, rows)
    return load.steps[len(load.steps) - len(means) * rows :].reshape(-1, rows)[:, -1], means


def fluctuation_frame(load: LayerLoad) -> pd.DataFrame:
    """The course of the sliding variance and range, mean over experts: one row per window and moment.

    *noise_variance* and *noise_range* are what they would be for the last 1,000 steps if the load stood still,
    *threshold_variance* if it moved as much as the state rule lets a stable layer: a random walk of d a step has a
    variance of d / 6 a step within a window, and moves by 2 d / 3 a step from one window to the next.
    """
    scatter = step_scatter(load.last(RECENT))
    noise, spread = float(scatter.mean()), float(np.sqrt(scatter).mean())
    drift = RULE.settle_below**2 * float(np.square(load.last(RECENT).mean_shares).mean()) / (2 / 3 * RULE.window)
    parts = []
    for found in fluctuation(load):
        some, window = slice(None, None, -(-len(found.steps) // CURVE_POINTS)), found.window
        measured = {"variance": found.variance[some].mean(axis=1), "range": found.range[some].mean(axis=1)}
        still = {"noise_variance": noise, "threshold_variance": noise + drift * window / 6}
        still["noise_range"] = spread * NORMAL_RANGE[window]
        parts.append(_rows(load, window=window, step=found.steps[some], **measured, **still))
    columns = ["trace", "layer", "window", "step", "variance", "range"]
    return stacked(parts, [*columns, "noise_variance", "threshold_variance", "noise_range"])


def imbalance_frame(load: LayerLoad, last: int = RECENT) -> pd.DataFrame:
    """Every definition of imbalance for the load of the *last* steps: one row per definition."""
    share = load.last(last).mean_shares
    values = [measure(share) for measure, _ in IMBALANCE.values()]
    return _rows(load, definition=list(IMBALANCE), of=[whose for _, whose in IMBALANCE.values()], value=values)


BY_LAYER: dict[str, Callable[[LayerLoad], pd.DataFrame]] = {
    "load": load_frame,
    "fluctuation": fluctuation_frame,
    "imbalance": imbalance_frame,
    "balance": balance_frame,
    "peaks": peaks_frame,
    "hottest": hottest_frame,
    "distinct": distinct_frame,
    "experts": experts_frame,
    "sensitivity": sensitivity_frame,
}
"""Tables that are made of one layer at a time, by name."""
COURSES = ("load", "fluctuation", "imbalance", "balance", "peaks", "hottest")
"""Those that figures are drawn from."""


# --- sliding variance and range ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fluctuation:
    """Sliding variance and range of the shares over one *window* of steps.

    *steps* (moments,) is the last step of each window; *variance* and *range* (moments, experts).
    """

    window: int
    steps: Steps
    variance: Shares
    range: Shares


def fluctuation(load: LayerLoad, windows: Sequence[int] = WINDOWS) -> list[Fluctuation]:
    """Sliding variance and range for each of *windows*, sampled at every block of their common divisor.

    For the paper's windows that is every 10 steps. Each block is reduced to its mean, variance, minimum and
    maximum, and each window is computed from those of its blocks: the variance is the mean of the blocks'
    variances plus the variance of their means. Unlike a cumulative sum, that forgets a spike exactly.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> [(found.window, found.variance.shape) for found in mt.fluctuation(trace.layer(0))]
    [(10, (200, 8)), (100, (191, 8)), (200, (181, 8))]
    """
    check_several(windows, "windows", "[100, 200]")
    unit = int(np.gcd.reduce([load.rows(window) for window in windows]))
    blocks = len(load.steps) // unit
    lengths = {window: load.rows(window) // unit for window in windows if load.rows(window) <= blocks * unit}
    shares = load.shares[: blocks * unit].reshape(blocks, unit, load.experts)
    ends = load.steps[: blocks * unit].reshape(blocks, unit)[:, -1]
    shapes = {window: (blocks - k + 1, load.experts) for window, k in lengths.items()}
    found = [Fluctuation(w, ends[k - 1 :], np.empty(shapes[w]), np.empty(shapes[w])) for w, k in lengths.items()]
    n, longest = max(1, CACHED_VALUES // load.experts), max(lengths.values(), default=1)

    def fill(a: int) -> None:
        part = np.swapaxes(shares[a : a + n + longest - 1], 0, 1)  # (unit, some blocks, experts)
        block = spans = part.mean(axis=0), _variance(part), part.min(axis=0), part.max(axis=0)
        size = 1
        for into, k in zip(found, lengths.values()):
            spans, size = (_joined(block, k, 1) if k % size else _joined(spans, k, size)), k
            _, variance, low, high = spans
            into.variance[a : a + n] = variance[:n]
            into.range[a : a + n] = (high - low)[:n]

    with ThreadPoolExecutor(THREADS) as pool:  # NumPy lets go of the interpreter while it works
        list(pool.map(fill, range(0, blocks, n)))
    return found


def _joined(spans: Spans, k: int, size: int) -> Spans:
    """Every *k* consecutive blocks, from every *size* consecutive blocks; *size* divides *k*."""
    if k == size:
        return spans
    if len(spans[0]) <= k - size:
        return (spans[0][:0],) * 4
    parts = (sliding_window_view(values, k - size + 1, axis=0)[..., ::size] for values in spans)
    mean, variance, low, high = (np.moveaxis(part, -1, 0) for part in parts)  # (k / size, spans, experts)
    return mean.mean(axis=0), variance.mean(axis=0) + _variance(mean), low.min(axis=0), high.max(axis=0)


def _variance(values: Shares) -> Shares:
    """The same as ``values.var(axis=0)``, faster."""
    apart = values - values.mean(axis=0)
    variance: Shares = np.einsum("kse,kse->se", apart, apart) / len(values)
    return variance
