"""The cutoffs of a backtest of a trace, and the horizons that were recorded after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moetrace.errors import SettingError, check_several, shown
from moetrace.trace import LoadTrace

Windows = Mapping[int, Sequence[int]]
"""The horizons to score at each cutoff."""

# The first look is early, inside the transient state; then the paper's distance of 1,000 steps.
FIRST_CUTOFF = 500
CUTOFF_EVERY = 1000
# Cutoffs after the first one that are scored unless their distance is given: more say little more.
MOST_CUTOFFS = 50
# Of a sparse log: as many logged steps as the default distance has where every 40th is logged.
ROWS_APART = 25


def default_cutoffs(trace: LoadTrace, first: int = FIRST_CUTOFF, every: int | None = None) -> list[int]:
    """*first*, then every multiple of *every* (`cutoffs_apart` if None) after it, up to the end of the trace.

    Counted from the last multiple of *every*, or of `CUTOFF_EVERY`, at or before the first step, so that a trace that
    begins at step 100,000 is treated as one that begins at 0. Where steps were logged far apart, cutoffs are so
    far apart, and the first so late, that `ROWS_APART` logged steps lie between two.
    """
    start, end = int(trace.steps[0]), int(trace.steps[-1])
    every = every or cutoffs_apart(trace)
    if ROWS_APART * trace.stride > every:
        return [int(step) for step in trace.steps[ROWS_APART - 1 :: ROWS_APART]]
    origin = start - start % min(every, CUTOFF_EVERY)
    later = range(origin + every * (first // every + 1), end + 1, every)
    return [cutoff for cutoff in [origin + first, *later] if start <= cutoff <= end]


def cutoffs_apart(trace: LoadTrace) -> int:
    """Steps between two default cutoffs: `CUTOFF_EVERY`, or as many times that as leave `MOST_CUTOFFS` of them."""
    length = int(trace.steps[-1] - trace.steps[0]) + 1
    return CUTOFF_EVERY * -(-length // (CUTOFF_EVERY * MOST_CUTOFFS))


def fitted(trace: LoadTrace, horizons: Sequence[int], first: int | None = None) -> tuple[list[int], int, list[int]]:
    """The *horizons*, the *first* cutoff and all cutoffs; where *trace* is too short for them a quarter of it for each.

    A default dump of SGLang has 1,000 passes: it is scored over 250 at 250, 500 and 750. No cutoffs where no quarter
    holds a logged step.

    >>> import moetrace as mt
    >>> fitted(mt.synthetic_trace([mt.settling(100, steps=400)]), [1000, 2000])
    ([100], 100, [100, 200, 300])
    """
    start, early = int(trace.steps[0]), FIRST_CUTOFF if first is None else first
    if longest_scorable(trace, early) >= min(horizons):
        return list(horizons), early, default_cutoffs(trace, early)
    quarter = (int(trace.steps[-1]) - start + 1) // 4
    cutoffs = [start - 1 + quarter * part for part in (1, 2, 3)] if first is None else [start - 1 + first]
    return [max(quarter, 1)], quarter, scorable(trace, cutoffs, quarter) if quarter else []


def thinned(trace: LoadTrace) -> bool:
    """Whether default cutoffs are further apart than `CUTOFF_EVERY` for the length of *trace*, not for its gaps."""
    return cutoffs_apart(trace) > max(CUTOFF_EVERY, ROWS_APART * trace.stride)


def scorable(trace: LoadTrace, cutoffs: Sequence[int], horizon: int) -> list[int]:
    """The *cutoffs* inside the trace after which *horizon* steps were recorded."""
    first, last = int(trace.steps[0]), _last_scorable(trace, horizon)
    inside = [cutoff for cutoff in cutoffs if first <= cutoff <= last]
    # Some step of the horizon has to be logged: a gap may be longer.
    before, after = (np.searchsorted(trace.steps, np.array(inside) + ahead, "right") for ahead in (0, horizon))
    return [cutoff for cutoff, a, b in zip(inside, before, after) if a < b]


def _last_scorable(trace: LoadTrace, horizon: int) -> int:
    """The last step after which *horizon* steps were recorded; the last logged one stands for its whole stride."""
    return int(trace.steps[-1]) + trace.stride - 1 - horizon


def longest_scorable(trace: LoadTrace, first: int = FIRST_CUTOFF) -> int:
    """The longest horizon for which there is a cutoff with *first* steps of history before it."""
    return max(0, int(trace.steps[-1] - trace.steps[0]) + 1 - first)


def checked_cutoffs(
    trace: LoadTrace, horizons: Sequence[int], cutoffs: Sequence[int], *, explicit: bool = False
) -> list[int]:
    """*cutoffs*, each of which some of *horizons* can be scored at, if they were asked for explicitly.

    Raises `SettingError`, with what would work, if one of them cannot be scored, or no horizon at any.
    """
    first, shortest = int(trace.steps[0]), min(horizons)
    last = _last_scorable(trace, shortest)
    scored = {cutoff for horizon in horizons for cutoff in scorable(trace, cutoffs, horizon)}
    unscorable = [f"{cutoff:,}" for cutoff in cutoffs if cutoff not in scored]
    if explicit and unscorable and first <= last:
        raise SettingError(
            f"{trace.name}: cutoff {shown(unscorable)} cannot be scored: a horizon of {shortest:,} steps needs cutoffs "
            f"from {first:,} to {last:,}"
        )
    if scored:
        return list(cutoffs)
    start = min((cutoff for cutoff in cutoffs if cutoff >= first), default=first)
    longest = longest_scorable(trace, start - first + 1)
    advice = f"steps were logged {trace.stride:,} apart, which is the shortest horizon"
    if longest < shortest:
        advice = f"the longest horizon is {longest:,}" if longest else "record more steps, or choose an earlier cutoff"
    elif fitting := scorable(trace, trace.steps.tolist(), shortest):
        advice = f"few steps were logged; cutoffs from {fitting[0]:,} to {fitting[-1]:,} can be given"
    raise SettingError(
        f"{trace.name}: a horizon of {shortest:,} steps cannot be scored at cutoffs from {start:,} on: {advice}"
    )


def evaluation_windows(trace: LoadTrace, horizons: Sequence[int], cutoffs: Sequence[int] | None = None) -> Windows:
    """For each of *cutoffs* (the default ones if None) the *horizons* recorded after it; those with none are left out.

    Raises `SettingError` for a horizon that is not positive.
    """
    check_several(horizons, "horizons", "[1000]")
    check_several([] if cutoffs is None else cutoffs, "cutoffs", "[3000]")
    if not horizons or min(horizons) < 1:
        raise SettingError("a horizon is a whole number of steps above 0")
    windows: dict[int, list[int]] = {
        cutoff: [] for cutoff in sorted(default_cutoffs(trace) if cutoffs is None else cutoffs)
    }
    for horizon in sorted(set(horizons)):
        for cutoff in scorable(trace, list(windows), horizon):
            windows[cutoff].append(horizon)
    return {cutoff: there for cutoff, there in windows.items() if there}
