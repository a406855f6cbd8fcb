"""The answers in words: one sentence for each question, made from the frames that hold the evidence.

That on balancing has notes, too: its evidence, and what to start or to deploy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moetrace.reporting.phrases import SAME, Answer, bytes_of, capitalised, count_of, listed, percent, points
from moetrace.reporting.residency import kept
from moetrace.reporting.tables import rows_of
from moetrace.words import (
    BASELINE,
    COLLAPSED,
    DEFAULT,
    DEPENDS,
    DEPLOYED,
    MODERATE,
    NOT_WORTH_IT,
    OK,
    ORACLE,
    SEVERE,
    SEVERITIES,
    STABLE,
    STATES,
    TRANSIENT,
    UNKNOWN,
)  # fmt: skip

if TYPE_CHECKING:
    import pandas as pd

BALANCED, SETTLED, PREDICTABLE, WORTH = "Balanced?", "Settled?", "Predictable?", "Worth balancing?"
PHASE = {STABLE: "Stable phase", TRANSIENT: "Transient phase", UNKNOWN: "Stability unknown"}
# What the number of a card adds where it is of another state than the one that counts.
OTHERWISE = {STABLE: "", TRANSIENT: ", transient", UNKNOWN: ", state unknown"}
BASELINE_NAMED = "the 1,000-step mean"
FROM_START = "stable from the start"
TOO_FEW = "too few rows, or rows too far apart"
GRADUAL = 2000  # steps of an interval beyond which the settle step is only one of many
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


# --- is it balanced? -----------------------------------------------------------------------------------------------


# What people do about it: balancing loss (Switch Transformer, arXiv 2101.03961), bias rate (arXiv 2408.15664), router
# z-loss (ST-MoE, arXiv 2202.08906), capacity (GShard, arXiv 2006.16668).
ADVICE = {
    OK: "",
    MODERATE: "",
    SEVERE: "When training, raise the balancing loss or the bias rate, or set a capacity limit; when serving, try a "
    "plan (moetrace place).",
    COLLAPSED: "Go back to a checkpoint before it, with a larger balancing loss or bias rate and a router z-loss.",
}
# Before the answer of a plan, which is tried already.
ADVICE_BESIDE_A_PLAN = ADVICE | {SEVERE: ""}


def balanced(balance: pd.DataFrame, advice: Mapping[str, str] = ADVICE) -> Answer:
    """How bad the imbalance is now, of the worst layer first, from the frame ``balance``, one row for each layer."""
    rows = sorted(rows_of(balance), key=lambda row: (-SEVERITIES.index(row["severity"]), -row["max_over_mean"]))
    worst, idle = rows[0], int(balance["idle"].sum())
    share = f"{worst['max_over_mean']:.1f}x the mean load ({percent(worst['hottest_share'], 0)} of the tokens)"
    expert = f"expert {worst['hottest']} gets {share}"
    since = f", since step {int(worst['since']):,}" if worst["since"] == worst["since"] and worst["since"] else ""
    alike = [row["layer"] for row in rows if row["severity"] == worst["severity"]]
    others = f" So {'has' if len(alike) == 2 else 'have'} layer{'' if len(alike) == 2 else 's'} {listed(alike[1:])}."
    where = f"layer {worst['layer']}" if len(alike) == 1 else f"{len(alike)} layers, most in layer {worst['layer']}"
    used = percent(worst["in_use"], 0)
    busiest = f"the busiest expert (layer {worst['layer']}, expert {worst['hottest']}) gets {share}"
    sentence = {
        OK: f"The load is balanced: {busiest}.",
        MODERATE: f"Moderate imbalance in {where}: {expert}{since}.",
        SEVERE: f"Severe imbalance in {where}: {expert}{since}.",
        COLLAPSED: f"The router of layer {worst['layer']} has collapsed ({used} of experts in use): {expert}{since}.",
    }[worst["severity"]]
    if worst["severity"] == COLLAPSED and len(alike) > 1:
        sentence += others
    if idle:
        sentence += f" {count_of(idle, 'expert').capitalize()} got no token at all."
    sentence = " ".join([sentence, advice[worst["severity"]]]).strip()
    over = f"the last {int(balance['steps'].iloc[0]):,} steps"
    return Answer(BALANCED, worst["severity"], sentence, over, worst["severity"], worst["severity"] == OK)


def alarm(balance: pd.DataFrame, advice: Mapping[str, str] = ADVICE) -> str:
    """The sentence about the imbalance where it is severe or the router has collapsed, before any other answer."""
    bad = set(balance["severity"]) & {SEVERE, COLLAPSED}
    return f"{balanced(balance, advice).sentence} " if bad else ""


# --- has it settled? -----------------------------------------------------------------------------------------------


def settled(layers: pd.DataFrame) -> Answer:
    """When the layers became stable, from the frame ``layers``."""
    n, done = len(layers), layers[layers["state"] == STABLE]
    known = layers[layers["state"] != UNKNOWN]
    if known.empty:
        which = "the only layer" if n == 1 else f"all {n} layers"
        sentence = f"Stability unknown for {which}: {TOO_FEW}."
        return Answer(SETTLED, f"{len(done)} of {n} layers", sentence)
    agree = int((known["detectors"] == "agree").sum())
    evidence = f"the rank test agrees in {agree} of {len(known)} layers"
    settling = done[done["outcome"] != FROM_START]
    if len(settling):
        last = max(rows_of(settling), key=lambda layer: layer["settle_step"])
        low, high = int(last["settle_step_low"]), int(last["settle_step_high"])
        evidence = f"layer {last['layer']} settled between {low:,} and {high:,}; {evidence}"
    sentence = " ".join([_settled_sentence(done, n), *_not_settled(layers)])
    return Answer(SETTLED, f"{len(done)} of {n} layers", sentence, evidence, fine=len(done) == n)


def _settled_sentence(done: pd.DataFrame, n: int) -> str:
    """How many layers are stable, and when those that settled did; the last of them by its number."""
    if done.empty:
        return f"None of {n} layers is stable by the end." if n > 1 else "The only layer is not stable by the end."
    count = {1: "The only layer is", 2: "Both layers are"}.get(n, f"All {n} layers are")
    if len(done) < n:
        count = f"{capitalised(_in_words(len(done)))} of {n} layers {'is' if len(done) == 1 else 'are'}"
    settling = rows_of(done[done["outcome"] != FROM_START].sort_values("settle_step", kind="stable"))
    if not settling:
        return f"{count} stable from the start."
    *others, last = settling
    low, high, at = (int(last[name]) for name in ("settle_step_low", "settle_step_high", "settle_step"))
    named = f"Layer {last['layer']} settled at step {at:,}."
    if high - low > GRADUAL:
        named = f"Layer {last['layer']} settled gradually, around step {at:,} (plausible range {low:,} to {high:,})."
    by = f"by step {int(others[-1]['settle_step']):,}" if others else ""
    first = f"Layer {others[0]['layer']} settled {by}. " if len(others) == 1 else ""
    if len(others) > 1:
        first = f"{capitalised(_in_words(len(others)))} settled {by}. "
    return f"{count} stable by the end. {first}{named}"


def _not_settled(layers: pd.DataFrame) -> list[str]:
    """Sentences about the layers that are not stable at the end."""
    moving, unknown = layers[layers["state"] == TRANSIENT], layers[layers["state"] == UNKNOWN]
    again = moving[moving["outcome"] == "unsettled again"]
    never = moving[moving["outcome"] != "unsettled again"]
    sentences = []
    if len(never):
        all_of_many = len(never) == len(layers) > 1
        sentences.append("No layer settles." if all_of_many else f"{_layers_named(never, len(layers))} never settled.")
    if len(again):
        by = int(again["unsettled_step_high"].astype(float).max())
        were = f"{_layers_named(again, len(layers))} {'was' if len(again) == 1 else 'were'}"
        sentences.append(f"{were} stable for a time, but unstable again by step {by:,}.")
    if len(unknown):
        sentences.append(f"{_layers_named(unknown, len(layers))}: stability unknown ({TOO_FEW}).")
    return sentences


def _layers_named(some: pd.DataFrame, n: int) -> str:
    """*some* of *n* layers: all, or a few by their numbers, or how many and the first of them."""
    count, names = len(some), some["layer"].tolist()
    if count == n > 1:
        return "Both layers" if n == 2 else f"All {n} layers"
    if count > 4:
        return f"{count} layers ({', '.join(map(str, names[:4]))} and others)"
    return f"Layer{'' if count == 1 else 's'} {listed(names)}"


def _in_words(number: int) -> str:
    return NUMBERS[number] if number < len(NUMBERS) else f"{number:,}"


# --- can it be predicted? ------------------------------------------------------------------------------------------


def predictable(summary: pd.DataFrame, horizon: int) -> Answer:
    """How well the load of the next *horizon* steps was known, from the frame ``summary``: best beside baseline.

    Of scored cutoffs only; where none was scored, it says so. The best is the one with the lowest mean error.
    """
    own = summary[(summary["horizon"] == horizon) & (summary["scored"] > 0)]
    parts = {state: own[own["state"] == state] for state in STATES}
    parts = {state: rows for state, rows in parts.items() if len(rows)}
    if not parts:
        why = f"no cutoff of this trace can be evaluated {horizon:,} steps ahead"
        if summary[summary["horizon"] == horizon]["too_short"].sum():
            why = "every cutoff has less history than any of the predictors needs"
        return Answer(PREDICTABLE, "not measured", f"Not measured: {why}.", fine=True)
    sentence = " ".join(_state_sentence(state, rows) for state, rows in parts.items())
    if STABLE not in parts:
        sentence += " Nothing could be evaluated in a stable phase."
    first = next(iter(parts))
    best = best_of(parts[first])
    scored = " or ".join(f"{int(rows['scored'].max()):,} ({state})" for state, rows in parts.items())
    bests = {state: best_of(rows) for state, rows in parts.items()}
    covered = [f"{percent(row['coverage_80'], 0)} ({state}, {row['predictor']})" for state, row in bests.items()]
    evidence = (
        f"errors are means over {scored} pairs of layer and cutoff; brackets are 95% intervals. The 80% prediction "
        f"intervals of the predictor with the lowest error covered the load in {' and '.join(covered)}"
    )
    number = f"{percent(best['error_rate'])} error{OTHERWISE[first]}"
    return Answer(PREDICTABLE, number, sentence, evidence, fine=best["predictor"] == BASELINE)


def expected(ahead: pd.DataFrame, summary: pd.DataFrame, horizon: int) -> str:
    """What the best predictor expects of its forecast of the steps to come, from its rows in *ahead*, one a layer."""
    scored = summary[(summary["horizon"] == horizon) & (summary["scored"] > 0)]
    first = next((state for state in STATES if (scored["state"] == state).any()), None)
    best = str(best_of(scored[scored["state"] == first])["predictor"]) if first else str(ahead["predictor"].iloc[0])
    error = ahead.loc[ahead["predictor"] == best, "expected_error"].astype(float).mean()
    if error != error:
        return ""
    return (
        f"Expected error over the {horizon:,} steps after the trace, from how the load changes at its end: "
        f"{percent(error)} ({best})."
    )


def best_of(rows: pd.DataFrame) -> dict[str, Any]:
    """The row of the lowest mean error."""
    return min(rows_of(rows), key=lambda row: row["error_rate"])


def _state_sentence(state: str, rows: pd.DataFrame) -> str:
    """Which predictor clearly beats the baseline in one state, and by how much."""
    best, phase = best_of(rows), PHASE[state]
    floor = percent(best["error_noise"]) if best["error_noise"] == best["error_noise"] else "unknown"
    baseline = f"error {percent(best['error_rate'] - best['difference'])}, noise floor {floor}"
    own = f"{best['predictor']} has {percent(best['error_rate'])} error"
    if len(rows) == 1 and best["predictor"] == BASELINE:
        return f"{phase}: {own} (noise floor {floor})."
    if len(rows) == 1:
        apart = points(best["difference"], best["difference_low"], best["difference_high"])
        compared = "no clear difference from" if apart == SAME else f"{apart} compared with"
        return f"{phase}: {own} (noise floor {floor}), {compared} {BASELINE_NAMED}."
    better = rows[rows["difference_high"] < 0]
    if len(better):
        best = best_of(better)
        instead = percent(best["error_rate"] - best["difference"])
        return (
            f"{phase}: {best['predictor']} clearly beats {BASELINE_NAMED}: {percent(best['error_rate'])} error instead "
            f"of {instead} (noise floor {floor})."
        )
    if rows["difference_low"].isna()[rows["predictor"] != BASELINE].all():
        lowest = "" if best["predictor"] == BASELINE else f"; {own}"
        return f"{phase}: too few cutoffs to compare predictors with {BASELINE_NAMED} ({baseline}){lowest}."
    return f"{phase}: no predictor clearly beats {BASELINE_NAMED} ({baseline})."


# --- is balancing worth it? ----------------------------------------------------------------------------------------


NO_GAIN = "no policy improves the balance of the default placement by 0.01, which is about 1% of the expert time"
MODEL = (
    "assume that each layer waits for its busiest GPU in every step (modelled, not measured). The policy was chosen on "
    "the first half of the trace and evaluated on the second"
)
HOT = 1.005  # of an expert that is below, two digits show no effect


def worth(verdict: Mapping[str, Any] | None, command: str = "") -> Answer:
    """The answer of a *verdict* of ``place --json``, with ``gpus``; without one, the *command* that would give it."""
    if verdict is None:
        return Answer(WORTH, "not evaluated", f"Not evaluated. Run {command}.", fine=True)
    answer, best = f"{capitalised(verdict['verdict'])} on {verdict['gpus']} GPUs", "The recommended policy is"
    if verdict["verdict"] == DEPENDS:
        answer = f"Whether balancing is worth it on {verdict['gpus']} GPUs depends on the hardware"
    if verdict["steps"] < verdict["evidence_steps"]:
        answer += f" (a verdict needs {verdict['evidence_steps']:,} steps, this trace has {verdict['steps']:,})"
        best = "On this short trace, the recommended policy is"
    if verdict["system"] is None:
        return Answer(WORTH, verdict["verdict"], f"{answer}: the plan is made from its mean load, and not tested.")
    known = verdict["ridge"] is not None
    bound = f"{answer}: {regime(verdict)}" if verdict["ridge"] else answer
    fine = verdict["verdict"] == NOT_WORTH_IT
    if verdict["start"] == "nothing":
        none = f"{bound}. {capitalised(NO_GAIN)}." if verdict["ridge"] else f"{answer}: {NO_GAIN}."
        return Answer(WORTH, verdict["verdict"], none, f"Savings are of expert time, and {MODEL}.", fine=fine)
    replicas = verdict["plain_redundant"]
    plain = "the default placement" + (f" with {replicas:,} redundant experts" if replicas else "")
    moves = "" if verdict["start"] == "file" else ", in which it moved no experts"
    if verdict["moved_per_1000"] > 0:
        size = verdict["moved_bytes"]
        amount = f" ({bytes_of(size)})" if size == size else ""
        moves = f", in which it moved {percent(verdict['moved_per_1000'], 0)} of the slots{amount} per 1,000 steps"
    evidence = f"Savings are of expert time, relative to {plain}, and {MODEL}{moves}."
    cuts = (
        f"{bound}. {best} {verdict['policy'].rstrip(',')}. It cuts expert time per step by {_saved(verdict, 'saved')}"
    )
    if known:
        time = verdict["microseconds"]
        amount = "" if time is None else f", {time:,.1f} µs per layer and step"
        return Answer(WORTH, f"{percent(verdict['saved'], 0)} saved", f"{cuts}{amount}.", evidence, fine=fine)
    sentence = (
        f"{cuts} if expert time is proportional to tokens. On a GPU that is memory-bound below "
        f"{verdict['memory_bound_ridge']:,.0f} tokens per expert, it cuts {_saved(verdict, 'saved_memory_bound')}. "
        f"Here an expert gets {tokens_of(verdict)} per pass."
    )
    if verdict["verdict"] == DEPENDS:
        sentence += " Add --hardware to decide."
    ends = sorted((verdict["saved"], verdict["saved_memory_bound"]))
    number = f"{100 * ends[0]:.0f} to {100 * ends[1]:.0f}% saved"
    return Answer(WORTH, number, sentence, evidence, fine=fine)


def worthwhile(verdict: Mapping[str, Any]) -> str:
    """From how many tokens per expert a plan saves 5%, empty where it never does."""
    ratio, ridge = verdict.get("worth_from"), verdict.get("ridge")
    if ratio is None:
        return ""
    if ridge:
        plan = f"On {verdict['hardware'].upper()}, a plan" if verdict["hardware"] else "A plan"
        return f"{plan} saves 5% or more if experts get at least about {ratio * ridge:,.0f} tokens per pass on average."
    highest = verdict["tokens_per_expert"] / ratio
    return f"A plan saves 5% or more on GPUs with a ridge of at most about {highest:,.0f} tokens."


def first_answer(trace: str, bound: Any) -> str:
    """What balancing can save at most on a *trace*, before any policy is replayed; *bound* is that of `at_most`."""
    about, most = f"an expert gets {tokens_of(bound._asdict())} per pass", f"{100 * bound.saved:.1f}%"
    if bound.ridge is None:
        most += (
            f" if expert time is proportional to tokens, and by {100 * bound.saved_memory_bound:.1f}% if experts are "
            "memory-bound"
        )
    elif bound.ridge:
        about = regime(bound._asdict())
    return f"{trace}: {about}. Perfectly even GPUs would cut expert time per step by {most}."


def _saved(verdict: Mapping[str, Any], name: str) -> str:
    """A saving with its interval, unless both ends are the same in the digits shown."""
    low, high, saved = (f"{100 * verdict[key]:.1f}" for key in (f"{name}_low", f"{name}_high", name))
    return f"{saved}%" if low == high == saved else f"{saved}% (95% interval {low} to {high}%)"


def tokens_of(verdict: Mapping[str, Any]) -> str:
    """The mean tokens of an expert in a pass."""
    tokens = verdict["tokens_per_expert"]
    return f"{tokens:,.1f} tokens" if tokens < 10 else f"{tokens:,.0f} tokens"


def regime(verdict: Mapping[str, Any]) -> str:
    """Whether experts are memory-bound or compute-bound on the hardware, and why."""
    ridge, on = verdict["ridge"], f" on {verdict['hardware'].upper()}" if verdict["hardware"] else ""
    if not ridge:
        return "expert time is proportional to tokens"
    passes = verdict["tokens_per_expert"] / ridge
    which = "memory-bound" if passes < 0.5 else "compute-bound" if passes > 2 else "partly memory-bound"
    return (
        f"experts are {which}{on}, because an expert gets {tokens_of(verdict)} per pass and the ridge is {ridge:,.0f}"
    )


def verdict_in(frames: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The verdict among the *frames* of a study, None where no number of GPUs was given."""
    found = frames.get("verdict")
    return rows_of(found)[0] if found is not None and len(found) else None


