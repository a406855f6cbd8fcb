"""Planners and policies side by side: against the best plan, EPLB's rules, and what serving systems do; Markdown.

    python benchmarks/planners.py --rivals PYTHON

Planners of SGLang, vLLM and vllm-ascend run in a child of the Python given, on the same problems; without it, or where
one is not installed there, their columns are empty. So is that of evolved programs without MOETRACE_EVOLVED, paths as in
PATH of files with EPLB's `rebalance_experts` in torch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from accuracy import SAMPLES
from optimum import lowest_peak, published

from moetrace import read_trace, rebalance_experts
from moetrace.analysis.states import state_at
from moetrace.placement.plan import Plan, default_plan, evenness
from moetrace.placement.planner import UNITS, planned
from moetrace.placement.planning import Planning
from moetrace.placement.replay import replayed
from moetrace.placement.step_peak import StepLoad
from moetrace.placement.systems import SYSTEMS
from moetrace.placement.verdict import policies_frame, saved_compared, verdict
from moetrace.reporting.tables import markdown

LAYERS, SEEDS, ROUNDS, DRAWS = 58, 8, 5, 1000
# Experts, replicas, GPUs, nodes, groups, sigma of the lognormal load, or None for Zipf's.
MANY = ((256, 32, 32, 1, 1, 1.0), (256, 32, 32, 1, 1, None), (256, 64, 64, 1, 1, 1.0), (128, 0, 16, 1, 1, 0.5),
        (128, 0, 16, 1, 1, 1.0), (256, 32, 32, 4, 8, 1.0))  # fmt: skip
FEW = ((8, 4, 4), (12, 4, 8), (16, 8, 8))
TRACES = {"gpt-moe-8e-a": (4, [0, 4]), "gpt-moe-8e-b": (4, [0, 4]), "large/gpt-moe-32e-d": (4, [0, 4]),
          "large/gpt-moe-128e-f": (8, [0, 16]), "large/gpt-moe-128e-serving": (8, [0, 16]),
          "large/qwen3-moe-64e-vllm": (8, [0, 8])}  # fmt: skip
MOVES = ["trace", "redundant", "state", "plan"]
CUTOFFS = range(2000, 12_000, 2000)
FLASHLB = ("FlashLB", "FlashLB, single steps")


def lognormal(rows: int, experts: int, spread: float, seed: int = 0) -> np.ndarray:
    """Shares of so many layers."""
    found = np.random.default_rng(seed).lognormal(0, spread, (rows, experts))
    return found / found.sum(axis=1, keepdims=True)


def zipf(rows: int, experts: int, seed: int = 0) -> np.ndarray:
    """Shares of so many layers that fall as 1, 1/2, 1/3, ..., of experts in any order."""
    rng = np.random.default_rng(seed)
    found = np.array([rng.permutation(1 / np.arange(1, experts + 1)) for _ in range(rows)])
    return found / found.sum(axis=1, keepdims=True)


def cases() -> list[tuple[str, np.ndarray, dict[str, int]]]:
    """The name, the shares (layers, experts) and the shape of each problem of many experts."""
    found = []
    for experts, redundant, gpus, nodes, groups, spread in MANY:
        name = f"{experts}+{redundant} on {gpus}" + (f" in {nodes} nodes, {groups} groups" if nodes > 1 else "")
        shape = {"replicas": experts + redundant, "groups": groups, "nodes": nodes, "gpus": gpus}
        shares = lognormal(LAYERS, experts, spread) if spread else zipf(LAYERS, experts)
        found.append((f"{name}, {f'lognormal {spread}' if spread else 'Zipf 1'}", shares, shape))
    return found


def histories() -> list[tuple[str, int, int, np.ndarray, np.ndarray]]:
    """Trace, GPUs, replicas, the counts before a cutoff and those after it, for each layer and cutoff."""
    found = []
    for name, (gpus, redundants) in TRACES.items():
        for load in read_trace(SAMPLES / f"{name}.parquet").by_layer():
            for cutoff in CUTOFFS:
                if cutoff + 1000 <= load.steps[-1]:
                    seen, after = load.until(cutoff).last(1000).counts, load.after(cutoff, 1000).counts
                    found += [(Path(name).name, gpus, n, seen, after) for n in redundants]
    return found


class Rivals:
    """What the planners of others made of the same problems, and in how many seconds."""

    def __init__(self, python: str | None, past: list[tuple[str, int, int, np.ndarray, np.ndarray]]) -> None:
        self.slots, self.seconds = {}, {}
        if python is None:
            return
        mean = [{"name": name, **shape} for name, _, shape in cases()]
        steps = [{"name": str(i), "replicas": own[3].shape[1] + own[2], "gpus": own[1]} for i, own in enumerate(past)]
        arrays = {name: shares for name, shares, _ in cases()} | {str(i): own[3] for i, own in enumerate(past)}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            np.savez(path / "problems.npz", **arrays)
            (path / "problems.json").write_text(json.dumps({"mean": mean, "steps": steps}))
            subprocess.run([python, "-W", "ignore", Path(__file__).with_name("rivals.py"), folder], check=True)
            self.slots = dict(np.load(path / "slots.npz"))
            self.seconds = json.loads((path / "seconds.json").read_text())

    def evolved(self, shares: np.ndarray, problem: str, shape: dict[str, int]) -> float:
        """The lowest peak of the evolved programs that keep groups on one node; not a number if none does."""
        own = [slots for key, slots in self.slots.items() if key.startswith("evolved") and key.endswith(f"|{problem}")]
        return min((peak(shares, slots, shape) for slots in own), default=np.nan)


def peak(shares: np.ndarray, slots: np.ndarray, shape: dict[str, int]) -> float:
    """Peak over mean, over layers, of experts in *slots* (layers, replicas); infinite where a group is on two nodes."""
    gpus, nodes = shape["gpus"], shape["nodes"]
    groups = slots.reshape(len(slots), nodes, -1) // (shares.shape[1] // shape["groups"])
    if any(sum(len(set(node)) for node in layer) > shape["groups"] for layer in groups.tolist()):
        return np.inf
    copies = np.zeros(shares.shape)
    np.add.at(copies, (np.arange(len(shares))[:, None], slots), 1)
    on = np.take_along_axis(shares / copies, slots, axis=1).reshape(len(shares), gpus, -1).sum(axis=2)
    return float((on.max(axis=1) * gpus).mean())


def many(rivals: Rivals) -> pd.DataFrame:
    """Peak over mean of 58 layers of EPLB's rules, the others and ours; and how much longer ours takes than theirs."""
    rows = []
    for name, shares, shape in cases():
        seconds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            phy2log, _, _ = rebalance_experts(shares, *shape.values())
            seconds.append(time.perf_counter() - start)
        theirs = {own: rivals.slots.get(f"{own}|{name}") for own in ("SGLang", "vLLM")}
        peaks = {own: np.nan if slots is None else peak(shares, slots, shape) for own, slots in theirs.items()}
        longer = {own: np.median(seconds) / rivals.seconds.get(f"{own}|{name}", np.nan) for own in theirs}
        eplb = np.mean([published(row, *shape.values()) for row in shares])
        best = rivals.evolved(shares, name, shape)
        rows.append((name, eplb, *peaks.values(), best, peak(shares, phy2log, shape), *longer.values()))
    columns = ["experts+replicas on GPUs", "EPLB's rules", "SGLang", "vLLM", "best evolved program", "moetrace"]
    return pd.DataFrame(rows, columns=[*columns, "time over SGLang's", "time over vLLM's"])


