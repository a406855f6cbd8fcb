"""Is it worth it? One policy, chosen on the first part of a trace, and what it saves on the rest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.placement.moves import lowest_bound
from moetrace.placement.plan import least_redundant
from moetrace.placement.planning import Planning
from moetrace.placement.policies import POLICIES, SETTINGS, launch
from moetrace.placement.policies import policies as known_policies
from moetrace.placement.replay import BLOCK
from moetrace.trace import LoadTrace

if TYPE_CHECKING:
    import pandas as pd

POLICY = ["trace", *SETTINGS, "redundant", "dispatch"]
POLICY_COLUMNS = (
    *POLICY,
    "balance",
    "peak_over_mean",
    "moved_per_1000",
    "moved_bytes",
    "chosen_by",
    "recommended",
    "stock",
)
# Policies whose balance is so near to the best are as good: the one with fewest replicas is taken, which cost memory,
# and of those the one that moves least.
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
    was not chosen on, if time follows the busiest GPU, beside experts in order with *plain_redundant* replicas, as
    few as fill the GPUs, with a 95 % interval from a paired bootstrap over blocks of steps. *enough_redundant*
    is the number of replicas above which balance gains less than 0.01, *floor* the peak that the hottest expert alone
    leaves, in mean loads, *holds* for how many steps the balance of a plan made once is within 0.01 of the recommended
    policy, None to the end. *launch* starts the system so that it does this. *stock* has the same of the best policy
    that needs no change to any system, None where that is the recommended one.
    """

    trace: str
    verdict: str
    system: str | None = None
    window: int | None = None
    interval: int | None = None
    threshold: float | None = None
    redundant: int | None = None
    plain_redundant: int | None = None
    saved: float = float("nan")
    saved_low: float = float("nan")
    saved_high: float = float("nan")
    moved_per_1000: float = float("nan")
    moved_bytes: float = float("nan")
    enough_redundant: int | None = None
    floor: float = float("nan")
    holds: int | None = None
    launch: str = ""
    stock: dict[str, Any] | None = None

    def launched(self, flags: str) -> Verdict:
        """With the *flags* that a file needs, where what is recommended is a plan that the system reads from one."""
        own = {"launch": flags} if self.system and POLICIES[self.system].launch is None else {}
        if self.stock and POLICIES[self.stock["system"]].launch is None:
            own["stock"] = self.stock | {"launch": flags}  # type: ignore[assignment]
        return replace(self, **own)  # type: ignore[arg-type]

    def as_row(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def policies_frame(replay: pd.DataFrame, trace: LoadTrace, expert_bytes: float | None = None) -> pd.DataFrame:
    """One row for each policy: *balance*, *peak_over_mean* and moves on the second half of the blocks.

    *chosen_by* is the balance on the first half, by which one is *recommended*: of those that move no more than
    `MOST_MOVED` and are within `ENOUGH` of the best, that with fewest replicas, and then fewest moves. *stock* is the
    one of those that need no change to any system.
    Moves are those of 1,000 steps, in parts of the slots of all layers of *trace*, and in bytes where an expert has so
    many *expert_bytes*.
    """
    if replay["step"].nunique() < 2:  # nothing to choose on
        return replay.iloc[:0].reindex(columns=list(POLICY_COLUMNS))
    steps = np.sort(replay["step"].unique())
    first = replay["step"] < steps[len(steps) // 2]
    half, found = (_measured(replay[part], trace, expert_bytes) for part in (first, ~first))  # in the same order
    stock = ~half["system"].map(lambda name: name in POLICIES and POLICIES[name].planned)
    picked = {"recommended": found.index == _best(half), "stock": found.index == _best(half[stock])}
    found = found.assign(chosen_by=half["balance"], **picked)
    return found[list(POLICY_COLUMNS)]


def _best(half: pd.DataFrame) -> Any:
    """The index of the best policy."""
    able = half[half["moved_per_1000"] <= MOST_MOVED]
    near = able[able["balance"] >= able["balance"].max() - ENOUGH]
    return near.sort_values(["redundant", "moved_per_1000"], kind="stable").index[0]


def _measured(replay: pd.DataFrame, trace: LoadTrace, expert_bytes: float | None) -> pd.DataFrame:
    """Balance, peak and moves of each policy."""
    blocks = replay["step"].nunique()
    mean, peak, block_peak, moved = (
        replay.groupby(POLICY, sort=False, dropna=False)[name].sum()
        for name in ("mean_load", "peak_load", "block_peak", "moved")
    )
    own = {"balance": mean / peak, "peak_over_mean": block_peak / mean}
    slots = (trace.experts + moved.index.get_level_values("redundant").to_numpy()) * len(trace.layers)
    own["moved_per_1000"] = moved / slots / blocks * 1000 / BLOCK
    own["moved_bytes"] = own["moved_per_1000"] * slots * (float("nan") if expert_bytes is None else expert_bytes)
    return mean.to_frame().assign(**own).reset_index()


def verdict(
    trace: LoadTrace,
    replay: pd.DataFrame,
    policies: pd.DataFrame,
    gpus: int,
    seed: int = 0,
    **settings: Any,
) -> Verdict:
    """What the *policies* and their *replay* say of balancing *trace* on *gpus*; *settings* are those of the replay."""
    steps = np.sort(replay["step"].unique()) if len(replay) else np.array([])
    if len(steps) < 2 * FEWEST_BLOCKS:
        return Verdict(trace.name, "not enough evidence")
    rest = replay[replay["step"] >= steps[len(steps) // 2]]
    planning = Planning(gpus, int(rest["redundant"].min()), **settings)
    best, stock = (policies[policies[name]].iloc[0] for name in ("recommended", "stock"))
    told = _told(trace, rest, best, planning, seed)
    low, high = told["saved_low"], told["saved_high"]
    said = "worth it" if low > WORTH else "not worth it" if high < WORTH else "not enough evidence"
    knee, floor = _replicas(trace, replace(planning, redundant=told["redundant"]))
    return Verdict(
        trace.name, said, **told, plain_redundant=planning.redundant, enough_redundant=knee, floor=floor,
        holds=_holds(replay, best), stock=None if stock["recommended"] else _told(trace, rest, stock, planning, seed),
    )  # fmt: skip


def _told(trace: LoadTrace, rest: pd.DataFrame, row: pd.Series[Any], plain: Planning, seed: int) -> dict[str, Any]:
    """What is told of the policy in a *row* of the policies, beside experts in order as *plain* has them."""
    import pandas as pd

    settings = tuple(None if pd.isna(value) else value for value in row[list(SETTINGS)])
    policy = next(own for own in known_policies(len(trace.layers)) if own.settings == settings)
    planning = replace(plain, redundant=int(row["redundant"]))
    in_order = rest[(rest["system"] == "none") & (rest["redundant"] == plain.redundant)]
    saved = saved_beside(in_order, rest[_is(rest, row)], seed)
    return {
        **dict(zip(SETTINGS, policy.settings)),
        "redundant": planning.redundant,
        **dict(zip(("saved", "saved_low", "saved_high"), saved)),
        "moved_per_1000": float(row["moved_per_1000"]),
        "moved_bytes": float(row["moved_bytes"]),
        "launch": launch(policy, planning, trace.experts),
    }


def saved_beside(plain: pd.DataFrame, mine: pd.DataFrame, seed: int = 0) -> tuple[float, float, float]:
    """The part of the expert time of *plain* that *mine* saves, both rows of a replay of the same steps.

    With a 95 % interval from a paired bootstrap over blocks of steps.
    """
    sums = np.array([part.groupby("step")["peak_load"].sum() for part in (mine, plain)])  # (2, blocks)
    draws = np.random.default_rng(seed).integers(sums.shape[1], size=(DRAWS, sums.shape[1]))
    drawn = sums[:, draws].sum(axis=2)
    low, high = np.quantile(1 - drawn[0] / drawn[1], [0.025, 0.975])
    return float(1 - sums[0].sum() / sums[1].sum()), float(low), float(high)


def _replicas(trace: LoadTrace, planning: Planning) -> tuple[int, float]:
    """Above how many replicas balance gains less than `ENOUGH`, and the peak that the hottest expert leaves.

    Balance is that of the last 1,000 steps with a plan by the 1,000 before them.
    """
    cutoff, gpus = int(trace.steps[-1]) - 1000, planning.gpus
    base = least_redundant(trace.experts, gpus)
    tried = [base + n * gpus for n in (0, 1, 2, 4) if base + n * gpus <= trace.experts * (gpus - 1)]
    balances, lowest = [], []
    for load in trace.by_layer():
        seen, after = load.until(cutoff).last(1000), load.after(cutoff, 1000).counts
        plans = [replace(planning, redundant=n) for n in tried]
        balances.append(
            [own.evenness(own.place(own.load(seen.counts, seen.mean_shares)), after).balance for own in plans]
        )
        lowest.append(lowest_bound(seen.mean_shares, gpus, planning.redundant) * gpus)
    mean = np.mean(balances, axis=0)
    return next(n for n, balance in zip(tried, mean) if balance >= mean.max() - ENOUGH), float(np.mean(lowest))


def _is(replay: pd.DataFrame, policy: pd.Series[Any]) -> pd.Series[bool]:
    """Which rows are those of *policy*."""
    own = replay[POLICY[1:]].astype(object)
    same: pd.Series[bool] = (own.fillna(-1) == policy[POLICY[1:]].astype(object).fillna(-1)).all(axis=1)
    return same


def _holds(replay: pd.DataFrame, best: pd.Series[Any]) -> int | None:
    """For how many steps a plan made once stays within `ENOUGH` of the balance of the *best* policy, or the next best.

    Over 1,000 steps, so that one block does not decide.
    """
    same = replay[replay["redundant"] == best["redundant"]]
    static = same[same["system"] == "static"]
    found = replay[_is(replay, best)]
    often: Any = found if best["system"] != "static" else _most_even(same)
    if often is None:
        return None
    ways = [part.groupby("step")[["peak_load", "mean_load"]].sum().rolling(4, 1).sum() for part in (static, often)]
    once, often = (way["mean_load"] / way["peak_load"] for way in ways)
    worse = once.index[once < often - ENOUGH]
    return int(worse[0] - replay["step"].min()) if len(worse) else None


def _most_even(replay: pd.DataFrame) -> pd.DataFrame | None:
    """The rows of the policy that plans anew and has the best balance; None where none does."""
    again = replay[~replay["system"].isin(["static", "none"])]
    policies = [part for _, part in again.groupby(list(POLICY[1:]), dropna=False)]
    return min(policies, key=lambda part: part["peak_load"].sum() / part["mean_load"].sum(), default=None)
