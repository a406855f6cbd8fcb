"""What the paper looks at: the sliding variance and range of each expert's share (arXiv 2404.16914)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moetrace.trace import LayerLoad, Shares, Steps

# The paper's windows (its figures of sliding variance and range).
WINDOWS = (10, 100, 200)
THREADS = 2
# What is worked on at a time, so that it stays in the processor's cache: 512 kB.
VALUES_AT_A_TIME = 1 << 16


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

    For the paper's windows that is every 10 steps. Each block is reduced once, to its mean, squared
    deviation, minimum and maximum; windows are put together from blocks.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> [(found.window, found.variance.shape) for found in mt.fluctuation(trace.layer(0))]
    [(10, (200, 8)), (100, (191, 8)), (200, (181, 8))]
    """
    unit = int(np.gcd.reduce([load.rows(window) for window in windows]))
    blocks = len(load.steps) // unit
    lengths = {window: load.rows(window) // unit for window in windows if load.rows(window) <= blocks * unit}
    shares = load.shares[: blocks * unit].reshape(blocks, unit, load.experts)
    ends = load.steps[: blocks * unit].reshape(blocks, unit)[:, -1]
    found = [
        Fluctuation(w, ends[k - 1 :], *(np.empty((blocks - k + 1, load.experts)) for _ in range(2)))
        for w, k in lengths.items()
    ]
    n = max(1, VALUES_AT_A_TIME // load.experts)
    longest = max(lengths.values(), default=1)

    def fill(a: int) -> None:
        some = _Spans.of_blocks(shares[a : a + n + longest - 1])
        for into, spans in zip(found, _windows(some, list(lengths.values()))):
            np.divide(spans.deviation[:n], spans.rows, out=into.variance[a : a + n])
            np.subtract(spans.high[:n], spans.low[:n], out=into.range[a : a + n])

    with ThreadPoolExecutor(THREADS) as pool:  # NumPy lets go of the interpreter while it works
        list(pool.map(fill, range(0, blocks, n)))
    return found


class _Spans(NamedTuple):
    """Mean, summed squared deviation, minimum and maximum of overlapping spans of *rows*, each (spans, experts).

    A span is *blocks* blocks long and begins one block after the one before it.
    """

    rows: int
    blocks: int
    mean: Shares
    deviation: Shares
    low: Shares
    high: Shares

    @classmethod
    def of_blocks(cls, shares: Shares) -> _Spans:
        """Of *shares* (blocks, rows, experts), one span a block; a few blocks at a time, as they fit the cache."""
        blocks, rows, experts = shares.shape
        mean, deviation, low, high = (np.empty((blocks, experts)) for _ in range(4))
        some = max(1, VALUES_AT_A_TIME // (rows * experts))
        for a in range(0, blocks, some):
            part, at = shares[a : a + some], slice(a, a + some)
            np.mean(part, axis=1, out=mean[at])
            apart = part - mean[at, None]
            np.einsum("bre,bre->be", apart, apart, out=deviation[at])
            np.min(part, axis=1, out=low[at])
            np.max(part, axis=1, out=high[at])
        return cls(rows, 1, mean, deviation, low, high)

    def times(self, n: int) -> _Spans:
        """Of every *n* spans on end, by doubling: a handful of passes however long the window."""
        whole: _Spans | None = None
        span = self
        while n:
            if n % 2:
                whole = span if whole is None else whole.followed_by(span)
            n //= 2
            span = span.followed_by(span) if n else span
        assert whole is not None
        return whole

    def followed_by(self, other: _Spans) -> _Spans:
        """Each span joined with the one of *other* that starts where it ends (Chan et al. 1979).

        Unlike a cumulative sum this loses nothing to a spike that has long left the window.
        """
        n = max(0, min(len(self.mean), len(other.mean) - self.blocks))
        late = slice(self.blocks, self.blocks + n)
        rows = self.rows + other.rows
        apart = other.mean[late] - self.mean[:n]
        mean = self.mean[:n] + apart * (other.rows / rows)
        apart *= apart
        apart *= self.rows * other.rows / rows
        apart += self.deviation[:n]
        apart += other.deviation[late]
        low, high = np.minimum(self.low[:n], other.low[late]), np.maximum(self.high[:n], other.high[late])
        return _Spans(rows, self.blocks + other.blocks, mean, apart, low, high)


def _windows(block: _Spans, lengths: Sequence[int]) -> Iterator[_Spans]:
    """Spans of each of *lengths* blocks, each built from the one before where that divides it."""
    spans = block
    for length in lengths:
        base = spans if length % spans.blocks == 0 else block
        spans = base.times(length // base.blocks)
        yield spans
