"""What the values of a dump are, counts, shares or utilisation, and how they become counts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.collector import HALVES, Collector
from moetrace.errors import TraceError
from moetrace.trace import Counts, whole_counts

COUNT_NAMES = (
    "tokens", "count", "counts", "load", "ntokens", "numtokens", "tokencount", "tokensperexpert", "expertcount",
    "expertcounts", "expertload", "expertdistribution",
)  # fmt: skip
SHARE_NAMES = ("share", "shares", "proportion", "fraction", "prob", "frequency")
# The count of an expert over the mean count of its layer.
UTILISATION_NAMES = ("utilisation", "utilization", "expertutilization", "expertutilisation")
PHYSICAL_NAMES = ("physicalcount", "globalphysicalcount", "physicalload")
VALUE_NAMES = (*COUNT_NAMES, *SHARE_NAMES, *UTILISATION_NAMES, *PHYSICAL_NAMES)
# How far a share times the tokens of a step may be from a whole count: the rounding error of a
# float32 share at 500,000 tokens is 0.03.
WHOLE_TOLERANCE = 0.05


def simple_name(name: str) -> str:
    """A column's name in lower case, without punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


@dataclass(frozen=True)
class Values:
    """How the values of a dump become counts; *collector* gets the findings about them.

    *tokens* is what a layer routes in a step, *experts* how many a layer has, where they are known.
    """

    collector: Collector
    tokens: int | None = None
    experts: int | None = None

    def counts(self, values: NDArray[Any], column: str, row: int, where: str, kind: str | None = None) -> Counts:
        """*values* as counts of the same shape; shares become counts where the tokens of a step are known.

        *row* is the number of the first of them, for the `TraceError` that names the first bad one, and *kind* says
        what they are where the name of their column does not.
        """
        simple, at = simple_name(kind or column), f"{where}, column {column}"
        if values.dtype.kind in "OUS":
            raise TraceError(at, "holds text, not numbers", "give counts of tokens, as docs/recipes.md shows")
        if values.dtype.kind == "V" and values.dtype.itemsize == 2:  # as NumPy has bfloat16
            values = (np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            self.collector.note_half(values, 2 ** HALVES["bfloat16"], "bfloat16", column, row)
        elif values.dtype == np.float16:
            self.collector.check_precision(values, column, row)
            values = values.astype(np.float32)
        if simple in PHYSICAL_NAMES:
            self.collector.note("physical", f"column {column}", "counts are of physical experts, replicas apart")
        if simple in UTILISATION_NAMES and (self.tokens is None or self.experts is None):
            problem = "holds utilisation, the load over the mean load of the layer, and no totals"
            raise TraceError(at, problem, "give them with --tokens-per-step N and --experts N, or log counts")
        if simple in SHARE_NAMES and self.tokens is None:
            raise TraceError(at, "holds shares, not counts", "give the tokens of a step with --tokens-per-step N")
        named = simple in (*SHARE_NAMES, *UTILISATION_NAMES)
        # Where the name does not say it, numbers up to 1 are shares of the tokens that were given.
        look_like_shares = values.dtype.kind == "f" and values.size and values.max() <= 1
        if self.tokens is None or not (named or look_like_shares):
            self.collector.check_precision(values, column, row)
            return whole_counts(values, where, column, row)
        tokens_per_unit = self.tokens / (self.experts or 1) if simple in UTILISATION_NAMES else self.tokens
        scaled = values.astype(np.float64) * tokens_per_unit
        near = np.rint(scaled)
        bad = np.argwhere(~(np.abs(scaled - near) <= WHOLE_TOLERANCE) | (near < 0))
        if bad.size:
            first = tuple(int(i) for i in bad[0])
            raise TraceError(
                f"{at}, row {row + first[0]}",
                f"a share of {values[first]} of {tokens_per_unit} tokens is not a whole count",
                "check --tokens-per-step: it is the tokens routed in one layer in one step (times top-k)",
            )
        return near.astype(np.int64)