def few() -> pd.DataFrame:
    """Peak over mean of 8 loads, beside the best plan that the MILP finds in 20 seconds, and its bound."""
    rows = []
    for experts, redundant, gpus in FEW:
        shares = lognormal(SEEDS, experts, 1.0)
        best = np.array([lowest_peak(row, gpus, redundant, 20.0) for row in shares])
        theirs = [published(row, experts + redundant, 1, 1, gpus) for row in shares]
        ours = planned(shares, gpus, redundant).peaks / UNITS * gpus
        rows.append((f"{experts}+{redundant} on {gpus}", np.mean(theirs), ours.mean(), *best.mean(axis=0)))
    return pd.DataFrame(rows, columns=["experts+replicas on GPUs", "EPLB's rules", "moetrace", "MILP", "its bound"])


def in_single_steps(rivals: Rivals, past: list[tuple[str, int, int, np.ndarray, np.ndarray]]) -> pd.DataFrame:
    """Balance of the 1,000 steps after each cutoff with plans by the 1,000 before it, all from nothing.

    *difference* is that of ours less that of the better FlashLB of the row, with a paired bootstrap over layers and cutoffs.
    """
    rows = []
    for i, (name, gpus, redundant, seen, after) in enumerate(past):
        mean = seen.sum(axis=0) / seen.sum()
        own = Planning(gpus, redundant)
        plans = {
            "moetrace, mean": own.place(StepLoad.of(mean[None], mean)),
            "moetrace, steps": own.place(own.load(seen, mean)),
        }
        theirs = {own: rivals.slots.get(f"{own}|{i}") for own in FLASHLB}
        plain = default_plan(len(mean), gpus, redundant)  # what FlashLB keeps where it finds no plan
        plans |= {
            own: plain if slots.min() < 0 else Plan.of(slots, len(mean))
            for own, slots in theirs.items()
            if slots is not None
        }
        rows.append((name, redundant, {how: evenness(plan, after).balance for how, plan in plans.items()}))
    frame = pd.DataFrame([{"trace": name, "replicas": n} | found for name, n, found in rows])
    return pd.DataFrame([_beside(key, own) for key, own in frame.groupby(["trace", "replicas"], sort=False)])


