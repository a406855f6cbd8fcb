"""Peak memory of the analysis of a large trace, command by command, each in a process of its own.

Makes a synthetic trace of 60 layers x 256 experts in its canonical form and prints a Markdown table.

    python benchmarks/large.py                 2,000 steps
    python benchmarks/large.py --steps 20000   307 million counts
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ingest import size_of, write_long

# Bytes that no command may exceed, whatever the number of layers and steps.
LIMIT = 2 << 30
CLI = "import sys; from moetrace.cli import main; sys.exit(main(sys.argv[1:]))"
PREDICTORS = ("--predictor", "window_mean", "--predictor", "sw_avg")


def peak(*argv: object) -> int | None:
    """Peak memory in bytes of one command; None when it failed."""
    command = [sys.executable, "-c", CLI, *map(str, argv), "--quiet"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return None if child.returncode else usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(steps: int, folder: Path) -> str:
    """The peak of each command on a trace of *steps* steps, as Markdown."""
    source, place = folder / "synthetic.parquet", ("--workspace", folder / "out")
    write_long(source, steps)
    horizon = str(min(1000, steps // 4))
    commands = {
        "ingest": ("ingest", source, *place),
        "states": ("states", *place),
        "predict, two cheap predictors": ("predict", "--horizon", horizon, *PREDICTORS, *place),
        "report, two cheap predictors": ("report", "--horizons", horizon, *PREDICTORS, *place),
    }
    lines = [f"{size_of(steps)}.", "", "| | peak memory, MiB | under 2 GiB |", "|---|---:|---|"]
    for name, argv in commands.items():
        found = peak(*argv)
        lines.append(
            f"| {name} | failed | |"
            if found is None
            else f"| {name} | {found / 2**20:,.0f} | {'yes' if found < LIMIT else 'no'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Make, measure, print, and remove what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="steps of the trace")
    parser.add_argument("--folder", type=Path, help="where it is made, and removed again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        print(table(options.steps, Path(name)))


if __name__ == "__main__":
    main()
