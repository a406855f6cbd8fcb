"""What planning is worth on the real traces, and for how long a plan holds; prints Markdown tables.

python benchmarks/placement.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accuracy import SAMPLES, TRACES

from moetrace import Planning, read_trace
from moetrace.analysis.states import state_at
from moetrace.reporting.tables import markdown

AGES = (0, 250, 500, 1000, 2000, 4000)
COMMAND = ("place", "--gpus", "4", "--predictor", "auto")
GAINS = (0.0, 0.01, 0.02, 0.05)
WORTH = ["trace", "strategy", "state", "peak_over_mean", "above_oracle", "difference", "difference_low",
         "difference_high", "scored"]  # fmt: skip
KEPT = ["trace", "state", "least_gain", "peak_over_mean", "balance", "moved"]


def moetrace(*argv: object) -> dict[str, Any]:
    """The JSON that a command prints."""
    command = [sys.executable, "-m", "moetrace", *map(str, argv), "--quiet"]
    document: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return document


def ages(name: str, gpus: int = 4) -> pd.DataFrame:
    """Balance in the 250 steps after a plan of each age, minus that of a plan made then, by the state at the plan."""
    planning, rows = Planning(gpus), []
    for load in read_trace(SAMPLES / f"{name}.parquet").by_layer():
        last = int(load.steps[-1]) - 250
        cutoffs = range(1000, last + 1, 250)
        wanted = {cutoff: load.until(cutoff).last(1000) for cutoff in cutoffs}
        plans = {c: planning.place(planning.load(seen.counts, seen.mean_shares)) for c, seen in wanted.items()}
        for cutoff in range(1000, last + 1, 1000):
            for age in (age for age in AGES if cutoff + age in plans):
                after = load.after(cutoff + age, 250).counts
                found = (planning.evenness(plans[at], after).balance for at in (cutoff, cutoff + age))
                rows.append((Path(name).name, state_at(load, cutoff), age, *found))
    frame = pd.DataFrame(rows, columns=["trace", "state", "age", "old", "new"])
    means = frame.assign(difference=frame["old"] - frame["new"]).groupby(["trace", "state", "age"])["difference"]
    error = means.std() / np.sqrt(means.size())
    return means.mean().to_frame().assign(error=error, plans=means.size()).reset_index()


def main() -> None:
    """Ingest the traces, plan, and print."""
    with tempfile.TemporaryDirectory() as name:
        place = ("--workspace", Path(name) / "out", "--json")
        moetrace("ingest", *(SAMPLES / f"{trace}.parquet" for trace in TRACES), *place)
        found = {gain: moetrace(*COMMAND, "--least-gain", gain, "--jobs", 2, *place) for gain in GAINS}
    frames = {gain: pd.DataFrame(document["summary"]) for gain, document in found.items()}
    kept = pd.concat([frame.assign(least_gain=gain) for gain, frame in frames.items()])
    kept = kept[(kept["strategy"] == "auto") & (kept["state"] != "all")].sort_values(KEPT[:3])
    print(f"`moetrace {' '.join(COMMAND)}`, plans for 1,000 steps:\n")
    print(markdown(frames[0.0][WORTH]))
    print(
        "\nBalance in the 250 steps that begin so many steps after a plan was made (age), minus that of a new plan:\n"
    )
    print(markdown(pd.concat([ages(trace) for trace in TRACES])))
    print("\nThe same with `--least-gain`, where a plan is only made if it promises so much:\n")
    print(markdown(kept[KEPT]))


if __name__ == "__main__":
    main()