def _beside(key: tuple[str, int], own: pd.DataFrame) -> dict[str, object]:
    means = own.drop(columns=["trace", "replicas"]).mean()
    found = {"trace": key[0], "replicas": key[1], "plans": len(own)} | {
        how: f"{100 * value:.2f}" for how, value in means.items()
    }
    theirs = [how for how in FLASHLB if how in means]
    if theirs:
        apart = 100 * (own["moetrace, steps"] - own[means[theirs].idxmax()]).to_numpy()
        draws = np.random.default_rng(0).integers(len(apart), size=(DRAWS, len(apart)))
        low, high = np.quantile(apart[draws].mean(axis=1), [0.025, 0.975])
        found["difference"] = f"{apart.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
    return found


def moves(name: str, gpus: int, redundant: int) -> pd.DataFrame:
    """Plans by the last 1,000 steps, every 1,000 steps: from nothing, and changed from the plan in force.

    Of four series that begin 250 steps apart. How far the peak of changed plans is above has a 95 % interval for half
    as many plans as there are, as the steps of neighbouring series overlap.
    """
    planning, rows = Planning(gpus, redundant), []
    for load, first in product(read_trace(SAMPLES / f"{name}.parquet").by_layer(), range(1000, 2000, 250)):
        plans = dict.fromkeys(("from scratch", "changed"), planning.default(load.experts))
        for cutoff in range(first, int(load.steps[-1]) - 999, 1000):
            seen, after = load.until(cutoff).last(1000), load.after(cutoff, 1000).counts
            wanted = planning.load(seen.counts, seen.mean_shares)
            fresh = planning.place(wanted, plans["from scratch"])
            new = {"from scratch": fresh, "changed": planning.replan(plans["changed"], wanted)}
            found = {how: planning.evenness(plan, after) for how, plan in new.items()}
            above = found["changed"].peak_over_mean - found["from scratch"].peak_over_mean
            key = Path(name).name, redundant, state_at(load, cutoff)
            if cutoff > first:
                rows += [(*key, how, *found[how], plan.moved(plans[how]), above) for how, plan in new.items()]
            plans = new
    frame = pd.DataFrame(rows, columns=[*MOVES, "peak_over_mean", "balance", "moved", "above"])
    groups = frame.groupby(MOVES)
    margin = 1.96 * groups["above"].std() / np.sqrt(groups.size() / 2)
    told = [f"{above:+.4f} ± {by:.4f}" for above, by in zip(groups["above"].mean(), margin)]
    means = groups[["peak_over_mean", "balance", "moved"]].mean().assign(plans=groups.size(), above=told).reset_index()
    return means.assign(above=means["above"].where(means["plan"] == "changed", ""))


