"""Calibration: the noise floor, borders of states, what a stable layer promises, expected errors, intervals.

Prints Markdown tables, on synthetic layers whose truth is known, of seeds from 1,000 on, and on all real traces in
`sample_traces`. Of the synthetic layers nothing was chosen on the seeds reported; the numbers of the intervals, of the
promise and of `auto` were chosen with an eye on all of the real traces but those that are held out.
Where horizons of neighbouring cutoffs overlap, intervals are from a bootstrap of whole stretches as long as a horizon.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.signal import lfilter
from scipy.stats import t

import moetrace as mt
from moetrace.analysis.states import PROMISE, PROMISED_STEPS, classify, state_at
from moetrace.analysis.variogram import pooled_shares
from moetrace.forecasting.backtest import evaluate
from moetrace.trace import LayerLoad
from moetrace.words import STABLE, TRANSIENT

SAMPLES = Path(__file__).parent.parent / "sample_traces"
FIRST_SEED = 1000
# Every fourth layer of a trace of many experts: the cutoffs are many.
MOST_EXPERTS = 64
# Steps from one cutoff to the next, rounds of the bootstrap, and the fewest stretches that it is made of.
EVERY, ROUNDS, LEAST = 250, 500, 3


def real_traces() -> Iterator[mt.LoadTrace]:
    """All of them, those that are held out last, and of many experts every fourth layer."""
    folders = {"": "", "large": "", "held_out": " (held out)"}
    for folder, mark in folders.items():
        # Passes of a server without a decode token are no steps.
        for path in sorted(path for path in (SAMPLES / folder).glob("*.parquet") if "decode" not in path.stem):
            trace = mt.read_trace(path)
            trace = replace(trace, info=replace(trace.info, name=f"{path.stem}{mark}"))
            yield trace.select(layers=trace.layers[::4]) if trace.experts > MOST_EXPERTS else trace


def markdown(table: pd.DataFrame) -> str:
    """*table* with its index, numbers as they are."""
    flat = table.reset_index().astype(str)
    rows = [flat.columns, ["---"] * len(flat.columns), *flat.to_numpy()]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


# --- the noise floor ---------------------------------------------------------------------------


def still(
    kind: str, stride: int, rows: int, varying: bool, seed: int, experts: int = 32
) -> tuple[LayerLoad, np.ndarray]:
    """A synthetic load that stands still, and its shares: sampled token by token, in topics, or in lasting topics."""
    rng = np.random.default_rng([seed, 79])
    shares = share = np.arange(1, experts + 1) / np.arange(1, experts + 1).sum()
    tokens = (4096 * np.exp(rng.normal(0, 0.6 * varying, rows))).astype(int) + 50
    if kind == "topics":
        shares = rng.dirichlet(share * 20 * experts, size=rows)
    if kind == "lasting topics":
        keep = np.exp(-stride / 5)
        topics = lfilter([(1 - keep**2) ** 0.5], [1, -keep], rng.normal(size=(rows, experts)), axis=0)
        shares = share * np.maximum(0, 1 + 0.2 * topics)
        shares = shares / shares.sum(axis=1, keepdims=True)
    counts = rng.multinomial(tokens, shares)
    return LayerLoad("still", 0, np.arange(rows) * stride, counts), share


def noise_table() -> str:
    """The estimated noise floor over the error of a forecast that knows the load, mean over seeds and cutoffs."""
    rows = []
    for kind, varying, stride in product(("tokens", "topics", "lasting topics"), (False, True), (1, 10, 100, 1000)):
        row: dict[str, object] = {"sampling": kind, "totals": "vary" if varying else "equal", "logged every": stride}
        for horizon in (1, 10, 100, 1000, 4000):
            estimated, known = [], []
            for seed in range(FIRST_SEED, FIRST_SEED + 4):
                load, share = still(kind, stride, 30_000 if stride == 1 else 6000, varying, seed)
                if horizon < stride:
                    continue
                errors = np.abs(pooled_shares(load.counts, horizon // stride) - share).sum(axis=1).mean()
                known.append((np.abs(load.shares - share).sum(axis=1).mean(), errors))
                for cutoff in np.linspace(60 * stride + 1100, load.steps[-1] - horizon - 1, 6).astype(int):
                    estimated.append(mt.horizon_noise(load, int(cutoff) // stride * stride, horizon))
            ratio = np.nanmean(estimated, axis=0) / np.mean(known, axis=0) if known else (np.nan, np.nan)
            row[f"{horizon:,}: step / mean"] = f"{ratio[0]:.2f} / {ratio[1]:.2f}" if known else ""
        rows.append(row)
    return markdown(pd.DataFrame(rows).set_index(["sampling", "totals", "logged every"]))


def floor_table() -> str:
    """Error of the best of three quick predictors and the estimated noise floor, on real traces."""
    rows = []
    by = [mt.predictor(spec) for spec in ("level", "ema", "window_mean:window=300")]
    for trace in real_traces():
        cutoffs = range(1500, int(trace.steps[-1]), 500)
        scores = evaluate(trace, by, (10, 100, 1000), list(cutoffs)).scores.dropna(subset=["error_rate", "error_noise"])
        for horizon, own in scores.groupby("horizon"):
            cells = own.pivot_table(index=["layer", "cutoff"], columns="predictor", values="error_rate")
            best = cells[cells.mean().idxmin()]
            noise = own.drop_duplicates(["layer", "cutoff"]).set_index(["layer", "cutoff"])["error_noise"]
            by_cutoff = (best - noise).groupby("cutoff").mean()
            margin = 1.96 * by_cutoff.std() / np.sqrt(len(by_cutoff))
            above = f"{100 * by_cutoff.mean():.2f} ± {100 * margin:.2f}"
            percent = {"error %": best.mean(), "noise %": noise.mean()}
            rows.append(
                {"trace": trace.name, "horizon": horizon}
                | {name: f"{100 * value:.2f}" for name, value in percent.items()}
                | {"difference %": above}
            )
    return markdown(pd.DataFrame(rows).set_index("trace"))


# --- borders -----------------------------------------------------------------------------------


def sudden(seeds: range) -> Iterator[tuple[str, int, LayerLoad]]:
    """Layers that suddenly settle, unsettle, or jump: the kind, the step, the load."""
    for seed in seeds:
        rng = np.random.default_rng([seed, 78])
        kind = ("settles", "unsettles", "jumps")[seed % 3]
        loud, quiet = np.exp(rng.uniform(*np.log([0.007, 0.03]))), np.exp(rng.uniform(*np.log([0.0002, 0.0013])))
        at, experts = int(rng.integers(1500, 4500)), int(rng.choice([8, 16, 64, 256]))
        tokens = int(np.exp(rng.uniform(*np.log([2_000, 500_000]))))
        topics = float(np.exp(rng.uniform(*np.log([3, 80]))) * experts) if rng.random() < 0.5 else None
        before, after = {"settles": (loud, quiet), "unsettles": (quiet, loud), "jumps": (quiet, quiet)}[kind]
        course = mt.Course(
            steps=6000, experts=experts, tokens=tokens, changes=((1, before), (at, after)), concentration=topics
        )
        load = mt.synthetic_trace([course], seed=seed).layer(0)
        if kind == "jumps":
            other = load.counts[:, rng.permutation(experts)]
            load = replace(load, counts=np.where(load.steps[:, None] >= at, other, load.counts))
        yield kind, at, load


def border_table() -> str:
    """How far from the truth the border lies, with hindsight; and how soon the state at a cutoff is right."""
    rows = []
    for kind, at, load in sudden(range(FIRST_SEED, FIRST_SEED + 240)):
        wanted = STABLE if kind == "settles" else TRANSIENT
        begins = [run.from_step for run in classify(load).runs[1:] if run.state == wanted]
        row = {"change": kind, "error": min((abs(begin - at) for begin in begins), default=len(load.steps))}
        if kind == "jumps":
            row |= {"before": state_at(load, at - 1) == STABLE, "after": state_at(load, at + 100) == TRANSIENT}
        rows.append(row)
    found = pd.DataFrame(rows).groupby("change", sort=False)
    return markdown(
        pd.DataFrame(
            {
                "layers": found.size(),
                "error in steps, median": found["error"].median().round().astype(int),
                "90 % within": found["error"].quantile(0.9).round().astype(int),
                "99 % within": found["error"].quantile(0.99).round().astype(int),
                "stable a step before": found["before"].mean().map(lambda x: "" if x != x else f"{100 * x:.0f} %"),
                "transient 100 steps after": found["after"].mean().map(lambda x: "" if x != x else f"{100 * x:.0f} %"),
            }
        )
    )


# --- what is known at a cutoff -------------------------------------------------------------------


def never_seen() -> Iterator[mt.LoadTrace]:
    """Synthetic traces whose layers calm down like a power of the step, or move on as they did."""
    calms, moves = "synthetic, calms down", "synthetic, moves on"
    courses: dict[str, list[mt.Course]] = {calms: [], moves: []}
    for seed in range(FIRST_SEED, FIRST_SEED + 8):
        rng = np.random.default_rng([seed, 80])
        power, volatility = rng.uniform(0.3, 1.2), np.exp(rng.uniform(*np.log([0.0003, 0.008])))
        falling = tuple((int(step), 0.02 * (step / 300) ** -power) for step in np.geomspace(300, 7000, 10))
        course = mt.Course(steps=8000, experts=16, tokens=4096, concentration=float(rng.uniform(80, 960)), width=400)
        courses[calms].append(replace(course, changes=((1, 0.02), *falling)))
        courses[moves].append(replace(course, changes=((1, volatility),)))
    yield from (mt.synthetic_trace(own, name=name, seed=FIRST_SEED) for name, own in courses.items())


def scored(traces: Iterable[mt.LoadTrace], specs: tuple[str, ...], cutoffs: dict[str, range]) -> pd.DataFrame:
    """Scores on *traces*, with the column *when*."""
    parts = []
    for trace in traces:
        for when, at in cutoffs.items():
            inside = [cutoff for cutoff in at if cutoff + PROMISED_STEPS <= trace.steps[-1]]
            scores = evaluate(trace, [mt.predictor(spec) for spec in specs], (1000, 2000), inside).scores
            parts.append(scores.assign(when=when))
    return pd.concat(parts, ignore_index=True).dropna(subset="error_rate")


def promise_table(scores: pd.DataFrame) -> str:
    """Errors of the level by the state at the cutoff."""
    own = scores[(scores["predictor"] == "level") & (scores["horizon"] == PROMISED_STEPS)]
    rows = []
    for (trace, state), part in own.groupby(["trace", "state"]):
        net = np.sqrt(np.maximum(part["error_rate"] ** 2 - part["error_noise"].fillna(0) ** 2, 0))
        beyond = f"{100 * (net > 3 * PROMISE).mean():.1f} %"
        rows.append(
            {
                "trace": trace, "state": state, "scored": len(part), "error %": f"{100 * part['error_rate'].mean():.2f}",
                "median %": f"{100 * part['error_rate'].median():.2f}", "beyond three times the promise": beyond,
            }
        )  # fmt: skip
    return markdown(pd.DataFrame(rows).set_index("trace"))


def expectation_table(scores: pd.DataFrame) -> str:
    """Calibration ratio and coverage of the intervals, by state; states of fewer than ten scores left out."""
    rows = []
    own = scores[scores["predictor"].isin(["level", "window_mean", "auto"])].assign(run=scores["trace"])
    real = own[~own["trace"].str.startswith("synthetic")]
    own = pd.concat([own, real.assign(trace="all real traces")], ignore_index=True)
    for (predictor, horizon, trace), part in own.groupby(["predictor", "horizon", "trace"], sort=False):
        correlation = np.log(part[["error_rate", "expected_error"]]).corr().iloc[0, 1]
        for state, one in part.groupby("state"):
            if state in (STABLE, TRANSIENT) and len(one) >= 10:
                stretches, found, margin = uncertain(one, horizon)
                low, high = np.exp(found[0] - margin[0]), np.exp(found[0] + margin[0])
                sure = "" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]"
                held = ["" if np.isnan(by) else f" ± {100 * by:.0f}" for by in margin[1:]]
                rows.append(
                    {
                        "predictor": predictor, "horizon": horizon, "trace": trace, "state": state,
                        "stretches": f"{stretches:.1f}", "calibration ratio": f"{np.exp(found[0]):.2f}{sure}",
                        "inside 80 %": f"{100 * found[1]:.0f}{held[0]} %", "inside 95 %": f"{100 * found[2]:.0f}{held[1]} %",
                        "log correlation, all states": f"{correlation:.2f}",
                    }
                )  # fmt: skip
    return markdown(pd.DataFrame(rows).set_index("predictor"))


def uncertain(scores: pd.DataFrame, horizon: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Stretches as long as a *horizon* that the cutoffs of each run make; logarithm of the median calibration ratio
    and the parts inside the two intervals; and how far each of the three may be off, 95 %.

    A bootstrap of stretches of neighbouring cutoffs, the last followed by the first, with all of their layers. It
    takes a few stretches for too much alike, so its standard error is widened, by Student's t and for a mean that is
    taken off: of simulated scores whose horizons overlap, an interval then holds 87 to 96 % for 3 to 12 stretches, and
    not 64 to 84 %. NaN for fewer than three.
    """
    by_cutoff = [own for _, own in scores.groupby(["run", "cutoff"])]
    logs = [np.log(own["error_rate"] / own["expected_error"]).to_numpy() for own in by_cutoff]
    parts = [own[["coverage_80", "coverage_95"]].to_numpy() for own in by_cutoff]

    def of(cutoffs: Iterable[int]) -> np.ndarray:
        drawn = list(cutoffs)
        return np.array([np.median(np.concatenate([logs[i] for i in drawn])),
                         *np.concatenate([parts[i] for i in drawn]).mean(axis=0)])  # fmt: skip

    n, length = len(by_cutoff), -(-horizon // EVERY)
    stretches, found = n / length, of(range(n))
    if stretches < LEAST:
        return stretches, found, np.full(3, np.nan)
    starts = np.random.default_rng(0).integers(0, n, (ROUNDS, -(-n // length)))
    drawn = ((starts[..., None] + np.arange(length)) % n).reshape(ROUNDS, -1)[:, :n]
    error = np.std([of(cutoffs) for cutoffs in drawn], axis=0)
    return stretches, found, t.ppf(0.975, stretches - 1) * error * np.sqrt(stretches / (stretches - 1))


def auto_table(scores: pd.DataFrame) -> str:
    """`auto` beside the best single predictor with its default setting, mean over both horizons."""
    rows = []
    for (trace, when), part in scores.groupby(["trace", "when"], sort=False):
        cells = part.pivot_table(
            index=["layer", "cutoff", "horizon"], columns="predictor", values="error_rate"
        ).dropna()
        means = 100 * cells.mean()
        best = means.drop("auto").idxmin()
        apart = f"{100 * (means['auto'] / means[best] - 1):+.1f} %"
        rows.append({"trace": trace, "cutoffs": when, **means.round(2), "best": best, "auto against it": apart})
    table = pd.DataFrame(rows).set_index("trace")
    overall = table.select_dtypes("number").mean()
    best = overall.drop("auto").idxmin()
    line = f"Mean of all rows: `auto` {overall['auto']:.2f} %, the best of the others, `{best}`, {overall[best]:.2f} %."
    return f"{markdown(table)}\n\n{line}"


def main() -> None:
    print("### The noise floor\n\nEstimated over the error of a forecast that knows the load, synthetic loads that stand still: "
          "of a step / of the mean over the horizon, by horizon in steps.\n")  # fmt: skip
    print(noise_table())
    print("\nOn real traces, the mean error of the best of `level`, `ema` and `window_mean:window=300` less the noise "
          "floor, in percent, with a 95 % interval over cutoffs, by horizon; cutoffs from step 1,500, every 500.\n")  # fmt: skip
    print(floor_table())
    print("\n### Borders of states\n\nSynthetic layers that change suddenly.\n")
    print(border_table())
    cutoffs = {"early": range(500, 2501, EVERY), "late": range(2750, 100_000, EVERY)}
    scores = scored(real_traces(), ("auto", "level", "sw_avg", "window_mean", "ema"), cutoffs)
    synthetic = scored(never_seen(), ("auto", "level", "window_mean"), cutoffs)
    print("\n### What a stable layer promises\n\nError of `level` over the next 1,000 steps by the state at the cutoff, every "
          f"250 steps from 500 on; the promise is {100 * PROMISE:.0f} %, noise taken off.\n")  # fmt: skip
    print(promise_table(scores))
    print("\n### Expected errors and intervals\n\nMedian of observed over expected error, and the part of the experts inside the 80 % and "
          "the 95 % intervals; the same cutoffs, and synthetic traces that nothing was chosen on. Horizons of neighbouring "
          "cutoffs overlap, and layers share their batches: *stretches* is how many horizons lie side by side in the cutoffs "
          "of a state, and 95 % intervals are from a bootstrap of such stretches, all layers together; fewer than three "
          "show nothing of how they scatter.\n")  # fmt: skip
    print(expectation_table(pd.concat([scores, synthetic], ignore_index=True)))
    print("\n### auto against the best single predictor\n\nMean error in percent over both horizons; early are the cutoffs up "
          "to 2,500.\n")  # fmt: skip
    print(auto_table(scores))


if __name__ == "__main__":
    main()
