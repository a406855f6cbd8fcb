"""How right the state rule is, beside what else one could use, on synthetic layers whose settle step is known.

Prints Markdown tables: errors of the settle step, the share of layers put into the right class, seconds.
Run it in an environment with `ruptures` and `pymbar`; `make bench` does. Seeds below 1,000 were used
to choose the numbers of the rule, those from 1,000 on are the ones reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from moetrace.analysis.states import classify, rank_runs
from moetrace.analysis.variogram import block_means
from moetrace.synthetic import Course, synthetic_trace
from moetrace.trace import LayerLoad
from moetrace.words import STABLE

STEPS = 6000
KINDS = ("sudden", "slow", "never", "start", "again")


@dataclass(frozen=True)
class Case:
    """A layer, what kind of course it has, and where it settles."""

    kind: str
    course: Course
    seed: int

    @property
    def load(self) -> LayerLoad:
        return synthetic_trace([self.course], seed=self.seed).layer(0)


def cases(seeds: range) -> Iterator[Case]:
    """Layers of every kind, size, number of tokens and sampling, one for each of *seeds*."""
    for seed in seeds:
        rng = np.random.default_rng([seed, 77])
        kind = KINDS[seed % len(KINDS)]
        loud, quiet = np.exp(rng.uniform(*np.log([0.007, 0.03]))), np.exp(rng.uniform(*np.log([0.0002, 0.0013])))
        settle = int(rng.integers(1000, 4500))
        width = int(rng.integers(400, 1200)) if kind == "slow" else 0
        changes = {
            "sudden": ((1, loud), (settle, quiet)),
            "slow": ((1, loud), (settle, quiet)),
            "never": ((1, loud),),
            "start": ((1, quiet),),
            "again": ((1, loud), (settle // 2 + 300, quiet), (settle // 2 + 2300, loud)),
        }[kind]
        experts = int(rng.choice([8, 16, 64, 256]))
        tokens = int(np.exp(rng.uniform(*np.log([2_000, 500_000]))))
        # Sequences that share a topic; the sample traces are as noisy as 3 times the experts.
        concentration = float(np.exp(rng.uniform(*np.log([3, 80]))) * experts) if rng.random() < 0.5 else None
        course = Course(
            steps=STEPS, experts=experts, tokens=tokens, changes=changes, width=width, concentration=concentration,
            collapsed=int(rng.random() < 0.2),
        )  # fmt: skip
        yield Case(kind, course, seed)


Answer = tuple[str, int | None]
"""Class (``settles``, ``never``, ``start`` or ``again``) and settle step, if the rule gives one."""


def truth(case: Case) -> Answer:
    """What is right."""
    return {"sudden": "settles", "slow": "settles"}.get(case.kind, case.kind), case.course.settle_step


def of_runs(states: list[str], begins: list[int], first: int) -> Answer:
    """The class of a sequence of states."""
    if states == [STABLE]:
        return "start", first
    if states[-1] == STABLE:
        return "settles", begins[-1]
    return ("again" if STABLE in states else "never"), None


def ours(load: LayerLoad) -> Answer:
    found = classify(load)
    return of_runs([r.state for r in found.runs], [r.from_step for r in found.runs], int(load.steps[0]))


# --- rivals ------------------------------------------------------------------------------------


def fixed_threshold(load: LayerLoad) -> Answer:
    """What a user would write: settled once the sliding variance of 200 steps stays below twice its final value."""
    variance = pd.DataFrame(load.shares).rolling(200).var().mean(axis=1).to_numpy()[199:]
    quiet = variance < 2 * variance[-500:].mean()
    loud = np.flatnonzero(~quiet)
    if loud.size == 0:
        return "start", int(load.steps[0])
    if loud[-1] == len(quiet) - 1:
        return "never", None
    return "settles", int(load.steps[199 + loud[-1] + 1])


def _log_block_variance(load: LayerLoad, rows: int = 100) -> np.ndarray:
    """Log of the variance of each expert's share within blocks, mean over experts, shape (blocks, 1)."""
    blocks = len(load.steps) // rows
    variance = load.shares[: blocks * rows].reshape(blocks, rows, -1).var(axis=1)
    return np.log(variance + 1e-16).mean(axis=1, keepdims=True)