def judged(name: str, gpus: int, redundants: list[int]) -> tuple[pd.DataFrame, dict[str, object], pd.DataFrame]:
    """The policies of a trace, the best of each system on the first half; the verdict; and what it saves beside all.

    Beside the defaults of each system, with as many replicas, and beside experts in order without any, on the half
    that it was not chosen on.
    """
    trace = read_trace(SAMPLES / f"{name}.parquet")
    planning = Planning(gpus)
    replay = replayed(trace, planning, redundants, 500)
    frame = policies_frame(replay, trace)
    said = verdict(trace, replay, frame, planning)
    steps = np.sort(replay["step"].unique())
    rest = replay[replay["step"] >= steps[len(steps) // 2]]
    settings = rest[["system", "window", "interval", "threshold", "redundant"]].astype(object)
    settings = settings.where(settings.notna(), None).apply(tuple, axis=1)
    mine = rest[settings == (said.system, said.window, said.interval, said.threshold, said.redundant)]
    rows = []
    for system, known in SYSTEMS.items():
        if not known.policies(len(trace.layers)):
            continue
        redundant = said.plain_redundant if system == "none" else said.redundant
        defaults = rest[settings == (*known.policies(len(trace.layers))[0].settings, redundant)]
        saved, low, high = (f"{100 * value:.1f} %" for value in saved_compared(defaults, mine))
        rows.append({"trace": Path(name).name, "compared with": system, "saved": f"{saved} [{low}, {high}]"})
    best = frame.loc[frame.groupby("system", sort=False)["chosen_by"].idxmax()].assign(trace=Path(name).name)
    stock = said.stock or {"system": "the same", "saved": said.saved, "moved_per_1000": said.moved_per_1000}
    told = said.as_row() | {"trace": Path(name).name} | {f"stock {key}": value for key, value in stock.items()}
    return best, told, pd.DataFrame(rows)


def exact(frame: pd.DataFrame) -> pd.DataFrame:
    """With peaks to the fourth digit, where planners differ, and times to the second."""
    numbers = frame.select_dtypes("float").columns.drop("moved", errors="ignore")
    digits = {name: "{:.2f}" if name.startswith("time") else "{:.4f}" for name in numbers}
    return frame.assign(**{name: frame[name].map(form.format) for name, form in digits.items()})


def main() -> None:
    """Plan, replay, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", metavar="PYTHON", help="the Python of the rivals")
    past = histories()
    rivals = Rivals(parser.parse_args().rivals, past)
    programs = ", ".join(Path(path).stem for path in os.environ.get("MOETRACE_EVOLVED", "").split(os.pathsep) if path)
    print(f"Peak over mean GPU load, synthetic loads; evolved programs: {programs or 'none'}.\n")
    print(markdown(exact(many(rivals))))
    print("\n" + markdown(exact(few())))
    print("\nBalance in percent of the 1,000 steps after a cutoff, with plans by the 1,000 before it, from nothing:\n")
    print(markdown(in_single_steps(rivals, past)))
    print(
        "\nMoves of each new plan; how far the peak of changed plans is above that from nothing, with a 95 % interval:\n"
    )
    frame = pd.concat([moves("large/gpt-moe-32e-d", 4, n) for n in (0, 4)])
    print(markdown(exact(frame)))
    found = [judged(name, *own) for name, own in TRACES.items()]
    print("\nOf each system the settings with the best balance on the first half, scored on the second:\n")
    print(markdown(pd.concat([frame for frame, _, _ in found]).drop(columns=["dispatch", "moved_bytes"])))
    said = ["trace", "verdict", "system", "window", "interval", "redundant", "saved", "saved_low", "saved_high", "moved_per_1000"]  # fmt: skip
    said += ["stock system", "stock window", "stock interval", "stock redundant", "stock saved", "stock moved_per_1000"]
    print("\nWhat is recommended, and of what systems do as they are (stock), on the second half:")
    print("\n" + markdown(pd.DataFrame([row for _, row, _ in found])[said]))
    print(
        "\nExpert time that the recommended policy saves beside the defaults of each system with as many replicas, and beside experts in order without any (none), on the second half:\n"
    )
    wide = pd.concat([frame for _, _, frame in found])
    print(markdown(wide.pivot_table("saved", "compared with", "trace", "first", sort=False).reset_index()))


if __name__ == "__main__":
    main()
