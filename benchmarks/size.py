"""How time and memory of a prediction grow with the trace.

    python benchmarks/size.py --sizes     # four sizes, everything but the LSTM
    python benchmarks/size.py --full 2    # 58 layers of 256 experts over 10,000 steps, by 2 processes
    python benchmarks/size.py --edges     # very long, very deep and very wide traces
    python benchmarks/size.py             # all of it

Prints Markdown tables. Every run is a process of its own: five cutoffs, horizons of 1,000 and 2,000
steps, scores, shares, the forecast after the end, its file and the summary. Traces are made, not
recorded, and making them is not counted. Memory is the largest resident set; with several processes
the sum of each one's largest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moetrace import LoadTrace, save_trace
from moetrace.forecasting.predictors import PREDICTORS, predictor
from moetrace.synthetic import settling, synthetic_trace
from moetrace.trace import Counts, TraceInfo

SIZES = ((8, 128, 5000), (16, 128, 5000), (16, 256, 5000), (16, 256, 10_000))
FULL = (58, 256, 10_000)
# What the largest trace may take.
MINUTES, MIB = 20, 2048
HORIZONS = [1000, 2000]
# Layers, experts and steps, the first the one that the others are beside, and the longest horizon each can score.
EDGES = {(8, 128, 5000): 1000, (1, 8, 10_000_000): 1000, (5000, 8, 600): 100, (2, 100_000, 600): 100}
DRAWN_EDGES = {(8, 128, 5000): 1000, (1, 8, 1_000_000): 1000, (500, 8, 600): 100, (2, 10_000, 600): 100}
SIMPLE = ("--predictor", "window_mean", "--predictor", "level")
COMMANDS = (("states",), ("predict", *SIMPLE, "--horizon", "{horizon}"))
DRAWN_COMMANDS = (
    ("report", *SIMPLE, "--horizons", "{horizon}"),
    ("place", *SIMPLE, "--gpus", "8", "--horizon", "{horizon}"),
)
TOKENS_PER_EXPERT = 256


def make(path: Path, layers: int, experts: int, steps: int) -> None:
    """Writes a trace whose layers settle in its first half."""
    shape = {"steps": steps, "experts": experts, "tokens": TOKENS_PER_EXPERT * experts}
    settle = np.linspace(0.1, 0.5, layers) * steps
    save_trace(synthetic_trace([settling(int(step), **shape) for step in settle], name="made"), path)


def predict(path: Path, jobs: int, specs: list[str]) -> dict[str, float]:
    """Seconds, and the sum of the largest resident sets of this process and its workers in MiB."""
    from moetrace import ResultFolder, evaluate, open_trace, runner, summary_frame
    from moetrace.workspace.results import writing_forecast

    trace = open_trace(path)
    end = int(trace.steps[-1])
    cutoffs = [int(cutoff) for cutoff in np.linspace(end / 4, end - max(HORIZONS), 5)]
    show = lambda done, total: print(done, total, round(time.perf_counter() - began), file=sys.stderr)  # noqa: E731
    began = time.perf_counter()
    test = evaluate(
        trace, [predictor(spec) for spec in specs], HORIZONS, cutoffs, show if jobs > 1 else None,
        ahead=True, results=ResultFolder(path.parent / "parts"), run=runner(jobs),
    )  # fmt: skip
    for _ in writing_forecast(path.parent / "forecast.parquet", test.forecasts()):
        pass
    summary_frame(test.scores)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "mib": largest_resident("self") + sum(map(largest_resident, children()))}


def full(layers: int, jobs: int, runs: dict[str, list[str]]) -> str:
    """Whether each of *runs* on the largest trace keeps to the time and memory it may take."""
    shape = (layers, *FULL[1:])
    lines = [
        f"{' x '.join(f'{n:,}' for n in shape)}, {jobs} processes.",
        "",
        f"| predictors | in {MINUTES} minutes | MiB | in {MIB:,} MiB |",
        "|---|---|---:|---|",
    ]
    for name, specs in runs.items():
        found = in_child(shape, jobs, specs)
        print(f"{shape}, {name}: {found['seconds']:.1f} s", file=sys.stderr)
        kept = ["yes" if within else "no" for within in (found["seconds"] <= 60 * MINUTES, found["mib"] <= MIB)]
        lines.append(f"| {name} | {kept[0]} | {found['mib']:.0f} | {kept[1]} |")
    return "\n".join(lines)


def largest_resident(process: str) -> float:
    """The largest resident set of a process that lives, in MiB, as Linux tells."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def children() -> list[str]:
    """The processes that this one started and that live: the workers wait for more work."""
    return [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def in_child(shape: tuple[int, int, int], jobs: int, specs: list[str]) -> dict[str, float]:
    """What `predict` says of a trace of that shape, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.parquet"
        make(path, *shape)
        asked = json.dumps([str(path), jobs, specs])
        done = subprocess.run(
            [sys.executable, __file__, "--child", asked], stdout=subprocess.PIPE, text=True, check=True
        )
    return json.loads(done.stdout)


def growth(specs: list[str]) -> str:
    """Time for a million counts, times that of the smallest trace, and memory."""
    lines = [
        "| layers x experts x steps | million counts | time | time for a count | MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    first: tuple[float, float] | None = None
    for shape in SIZES:
        found, millions = in_child(shape, 1, specs), float(np.prod(shape)) / 1e6
        first = first or (found["seconds"], found["seconds"] / millions)
        ratios = f"{found['seconds'] / first[0]:.2f} | {found['seconds'] / millions / first[1]:.2f}"
        print(f"{shape}: {found['seconds']:.1f} s", file=sys.stderr)
        lines.append(f"| {' x '.join(f'{n:,}' for n in shape)} | {millions:.1f} | {ratios} | {found['mib']:.0f} |")
    return "\n".join(lines)


def make_still(path: Path, layers: int, experts: int, steps: int) -> None:
    """Writes a trace that stands still, drawn layer by layer."""

    def counts(layer: int) -> Counts:
        rng = np.random.default_rng(layer)
        return rng.poisson(TOKENS_PER_EXPERT * rng.uniform(0.5, 1.5, experts), (steps, experts))

    numbers = tuple(range(layers))
    save_trace(LoadTrace(TraceInfo("made"), np.arange(1, steps + 1), numbers, experts, counts), path)


def command(path: Path, *words: str) -> tuple[float, float]:
    """Seconds and the largest resident set in MiB of a command on the trace at *path*, in a process of its own."""
    argv = [sys.executable, "-m", "moetrace", words[0], str(path), *words[1:], "-q", "-w", str(path.parent)]
    began = time.perf_counter()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)} ended with {process.returncode}")
    return time.perf_counter() - began, used.ru_maxrss / 1024


def edges(shapes: dict[tuple[int, int, int], int], commands: Sequence[tuple[str, ...]], intro: str) -> str:
    """Time and memory of *commands* on traces of *shapes*, times those of the first, which is an everyday one."""
    names = " | ".join(f"{words[0]}: time | {words[0]}: MiB" for words in commands)
    lines = [
        intro,
        "",
        f"| layers x experts x steps | million counts | counts of a layer, MiB | {names} |",
        "|---|---:|---:|" + "---:|---:|" * len(commands),
    ]
    first: list[float] = []
    for shape, horizon in shapes.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "made.parquet"
            # Elsewhere: what this process holds would count as what a command held that it starts.
            asked = json.dumps([str(path), *shape])
            subprocess.run([sys.executable, __file__, "--make", asked], check=True)
            found = [command(path, *(word.format(horizon=horizon) for word in words)) for words in commands]
        print(f"{shape}: {found}", file=sys.stderr)
        first = first or [seconds for seconds, _ in found]
        cells = " | ".join(f"{seconds / of:.1f} | {mib:,.0f}" for (seconds, mib), of in zip(found, first))
        named, layer = " x ".join(f"{n:,}" for n in shape), shape[1] * shape[2] * 8 / 2**20
        lines.append(f"| {named} | {np.prod(shape) / 1e6:.1f} | {layer:,.1f} | {cells} |")
    return "\n".join(lines)


def both_edges() -> str:
    """At the edges of what is predicted, and of what is drawn and placed."""
    parts = (
        (EDGES, COMMANDS, "`states`, and `predict` at its default cutoffs. A layer is held as two arrays of 8 bytes for each count."),
        (DRAWN_EDGES, DRAWN_COMMANDS, "`report`, and `place` on 8 GPUs."),
    )  # fmt: skip
    intro = "At the edges: synthetic traces that stand still, with `window_mean` and `level`; "
    return "\n\n".join(edges(shapes, commands, intro + text) for shapes, commands, text in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", action="store_true", help="the four sizes alone")
    parser.add_argument("--edges", action="store_true", help="very long, deep and wide traces alone")
    parser.add_argument("--full", type=int, metavar="JOBS", help="the largest trace alone, by so many processes")
    parser.add_argument("--layers", type=int, default=FULL[0], help="of the largest trace")
    parser.add_argument("--predictor", action="append", help="these alone; repeatable")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        path, jobs, specs = json.loads(given.child)
        print(json.dumps(predict(Path(path), jobs, specs)))
        return
    if given.make:
        name, *shape = json.loads(given.make)
        make_still(Path(name), *shape)
        return
    if given.edges:
        print(both_edges())
        return
    others = [name for name in PREDICTORS if name != "lstm"]
    runs = (
        {", ".join(given.predictor): given.predictor} if given.predictor else {"all but lstm": others, "lstm": ["lstm"]}
    )
    if not given.full:
        print(growth(given.predictor or others), end="\n\n" if not given.sizes else "\n")
    if not given.sizes:
        print(full(given.layers, given.full or 2, runs))
    if not (given.sizes or given.full or given.predictor):
        print("", both_edges(), sep="\n")


if __name__ == "__main__":
    main()