def verdict_notes(verdict: Mapping[str, Any], *, files: bool = True) -> list[str]:
    """What stands below the table, a paragraph each: the evidence, how long a plan holds, and what to deploy.

    Without *files*, as of some layers alone, there is nothing to deploy.
    """
    answer = worth(verdict)
    if verdict["system"] is None:
        return [deployment(verdict)] if files else []
    enough, floor = verdict["enough_redundant"], verdict["floor"]
    limits = "Redundant experts would save less than 1%."
    if enough:
        limits = f"Up to {enough:,} redundant experts per layer improve the balance; further ones save less than 1%."
    tried = verdict["by_redundant"] or ()
    if len(tried) > 1:
        each = (f"{own['redundant']:,} save {100 * own['saved']:.1f}%" for own in tried)
        limits = f"Of the numbers of redundant experts asked for, {', '.join(each)}. {limits}"
    if floor >= HOT:
        slots = f"With {verdict['redundant']:,}" if verdict["redundant"] else "Without"
        limits += f" {slots} redundant experts, no plan brings the busiest GPU below {floor:.2f}x."
    if verdict["start"] == "nothing":
        return [answer.evidence, limits]
    best = "the best re-planning policy" if verdict["start"] == "file" else "this policy"
    kept = "to its end"
    if verdict["holds"] is not None:
        kept = f"for {verdict['holds']:,} steps" if verdict["holds"] else "for less than 250 steps"
    limits = " ".join([limits, worthwhile(verdict)]).strip()
    lasting = (
        f"A plan made at the beginning of the trace and kept {kept} needs at most about 1% more expert time than "
        f"{best}."
    )
    return [answer.evidence, f"{lasting} {limits}", *([deployment(verdict)] if files else [])]


