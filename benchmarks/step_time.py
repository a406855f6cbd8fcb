"""The time model beside real matrix products on this machine, and the planner by time beside the others.

Prints Markdown; `make bench` runs it. Needs torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import moetrace as mt
from moetrace.placement.measure import expert, measured
from moetrace.placement.plan import Plan
from moetrace.placement.planner import greedy
from moetrace.placement.planning import Planning, spread
from moetrace.placement.step_time import StepTime
from moetrace.trace import LoadTrace

HERE = Path(__file__).resolve().parent.parent / "sample_traces"
GPUS, HIDDEN, FFN = 8, 512, 512
TOKENS, REDUNDANT, STEPS, ROUNDS = (1, 8, 32, 128), (0, 16), 8, 15
CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
TRACES = (
    "gpt-moe-32e-d", "gpt-moe-128e-f", "gpt-moe-128e-serving", "gpt-moe-128e-serving-decode", "qwen3-moe-64e-vllm",
)  # fmt: skip
MOST_LAYERS = 4
RATIOS = (0.0, 0.5, 2.0, 8.0)
# The table of the placement literature: layers of 256 experts with lognormal loads, a sigma for each.
SYNTHETIC = (0.5, 1.0, 1.5)


def traces() -> Iterator[LoadTrace]:
    """The real traces with many experts."""
    for name in TRACES:
        yield mt.read_trace(HERE / "large" / f"{name}.parquet", options=mt.ReadOptions(accept=("empty",)))


def halves(trace: LoadTrace, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The last 1,000 logged steps of the first half of a layer, and the second half."""
    counts = trace.layer(layer).counts
    middle = len(counts) // 2
    return counts[max(0, middle - 1000) : middle], counts[middle:]


def plans_of(seen: np.ndarray, redundant: int, step_time: StepTime, gpus: int = GPUS) -> dict[str, Plan]:
    """The default placement, EPLB's plan, ours by tokens and by time, from the same steps."""
    mean, experts = seen.sum(axis=0) / seen.sum(), seen.shape[1]
    tokens, timed = Planning(gpus, redundant), Planning(gpus, redundant, time=step_time)
    return {
        "default": tokens.default(experts),
        "EPLB": Plan.of(greedy(mean[None], gpus, redundant)[0], experts),
        "by tokens": tokens.place(tokens.load(seen, mean)),
        "by time": timed.place(timed.load(seen, mean)),
    }


def split(plan: Plan, counts: np.ndarray) -> list[list[int]]:
    """Whole tokens of each slot of each GPU, split evenly among the replicas of an expert."""
    parts = [np.diff(np.linspace(0, n, r + 1).round().astype(int)).tolist() for n, r in zip(counts, plan.held.sum(0))]
    return [[parts[e].pop() for e in own] for own in plan.experts]


