"""What the paper looks at: the sliding variance and range of each expert's share (arXiv 2404.16914)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from moetrace.errors import check_several
from moetrace.trace import LayerLoad, Shares, Steps

# The paper's windows (its figures of sliding variance and range).
WINDOWS = (10, 100, 200)
THREADS = 2
# Block values worked on at a time, so that they and what is computed from them stay in the processor's cache.
VALUES_AT_A_TIME = 1 << 16

# Mean, variance, minimum and maximum of spans of consecutive blocks, each of shape (spans, experts).
Spans = tuple[Shares, Shares, Shares, Shares]


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
    n, longest = max(1, VALUES_AT_A_TIME // load.experts), max(lengths.values(), default=1)

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
