"""Is it worth it? One policy, chosen on the first part of a trace, and what it saves on the rest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.placement.moves import lowest_bound
from moetrace.placement.planner import planned
from moetrace.placement.policies import BLOCK, launch
from moetrace.trace import LoadTrace

if TYPE_CHECKING:
    import pandas as pd

POLICY = ["trace", "system", "window", "interval", "redundant"]
POLICY_COLUMNS = (*POLICY, "dispatch", "balance", "peak_over_mean", "moved_per_1000", "chosen_by", "recommended")
# Policies whose balance is so near to the best are as good: the one that moves least is taken.
ENOUGH = 0.01
# Who moves more than every slot once in 1,000 steps is not recommended: no system that plans from nothing does so by
# default (SGLang every 1,000 iterations, vLLM every 3,000).
MOST_MOVED = 1.0
# Expert time that balancing has to save at least: below that, nobody would run one more moving part.
WORTH = 0.02
# Blocks of the rest below which a bootstrap tells nothing.
FEWEST_BLOCKS = 4
DRAWS = 1000


@dataclass(frozen=True)
class Verdict:
    """Whether balancing pays on a trace: *verdict* is ``worth it``, ``not worth it`` or ``not enough evidence``.

    *saved* is the part of the expert time of a step that the recommended policy saves on the part of the trace that it
    was not chosen on, if time follows the busiest GPU, with a 95 % interval from a paired bootstrap over blocks of
    steps. *enough_redundant* is the number of replicas above which the peak falls by less than 1 %, *floor* the peak
    that the hottest expert alone leaves, in mean loads, *holds* for how many steps a plan made once is within 1 % of
    the recommended policy, None to the end.
    """

    trace: str
    verdict: str
    system: str | None = None
    window: int | None = None
    interval: int | None = None
    redundant: int | None = None
    saved: float = float("nan")
    saved_low: float = float("nan")
    saved_high: float = float("nan")
    moved_per_1000: float = float("nan")
    moved_bytes: float = float("nan")
    enough_redundant: int | None = None
    floor: float = float("nan")
    holds: int | None = None
    launch: str = ""

    def as_row(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def policies_frame(replay: pd.DataFrame, trace: LoadTrace) -> pd.DataFrame:
    """One row for each policy: *balance*, *peak_over_mean* and moves on the second half of the blocks.

    *chosen_by* is the balance on the first half, by which the one is *recommended* that moves least among the best
    of those that move no more than `MOST_MOVED`.
    Moves are in parts of the slots of all layers of *trace*.
    """
    if replay["step"].nunique() < 2:  # nothing to choose on
        return replay.iloc[:0].reindex(columns=list(POLICY_COLUMNS))
    steps = np.sort(replay["step"].unique())
    first = replay["step"] < steps[len(steps) // 2]
    half, found = (_measured(replay[part], trace) for part in (first, ~first))  # in the same order
    able = half[half["moved_per_1000"] <= MOST_MOVED]
    near = able[able["balance"] >= able["balance"].max() - ENOUGH]
    recommended = found.index == near["moved_per_1000"].idxmin()
    found = found.assign(chosen_by=half["balance"], dispatch="even", recommended=recommended)
    return found[list(POLICY_COLUMNS)]


def _measured(replay: pd.DataFrame, trace: LoadTrace) -> pd.DataFrame:
    """Balance, peak and moves of each policy."""
    blocks = replay["step"].nunique()
    mean, peak, block_peak, moved = (
        replay.groupby(POLICY, sort=False, dropna=False)[name].sum()
        for name in ("mean_load", "peak_load", "block_peak", "moved")
    )
    own = {"balance": mean / peak, "peak_over_mean": block_peak / mean}
    slots = (trace.experts + moved.index.get_level_values("redundant").to_numpy()) * len(trace.layers)
    own["moved_per_1000"] = moved / slots / blocks * 1000 / BLOCK
    return mean.to_frame().assign(**own).reset_index()


def verdict(
    trace: LoadTrace, replay: pd.DataFrame, policies: pd.DataFrame, gpus: int, expert_bytes: float | None, seed: int = 0
) -> Verdict:
    """What the *policies* and their *replay* say of balancing *trace* on *gpus*."""
    import pandas as pd

    steps = np.sort(replay["step"].unique()) if len(replay) else np.array([])
    if len(steps) < 2 * FEWEST_BLOCKS:
        return Verdict(trace.name, "not enough evidence")
    best = policies[policies["recommended"]].iloc[0]
    rest = replay[replay["step"] >= steps[len(steps) // 2]]
    mine = _is(rest, best)
    plain = rest[(rest["system"] == "none") & (rest["redundant"] == best["redundant"])]
    sums = np.array([part.groupby("step")["peak_load"].sum() for part in (rest[mine], plain)])  # (2, blocks)
    draws = np.random.default_rng(seed).integers(sums.shape[1], size=(DRAWS, sums.shape[1]))
    drawn = sums[:, draws].sum(axis=2)
    low, high = np.quantile(1 - drawn[0] / drawn[1], [0.025, 0.975])
    said = "worth it" if low > WORTH else "not worth it" if high < WORTH else "not enough evidence"
    interval = None if pd.isna(best["interval"]) else int(best["interval"])
    system, window, redundant = str(best["system"]), int(best["window"]), int(best["redundant"])
    slots = (trace.experts + redundant) * len(trace.layers)
    knee, floor = _replicas(trace, gpus, redundant)
    return Verdict(
        trace.name, said, system, window, interval, redundant,
        float(1 - sums[0].sum() / sums[1].sum()), float(low), float(high), float(best["moved_per_1000"]),
        float(best["moved_per_1000"]) * slots * (float("nan") if expert_bytes is None else expert_bytes),
        knee, floor, _holds(replay, best), launch(system, window, interval, gpus, redundant),
    )  # fmt: skip


def _replicas(trace: LoadTrace, gpus: int, redundant: int) -> tuple[int, float]:
    """Above how many replicas the peak falls by less than `ENOUGH`, and the peak that the hottest expert leaves."""
    shares = np.array([load.last(1000).mean_shares for load in trace.by_layer()])
    most = trace.experts * (gpus - 1)
    base = -trace.experts % gpus
    tried = [base + n * gpus for n in (0, 1, 2, 4) if base + n * gpus <= most]
    peaks = [float(planned(shares, gpus, n).peaks.mean() * gpus) for n in tried]
    knee = next(n for n, peak in zip(tried, peaks) if peak <= min(peaks) + ENOUGH)
    return knee, float(np.mean([lowest_bound(share, gpus, redundant) * gpus for share in shares]))


def _is(replay: pd.DataFrame, policy: pd.Series[Any]) -> pd.Series[bool]:
    """Which rows are those of *policy*."""
    own = replay[POLICY[1:]].astype(object)
    same: pd.Series[bool] = (own.fillna(-1) == policy[POLICY[1:]].astype(object).fillna(-1)).all(axis=1)
    return same


def _holds(replay: pd.DataFrame, best: pd.Series[Any]) -> int | None:
    """For how many steps the plan made once stays within `ENOUGH` of the *best* policy, or of the next best."""
    same = replay[replay["redundant"] == best["redundant"]]
    static = same[same["system"] == "static"]
    found = replay[_is(replay, best)]
    often: Any = found if best["system"] != "static" else _most_even(same)
    if often is None:
        return None
    ways = [part.groupby("step")[["block_peak", "mean_load"]].sum() for part in (static, often)]
    once, often = (way["block_peak"] / way["mean_load"] for way in ways)
    worse = once.index[once > often + ENOUGH]
    return int(worse[0] - replay["step"].min()) if len(worse) else None


def _most_even(replay: pd.DataFrame) -> pd.DataFrame | None:
    """The rows of the policy that plans anew and leaves the lowest peak; None where none does."""
    again = replay[~replay["system"].isin(["static", "none"])]
    policies = [part for _, part in again.groupby(list(POLICY[1:]), dropna=False)]
    return min(policies, key=lambda part: part["block_peak"].sum() / part["mean_load"].sum(), default=None)
