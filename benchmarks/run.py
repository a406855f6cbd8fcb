"""Runs every benchmark and writes `benchmarks/README.md`: ratios and errors, never absolute times.

`make bench` calls it. Names of benchmarks as arguments run only those and replace only their sections.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
HEAD = """# Benchmarks

Written by `make bench`; one section alone by `.venv-bench/bin/python benchmarks/run.py NAME`.
Ratios are against a named rival in the same run, on the same machine; no time stands for itself.
"""
# Benchmarks beside rivals that live in an environment of their own.
RIVALS = ("planners", "speed")
SECTIONS = {
    "states": ("How right the state rule is", "200 synthetic layers of known settle step; the rule's numbers were chosen on other seeds."),
    "change_points": ("Location of change points", "Synthetic layers of known change, of seeds that nothing was chosen on: a jump of the level, or a constant load that begins to drift."),
    "told": ("Whether what is told holds", "Synthetic layers of known truth, of seeds that nothing was chosen on; real traces, with an eye on which the numbers of the intervals, of the promise and of `auto` were chosen, and two, held out, that were recorded when all of that was done."),
    "sliding": ("Sliding variance and range", "Variance and range for windows of 10, 100 and 200 steps; moetrace on two threads, the others on their one."),
    "accuracy": ("How wrong the predictors are", "`error_rate` in percent on the real traces; choices were made on gpt-moe-8e-a, those of `auto` with an eye on all; the others are only reported on."),
    "planners": ("Planners and policies", "Against the best plan, EPLB's rules, and what serving systems do."),
    "placement": ("Experts on GPUs", "How even plans leave the load, and for how long one holds; shares of the mean GPU's load in percent."),
    "step_time": ("Step time", "Expert time of a step of the busiest of 8 GPUs, by the time model and by real products of matrices on this machine; a plan from the first half of a trace, on steps of the second."),
    "residency": ("Experts in fast memory", "Resident sets and caches on the real traces, scored on the 1,000 steps after each cutoff, in percent; with slots for a part of the experts of every layer."),
    "comparison": ("Does it transfer?", "Real traces and parts of them, in percent: total variation of the mean shares beside that of two samples of one load; expert time of a plan from the first on the second half of the second trace (8 GPUs, 4 for 8 experts, time follows tokens) and token choices of a set of a quarter of the experts, beside its own plan and set, from its first half."),
    "speed": ("Speed of arima and lstm", "Fit and forecast, per series, errors beside the ratios; a rival that was not tuned, on the trace our defaults were chosen on."),
    "size": ("Growth with size", "Synthetic traces; everything but the LSTM."),
    "ingest": ("Ingest", "A synthetic trace in the long layout, in step order. The median of five rounds, start-up of Python included; how long pandas takes is above all how fast the machine hands out the memory that it wants, and so it scatters."),
    "large": ("A large trace", "Peak memory of the commands on a synthetic trace."),
    "record_cost": ("The cost of recording", "As a part of a training step of the reference run."),
    "record_vllm": ("The cost of recording in vLLM", "Of `MOETRACE_RECORD`, in pairs of runs of one engine; the model is small, so this is the worst case."),
}  # fmt: skip


def section(name: str) -> str:
    """What the benchmark prints, under its title."""
    title, intro = SECTIONS[name]
    more = ["--rivals", os.environ["MOETRACE_RIVALS"]] if name in RIVALS and "MOETRACE_RIVALS" in os.environ else []
    python = os.environ.get("MOETRACE_VLLM", sys.executable) if name == "record_vllm" else sys.executable
    done = subprocess.run([python, "-W", "ignore", HERE / f"{name}.py", *more], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    body = done.stdout.strip() if done.returncode == 0 else "Did not run: `make bench` says why."
    packages = ", ".join(f"{package} {version(package)}" for package in ("moetrace", "numpy", "pandas", "pyarrow"))
    return f"<!-- {name} -->\n## {title}\n\n{intro}\n\n{body}\n\nPython {platform.python_version()}, {packages}.\n"


def sections_of(text: str) -> dict[str, str]:
    """The sections of a page, by name."""
    parts = re.split(r"(?m)^(?=<!-- \w+ -->$)", text)[1:]
    return {part.split()[1]: part.rstrip() + "\n" for part in parts}


def main() -> None:
    """Run the sections that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SECTIONS))
    names = parser.parse_args().names
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: choose among {', '.join(SECTIONS)}")
    known = sections_of(PAGE.read_text()) if PAGE.exists() else {}
    for name in names or [name for name in SECTIONS if (HERE / f"{name}.py").exists()]:
        print(f"{name} ...", flush=True)
        known[name] = section(name)
        PAGE.write_text("\n".join([HEAD, *(known[name] for name in SECTIONS if name in known)]))


if __name__ == "__main__":
    main()
