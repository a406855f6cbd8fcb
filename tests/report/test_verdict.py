"""The verdict in words: one saving, how it was found, and what to start or to deploy."""

import pytest

from moetrace.report.verdict import deployment, judged, policy_named, verdict_notes

VERDICT = {
    "verdict": "worth it", "system": "vLLM", "window": 1000, "interval": 3000, "threshold": None, "redundant": 32, "plain_redundant": 0,
    "saved": 0.1234, "saved_low": 0.11, "saved_high": 0.131, "moved_per_1000": 0.25, "moved_bytes": float("nan"), "enough_redundant": 32,
    "floor": 1.0, "holds": 750, "launch": "--enable-eplb", "stock": None,
}  # fmt: skip


def test_the_verdict_is_one_sentence_with_one_saving():
    """The policy, its replicas, and the interval; beside what is in the evidence."""
    answer = judged(VERDICT, 8)

    assert answer.sentence == (
        "Worth it on 8 GPUs: a plan every 3,000 steps, by the load of the last 1,000, as vLLM makes it, with 32 "
        "replicas, saves 12.3 % [11.0 %, 13.1 %] of the expert time of a step."
    )
    assert "beside experts in order, if time" in answer.evidence
    assert "25 % of the slots move" in answer.evidence
    assert "25 % of the slots (14 GB) move" in judged(VERDICT | {"moved_bytes": 14e9}, 8).evidence
    assert "in order with 16 replicas" in judged(VERDICT | {"plain_redundant": 16}, 8).evidence
    assert "unless utilisation is above 90%," in policy_named(VERDICT | {"threshold": 0.9})
    assert "too short" in judged({"verdict": "not enough evidence", "system": None}, 8).sentence


def test_where_nothing_is_better_than_experts_in_order_nothing_is_saved():
    """It says so instead of 0 %."""
    found = judged(VERDICT | {"system": "none", "verdict": "not worth it", "window": 0, "interval": 0}, 8)

    assert found.sentence.startswith("Not worth it on 8 GPUs: no policy betters the balance of experts in order")
    assert found.evidence.startswith("If time follows the busiest GPU")


@pytest.mark.parametrize(
    ("system", "policy", "todo"),
    [
        ("none", "leaving experts in order", "nothing"),
        ("static", "one plan, by the load of the last 1,000 steps,", "that is this policy"),
        ("moetrace", "changed in few places every 3,000 steps", "`moetrace.rebalance_experts` makes them"),
        ("moetrace by state", "every 3,000 steps while it moves,", "the files are its first"),
        ("SGLang", "as SGLang makes it", "start SGLang with the flags of its policy"),
    ],
)
def test_what_to_run_says_whether_the_file_is_the_policy(system, policy, todo):
    """A file where the system reads one, flags where it plans by itself."""
    verdict = VERDICT | {"system": system, "stock": VERDICT | {"system": "static", "saved": 0.05}}

    assert policy in policy_named(verdict)
    assert todo in deployment(verdict)


@pytest.mark.parametrize(
    ("system", "todo"),
    [
        ("none", "leaving experts in order with 32 replicas, saves 5.0 % [11.0 %, 13.1 %]: nothing to do."),
        ("static", "deploy the file of your system with its flags, above."),
        ("vLLM", "start vLLM with the flags of its policy, above, without a file."),
    ],
)
def test_where_a_system_has_to_be_changed_the_best_without_is_told(system, todo):
    """And what it saves."""
    assert todo in deployment(VERDICT | {"system": "moetrace", "stock": VERDICT | {"system": system, "saved": 0.05}})


def test_without_files_nothing_is_to_be_deployed():
    """A plan of some layers is not written, so no file is above."""
    whole, part = (verdict_notes(VERDICT | {"system": "static"}, 8, files=files) for files in (True, False))

    assert "deploy the file" in whole[-1]
    assert whole[:-1] == part


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, "For 750 steps one plan made at the start stays within 1 % of this policy."),
        ({}, "Replicas beyond 32 save less than 1 % more."),
        ({"enough_redundant": 0}, "Replicas save less than 1 %."),
        ({"holds": None}, "To the end one plan made at the start"),
        ({"holds": 0}, "For less than 250 steps one plan"),
        ({"system": "static"}, "within 1 % of the best that plans anew."),
        ({"floor": 1.31}, "keeps the busiest GPU at 1.31 mean loads."),
    ],
)
def test_how_long_a_plan_holds_and_how_many_replicas_pay(more, said):
    """Also where the answer is none, at once, or never."""
    assert said in verdict_notes(VERDICT | more, 8)[1]
