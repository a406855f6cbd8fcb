"""How long a GPU takes for an expert in one pass, by the number of tokens that the expert gets.

By the roofline, an expert with n tokens takes the longer of reading its weights and of computing. Divided by the time
of one token that is ``max(n, ridge)`` for n of 1 or more, and nothing for n = 0. The ridge is a number of the hardware
alone: peak FLOP/s times bytes of a weight over twice the memory bandwidth. Below it an expert is memory-bound: more
tokens cost nothing, and a replica that gets tokens costs as much as the expert. All-to-all traffic, padding of tiles
and overlap are left out, unless a measured curve has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import SettingError, TraceError
from moetrace.trace import Shares


@dataclass(frozen=True)
class Gpu:
    """Dense bf16 *teraflops* (10^12 FLOP/s) and memory bandwidth in *terabytes* (10^12 bytes/s), as its data sheet has.

    fp8 doubles the first and halves the bytes, so that the ridge is the same.
    """

    teraflops: float
    terabytes: float
    source: str

    @property
    def ridge(self) -> float:
        """Tokens of an expert above which it is compute-bound, with weights of 2 bytes."""
        return self.teraflops / self.terabytes


GPUS = {
    "a100": Gpu(312, 2.039, "NVIDIA A100 80GB SXM data sheet, 2021"),
    "h20": Gpu(148, 4.0, "NVIDIA H20 specification, 2023"),
    "h100": Gpu(989, 3.35, "NVIDIA H100 SXM data sheet, 2023"),
    "h200": Gpu(989, 4.8, "NVIDIA H200 SXM data sheet, 2023"),
    "b200": Gpu(2250, 8.0, "NVIDIA DGX B200 data sheet, 2024, per GPU"),
    "l40s": Gpu(362, 0.864, "NVIDIA L40S data sheet, 2023"),
    "mi300x": Gpu(1307, 5.3, "AMD Instinct MI300X data sheet, 2023"),
}
# Where nothing is known of the hardware, answers are also given for the highest ridge of the table.
HIGHEST_RIDGE = max(gpu.ridge for gpu in GPUS.values())
CURVE_COLUMNS = ("tokens", "microseconds")


@dataclass(frozen=True)
class StepTime:
    """The time of an expert by its tokens: from a *ridge*, a measured *curve*, or in proportion to tokens (both None).

    *hardware* is what the ridge is of. A step of the trace holds so many *passes*, among which its tokens are spread
    evenly. *token_time* is the microseconds of one token where an expert is compute-bound, None where not known.
    *curve* has pairs of tokens and microseconds, tokens increasing; costs are then microseconds, else tokens.
    Raises `SettingError` for settings that are no numbers of their kind.

    >>> import moetrace as mt
    >>> mt.StepTime(ridge=200).cost(np.array([0, 1, 100, 400])).tolist()
    [0.0, 200.0, 200.0, 400.0]
    """

    ridge: float | None = None
    curve: tuple[tuple[float, float], ...] | None = None
    hardware: str = ""
    passes: int = 1
    token_time: float | None = None

    def __post_init__(self) -> None:
        if self.ridge is not None and not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise SettingError(f"the ridge is a number of tokens, 0 or more, not {self.ridge}")
        if self.passes < 1:
            raise SettingError(f"a step holds one pass or more, not {self.passes}")

    @classmethod
    def of(
        cls, hardware: str = "", ridge: float | None = None, passes: int = 1, expert_bytes: float | None = None
    ) -> StepTime:
        """Of a GPU in `GPUS`, or of a *ridge*; in microseconds where an expert has so many *expert_bytes*."""
        if hardware and ridge is not None:
            raise SettingError("give either the hardware or its ridge")
        if not hardware:
            return cls(ridge, passes=passes)
        name = hardware.lower().replace("-", "").replace("_", "")
        if name not in GPUS:
            raise SettingError(f"unknown hardware {hardware!r} (choose {', '.join(GPUS)}, or give --ridge)")
        gpu = GPUS[name]
        reading = None if expert_bytes is None else expert_bytes / (gpu.terabytes * 1e6)  # microseconds
        return cls(gpu.ridge, None, name, passes, None if reading is None else reading / gpu.ridge)

    @property
    def known(self) -> bool:
        """Whether anything was said about the hardware."""
        return self.ridge is not None or self.curve is not None

    @property
    def linear(self) -> bool:
        """Whether time is in proportion to tokens."""
        return not self.ridge and self.curve is None

    @property
    def bound(self) -> float:
        """Tokens per pass below which an expert is memory-bound: the ridge, or where a curve's two asymptotes meet."""
        if self.curve is None:
            return self.ridge or 0.0
        (_, floor), (tokens, last) = self.curve[0], self.curve[-1]
        return tokens * floor / last

    def cost(self, tokens: NDArray[Any]) -> Shares:
        """The time of an expert, or of one replica, with so many *tokens* of a step, same shape; 0 for none.

        Less than one token in a pass is a part of the passes in which there is one. In tokens that take as long where
        an expert is compute-bound; in microseconds for a curve.
        """
        each: Shares = np.asarray(tokens, np.float64)
        if self.linear:
            return each
        if self.passes > 1:
            each = each / self.passes
        if self.curve is None:
            cost = np.maximum(each, max(1.0, self.ridge or 0.0))
        else:
            at, time = np.array(self.curve).T
            cost = np.interp(each, at, time) * np.maximum(each / at[-1], 1.0)
        cost *= np.minimum(each, 1.0)
        return cost * self.passes if self.passes > 1 else cost

    def microseconds(self, cost: float) -> float | None:
        """A *cost* in microseconds, None where that is not known."""
        if self.curve is not None:
            return cost
        return None if self.token_time is None else cost * self.token_time


BY_TOKENS = StepTime()


def read_curve(path: Path, passes: int = 1) -> StepTime:
    """The measured curve in a CSV with the columns `CURVE_COLUMNS`, as `placement.measure` writes it.

    Raises `TraceError` with the first bad row: tokens have to rise, and times must not be negative.

    >>> import moetrace as mt
    >>> from pathlib import Path
    >>> written = Path("curve.csv").write_text("tokens,microseconds\\n1,10\\n200,10\\n400,20\\n")
    >>> float(mt.read_curve(Path("curve.csv")).cost(300))
    15.0
    """
    import pandas as pd

    way_out = f"give a CSV with the columns {','.join(CURVE_COLUMNS)}: python -m moetrace.placement.measure writes one"
    try:
        frame = pd.read_csv(path)
    except OSError as error:
        raise TraceError(str(path), error.strerror or "cannot be read", way_out) from None
    except ValueError:
        raise TraceError(str(path), "is not a CSV file", way_out) from None
    missing = [name for name in CURVE_COLUMNS if name not in frame]
    if missing:
        raise TraceError(str(path), f"has no column {missing[0]}", way_out)
    values = frame[list(CURVE_COLUMNS)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    wrong = ~(np.isfinite(values).all(axis=1) & (values > 0).all(axis=1))
    wrong[1:] |= ~(np.diff(values[:, 0]) > 0)
    if wrong.any() or not len(values):
        row = f"row {int(np.flatnonzero(wrong)[0]) + 2}" if len(values) else "the file"
        raise TraceError(str(path), f"{row} is no point of a curve: tokens rise, both are above 0", way_out)
    return StepTime(None, tuple((float(tokens), float(time)) for tokens, time in values), passes=passes)