def _of_breaks(levels: np.ndarray, breaks: list[int], rows: int, load: LayerLoad) -> Answer:
    """Segments of log variance as states: quiet ones lie in the lower half of what is between them all."""
    edges = [0, *breaks, len(levels)]
    means = [float(levels[a:b].mean()) for a, b in pairwise(edges) if b > a]
    if max(means) - min(means) < np.log(1.3):
        return "start", int(load.steps[0])  # no change of the variance: it cannot tell loud from quiet
    middle = (max(means) + min(means)) / 2
    states = [STABLE if mean < middle else "transient" for mean in means]
    merged = [i for i in range(len(states)) if i == 0 or states[i] != states[i - 1]]
    return of_runs([states[i] for i in merged], [int(load.steps[edges[i] * rows]) for i in merged], int(load.steps[0]))


def ruptures_one_break(load: LayerLoad) -> Answer:
    """ruptures: one break on the log variance of blocks of 100 steps."""
    import ruptures

    levels = _log_block_variance(load)
    return _of_breaks(levels, ruptures.Binseg(model="l2").fit(levels).predict(n_bkps=1)[:-1], 100, load)


def ruptures_pelt(load: LayerLoad) -> Answer:
    """ruptures: PELT on the same, with the usual penalty of the noise times the log of the length."""
    import ruptures

    levels = _log_block_variance(load)
    noise = float(np.var(np.diff(levels[:, 0])) / 2)
    return _of_breaks(
        levels, ruptures.Pelt(model="l2").fit(levels).predict(pen=3 * noise * np.log(len(levels)))[:-1], 100, load
    )


def pymbar_equilibration(load: LayerLoad) -> Answer:
    """pymbar: where the distance from the final load has equilibrated, on means of 20 steps."""
    from pymbar.timeseries import detect_equilibration

    means = block_means(load, 20)
    distance = np.abs(means - means[-50:].mean(axis=0)).sum(axis=1)
    start = int(detect_equilibration(distance, nskip=5)[0])
    if start > 0.9 * len(distance):
        return "never", None
    return ("start", int(load.steps[0])) if start == 0 else ("settles", int(load.steps[start * 20]))


RULES: dict[str, Callable[[LayerLoad], Answer]] = {
    "moetrace": ours,
    "moetrace, ranks alone": lambda load: of_ranks(load),
    "fixed threshold": fixed_threshold,
    "ruptures, one break": ruptures_one_break,
    "ruptures, PELT": ruptures_pelt,
    "pymbar": pymbar_equilibration,
}


def of_ranks(load: LayerLoad) -> Answer:
    runs = rank_runs(load)
    return of_runs([run.state for run in runs], [run.from_step for run in runs], int(load.steps[0]))


def judged(seeds: range) -> pd.DataFrame:
    """One row per case and rule: right class, error of the settle step, seconds, and whether the interval holds."""
    rows = []
    for case in cases(seeds):
        load = case.load
        want, step = truth(case)
        for name, rule in RULES.items():
            began = time.perf_counter()
            got, at = rule(load)
            row = {"rule": name, "kind": case.kind, "seconds": time.perf_counter() - began, "right": got == want}
            if want == "settles":
                scale = case.course.width if case.kind == "slow" else 1
                row["error"] = (STEPS if at is None else abs(at - step)) / scale
            rows.append(row)
        if want == "settles":
            low, high = classify(load).settle_interval or (0, 0)
            rows[-len(RULES)]["held"] = low <= step <= high
    return pd.DataFrame(rows)


def table(found: pd.DataFrame) -> str:
    """The figures that the README of the benchmarks shows, as Markdown."""
    lines = [
        "| rule | right class | " + " | ".join(KINDS) + " | sudden: error in steps, median / p90 "
        "| slow: error over width, median / p90 | time |",
        "|---|" + "---:|" * (len(KINDS) + 4),
    ]
    ours = found[found["rule"] == "moetrace"]["seconds"].median()
    for name in RULES:
        part = found[found["rule"] == name]
        by_kind = part.groupby("kind")["right"].mean()
        errors = [part[part["kind"] == kind]["error"].quantile([0.5, 0.9]) for kind in ("sudden", "slow")]
        cells = [f"{100 * part['right'].mean():.1f} %", *(f"{100 * by_kind[kind]:.0f} %" for kind in KINDS)]
        cells += [f"{errors[0][0.5]:.0f} / {errors[0][0.9]:.0f}", f"{errors[1][0.5]:.2f} / {errors[1][0.9]:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {part['seconds'].median() / ours:.1f} |")
    held = found.dropna(subset="held").groupby("kind")["held"].mean()
    lines += ["", "| course | interval holds the settle step |", "|---|---:|"]
    lines += [f"| {kind} | {100 * held[kind]:.0f} % |" for kind in ("sudden", "slow")]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(judged(range(1000, 1200))))
