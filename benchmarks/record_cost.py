"""What recording costs, as a share of a training step of the reference run; below 1 % is promised.

    python benchmarks/record_cost.py

Two measurements. The time spent in the hooks and in `Watch.step`, taken on the clock around each call,
divided by the time of the whole step: the number that counts, because the difference of two runs of a
busy machine is noise. And, for comparison, the median step with and without recording.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "sample_traces"))

import train_gpt_moe as run  # noqa: E402 - the script lies in a folder of its own

from moetrace.record import Recorder  # noqa: E402 - after it
from moetrace.record.torch import Watch  # noqa: E402 - after it


class Clock:
    """Adds up the time spent in the functions it wraps, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """*function*, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begun

        return timed


def timed_hooks(model: run.GPT, watching: Watch, clock: Clock) -> None:
    """Time every hook that *watching* has put on *model*, and its `step`."""
    for module in model.modules():
        for key, hook in module._forward_hooks.items():
            module._forward_hooks[key] = clock.wrap(hook)
    watching.step = clock.wrap(watching.step)  # type: ignore[method-assign]


def measure(steps: int, path: Path) -> tuple[np.ndarray, float]:
    """Seconds of each step (steps,), and seconds spent on recording in all of them."""
    options, shape = run.parsed(["--shape", "small"])
    torch.manual_seed(0)
    model = run.GPT(shape, options.top_k)
    optimiser = run.optimiser_of(model)
    corpus = np.random.default_rng(0).integers(0, shape.vocabulary, 1_000_000, np.uint16)
    clock = Clock()
    watching = run.watch(model, Recorder(path))
    timed_hooks(model, watching, clock)
    taken = []
    for step in range(1, steps + 6):
        if step == 6:  # the first steps are slower, with and without; so is the first block, which imports Arrow
            if watching.recorder is not None:
                watching.recorder.flush()
            clock.seconds = 0.0
        begun = time.perf_counter()
        run.train_step(model, optimiser, run.batch(corpus, shape, 0, step), shape, options)
        watching.step(step)
        taken.append(time.perf_counter() - begun)
    return np.array(taken[5:]), clock.seconds


def main() -> int:
    """Print the ratio; 1 when it is not below 1 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps to time; 100 are one block")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        taken, spent = measure(steps, Path(folder) / "run.parquet")
    ratio = spent / taken.sum()
    print(
        f"| what | share of a training step |\n|---|---:|\n| recording, blocks written included | {100 * ratio:.2f} % |"
    )
    return int(ratio >= 0.01)


if __name__ == "__main__":
    raise SystemExit(main())
