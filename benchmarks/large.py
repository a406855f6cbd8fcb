"""Peak memory of the analysis of a large trace, command by command, each run by itself.

Makes a synthetic trace of 60 layers x 256 experts in its canonical form and prints a Markdown table.

    python benchmarks/large.py                20,000 steps, 307 million counts
    python benchmarks/large.py --steps 2000   a tenth of it

Memory is the largest resident set; with several processes the largest sum of theirs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from ingest import size_of, write_long
from processes import run

# Bytes that no command may exceed, whatever the number of layers and steps.
LIMIT = 2 << 30
CLI = "import sys; from moetrace.cli import main; sys.exit(main(sys.argv[1:]))"
CHEAP = ("--predictor", "window_mean", "--predictor", "sw_avg")
PAPER = ("--predictor", "sw_avg", "--predictor", "arima", "--predictor", "lstm")


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
        "hot, level and window_mean, 2 processes": ("hot", "--slots", "64", "--jobs", "2", *place),
        "report, sw_avg and window_mean": ("report", "--horizons", horizon, *CHEAP, *place),
    }
    lines = [f"{size_of(steps)}.", "", "| command | peak memory, MiB | under 2 GiB |", "|---|---:|---|"]
    for name, argv in commands.items():
        done = run([sys.executable, "-c", CLI, *argv, "--quiet"])
        within = f"{done.peak / 2**20:,.0f} | {'yes' if done.peak < LIMIT else 'no'}"
        lines.append(f"| {name} | {'failed |' if done.code else within} |")
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
