"""Is it worth it? One policy, chosen on the first half of a trace, and what it saves on the second."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moetrace.placement.plan import least_redundant, lowest_peak
from moetrace.placement.planning import Planning
from moetrace.placement.policies import DIGITS, SETTINGS
from moetrace.placement.replay import BLOCK
from moetrace.placement.systems import SYSTEMS, launch
from moetrace.placement.systems import policies as known_policies
from moetrace.trace import LoadTrace

if TYPE_CHECKING:
    import pandas as pd

WORTH_IT, NOT_WORTH_IT, NO_EVIDENCE = "worth it", "not worth it", "not enough evidence"
POLICY = ["trace", *SETTINGS, "redundant", "dispatch"]
POLICY_COLUMNS = (
    *POLICY, "balance", "peak_over_mean", "moved_per_1000", "moved_bytes", "chosen_by", "recommended", "stock",
)  # fmt: skip
# Policies whose balance is so near to the best are as good: the one with the fewest redundant experts is taken, which
# cost memory, and of those the one that moves least.
ENOUGH = 0.01
# A policy that moves more than every slot once in 1,000 steps is not recommended: no system that plans from scratch
# does so by default (SGLang every 1,000 iterations, vLLM every 3,000).
MOST_MOVED = 1.0
# Expert time that balancing has to save at least: below that, nobody would run one more moving part.
WORTH = 0.02
# Blocks of the second half below which a bootstrap shows nothing.
FEWEST_BLOCKS = 4
DRAWS = 1000


@dataclass(frozen=True)
class Verdict:
    """Whether balancing is worth it on a trace: *verdict* is `WORTH_IT`, `NOT_WORTH_IT` or `NO_EVIDENCE`.

    *policy* is the recommended policy as the subject of a sentence, *start* how it is run: ``nothing`` to do, a plan
    ``file``, the ``flags`` of a system that plans by itself, or ``replanning`` by `rebalance_experts` while a system
    runs. *saved* is the part of the expert time of a step that it saves on the half of the trace that it was not chosen
    on, if time follows the busiest GPU, compared with the default placement with *plain_redundant* redundant experts,
    as few as fill the GPUs, with a 95% interval from a paired bootstrap over blocks of steps. *enough_redundant* is the
    number of redundant experts above which balance gains less than 0.01, *floor* the peak load that the hottest expert
    alone causes, *holds* for how many steps the balance of a plan made once is within 0.01 of the recommended policy,
    None to the end. *launch* starts the system so that it does this. *stock* has the same of the best policy that needs
    no change to any system, None where that is the recommended one.
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
    policy: str = ""
    start: str = ""
    launch: str = ""
    stock: dict[str, Any] | None = None

    def launched(self, flags: str) -> Verdict:
        """With the *flags* that a file needs, where a system reads the recommended plan, or the first one, from it."""
        stock = self.stock | {"launch": flags} if self.stock and self.stock["start"] == "file" else self.stock
        return replace(self, launch=flags if self.start in ("file", "replanning") else self.launch, stock=stock)

    def as_row(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def policies_frame(replay: pd.DataFrame, trace: LoadTrace, expert_bytes: float | None = None) -> pd.DataFrame:
    """One row for each policy: *balance*, *peak_over_mean* and moves on the second half of the blocks.

    *chosen_by* is the balance on the first half, by which one is *recommended*: of those that move no more than
    `MOST_MOVED` and are within `ENOUGH` of the best, that with the fewest redundant experts, and then fewest moves.
    *stock* is the one of those that need no change to any system.
    Moves are those of 1,000 steps, in parts of the slots of all layers of *trace*, and in bytes where an expert has so
    many *expert_bytes*.
    """
    if replay["step"].nunique() < 2:  # nothing to choose on
        return replay.iloc[:0].reindex(columns=list(POLICY_COLUMNS))
    steps = np.sort(replay["step"].unique())
    first = replay["step"] < steps[len(steps) // 2]
    half, found = (_measured(replay[part], trace, expert_bytes) for part in (first, ~first))  # in the same order
    stock = ~half["system"].map(lambda name: SYSTEMS[name].planned)
    picked = {"recommended": found.index == _best(half), "stock": found.index == _best(half[stock])}
    found = found.assign(chosen_by=half["balance"], **picked)
    return found[list(POLICY_COLUMNS)]


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


def _best(half: pd.DataFrame) -> Any:
    """The index of the best policy; balances are compared to `DIGITS`, the first of equal policies is taken."""
    able = half[half["moved_per_1000"] <= MOST_MOVED]
    balance = able["balance"].round(DIGITS)
    near = able[balance >= round(balance.max() - ENOUGH, DIGITS)]
    return near.sort_values(["redundant", "moved_per_1000"], kind="stable").index[0]


def verdict(
    trace: LoadTrace, replay: pd.DataFrame, policies: pd.DataFrame, planning: Planning, seed: int = 0
) -> Verdict:
    """The verdict of the *policies* and their *replay* on balancing *trace* as *planning* does."""
    steps = np.sort(replay["step"].unique()) if len(replay) else np.array([])
    if len(steps) < 2 * FEWEST_BLOCKS:
        return Verdict(trace.name, NO_EVIDENCE)
    rest = replay[replay["step"] >= steps[len(steps) // 2]]
    plain = planning.with_redundant(int(rest["redundant"].min()))
    best, stock = (policies[policies[name]].iloc[0] for name in ("recommended", "stock"))
    savings = _savings_of(trace, rest, best, plain, seed)
    low, high = savings["saved_low"], savings["saved_high"]
    enough, floor = _enough_redundant(trace, planning.with_redundant(savings["redundant"]))
    return Verdict(
        trace.name,
        WORTH_IT if low > WORTH else NOT_WORTH_IT if high < WORTH else NO_EVIDENCE,
        **savings,
        plain_redundant=plain.redundant,
        enough_redundant=enough,
        floor=floor,
        holds=_holds(replay, best),
        stock=None if stock["recommended"] else _savings_of(trace, rest, stock, plain, seed),
    )


def _savings_of(
    trace: LoadTrace, rest: pd.DataFrame, row: pd.Series[Any], plain: Planning, seed: int
) -> dict[str, Any]:
    """The policy in a *row* of the policies, and what it saves compared with the default placement of *plain*."""
    import pandas as pd

    settings = tuple(None if pd.isna(value) else value for value in row[list(SETTINGS)])
    policy = next(own for own in known_policies(len(trace.layers)) if own.settings == settings)
    system, planning = SYSTEMS[policy.system], plain.with_redundant(int(row["redundant"]))
    default = rest[(rest["system"] == "none") & (rest["redundant"] == plain.redundant)]
    saved = saved_compared(default, rest[_is(rest, row)], seed)
    known = {**dict(zip(SETTINGS, policy.settings)), "redundant": planning.redundant}
    sentence = system.sentence.format(**known)
    if policy.threshold is not None:
        sentence += f" unless utilisation is above {policy.threshold:.0%},"
    if planning.redundant:
        sentence += f"{'' if sentence.endswith(',') else ','} with {planning.redundant:,} redundant experts,"
    if policy.interval == 0:
        start = "nothing"
    else:
        start = "replanning" if system.planned else "file" if system.launch is None else "flags"
    return {
        **known,
        **dict(zip(("saved", "saved_low", "saved_high"), saved)),
        "moved_per_1000": float(row["moved_per_1000"]),
        "moved_bytes": float(row["moved_bytes"]),
        "policy": sentence,
        "start": start,
        "launch": launch(policy, planning, trace.experts),
    }


def saved_compared(plain: pd.DataFrame, mine: pd.DataFrame, seed: int = 0) -> tuple[float, float, float]:
    """The part of the expert time of *plain* that *mine* saves, both rows of a replay of the same steps.

    With a 95% interval from a paired bootstrap over blocks of steps.
    """
    sums = np.array([part.groupby("step")["peak_load"].sum() for part in (mine, plain)])  # (2, blocks)
    draws = np.random.default_rng(seed).integers(sums.shape[1], size=(DRAWS, sums.shape[1]))
    drawn = sums[:, draws].sum(axis=2)
    low, high = np.quantile(1 - drawn[0] / drawn[1], [0.025, 0.975])
    return float(1 - sums[0].sum() / sums[1].sum()), float(low), float(high)


def _enough_redundant(trace: LoadTrace, planning: Planning) -> tuple[int, float]:
    """Above how many redundant experts balance gains less than `ENOUGH`, and the peak that the hottest expert causes.

    Balance is that of the last 1,000 steps with a plan from the 1,000 before them.
    """
    cutoff, gpus = int(trace.steps[-1]) - 1000, planning.gpus
    base = least_redundant(trace.experts, gpus)
    tried = [base + n * gpus for n in (0, 1, 2, 4) if base + n * gpus <= trace.experts * (gpus - 1)]
    balances, lowest = [], []
    for load in trace.by_layer():
        seen, after = load.until(cutoff).last(1000), load.after(cutoff, 1000).counts
        plans = [planning.with_redundant(n) for n in tried]
        balances.append(
            [own.evenness(own.place(own.load(seen.counts, seen.mean_shares)), after).balance for own in plans]
        )
        lowest.append(lowest_peak(seen.mean_shares, gpus, planning.redundant) * gpus)
    mean = np.mean(balances, axis=0).round(DIGITS)
    return next(n for n, balance in zip(tried, mean) if balance >= mean.max() - ENOUGH), float(np.mean(lowest))


def _is(replay: pd.DataFrame, policy: pd.Series[Any]) -> pd.Series[bool]:
    """Which rows are those of *policy*."""
    own = replay[POLICY[1:]].astype(object)
    same: pd.Series[bool] = (own.fillna(-1) == policy[POLICY[1:]].astype(object).fillna(-1)).all(axis=1)
    return same


def _holds(replay: pd.DataFrame, best: pd.Series[Any]) -> int | None:
    """For how many steps a plan made once stays within `ENOUGH` of the balance of the *best* policy, or the next best.

    Over 1,000 steps, so that one block does not decide; None to the end, and where no plan is made.
    """
    same = replay[replay["redundant"] == best["redundant"]]
    static, often = same[same["system"] == "static"], replay[_is(replay, best)]
    if best["system"] == "static":  # compared with the policy that plans again and has the best balance
        again = same[~same["system"].isin(["static", "none"])]
        others = [part for _, part in again.groupby(POLICY[1:], dropna=False)]
        often = min(others, key=lambda part: part["peak_load"].sum() / part["mean_load"].sum(), default=again)
    if static.empty or often.empty or best["system"] == "none":
        return None
    sums = [part.groupby("step")[["peak_load", "mean_load"]].sum().rolling(4, 1).sum() for part in (static, often)]
    once, anew = ((part["mean_load"] / part["peak_load"]).round(DIGITS) for part in sums)
    worse = once.index[once < anew - ENOUGH]
    return int(worse[0] - replay["step"].min()) if len(worse) else None
