"""Whether balancing is worth it, in words: the sentence, its evidence, and what to start or to deploy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moetrace.report.answers import Answer, percent_whole
from moetrace.report.screens import bytes_of

UNTOLD = "the trace is too short to choose a policy on one half and to score it on the other"
NO_BETTER = "no policy betters the balance of experts in order by 0.01, which is about 1 % of the expert time"
TOLD = (
    "if time follows the busiest GPU of every step, which is a model; on the second half of the trace, by the best "
    "policy of the first"
)
# What a policy does; the others are named after the system that does so.
WAYS = {
    "none": "leaving experts in order",
    "static": "one plan, by the load of the last {window:,} steps,",
    "moetrace": "a plan that is changed in few places every {interval:,} steps, by the load of the last {window:,},",
    "moetrace by state": "a plan once a layer settles, and a changed one every {interval:,} steps while it moves,",
}
LIKE_SYSTEM = "a plan every {interval:,} steps, by the load of the last {window:,}, as {system} makes it,"
HOT = 1.005  # of an expert that is below, two digits say that it leaves nothing


def judged(verdict: Mapping[str, Any], gpus: int) -> Answer:
    """Whether balancing pays on *gpus*, from the verdict of ``place --json``."""
    said = f"{verdict['verdict'][:1].upper()}{verdict['verdict'][1:]} on {gpus} GPUs"
    if verdict["system"] is None:
        return Answer("Worth balancing?", verdict["verdict"], f"{said}: {UNTOLD}.")
    if verdict["system"] == "none":
        return Answer("Worth balancing?", verdict["verdict"], f"{said}: {NO_BETTER}.", f"{TOLD[:1].upper()}{TOLD[1:]}.")
    sentence = f"{said}: {policy_named(verdict)} saves {_saved(verdict)} of the expert time of a step."
    replicas = verdict["plain_redundant"]
    beside = "experts in order" + (f" with {replicas:,} replicas" if replicas else "")
    size = "" if math.isnan(verdict["moved_bytes"]) else f" ({bytes_of(verdict['moved_bytes'])})"
    evidence = (
        f"Saved: beside {beside}, {TOLD}. {percent_whole(verdict['moved_per_1000'])} of the slots{size} "
        "move in 1,000 steps."
    )
    return Answer("Worth balancing?", f"{percent_whole(verdict['saved'])} saved", sentence, evidence)


def _saved(verdict: Mapping[str, Any]) -> str:
    """With its interval."""
    saved, low, high = (f"{100 * verdict[f'saved{end}']:.1f} %" for end in ("", "_low", "_high"))
    return f"{saved} [{low}, {high}]"


def policy_named(verdict: Mapping[str, Any]) -> str:
    """The recommended policy as the subject of a sentence."""
    way = WAYS.get(verdict["system"], LIKE_SYSTEM).format(**verdict)
    if verdict["threshold"] is not None:
        way += f" unless utilisation is above {verdict['threshold']:.0%},"
    return f"{way} with {verdict['redundant']:,} replicas," if verdict["redundant"] else way


def verdict_notes(verdict: Mapping[str, Any], gpus: int, *, files: bool = True) -> list[str]:
    """What stands below the table, a paragraph each: the evidence, how long a plan holds, and what to deploy.

    Without *files*, as of some layers alone, there is nothing to deploy.
    """
    answer = judged(verdict, gpus)
    if verdict["system"] is None:
        return [answer.sentence]
    said = [answer.evidence, f"{_holding(verdict)} {_replicas(verdict)}"]
    return [*said, deployment(verdict)] if files else said


def _holding(verdict: Mapping[str, Any]) -> str:
    beside = "the best that plans anew" if verdict["system"] == "static" else "this policy"
    holds = f"{verdict['holds']:,}" if verdict["holds"] else "less than 250"
    how_long = "To the end" if verdict["holds"] is None else f"For {holds} steps"
    return f"{how_long} one plan made at the start stays within 1 % of {beside}."


def _replicas(verdict: Mapping[str, Any]) -> str:
    enough, floor = verdict["enough_redundant"], verdict["floor"]
    more = f"Replicas beyond {enough:,} save less than 1 % more" if enough else "Replicas save less than 1 %"
    hottest = f" The hottest expert alone keeps the busiest GPU at {floor:.2f} mean loads." if floor >= HOT else ""
    return f"{more}.{hottest}"


def deployment(verdict: Mapping[str, Any]) -> str:
    """What to start or which file to deploy, and whether that is what is recommended."""
    system = verdict["system"]
    if system == "none":
        return "To run it: nothing. The files are plans that are hardly better."
    if system == "static":
        return "To run it: deploy the file of your system with its flags, above; that is this policy."
    if system in WAYS:
        return (
            "To run it, a system has to take plans while it runs: `moetrace.rebalance_experts` makes them, with "
            f"`before`; the files are its first. {_as_it_is(verdict['stock'])}"
        )
    return (
        f"To run it: start {system} with the flags of its policy, above, and without a file. The files are one plan "
        "that stays as it is, for systems that read one: not this policy."
    )


def _as_it_is(stock: Mapping[str, Any]) -> str:
    """The best policy that needs no change, and what it takes."""
    flags = {"none": "nothing to do", "static": "deploy the file of your system with its flags, above"}
    what = flags.get(stock["system"], f"start {stock['system']} with the flags of its policy, above, without a file")
    return f"As systems are, {policy_named(stock)} saves {_saved(stock)}: {what}."
