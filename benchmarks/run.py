"""Runs benchmarks, writes their tables to `benchmarks/results/` and renews the tables and figures of the page.

`make bench` calls it. Names of benchmarks as arguments run only those; `--page` runs none. The sentences of the page
are written by hand: read those of a section again when its tables have changed.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from typing import NamedTuple

import pandas as pd
from tables import HERE, RESULTS, filled, printed, read

PAGE = HERE / "README.md"
PACKAGES = ("moetrace", "numpy", "pandas", "pyarrow")
# Benchmarks beside rivals that live in an environment of their own.
RIVALS = ("planners", "speed")
# The files that the tables of a script become, in the order in which it prints them.
SECTIONS = {
    "states": ("state_rule", "state_interval"),
    "change_points": ("jumps", "drifts", "drifts_noticed"),
    "calibration": ("noise_floor", "noise_floor_real", "borders", "stable_promise", "expected_errors", "auto_single"),
    "sliding": ("sliding",),
    "accuracy": ("accuracy", "fixed_settings", "fixed_settings_late", "arima_settings", "trained_elsewhere", "rivals"),
    "planners": ("planners", "planners_optimum", "planners_steps", "moves", "policies", "verdicts", "savings"),
    "placement": ("placement", "plan_age", "least_gain"),
    "step_time": ("step_time_measured", "step_time"),
    "residency": ("residency", "residency_active", "residency_answers"),
    "comparison": ("comparison",),
    "speed": ("speed_arima", "speed_lstm"),
    "size": ("size", "size_limits", "size_edges", "size_edges_drawn"),
    "ingest": ("ingest",),
    "large": ("large",),
    "record_cost": ("record_cost",),
    "record_vllm": ("record_vllm",),
}


class Guard(NamedTuple):
    """A ratio that must not be lost: a *column* of a *table*, in rows that name a *rival* (in all if empty)."""

    table: str
    column: str
    rival: str
    least: float = 0.0
    most: float = float("inf")

    def missed(self) -> list[str]:
        """A line for each row that is beyond."""
        frame = read(self.table)
        rows = frame[frame.astype(str).apply(" ".join, axis=1).str.contains(self.rival, regex=False)]
        values = rows[self.column].astype(float)
        bad = values[~values.between(self.least, self.most)]
        limits = f"{self.least:g} to {self.most:g}"
        return [f"{self.table}: {self.column} is {value:g} of {self.rival}, not {limits}" for value in bad]


# About half of what was measured: machines differ.
GUARDS = (
    Guard("ingest", "times as long", "pandas", least=2.0),
    Guard("speed_arima", "times as long", "statsforecast", least=50.0),
    Guard("planners", "time over SGLang's", "", most=1.0),
)


def run(section: str) -> str:
    """Run the script of a *section* and write its tables; why not, where it failed."""
    more = ["--rivals", os.environ["MOETRACE_RIVALS"]] if section in RIVALS and "MOETRACE_RIVALS" in os.environ else []
    python = os.environ.get("MOETRACE_VLLM", sys.executable) if section == "record_vllm" else sys.executable
    done = subprocess.run([python, "-W", "ignore", HERE / f"{section}.py", *more], capture_output=True, text=True)
    tables, names = printed(done.stdout), SECTIONS[section]
    if done.returncode or len(tables) != len(names):
        return f"{section}: exit code {done.returncode}, {len(tables)} of {len(names)} tables\n{done.stderr}"
    for name, table in zip(names, tables):
        table.to_csv(RESULTS / f"{name}.csv", index=False)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    row = {
        "section": section,
        "date": date.today().isoformat(),
        "machine": machine,
        "python": platform.python_version(),
    }
    runs = read("runs")
    runs = pd.concat([runs[runs["section"] != section], pd.DataFrame([row | {p: version(p) for p in PACKAGES}])])
    runs.sort_values("section").to_csv(RESULTS / "runs.csv", index=False)
    return ""


def main() -> int:
    """Run the sections that are named, or all of them, and renew the page; 1 where one failed, or lost a ratio of `GUARDS`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SECTIONS))
    parser.add_argument("--page", action="store_true", help="run nothing: tables and figures of the page alone")
    given = parser.parse_args()
    if unknown := set(given.names) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}: choose among {', '.join(SECTIONS)}")
    failed = []
    for name in [] if given.page else given.names or SECTIONS:
        print(f"{name} ...", flush=True)
        failed += filter(None, [run(name)])
        PAGE.write_text(filled(PAGE.read_text()))
    from figures import draw  # and matplotlib with it

    draw(RESULTS)
    PAGE.write_text(filled(PAGE.read_text()))
    failed += [line for guard in GUARDS for line in guard.missed()]
    print(*failed, sep="\n", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