def deployment(verdict: Mapping[str, Any]) -> str:
    """What to start or which file to deploy, and whether that is the recommended policy."""
    from_file = "load the plan file of your system with its flags (on stderr; `deploy` in JSON)"
    if verdict["system"] is None:
        return f"To deploy the plan, {from_file}."
    wish = "If you still want this policy" if verdict["verdict"] == NOT_WORTH_IT else "To deploy this policy"
    if verdict["start"] == "file":
        return f"{wish}, {from_file}."
    if verdict["start"] == "flags":
        return (
            f"{wish}, {_started(verdict)}. The plan files hold one fixed plan, for systems that can load a plan. "
            "They do not implement this policy."
        )
    stock = verdict["stock"]
    how = {
        "nothing": "it needs nothing",
        "file": from_file,
        "flags": _started(stock),
    }[stock["start"]]
    return (
        "This policy needs a system that takes plans while it runs: `moetrace.rebalance_experts` makes them, with "
        f"`before`. Without changes to a system, {stock['policy']} cuts expert time per step by "
        f"{100 * stock['saved']:.1f}%: {how}."
    )


def _started(policy: Mapping[str, Any]) -> str:
    """How a system is started that plans by itself."""
    return f"start {policy['system']} with its flags (on stderr; `verdict.launch` in JSON), and without a plan file"


def plan_peaks(summary: pd.DataFrame) -> dict[str, float]:
    """The mean load of the busiest GPU by strategy, over all states."""
    return {row["strategy"]: row["peak_over_mean"] for row in rows_of(summary) if row["state"] == "all"}


def best_plan(peaks: Mapping[str, float]) -> str:
    """The strategy of the lowest of the *peaks*, of those that plan by a forecast."""
    return min((name for name in peaks if name not in (DEFAULT, DEPLOYED, ORACLE)), key=lambda name: peaks[name])


# --- all of them, for one trace ------------------------------------------------------------------------------------


def answers_of(frames: Mapping[str, pd.DataFrame]) -> list[Answer]:
    """The answers on one trace, in the order of the cards, from the frames of a study; the last only with ``kept``."""
    trace = str(frames["layers"]["trace"].iloc[0])
    horizons = sorted(frames["summary"]["horizon"].unique()) if len(frames["summary"]) else [1000]
    return [
        balanced(frames["balance"]),
        settled(frames["layers"]),
        predictable(frames["summary"], int(horizons[0])),
        worth(verdict_in(frames), f"moetrace place {trace} --gpus N"),
        *(kept(row) for name in ("kept",) if name in frames for row in rows_of(frames[name])),
    ]
