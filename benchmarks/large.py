"""Peak memory of the analysis of a large trace, command by command, each run by itself.

Makes a synthetic trace of 60 layers x 256 experts in its canonical form and prints a Markdown table.

    python benchmarks/large.py                20,000 steps, 307 million counts
    python benchmarks/large.py --steps 2000   a tenth of it

Memory is the largest resident set; with several processes the largest sum of theirs, looked at ten times a second.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ingest import size_of, write_long

# Bytes that no command may exceed, whatever the number of layers and steps.
LIMIT = 2 << 30
CLI = "import sys; from moetrace.cli import main; sys.exit(main(sys.argv[1:]))"
CHEAP = ("--predictor", "window_mean", "--predictor", "sw_avg")
PAPER = ("--predictor", "sw_avg", "--predictor", "arima", "--predictor", "lstm")


def peak(*argv: object) -> int | None:
    """Peak memory in bytes of one command; None when it failed."""
    command = [sys.executable, "-c", CLI, *map(str, argv), "--quiet"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    together = pid = 0
    while not pid:
        together = max(together, sum(map(resident, family(child.pid))))
        time.sleep(0.1)
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
    child.returncode = os.waitstatus_to_exitcode(status)
    alone = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None if child.returncode else max(alone, together)


def family(pid: int) -> list[int]:
    """A process and those that it started, as Linux tells; elsewhere the process alone."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:  # it has just ended
        return [pid]
    return [pid, *(member for child in children for member in family(child))]


def resident(pid: int) -> int:
    """The resident set of a process in bytes, 0 of one that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


def table(steps: int, folder: Path) -> str:
    """The peak of each command on a trace of *steps* steps, as Markdown."""
    source, place = folder / "synthetic.parquet", ("--workspace", folder / "out")
    write_long(source, steps)
    horizon = str(min(1000, steps // 4))
    few = ("--cutoffs", f"{steps // 2},{steps * 3 // 4}")
    others = ("--cutoffs", f"{steps // 2 + 1},{steps * 3 // 4 + 1}", "--jobs", "2")
    commands = {
        "ingest": ("ingest", source, *place),
        "states": ("states", *place),
        "predict, sw_avg and window_mean": ("predict", "--horizon", horizon, *CHEAP, *place),
        "predict, sw_avg, arima and lstm, 2 cutoffs": ("predict", "--horizon", horizon, *PAPER, *few, *place),
        "the same at 2 other cutoffs, by 2 processes": ("predict", "--horizon", horizon, *PAPER, *others, *place),
        "report, sw_avg and window_mean": ("report", "--horizons", horizon, *CHEAP, *place),
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
    parser.add_argument("--steps", type=int, default=20_000, help="steps of the trace")
    parser.add_argument("--folder", type=Path, help="where it is made, and removed again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        print(table(options.steps, Path(name)))


if __name__ == "__main__":
    main()
