"""Sliding variance and range of a layer, three windows together, beside pandas and bottleneck.

Prints a Markdown table of ratios. All give the variance (of the population) and the range of every
expert for windows of 10, 100 and 200 steps; moetrace at every tenth step, which is what the figures
and tables use, the others at every step, and pandas once more with its own `step=10`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import bottleneck
import numpy as np
import pandas as pd

from moetrace import LoadTrace
from moetrace.analysis.tables import WINDOWS, fluctuation

STEPS, EXPERTS, LAYERS = 10_000, 256, 60


def best(work: Callable[[], object], rounds: int) -> float:
    """The shortest of some rounds, in seconds."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def with_pandas(frame: pd.DataFrame, step: int | None) -> None:
    for window in WINDOWS:
        rolling = frame.rolling(window, step=step)
        rolling.var(ddof=0)
        rolling.max() - rolling.min()


def with_bottleneck(series: np.ndarray) -> None:
    for window in WINDOWS:
        bottleneck.move_var(series, window, axis=1)
        bottleneck.move_max(series, window, axis=1) - bottleneck.move_min(series, window, axis=1)


def table() -> str:
    counts = np.random.default_rng(0).multinomial(100_000, np.full(EXPERTS, 1 / EXPERTS), size=STEPS)
    load = LoadTrace.from_counts(counts[:, None]).layer(0)
    shares = load.shares
    frame, series = pd.DataFrame(shares), np.ascontiguousarray(shares.T)
    ours = best(lambda: fluctuation(load), 9)
    rivals = {
        "pandas rolling": best(lambda: with_pandas(frame, None), 3),
        "pandas rolling, `step=10`": best(lambda: with_pandas(frame, 10), 3),
        "bottleneck": best(lambda: with_bottleneck(series), 3),
    }
    lines = [
        f"One of {LAYERS} equal layers of {EXPERTS} experts over {STEPS:,} steps.",
        "",
        "| way | times as long |",
        "|---|---:|",
    ]
    lines += ["| moetrace | 1 |", *(f"| {name} | {seconds / ours:.0f} |" for name, seconds in rivals.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
