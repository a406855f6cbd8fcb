"""Whether balancing is worth it, in words: the sentence, its evidence, and what to start or to deploy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moetrace.report.phrases import Answer, bytes_of, percent_whole
from moetrace.report.tables import rows_of

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
        return Answer(QUESTION, "not evaluated", f"Not evaluated. Run {command}.")
    answer = f"{verdict['verdict'][:1].upper()}{verdict['verdict'][1:]} on {verdict['gpus']} GPUs"
    if verdict["system"] is None:
        return Answer(QUESTION, verdict["verdict"], f"{answer}: the trace is too short to choose and test a policy.")
    if verdict["start"] == "nothing":
        return Answer(QUESTION, verdict["verdict"], f"{answer}: {NO_GAIN}.", f"Savings {MODEL}")
    low, high = (f"{100 * verdict[f'saved_{end}']:.1f}" for end in ("low", "high"))
    saved = f"{100 * verdict['saved']:.1f}% (95% interval {low} to {high}%)"
    sentence = f"{answer}: {verdict['policy']} cuts expert time per step by {saved}."
    replicas = verdict["plain_redundant"]
    plain = "the default placement" + (f" with {replicas:,} redundant experts" if replicas else "")
    moves = "No experts move after the first plan."
    if verdict["moved_per_1000"] > 0:
        size = verdict["moved_bytes"]
        amount = f" ({bytes_of(size)})" if size == size else ""
        moves = f"{percent_whole(verdict['moved_per_1000'])} of the slots{amount} move per 1,000 steps."
    evidence = f"Savings are relative to {plain} and {MODEL} {moves}"
    return Answer(QUESTION, f"{percent_whole(verdict['saved'])} saved", sentence, evidence)


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
        return [answer.sentence]
    enough, floor = verdict["enough_redundant"], verdict["floor"]
    more = f"More than {enough:,} redundant experts" if enough else "Redundant experts"
    limits = f"{more} would gain less than 1%."
    if floor >= HOT:
        limits += f" The hottest expert limits the busiest GPU to {floor:.2f}x at best."
    if verdict["start"] == "nothing":
        return [answer.evidence, limits]
    best = "the best re-planning policy" if verdict["start"] == "file" else "this policy"
    holds = "to the end of the trace"
    if verdict["holds"] is not None:
        holds = f"for {verdict['holds']:,} steps" if verdict["holds"] else "for less than 250 steps"
    lasting = f"A plan made once stays within 1% of {best} {holds}."
    return [answer.evidence, f"{lasting} {limits}", *([deployment(verdict)] if files else [])]


def deployment(verdict: Mapping[str, Any]) -> str:
    """What to start or which file to deploy, and whether that is the recommended policy."""
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
