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
    "assume that each step waits for its busiest GPU (modelled, not measured). The policy was chosen on the first half "
    "of the trace and evaluated on the second"
)
HOT = 1.005  # of an expert that is below, two digits show no effect


def worth(verdict: Mapping[str, Any] | None, command: str = "") -> Answer:
    """The answer of a *verdict* of ``place --json``, with ``gpus``; without one, the *command* that would give it."""
    if verdict is None:
        return Answer(QUESTION, "not evaluated", f"Not evaluated. Run {command}.", fine=True)
    answer, best = f"{capitalised(verdict['verdict'])} on {verdict['gpus']} GPUs", "The best policy is"
    if verdict["verdict"] == DEPENDS:
        answer = f"Whether balancing is worth it on {verdict['gpus']} GPUs depends on the hardware"
    if verdict["steps"] < verdict["evidence_steps"]:
        answer += f" (a verdict needs {verdict['evidence_steps']:,} steps, this trace has {verdict['steps']:,})"
        best = "On this short trace, the best policy is"
    if verdict["system"] is None:
        return Answer(QUESTION, verdict["verdict"], f"{answer}: the plan is made from its mean load, and not tested.")
    known = verdict["ridge"] is not None
    bound = f"{answer}: {regime(verdict)}" if verdict["ridge"] else answer
    fine = verdict["verdict"] == NOT_WORTH_IT
    if verdict["start"] == "nothing":
        none = f"{bound}. {capitalised(NO_GAIN)}." if verdict["ridge"] else f"{answer}: {NO_GAIN}."
        return Answer(QUESTION, verdict["verdict"], none, f"Savings are of expert time, and {MODEL}.", fine=fine)
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
        return Answer(QUESTION, f"{percent(verdict['saved'], 0)} saved", f"{cuts}{amount}.", evidence, fine=fine)
    sentence = (
        f"{cuts} if expert time is proportional to tokens. On a GPU that is memory-bound below "
        f"{verdict['memory_bound_ridge']:,.0f} tokens per expert, it cuts {_saved(verdict, 'saved_memory_bound')}. "
        f"Here an expert gets {tokens_of(verdict)} per pass."
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
    return f"start {policy['system']} with its flags (on stderr; `launch` in JSON), and without a plan file"
