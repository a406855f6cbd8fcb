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

from moetrace.report.tables import markdown

SAMPLES = Path(__file__).parent.parent / "sample_traces"
TRACES = ("gpt-moe-8e-a", "gpt-moe-8e-b", "large/gpt-moe-32e-d")
EVERY = "250,500,1000,2000,4000"
COMMAND = ("place", "--gpus", "4", "--predictor", "auto", "--replan", EVERY)
GAINS = ("0", "0.01", "0.02", "0.05")
WORTH = ["trace", "strategy", "state", "peak_over_mean", "above_oracle", "difference", "difference_low",
         "difference_high", "scored"]  # fmt: skip
OFTEN = ["trace", "state", "replan_every", "difference", "difference_low", "difference_high", "moved_per_1000",
         "scored"]  # fmt: skip


def moetrace(*argv: object) -> dict[str, Any]:
    """The JSON that a command prints."""
    command = [sys.executable, "-m", "moetrace", *map(str, argv), "--quiet"]
    document: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return document


def gains(place: tuple[object, ...]) -> pd.DataFrame:
    """What is left and what is moved where a plan has to gain something to be made."""
    rows = []
    for gain in GAINS:
        found = pd.DataFrame(moetrace(*COMMAND, "--least-gain", gain, *place)["replanning"])
        own = found[(found["strategy"] == "auto") & (found["state"] != "all") & found["replan_every"].isin([250, 1000])]
        rows.append(own.assign(least_gain=float(gain)))
    frame = pd.concat(rows).astype({"replan_every": int}).sort_values(["trace", "state", "replan_every", "least_gain"])
    return frame[["trace", "state", "replan_every", "least_gain", "peak_over_mean", "balance", "moved_per_1000"]]


def main() -> None:
    """Ingest the traces, plan, and print."""
    with tempfile.TemporaryDirectory() as name:
        place = ("--workspace", Path(name) / "out", "--json")
        moetrace("ingest", *(SAMPLES / f"{trace}.parquet" for trace in TRACES), *place)
        found, kept = moetrace(*COMMAND, *place), gains(place)
    print(f"`moetrace {' '.join(COMMAND)}`, plans for 1,000 steps:\n")
    print(markdown(pd.DataFrame(found["summary"])[WORTH]))
    often = pd.DataFrame(found["replanning"]).astype({"replan_every": "Int64"})
    print("\nPlans of `auto`, made every so many steps or (-) once; `difference` is from every 250:\n")
    print(markdown(often[(often["strategy"] == "auto") & (often["state"] != "all")][OFTEN]))
    print("\nThe same with `--least-gain`, where a plan is only made if it promises so much:\n")
    print(markdown(kept))


if __name__ == "__main__":
    main()
