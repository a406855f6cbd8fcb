"""`sw_avg`: the paper's sliding-window average (arXiv 2404.16914, section on SW_Avg)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moetrace.forecasting.predictors.base import Forecast, Untrained, hold
from moetrace.trace import LayerLoad


@dataclass(frozen=True)
class SwAvg(Untrained):
    """The mean of the last *window* steps becomes the next value, and the window slides over it.

    Not a constant: the oldest steps leave the window first, so over a long horizon recent steps
    weigh up to twice as much as the average one. The paper does not state its window; 500 has the
    lowest error on the sample trace gpt-moe-8e-a (1.73 % at 1,000 steps; 300: 1.83 %, 700: 1.75 %).
    """

    name = "sw_avg"
    window: int = 500

    def forecast(self, history: LayerLoad, horizon: int) -> Forecast:
        """The recursion, one logged row at a time."""
        window = history.shares[-history.rows(self.window) :]
        return Forecast(hold(slide(window, -(-horizon // history.stride)), history.stride, horizon))


def slide(
    window: np.ndarray[tuple[int, int], np.dtype[np.float64]], n: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """*n* further rows, each the mean of the len(*window*) rows before it, shape (n, experts)."""
    w = len(window)
    values = np.concatenate([window, np.empty((n, window.shape[1]))])  # (w + n, experts)
    total = window.sum(axis=0)
    for i in range(w, w + n):
        values[i] = total / w
        total += values[i] - values[i - w]
    return values[w:]
