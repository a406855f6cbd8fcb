"""Whether balancing is worth it, in words: the sentence, its evidence, and what to start or to deploy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetrace.reporting.phrases import Answer, bytes_of, capitalised, percent
from moetrace.reporting.tables import rows_of
from moetrace.words import DEPENDS, NOT_WORTH_IT

QUESTION = "Worth balancing?"
NO_GAIN = "no policy improves the balance of the default placement by 0.01, which is about 1% of the expert time"
MODEL = (
    "assume that step time follows the busiest GPU (modelled, not measured). The policy was chosen on the first half "
    "of the trace and evaluated on the second."
)
HOT = 1.005  # of an expert that is below, two digits show no effect


def worth(verdict: Mapping[str, Any] | None, command: str = "") -> Answer:
    """The answer of a *verdict* of ``place --json``, with ``gpus``; without one, the *command* that would give it."""
    if verdict is None:
        return Answer(QUESTION, "not evaluated", f"Not evaluated. Run {command}.", fine=True)
    answer = f"{capitalised(verdict['verdict'])} on {verdict['gpus']} GPUs"
    if verdict["steps"] < verdict["evidence_steps"]:
        answer += f" (a verdict needs {verdict['evidence_steps']:,} steps, this trace has {verdict['steps']:,})"
        if verdict["system"] is not None:
            answer += ". Best estimate"
    if verdict["system"] is None:
        return Answer(QUESTION, verdict["verdict"], f"{answer}: the plan is made from its mean load, and not tested.")
    known = verdict["ridge"] is not None
    bound = f"{answer}: {regime(verdict)}" if verdict["ridge"] else answer
    fine = verdict["verdict"] == NOT_WORTH_IT
    if verdict["start"] == "nothing":
        return Answer(QUESTION, verdict["verdict"], f"{bound}: {NO_GAIN}.", f"Savings {MODEL}", fine=fine)
    replicas = verdict["plain_redundant"]
    plain = "the default placement" + (f" with {replicas:,} redundant experts" if replicas else "")
    moves = "No experts move after the first plan."
    if verdict["moved_per_1000"] > 0:
        size = verdict["moved_bytes"]
        amount = f" ({bytes_of(size)})" if size == size else ""
        moves = f"{percent(verdict['moved_per_1000'], 0)} of the slots{amount} move per 1,000 steps."
    evidence = f"Savings are relative to {plain} and {MODEL} {moves}"
    saved = _saved(verdict, "saved")
    if known:
        time = verdict["microseconds"]
        amount = "" if time is None else f", {time:,.1f} µs per layer and step"
        how = f"cuts expert time per step by {saved}{amount}."
        if not verdict["ridge"]:
            sentence = f"{answer}: {verdict['policy']} {how}"
        elif verdict["verdict"] == NOT_WORTH_IT:
            sentence = f"{bound}. The best policy, {verdict['policy'].rstrip(',')}, {how}"
        else:
            sentence = f"{bound}. {capitalised(verdict['policy'])} {how}"
        return Answer(QUESTION, f"{percent(verdict['saved'], 0)} saved", sentence, evidence, fine=fine)
    sentence = (
        f"{answer}: {verdict['policy']} cuts expert time per step by {saved} where time follows tokens, and by "
        f"{_saved(verdict, 'saved_memory_bound')} on a GPU that is memory-bound below "
        f"{verdict['memory_bound_ridge']:,.0f} tokens per expert; here an expert gets {tokens_of(verdict)} per pass."
    )
    if verdict["verdict"] == DEPENDS:
        sentence += " Add --hardware to decide."
    ends = sorted((verdict["saved"], verdict["saved_memory_bound"]))
    number = f"{100 * ends[0]:.0f} to {100 * ends[1]:.0f}% saved"
    return Answer(QUESTION, number, sentence, evidence, fine=fine)


def worthwhile(verdict: Mapping[str, Any]) -> str:
    """From how many tokens per expert a plan saves 5%, empty where it never does."""
    ratio, ridge = verdict.get("worth_from"), verdict.get("ridge")
    if ratio is None:
        return ""
    if ridge:
        on = f" on {verdict['hardware'].upper()}" if verdict["hardware"] else ""
        return f"A plan saves 5% or more from about {ratio * ridge:,.0f} tokens per expert and pass{on}."
    return (
        f"A plan saves 5% or more where an expert gets at least about {ratio:.2g} times the ridge of the GPU per pass."
    )


def first_answer(trace: str, bound: Any) -> str:
    """What balancing can save at most on a *trace*, before any policy is replayed; *bound* is that of `at_most`."""
    about, most = f"an expert gets {tokens_of(bound._asdict())} per pass", f"{100 * bound.saved:.1f}%"
    if bound.ridge is None:
        most += f" where time follows tokens and {100 * bound.saved_memory_bound:.1f}% where experts are memory-bound"
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
        return "time follows tokens"
    passes = verdict["tokens_per_expert"] / ridge
    which = "memory-bound" if passes < 0.5 else "compute-bound" if passes > 2 else "partly memory-bound"
    return f"experts are {which}{on}, with {tokens_of(verdict)} per expert and pass and a ridge of {ridge:,.0f}"


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
    more = f"More than {enough:,} redundant experts" if enough else "Redundant experts"
    limits = f"{more} would gain less than 1%."
    tried = verdict["by_redundant"] or ()
    if len(tried) > 1:
        each = (f"{own['redundant']:,} save {100 * own['saved']:.1f}%" for own in tried)
        limits = f"Of the numbers of redundant experts asked for, {', '.join(each)}. {limits}"
    if floor >= HOT:
        limits += f" The hottest expert limits the busiest GPU to {floor:.2f}x at best."
    if verdict["start"] == "nothing":
        return [answer.evidence, limits]
    best = "the best re-planning policy" if verdict["start"] == "file" else "this policy"
    holds = "to the end of the trace"
    if verdict["holds"] is not None:
        holds = f"for {verdict['holds']:,} steps" if verdict["holds"] else "for less than 250 steps"
    limits = " ".join([limits, worthwhile(verdict)]).strip()
    lasting = f"A plan made once stays within 1% of {best} {holds}."
    return [answer.evidence, f"{lasting} {limits}", *([deployment(verdict)] if files else [])]


def deployment(verdict: Mapping[str, Any]) -> str:
    """What to start or which file to deploy, and whether that is the recommended policy."""
    if verdict["system"] is None:
        return "To deploy the plan, start your serving system with its file and flags listed above."
    if verdict["start"] == "file":
        return "To deploy this policy, start your serving system with its file and flags listed above."
    if verdict["start"] == "flags":
        return (
            f"To deploy this policy, start {verdict['system']} with the policy flags above and no placement file. "
            "The files hold a fixed plan, for systems that load one; they do not implement this policy."
        )
    stock = verdict["stock"]
    how = {
        "nothing": "it needs nothing",
        "file": "start your serving system with its file and flags listed above",
        "flags": f"start {stock['system']} with the policy flags above and no placement file",
    }[stock["start"]]
    return (
        "This policy needs a system that takes plans while it runs: `moetrace.rebalance_experts` makes them, with "
        f"`before`. Without changes to a system, {stock['policy']} cuts expert time per step by "
        f"{100 * stock['saved']:.1f}%: {how}."
    )
