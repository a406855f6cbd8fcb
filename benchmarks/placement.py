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

import pandas as pd
from accuracy import SAMPLES, TRACES

from moetrace.report.tables import markdown

EVERY = "250,500,1000,2000,4000"
COMMAND = ("place", "--gpus", "4", "--predictor", "auto", "--replan", EVERY)
GAINS = (0.0, 0.01, 0.02, 0.05)
WORTH = ["trace", "strategy", "state", "peak_over_mean", "above_oracle", "difference", "difference_low",
         "difference_high", "scored"]  # fmt: skip
OFTEN = ["trace", "state", "replan_every", "difference", "difference_low", "difference_high", "moved_per_1000",
         "scored"]  # fmt: skip
KEPT = ["trace", "state", "replan_every", "least_gain", "peak_over_mean", "balance", "moved_per_1000"]


def moetrace(*argv: object) -> dict[str, Any]:
    """The JSON that a command prints."""
    command = [sys.executable, "-m", "moetrace", *map(str, argv), "--quiet"]
    document: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return document


def of_auto(found: dict[str, Any]) -> pd.DataFrame:
    """How often to plan by `auto`, state by state."""
    frame = pd.DataFrame(found["replanning"]).astype({"replan_every": "Int64"})
    return frame[(frame["strategy"] == "auto") & (frame["state"] != "all")]


def main() -> None:
    """Ingest the traces, plan, and print."""
    with tempfile.TemporaryDirectory() as name:
        place = ("--workspace", Path(name) / "out", "--json")
        moetrace("ingest", *(SAMPLES / f"{trace}.parquet" for trace in TRACES), *place)
        found = {gain: moetrace(*COMMAND, "--least-gain", gain, "--jobs", 2, *place) for gain in GAINS}
    often = {gain: of_auto(document) for gain, document in found.items()}
    kept = pd.concat([frame.assign(least_gain=gain) for gain, frame in often.items()])
    kept = kept[kept["replan_every"].isin([250, 1000])].sort_values(KEPT[:4])
    print(f"`moetrace {' '.join(COMMAND)}`, plans for 1,000 steps:\n")
    print(markdown(pd.DataFrame(found[0.0]["summary"])[WORTH]))
    print("\nPlans of `auto`, made every so many steps or (-) once; `difference` is from every 250:\n")
    print(markdown(often[0.0][OFTEN]))
    print("\nThe same with `--least-gain`, where a plan is only made if it promises so much:\n")
    print(markdown(kept[KEPT]))


if __name__ == "__main__":
    main()