def measured_table() -> Iterator[str]:
    """Predicted and measured savings of a step, each simulated GPU run one after the other."""
    torch.set_num_threads(1)
    trace = next(own for own in traces() if own.name == "gpt-moe-128e-serving")
    seen, after = halves(trace, trace.layers[len(trace.layers) // 2])
    shares = after[:: len(after) // STEPS][:STEPS] / after[:: len(after) // STEPS][:STEPS].sum(axis=1, keepdims=True)
    rng = np.random.default_rng(0)
    # A slot of a GPU is the same memory in every plan, one after the other as in a server: where an expert lies in
    # memory makes more of a difference than some plans do.
    slots = GPUS, -(-(trace.experts + max(REDUNDANT)) // GPUS)
    weights = torch.randn(*slots, HIDDEN, 2 * FFN), torch.randn(*slots, FFN, HIDDEN)
    curve = StepTime(curve=tuple(measured(HIDDEN, FFN, "float32", CURVE, "cpu", trace.experts, 9)))
    inputs = torch.randn(1 << 13, HIDDEN)

    def seconds(up: torch.Tensor, down: torch.Tensor, tokens: list[int]) -> float:
        began = time.process_time()
        for own_up, own_down, n in zip(up, down, tokens):
            if n:
                expert(inputs[:n], own_up, own_down)
        return time.process_time() - began

    yield "| tokens per expert | redundant | plan | predicted | measured | difference, points |\n|---:|---:|---|---:|---:|---:|"
    for tokens in TOKENS:
        steps = np.array([rng.multinomial(tokens * trace.experts, own) for own in shares])
        planned = (seen * (tokens / seen.mean())).round().astype(int)
        plans = [
            (redundant, name, plan)
            for redundant in REDUNDANT
            for name, plan in plans_of(planned, redundant, curve).items()
            if name != "by tokens"
        ]
        predicted, took = np.zeros(len(plans)), np.zeros(len(plans))
        for counts in steps:
            parts = [split(plan, counts) for _, _, plan in plans]
            predicted += [max(curve.cost(np.array(own)).sum() for own in gpus) for gpus in parts]
            # All GPUs of all plans in every round: no cache holds the experts of the one that is measured, and a
            # processor that becomes slower does so for all plans.
            rounds = [[[seconds(*gpu) for gpu in zip(*weights, gpus)] for gpus in parts] for _ in range(ROUNDS)]
            took += np.min(rounds, axis=0).max(axis=1)
        saved_percent = [100 - 100 * own / own[0] for own in (predicted, took)]
        for (redundant, name, _), a, b in list(zip(plans, *saved_percent))[1:]:
            yield f"| {tokens} | {redundant} | {name} | {a:.1f}% | {b:.1f}% | {abs(a - b):.1f} |"


def saved(seen: np.ndarray, after: np.ndarray, redundant: int, ridge: float, gpus: int) -> dict[str, float]:
    """What each plan saves of the step time of the default placement without replicas, in percent."""
    step_time = StepTime(ridge)
    split_by = Planning(gpus, time=step_time).split
    base = split_by.peaks(Planning(gpus).default(seen.shape[1]).held, after).sum()
    return {
        name: 100 * (1 - split_by.peaks(plan.held, after).sum() / base)
        for name, plan in plans_of(seen, redundant, step_time, gpus).items()
    }


def synthetic(sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """1,000 steps and the 1,000 after them of 256 experts with a constant lognormal load of 33 tokens on average."""
    rng = np.random.default_rng(int(10 * sigma))
    share = rng.lognormal(0, sigma, 256)
    counts = rng.multinomial(33 * 256, share / share.sum(), size=2000)
    return counts[:1000], counts[1000:]


def planner_table() -> Iterator[str]:
    """Every planner at every ridge, on real and synthetic loads."""
    names = ("default", "EPLB", "by tokens", "by time")
    yield f"| load | GPUs | redundant | ridge / tokens | {' | '.join(names)} |\n|---|---:|---:|---:|{'---:|' * len(names)}"
    loads = [(own.name, [halves(own, layer) for layer in spread(own.layers, MOST_LAYERS)]) for own in traces()]
    loads += [(f"256 lognormal, sigma {sigma}", [synthetic(sigma)]) for sigma in SYNTHETIC]
    worse = 0
    for name, parts in loads:
        for redundant in (0, 16):
            for ratio in RATIOS:
                rows = [saved(seen, after, redundant, ratio * float(seen.mean()), 8) for seen, after in parts]
                means = {own: float(np.mean([row[own] for row in rows])) for own in names}
                worse += means["by time"] < max(means.values()) - 0.05
                yield f"| {name} | 8 | {redundant} | {ratio:g} | {' | '.join(f'{means[n]:.1f}%' for n in names)} |"
    yield f"\nThe plan by time is behind the best of the others by more than 0.05 points in {worse} cells."


if __name__ == "__main__":
    print("Saved of the step time of the default placement without replicas. Real products, float32, one thread:\n")
    print("\n".join(measured_table()))
    print("\nPlanners, time by the roofline; EPLB's rules are also those of SGLang and vLLM:\n")
    print("\n".join(planner_table()))
