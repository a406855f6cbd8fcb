"""Planners and policies side by side: against the best plan, EPLB's rules, and what serving systems do; Markdown.

python benchmarks/planners.py
"""

from __future__ import annotations

import time

import numpy as np
import pandas as pd
from accuracy import SAMPLES
from optimum import lowest_peak, published

from moetrace import LoadTrace, read_trace, rebalance_experts
from moetrace.analysis.states import state_at
from moetrace.placement.plan import evenness, in_order, place, replan
from moetrace.placement.planner import greedy, planned
from moetrace.placement.replay import replayed
from moetrace.placement.verdict import policies_frame, verdict
from moetrace.report.tables import markdown

LAYERS, SEEDS = 58, 8
MANY = ((256, 32, 32, 1.0), (256, 64, 64, 1.0), (128, 0, 16, 0.5), (128, 0, 16, 1.0))
FEW = ((8, 4, 4), (12, 4, 8), (16, 8, 8))
TRACES = {"gpt-moe-8e-a": (4, [0, 4]), "gpt-moe-8e-b": (4, [0, 4]), "large/gpt-moe-32e-d": (4, [0, 4]),
          "large/gpt-moe-128e-f": (8, [0, 16]), "large/gpt-moe-128e-serving": (8, [0, 16])}  # fmt: skip


def lognormal(rows: int, experts: int, spread: float, seed: int = 0) -> np.ndarray:
    """Shares of so many layers."""
    found = np.random.default_rng(seed).lognormal(0, spread, (rows, experts))
    return found / found.sum(axis=1, keepdims=True)


def many() -> pd.DataFrame:
    """Peak over mean of 58 layers; seconds are of this planner over those of EPLB's rules, vectorised alike."""
    rows = []
    for experts, redundant, gpus, spread in MANY:
        shares = lognormal(LAYERS, experts, spread)
        start = time.perf_counter()
        ours = planned(shares, gpus, redundant).peaks * gpus
        middle = time.perf_counter()
        greedy(shares, gpus, redundant)
        longer = (middle - start) / (time.perf_counter() - middle)
        theirs = [published(row, experts + redundant, 1, 1, gpus) for row in shares]
        rows.append((f"{experts}+{redundant} on {gpus}, {spread}", np.mean(theirs), ours.mean(), longer))
    shares = lognormal(LAYERS, 256, 1.0)
    phy2log, _, logcnt = rebalance_experts(shares, 288, 8, 4, 32)
    on = np.take_along_axis(shares / logcnt, phy2log, axis=1).reshape(LAYERS, 32, 9).sum(axis=2)
    theirs = [published(row, 288, 8, 4, 32) for row in shares]
    rows.append(("256+32 on 32 in 4 nodes, 8 groups", np.mean(theirs), (on.max(axis=1) * 32).mean(), np.nan))
    return pd.DataFrame(
        rows, columns=["experts+replicas on GPUs, lognormal", "EPLB's rules", "moetrace", "times as long"]
    )


def few() -> pd.DataFrame:
    """Peak over mean of 8 loads, beside the best plan that the MILP finds in 20 seconds, and its bound."""
    rows = []
    for experts, redundant, gpus in FEW:
        shares = lognormal(SEEDS, experts, 1.0)
        best = np.array([lowest_peak(row, gpus, redundant, 20.0) for row in shares])
        theirs = [published(row, experts + redundant, 1, 1, gpus) for row in shares]
        ours = planned(shares, gpus, redundant).peaks * gpus
        rows.append((f"{experts}+{redundant} on {gpus}", np.mean(theirs), ours.mean(), *best.mean(axis=0)))
    return pd.DataFrame(rows, columns=["experts+replicas on GPUs", "EPLB's rules", "moetrace", "MILP", "its bound"])


def moves(name: str, gpus: int, redundant: int) -> pd.DataFrame:
    """Plans by the last 1,000 steps, every 1,000 steps: from nothing, and changed from the plan in force."""
    rows = []
    for load in read_trace(SAMPLES / f"{name}.parquet").by_layer():
        plans = dict.fromkeys(("from nothing", "changed"), in_order(load.experts, gpus, redundant))
        for cutoff in range(1000, int(load.steps[-1]) - 999, 1000):
            shares, after = load.until(cutoff).last(1000).mean_shares, load.after(cutoff, 1000).counts
            fresh = place(shares, gpus, redundant).aligned(plans["from nothing"])
            new = {"from nothing": fresh, "changed": replan(plans["changed"], shares, redundant)}
            if cutoff > 1000:
                state = state_at(load, cutoff)
                rows += [
                    (name, redundant, state, how, *evenness(plan, after), plan.moved(plans[how]))
                    for how, plan in new.items()
                ]
            plans = new
    frame = pd.DataFrame(rows, columns=["trace", "redundant", "state", "plan", "peak_over_mean", "balance", "moved"])
    return frame.groupby(["trace", "redundant", "state", "plan"], as_index=False).mean()


def judged(trace: LoadTrace, gpus: int, redundants: list[int]) -> tuple[pd.DataFrame, dict[str, object]]:
    """The policies of a trace, the best of each system on the half it was not chosen on, and the verdict."""
    replay = replayed(trace, gpus, redundants, 500)
    frame = policies_frame(replay, trace)
    best = frame.loc[frame.groupby("system", sort=False)["chosen_by"].idxmax()]
    return best, verdict(trace, replay, frame, gpus, None).as_row()


def exact(frame: pd.DataFrame) -> pd.DataFrame:
    """With peaks to the fourth digit, where planners differ."""
    peaks = frame.columns[1:].drop("times as long", errors="ignore")
    return frame.assign(**{name: frame[name].map("{:.4f}".format) for name in peaks})


def main() -> None:
    """Plan, replay, and print."""
    print("Peak over mean GPU load, synthetic loads:\n")
    print(markdown(exact(many())))
    print("\n" + markdown(exact(few())))
    print("\nMoves of each new plan:\n")
    print(markdown(pd.concat([moves("large/gpt-moe-32e-d", 4, 0), moves("large/gpt-moe-32e-d", 4, 4)])))
    found = [judged(read_trace(SAMPLES / f"{name}.parquet"), *own) for name, own in TRACES.items()]
    print("\nOf each system the settings with the best balance on the first half, scored on the second:\n")
    print(markdown(pd.concat([frame for frame, _ in found]).drop(columns="dispatch")))
    said = ["trace", "verdict", "system", "window", "interval", "redundant", "saved", "saved_low", "saved_high", "moved_per_1000"]  # fmt: skip
    print("\n" + markdown(pd.DataFrame([row for _, row in found])[said]))


if __name__ == "__main__":
    main()
