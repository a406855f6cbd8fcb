"""Kills `moetrace predict` at random moments until it ends, and compares what is there with an uninterrupted run.

python benchmarks/kills.py --kills 20 --jobs 2
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

SAMPLE = Path(__file__).parent.parent / "sample_traces" / "gpt-moe-8e-a.parquet"
SECONDS = {"fit_seconds", "forecast_seconds", "seconds"}


def command(workspace: Path, *argv: str) -> list[str]:
    return [sys.executable, "-m", "moetrace", *argv, "--workspace", str(workspace), "--json", "--quiet"]


def outcome(workspace: Path, argv: list[str]) -> tuple[object, object]:
    """Scores and forecast of a run that nobody kills, without the seconds they took."""
    done = subprocess.run(command(workspace, *argv), stdout=subprocess.PIPE, check=True)
    scores = [{k: v for k, v in row.items() if k not in SECONDS} for row in json.loads(done.stdout)["scores"]]
    (forecast,) = (workspace / "predict").glob("*.parquet")
    return scores, pq.read_table(forecast)


def kill(workspace: Path, argv: list[str], longest: float) -> bool:
    """Whether a run, and every process it started, was killed at a random moment before it ended."""
    child = subprocess.Popen(command(workspace, *argv), stdout=subprocess.DEVNULL, start_new_session=True)
    time.sleep(random.uniform(0, longest))
    ended = child.poll() is not None
    if not ended:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return not ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--longest", type=float, default=12.0, help="seconds until the latest kill")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    argv = ["predict", "--horizon", "1000", "--jobs", str(given.jobs)]
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        for workspace in (whole, killed):
            subprocess.run(command(workspace, "ingest", str(SAMPLE)), stdout=subprocess.DEVNULL, check=True)
        kills, parts = 0, []
        while kills < given.kills:
            if not kill(killed, argv, given.longest):
                # It got to the end: the rest of the kills go to a workspace without results.
                subprocess.run(["rm", "-r", str(killed / "parts")], check=True)
                continue
            kills += 1
            parts.append(len(list((killed / "parts").rglob("*.scores.parquet"))))
        (scores, forecast), (expected, ahead) = outcome(killed, argv), outcome(whole, argv)
        left = list((killed / "parts").rglob(".partial-*"))
    print(f"{kills} kills; results there after each: {parts}")
    print(f"scores equal: {scores == expected}; forecasts equal: {forecast.equals(ahead)}; left half-written: {left}")
    sys.exit(not (scores == expected and forecast.equals(ahead) and not left))


if __name__ == "__main__":
    main()
