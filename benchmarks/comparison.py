"""How far apart real loads are, and what plans and resident sets from one cost on another; prints a Markdown table.

python benchmarks/comparison.py
"""

from __future__ import annotations

import pandas as pd
from accuracy import SAMPLES

import moetrace as mt
from moetrace.placement.planning import usual_gpus
from moetrace.reporting.tables import markdown

DECODE, SERVING, TRAINING = (f"large/gpt-moe-128e-{name}" for name in ("serving-decode", "serving", "f"))
# Two traces, each with the part of its steps that is compared.
PAIRS = (
    ("gpt-moe-8e-a", (0.5, 0.75), "gpt-moe-8e-a", (0.75, 1)),
    ("gpt-moe-8e-a", (0, 0.5), "gpt-moe-8e-a", (0.5, 1)),
    ("gpt-moe-8e-a", (0, 1), "gpt-moe-8e-b", (0, 1)),
    ("large/gpt-moe-32e-d", (0, 0.5), "large/gpt-moe-32e-d", (0.5, 1)),
    (TRAINING, (0, 0.5), TRAINING, (0.5, 1)),
    (SERVING, (0, 0.5), SERVING, (0.5, 1)),
    (SERVING, (0, 0.5), DECODE, (0.5, 1)),
    (SERVING, (0.75, 1), DECODE, (0.75, 1)),
    (TRAINING, (0.5, 0.69), SERVING, (0, 1)),  # of the checkpoint that serves
)


def part(name: str, ends: tuple[float, float]) -> mt.LoadTrace:
    """The steps of a trace between two parts of their number."""
    trace = mt.read_trace(SAMPLES / f"{name}.parquet", options=mt.ReadOptions(accept=("empty",)))
    first, last = (round(end * len(trace.steps)) for end in ends)
    return trace.select(first=int(trace.steps[first]), last=int(trace.steps[last - 1]))


def main() -> None:
    """Compare each pair, with slots for a quarter of the experts, and print."""
    rows = []
    for a, ends, b, other in PAIRS:
        one, two = part(a, ends), part(b, other)
        found = mt.compare(one, two, gpus=usual_gpus(one.experts), slots=one.experts // 4)
        apart, moved = found.distance, found.transfer
        gain = 1 - (1 + moved["slower_than_default"]) / (1 + moved["slower_than_own"])
        names = [f"{own.name} {own.steps[0]}-{own.steps[-1]}" for own in (one, two)]
        percent = {
            "distance": apart.distance, "noise": apart.noise, "by rank": apart.sorted_distance,
            "own plan saves": gain, "slower than own": moved["slower_than_own"],
            "own set covers": moved["own_hit_rate"], "points less": moved["own_hit_rate"] - moved["hit_rate"],
        }  # fmt: skip
        same = {True: "yes", False: "no", None: "unknown"}[apart.same]
        rows.append(
            {"plan and set from": names[0], "used on": names[1]}
            | {key: f"{100 * value:.2f}" for key, value in percent.items()}
            | {"same": same, "order": apart.order}
        )
    print(markdown(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
