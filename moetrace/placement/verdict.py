"""Is it worth it? One policy, chosen on the first half of a trace, and what it saves on the second.

At the end is the knee: from how many tokens per expert on a plan is worth it (`knee_frame`, `worth_from`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moetrace.forecasting.windows import FIRST_CUTOFF
from moetrace.placement.plan import least_redundant, lowest_peak
from moetrace.placement.planning import Planning, spread
from moetrace.placement.policies import DIGITS, SETTINGS
from moetrace.placement.replay import BLOCK, BLOCKS
from moetrace.placement.step_time import BY_TOKENS, HIGHEST_RIDGE, StepTime
from moetrace.placement.systems import SYSTEMS, launch
from moetrace.placement.systems import policies as known_policies
from moetrace.trace import LoadTrace
from moetrace.words import DEPENDS, NO_EVIDENCE, NOT_WORTH_IT, WORTH_IT

if TYPE_CHECKING:
    import pandas as pd

POLICY = ["trace", *SETTINGS, "redundant", "dispatch"]
POLICY_COLUMNS = (
    *POLICY, "balance", "peak_over_mean", "moved_per_1000", "moved_bytes", "chosen_by", "recommended", "stock",
)  # fmt: skip
# Policies whose balance is so near to the best are as good: the one with the fewest redundant experts is taken, which
# cost memory, and of those the one that moves least.
ENOUGH = 0.01
# A policy that moves more than every slot once in 1,000 steps is not recommended: no system that plans from scratch
# does so by default (SGLang every 1,000 iterations, vLLM every 3,000).
MOST_MOVED = 1.0
# Expert time that balancing has to save at least: below that, nobody would run one more moving part.
WORTH = 0.02
# Steps that a verdict needs: as many blocks as policies are chosen and tested on, after the first cutoff.
EVIDENCE = FIRST_CUTOFF + BLOCKS * BLOCK
DRAWS = 1000
# Tokens of an expert and pass over the ridge: memory-bound on the left, compute-bound on the right.
RATIOS = (0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# Steps of a half from which the saving is computed.
KNEE_STEPS = 200


@dataclass(frozen=True)
class Verdict:
    """Whether balancing is worth it on a trace: `WORTH_IT`, `NOT_WORTH_IT`, `NO_EVIDENCE`, or `DEPENDS`.

    A trace of fewer than *evidence_steps* has no verdict, but the savings as the best estimate, unless it is too short
    even for that.

    *policy* is the recommended policy as the subject of a sentence, *start* how it is run: ``nothing`` to do, a plan
    ``file``, the ``flags`` of a system that plans by itself, or ``replanning`` by `rebalance_experts` while a system
    runs. *saved* is the part of the expert time of a step that it saves on the half of the trace that it was not chosen
    on, if time follows the busiest GPU, compared with the default placement with *plain_redundant* redundant experts,
    as few as fill the GPUs, with a 95% interval from a paired bootstrap over blocks of steps. Where nothing is known of
    the hardware, it is proportional to tokens, and *saved_memory_bound* is the same at the *memory_bound_ridge*,
    `HIGHEST_RIDGE`; where the two do not lead to one answer, it depends on the hardware. *tokens_per_expert* are those
    of a pass, *ridge* is where an expert becomes compute-bound on the *hardware*, *microseconds* are saved in each
    layer and step, where that is known. *by_redundant* has the best policy with each number of redundant experts that
    was asked for. *worth_from* are the tokens over the ridge from which on a plan saves 5%, None where it never does.
    *enough_redundant* is the number of redundant experts above which balance gains less than 0.01, *floor* the peak
    load that the hottest expert alone causes, *holds* for how many steps the balance of a plan made once is within 0.01
    of the recommended policy, None to the end. *launch* starts the system so that it does this. *stock* has the same of
    the best policy that needs no change to any system, None where that is the recommended one.
    """

    trace: str
    verdict: str
    steps: int = 0
    evidence_steps: int = EVIDENCE
    system: str | None = None
    window: int | None = None
    interval: int | None = None
    threshold: float | None = None
    redundant: int | None = None
    plain_redundant: int | None = None
    saved: float = float("nan")
    saved_low: float = float("nan")
    saved_high: float = float("nan")
    saved_memory_bound: float = float("nan")
    saved_memory_bound_low: float = float("nan")
    saved_memory_bound_high: float = float("nan")
    memory_bound_ridge: float | None = None
    microseconds: float | None = None
    tokens_per_expert: float = float("nan")
    ridge: float | None = None
    hardware: str = ""
    by_redundant: list[dict[str, Any]] | None = None
    moved_per_1000: float = float("nan")
    moved_bytes: float = float("nan")
    enough_redundant: int | None = None
    floor: float = float("nan")
    holds: int | None = None
    policy: str = ""
    start: str = ""
    launch: str = ""
    stock: dict[str, Any] | None = None
    worth_from: float | None = None

    def launched(self, flags: str) -> Verdict:
        """With the *flags* that a file needs, where a system reads the recommended plan, or the first one, from it."""
        stock = self.stock | {"launch": flags} if self.stock and self.stock["start"] == "file" else self.stock
        return replace(self, launch=flags if self.start in ("file", "replanning") else self.launch, stock=stock)

    def as_row(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def policies_frame(replay: pd.DataFrame, trace: LoadTrace, expert_bytes: float | None = None) -> pd.DataFrame:
    """One row for each policy: *balance*, *peak_over_mean* and moves on the second half of the blocks.

    *chosen_by* is the balance on the first half, by which one is *recommended*: of those that move no more than
    `MOST_MOVED` and are within `ENOUGH` of the best, that with the fewest redundant experts, and then fewest moves.
    *stock* is the one of those that need no change to any system.
    Moves are those of 1,000 steps, in parts of the slots of all layers of *trace*, and in bytes where an expert has so
    many *expert_bytes*.
    """
    if replay["step"].nunique() < 2:  # nothing to choose on
        return replay.iloc[:0].reindex(columns=list(POLICY_COLUMNS))
    steps = np.sort(replay["step"].unique())
    first = replay["step"] < steps[len(steps) // 2]
    half, found = (_measured(replay[part], trace, expert_bytes) for part in (first, ~first))  # in the same order
    stock = ~half["system"].map(lambda name: SYSTEMS[name].planned)
    picked = {"recommended": found.index == _best(half), "stock": found.index == _best(half[stock])}
    found = found.assign(chosen_by=half["balance"], **picked)
    return found[list(POLICY_COLUMNS)]


def _measured(replay: pd.DataFrame, trace: LoadTrace, expert_bytes: float | None) -> pd.DataFrame:
    """Balance, peak and moves of each policy."""
    scored = replay["step"].nunique() * block_of(replay)
    mean, peak, block_peak, moved = (
        replay.groupby(POLICY, sort=False, dropna=False)[name].sum()
        for name in ("mean_load", "peak_load", "block_peak", "moved")
    )
    own = {"balance": mean / peak, "peak_over_mean": block_peak / mean}
    slots = (trace.experts + moved.index.get_level_values("redundant").to_numpy()) * len(trace.layers)
    own["moved_per_1000"] = moved / slots / scored * 1000
    own["moved_bytes"] = own["moved_per_1000"] * slots * (float("nan") if expert_bytes is None else expert_bytes)
    return mean.to_frame().assign(**own).reset_index()


def _best(half: pd.DataFrame) -> Any:
    """The index of the best policy; balances are compared to `DIGITS`, the first of equal policies is taken."""
    able = half[half["moved_per_1000"] <= MOST_MOVED]
    balance = able["balance"].round(DIGITS)
    near = able[balance >= round(balance.max() - ENOUGH, DIGITS)]
    return near.sort_values(["redundant", "moved_per_1000"], kind="stable").index[0]


def verdict(
    trace: LoadTrace, replay: pd.DataFrame, policies: pd.DataFrame, planning: Planning, seed: int = 0
) -> Verdict:
    """The verdict of the *policies* and their *replay* on balancing *trace* as *planning* does."""
    time = planning.time
    about = Verdict(
        trace.name,
        NO_EVIDENCE,
        steps=int(trace.steps[-1] - trace.steps[0]) + 1,
        evidence_steps=EVIDENCE,
        tokens_per_expert=tokens_per_expert(trace, time.passes),
        ridge=time.bound if time.known else None,
        memory_bound_ridge=None if time.known else HIGHEST_RIDGE,
        hardware=time.hardware,
    )
    steps = np.sort(replay["step"].unique()) if len(replay) else np.array([])
    if len(steps) < 2:
        return about
    rest = replay[replay["step"] >= steps[len(steps) // 2]]
    few = int(rest["redundant"].min())
    default = rest[(rest["system"] == "none") & (rest["redundant"] == few)]
    best, stock = (policies[policies[name]].iloc[0] for name in ("recommended", "stock"))
    savings = _savings_of(trace, best, rest, default, planning, seed)
    enough, floor = _enough_redundant(trace, planning.with_redundant(savings["redundant"]))
    return replace(
        about,
        verdict=_judged(savings) if about.steps >= EVIDENCE else NO_EVIDENCE,
        **savings,
        plain_redundant=few,
        by_redundant=_by_redundant(policies, rest, default),
        enough_redundant=enough,
        floor=floor,
        holds=_holds(replay, best),
        stock=None if stock["recommended"] else _savings_of(trace, stock, rest, default, planning, seed),
    )


def block_of(replay: pd.DataFrame) -> int:
    """The steps of a block of a *replay*."""
    apart = np.diff(np.sort(replay["step"].unique()))
    return int(apart.min()) if len(apart) else BLOCK


def _judged(savings: Mapping[str, Any]) -> str:
    """The verdict of what is saved, and where the hardware is not known of what is saved where it is memory-bound."""
    ends = ("saved",) if np.isnan(savings["saved_memory_bound"]) else ("saved", "saved_memory_bound")
    worth = {savings[f"{end}_low"] > WORTH for end in ends}
    vain = {savings[f"{end}_high"] < WORTH for end in ends}
    if worth == {True}:
        return WORTH_IT
    if vain == {True}:
        return NOT_WORTH_IT
    return DEPENDS if True in worth and True in vain else NO_EVIDENCE


def tokens_per_expert(trace: LoadTrace, passes: int = 1) -> float:
    """The mean tokens of an expert in one of so many *passes* of a step, over all layers and steps of *trace*."""
    return float(np.mean([load.counts.mean() for load in trace.by_layer()])) / passes


class Bound(NamedTuple):
    """The most that balancing can save on a trace, as parts of the expert time of a step, see `at_most`."""

    saved: float
    saved_memory_bound: float
    tokens_per_expert: float
    ridge: float | None
    hardware: str


def at_most(trace: LoadTrace, planning: Planning) -> Bound:
    """What a plan would save that leaves every GPU with the same load in each of the last 1,000 steps of *trace*.

    Compared with the default placement with as few redundant experts as fill the GPUs; *saved_memory_bound* is that at
    `HIGHEST_RIDGE`, NaN where the time of experts is known. *tokens_per_expert* are those of a pass.
    """
    default = planning.with_redundant(least_redundant(trace.experts, planning.gpus)).default(trace.experts)
    time = planning.time
    ends = [time] if time.known else [time, replace(time, ridge=HIGHEST_RIDGE)]
    even, busiest, tokens = np.zeros(len(ends)), np.zeros(len(ends)), list[float]()
    for load in trace.by_layer():
        tokens.append(load.counts.mean())
        counts = load.last(1000).counts
        for end, own in enumerate(ends):
            even[end] += own.cost(counts).sum() / planning.gpus
            busiest[end] += replace(planning, time=own).evenly.peaks(default.held, counts).sum()
    saved, bound = (*map(float, 1 - even / busiest), float("nan"))[:2]
    ridge = time.bound if time.known else None
    return Bound(saved, bound, float(np.mean(tokens)) / time.passes, ridge, time.hardware)


def _by_redundant(policies: pd.DataFrame, rest: pd.DataFrame, default: pd.DataFrame) -> list[dict[str, Any]]:
    """For each number of redundant experts that was asked for the best policy of the first half, and what it saves."""
    found = []
    for _, own in policies.groupby("redundant"):
        if own["system"].nunique() > 1:
            best = own.loc[_best(own.assign(balance=own["chosen_by"]))]
            saved = saved_compared(default, rest[_is(rest, best)])[0]
            found.append({"redundant": int(best["redundant"]), "system": best["system"], "saved": saved})
    return found


def _savings_of(
    trace: LoadTrace, row: pd.Series[Any], rest: pd.DataFrame, default: pd.DataFrame, planning: Planning, seed: int
) -> dict[str, Any]:
    """The policy in a *row* of the policies, and what it saves of the *rest* compared with the *default* placement."""
    import pandas as pd

    settings = tuple(None if pd.isna(value) else value for value in row[list(SETTINGS)])
    policy = next(own for own in known_policies(len(trace.layers)) if own.settings == settings)
    system, planning = SYSTEMS[policy.system], planning.with_redundant(int(row["redundant"]))
    mine = rest[_is(rest, row)]
    loads = {"saved": "peak_load", "saved_memory_bound": "peak_memory_bound"}
    saved = {
        f"{name}{end}": value
        for name, load in loads.items()
        for end, value in zip(("", "_low", "_high"), saved_compared(default, mine, seed, load))
    }
    block, begin = block_of(rest), int(rest["step"].min())
    logged = int(np.isin(begin + (trace.steps - begin - 1) // block * block, rest["step"]).sum())
    each = float(default["peak_load"].sum() - mine["peak_load"].sum()) / logged / len(trace.layers)
    known = {**dict(zip(SETTINGS, policy.settings)), "redundant": planning.redundant}
    window = min(policy.window, int(trace.steps[-1] - trace.steps[0]) + 1)
    sentence = system.sentence.format(**known | {"window": window})
    if policy.threshold is not None:
        sentence += f" unless utilisation is above {policy.threshold:.0%},"
    if planning.redundant:
        sentence += f"{'' if sentence.endswith(',') else ','} with {planning.redundant:,} redundant experts,"
    start = "replanning" if system.planned else "file" if system.launch is None else "flags"
    return {
        **known,
        **saved,
        "microseconds": planning.time.microseconds(each),
        "moved_per_1000": float(row["moved_per_1000"]),
        "moved_bytes": float(row["moved_bytes"]),
        "policy": sentence,
        "start": "nothing" if policy.interval == 0 else start,
        "launch": launch(policy, planning, trace.experts),
    }


def saved_compared(
    plain: pd.DataFrame, mine: pd.DataFrame, seed: int = 0, load: str = "peak_load"
) -> tuple[float, float, float]:
    """The part of the expert time of *plain* that *mine* saves, both rows of a replay of the same steps.

    With a 95% interval from a paired bootstrap over blocks of steps. Time is the column *load*; NaN where it is.
    """
    sums = np.array([part.groupby("step")[load].sum(min_count=1) for part in (mine, plain)])  # (2, blocks)
    draws = np.random.default_rng(seed).integers(sums.shape[1], size=(DRAWS, sums.shape[1]))
    drawn = sums[:, draws].sum(axis=2)
    low, high = np.quantile(1 - drawn[0] / drawn[1], [0.025, 0.975])
    return float(1 - sums[0].sum() / sums[1].sum()), float(low), float(high)


def _enough_redundant(trace: LoadTrace, planning: Planning) -> tuple[int, float]:
    """Above how many redundant experts balance gains less than `ENOUGH`, and the peak that the hottest expert causes.

    The peak is that by tokens, NaN where time does not follow them. Balance is that of the last 1,000 steps with a plan
    from the 1,000 before them, in layers that are `spread`.
    """
    gpus, window = planning.gpus, min(1000, max(int(trace.steps[-1] - trace.steps[0]) // 2, 1))
    cutoff = int(trace.steps[-1]) - window
    base = least_redundant(trace.experts, gpus)
    tried = [base + n * gpus for n in (0, 1, 2, 4) if planning.with_redundant(base + n * gpus).fits(trace.experts)]
    tried = tried or [planning.redundant]
    balances, lowest = [], []
    for layer in spread(trace.layers):
        load = trace.layer(layer)
        seen, after = load.until(cutoff).last(window), load.after(cutoff, window).counts
        plans = [planning.with_redundant(n) for n in tried]
        balances.append(
            [own.evenness(own.place(own.load(seen.counts, seen.mean_shares)), after).balance for own in plans]
        )
        lowest.append(lowest_peak(seen.mean_shares, gpus, planning.redundant) * gpus)
    mean = np.mean(balances, axis=0).round(DIGITS)
    enough = next(n for n, balance in zip(tried, mean) if balance >= mean.max() - ENOUGH)
    return enough, float(np.mean(lowest)) if planning.time.linear else float("nan")


def _is(replay: pd.DataFrame, policy: pd.Series[Any]) -> pd.Series[bool]:
    """Which rows are those of *policy*."""
    own = replay[POLICY[1:]].astype(object)
    return (own.fillna(-1) == policy[POLICY[1:]].astype(object).fillna(-1)).all(axis=1)


def _holds(replay: pd.DataFrame, best: pd.Series[Any]) -> int | None:
    """For how many steps a plan made once stays within `ENOUGH` of the balance of the *best* policy, or the next best.

    Over 1,000 steps, so that one block does not decide; None to the end, and where no plan is made.
    """
    same = replay[replay["redundant"] == best["redundant"]]
    static, often = same[same["system"] == "static"], replay[_is(replay, best)]
    if best["system"] == "static":  # compared with the policy that plans again and has the best balance
        again = same[~same["system"].isin(["static", "none"])]
        others = [part for _, part in again.groupby(POLICY[1:], dropna=False)]
        often = min(others, key=lambda part: part["peak_load"].sum() / part["mean_load"].sum(), default=again)
    if static.empty or often.empty or best["system"] == "none":
        return None
    sums = [part.groupby("step")[["peak_load", "mean_load"]].sum().rolling(4, 1).sum() for part in (static, often)]
    once, anew = ((part["mean_load"] / part["peak_load"]).round(DIGITS) for part in sums)
    worse = once.index[once < anew - ENOUGH]
    return int(worse[0] - replay["step"].min()) if len(worse) else None


# --- from how many tokens on ------------------------------------------------------------------


def knee_frame(trace: LoadTrace, planning: Planning) -> pd.DataFrame:
    """One row for each of `RATIOS`: *tokens_over_ridge*, and what one plan *saved* of the expert time of a step.

    A plan by tokens from the last 1,000 steps of the first half of *trace*, on `KNEE_STEPS` steps of the second half,
    in layers that are `spread`, compared with the default placement, both with as few redundant experts as fill the
    GPUs. Where the plan takes longer on the steps it was made from, the default placement stays. Empty for a trace of
    fewer than 4 logged steps.
    """
    import pandas as pd

    few = planning.with_redundant(least_redundant(trace.experts, planning.gpus))
    tokens, default = replace(few, time=BY_TOKENS), few.default(trace.experts)
    spent = np.zeros((len(RATIOS), 2))  # by the plan, and by the default placement
    for number in spread(trace.layers) if len(trace.steps) >= 4 else ():
        load = trace.layer(number)
        middle = len(load.steps) // 2
        seen = load.until(int(load.steps[middle - 1])).last(1000)
        plan = tokens.place(tokens.load(seen.counts, seen.mean_shares))
        before, after = (part[:: -(-len(part) // KNEE_STEPS)] for part in (seen.counts, load.counts[middle:]))
        for row, ratio in enumerate(RATIOS):
            own = replace(few, time=StepTime(load.counts.mean() / planning.time.passes / ratio, passes=few.time.passes))
            known, then = (
                [own.split.peaks(each.held, part).sum() for each in (plan, default)] for part in (before, after)
            )
            spent[row] += np.array([then[int(known[1] < known[0])], then[1]]) / own.time.cost(after).sum()
    saved = 1 - spent[:, 0] / spent[:, 1] if spent.any() else np.array([])
    return pd.DataFrame({"trace": trace.name, "tokens_over_ridge": RATIOS[: len(saved)], "saved": saved})


def worth_from(knee: pd.DataFrame, saved: float) -> float | None:
    """The least tokens over the ridge from which on a plan saves at least *saved*; None where it never does.

    Between two rows of the *knee* the saving is linear in the logarithm; 0 where it is as much at the first row.

    >>> import pandas as pd
    >>> round(worth_from(pd.DataFrame({"tokens_over_ridge": [0.25, 1.0], "saved": [0.0, 0.04]}), 0.02), 3)
    0.5
    """
    ratios, values = knee["tokens_over_ridge"].to_numpy(), knee["saved"].to_numpy()
    below = np.flatnonzero(values < saved)
    if not len(below):
        return 0.0
    last = int(below[-1])
    if last + 1 == len(values):
        return None
    part = (saved - values[last]) / (values[last + 1] - values[last])
    return float(np.exp(np.log(ratios[last]) + part * np.log(ratios[last + 1] / ratios[last])))
