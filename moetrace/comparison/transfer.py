"""What a plan and a resident set made on one trace cost on another, compared with its own and with none.

All are scored on the same steps: the second half of the other trace. Its own plan and set are made from the last
steps of its first half, so that none of them has seen what it is scored on; those of the first trace are made from its
last steps. So they differ in nothing but the trace that they come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from moetrace.errors import SettingError
from moetrace.forecasting.backtest import Progress
from moetrace.placement.planning import Planning, spread
from moetrace.placement.replay import BLOCK, BLOCKS
from moetrace.placement.step_time import HIGHEST_RIDGE
from moetrace.placement.verdict import saved_compared
from moetrace.residency.sets import Budget, ranked
from moetrace.trace import LayerLoad, LoadTrace
from moetrace.words import DEFAULT

# Steps that a plan or a set is made from, as serving systems do.
WINDOW = 1000
OWN, OTHER = "own", "other"


def transfer_of(
    a: LoadTrace, b: LoadTrace, planning: Planning | None, slots: int | None, progress: Progress | None = None
) -> dict[str, Any]:
    """What plans as of *planning*, and sets of *slots* experts, from *a* do on *b*: ``transfer`` of ``compare --json``.

    Either may be None: not asked. Plans are of `spread` layers; *progress* counts layers.
    Raises `SettingError` if *b* is too short, slots do not fill the GPUs evenly, or a layer has fewer experts.
    """
    if len(b.steps) < 2:
        raise SettingError(
            f"{b.name} has one step; its own plan is made from some steps and scored on others: record more"
        )
    if planning is not None:
        planning.check(b.experts)
    Budget(slots).check(len(b.layers), b.experts)
    cutoff, end = int(b.steps[(len(b.steps) - 1) // 2]), int(b.steps[-1])
    planned = [] if planning is None else spread(b.layers)
    rows, covered = [], []
    for done, (one, other) in enumerate(zip(a.by_layer(), b.by_layer()), 1):
        seen, after = {OTHER: one.last(WINDOW), OWN: other.until(cutoff).last(WINDOW)}, other.between(cutoff + 1, end)
        if planning is not None and other.layer in planned:
            rows += list(_replayed(planning, seen, after))
        sets = [ranked(own.mean_shares)[:slots] for own in (*seen.values(), after)]
        covered.append([float(after.mean_shares[own].sum()) for own in sets])
        if progress:
            progress(done, len(b.layers))
    scored = {"from_step": int(b.steps[b.steps > cutoff][0]), "to_step": end}
    if slots is not None:
        rates = dict(zip(("hit_rate", "own_hit_rate", "best_hit_rate"), np.mean(covered, axis=0).tolist()))
        scored |= {"slots": slots} | rates | {"random_hit_rate": slots / b.experts}
    if planning is not None:
        scored |= {"gpus": planning.gpus, "redundant": planning.redundant} | _slower(rows)
    return scored


def _replayed(planning: Planning, seen: Mapping[str, LayerLoad], after: LayerLoad) -> Iterator[tuple[Any, ...]]:
    """Plan, block of steps, and the time of the busiest GPU in it: as planned, and where experts are memory-bound."""
    plans = {name: planning.place(planning.load(own.counts, own.mean_shares)) for name, own in seen.items()}
    bound = [] if planning.time.known else [replace(planning.time, ridge=HIGHEST_RIDGE)]
    splits = [replace(planning.split, time=time) for time in (planning.time, *bound)]
    edges = np.arange(0, len(after.steps), min(after.rows(BLOCK), max(1, len(after.steps) // BLOCKS)))
    for name, plan in (plans | {DEFAULT: planning.default(after.experts)}).items():
        peaks = [np.add.reduceat(split.peaks(plan.held, after.counts), edges) for split in splits]
        yield from ((name, *own) for own in zip(range(len(edges)), *peaks))


def _slower(rows: list[tuple[Any, ...]]) -> dict[str, Any]:
    """How much slower the plan of the other trace is, with 95% intervals over blocks of steps, from *rows*."""
    import pandas as pd

    names = ["plan", "step", "peak_load", "peak_memory_bound"]
    plans = dict(list(pd.DataFrame(rows, columns=names[: len(rows[0])]).groupby("plan")))
    found: dict[str, Any] = {}
    for name, than in (("slower_than_own", plans[OWN]), ("slower_than_default", plans[DEFAULT])):
        middle, low, high = saved_compared(than, plans[OTHER])
        found |= {name: -middle, f"{name}_low": -high, f"{name}_high": -low, f"{name}_memory_bound": None}
        if names[-1] in than:
            found[f"{name}_memory_bound"] = -saved_compared(than, plans[OTHER], load=names[-1])[0]
    return found
