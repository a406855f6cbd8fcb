"""From how many tokens per expert balancing is worth it: the saving of one plan at several ridges of the hardware."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moetrace.placement.plan import least_redundant
from moetrace.placement.planning import Planning, spread
from moetrace.placement.step_time import BY_TOKENS, StepTime
from moetrace.trace import LoadTrace

if TYPE_CHECKING:
    import pandas as pd

# Tokens of an expert and pass over the ridge: memory-bound on the left, compute-bound on the right.
RATIOS = (0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# Steps of a half from which the saving is computed.
STEPS = 200


def knee_frame(trace: LoadTrace, planning: Planning) -> pd.DataFrame:
    """One row for each of `RATIOS`: *tokens_over_ridge*, and what one plan *saved* of the expert time of a step.

    A plan by tokens from the last 1,000 steps of the first half of *trace*, on `STEPS` steps of the second half, in
    layers that are `spread`, compared with the default placement, both with as few redundant experts as fill the GPUs.
    Where the plan takes longer on the steps it was made from, the default placement stays. Empty for a trace of fewer
    than 4 logged steps.
    """
    import pandas as pd

    few = planning.with_redundant(least_redundant(trace.experts, planning.gpus))
    tokens, default = replace(few, time=BY_TOKENS), few.default(trace.experts)
    spent = np.zeros((len(RATIOS), 2))  # by the plan, and by the default placement
    for number in spread(trace.layers) if len(trace.steps) >= 4 else ():
        load = trace.layer(number)
        middle = len(load.steps) // 2
        seen = load.until(int(load.steps[middle - 1])).last(1000)
        plan = tokens.place(tokens.load(seen.counts, seen.mean_shares))
        before, after = (part[:: -(-len(part) // STEPS)] for part in (seen.counts, load.counts[middle:]))
        for row, ratio in enumerate(RATIOS):
            own = replace(few, time=StepTime(load.counts.mean() / planning.time.passes / ratio, passes=few.time.passes))
            known, then = (
                [own.split.peaks(each.held, part).sum() for each in (plan, default)] for part in (before, after)
            )
            spent[row] += np.array([then[int(known[1] < known[0])], then[1]]) / own.time.cost(after).sum()
    saved = 1 - spent[:, 0] / spent[:, 1] if spent.any() else np.array([])
    return pd.DataFrame({"trace": trace.name, "tokens_over_ridge": RATIOS[: len(saved)], "saved": saved})


def worth_from(knee: pd.DataFrame, saved: float) -> float | None:
    """The least tokens over the ridge from which on a plan saves at least *saved*; None where it never does.

    Between two rows of the *knee* the saving is linear in the logarithm; 0 where it is as much at the first row.

    >>> import pandas as pd
    >>> round(worth_from(pd.DataFrame({"tokens_over_ridge": [0.25, 1.0], "saved": [0.0, 0.04]}), 0.02), 3)
    0.5
    """
    ratios, values = knee["tokens_over_ridge"].to_numpy(), knee["saved"].to_numpy()
    below = np.flatnonzero(values < saved)
    if not len(below):
        return 0.0
    last = int(below[-1])
    if last + 1 == len(values):
        return None
    part = (saved - values[last]) / (values[last + 1] - values[last])
    return float(np.exp(np.log(ratios[last]) + part * np.log(ratios[last + 1] / ratios[last])))
