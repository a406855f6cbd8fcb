"""The verdict in words: one saving, how it was found, and what to start or to deploy."""

import pytest

from moetrace.reporting.answers import deployment, regime, verdict_notes, worth, worthwhile

VERDICT = {
    "gpus": 8, "verdict": "worth it", "system": "vLLM", "window": 1000, "interval": 3000, "threshold": None, "redundant": 32, "plain_redundant": 0,
    "saved": 0.1234, "saved_low": 0.11, "saved_high": 0.131, "moved_per_1000": 0.25, "moved_bytes": float("nan"), "enough_redundant": 32,
    "floor": 1.0, "holds": 750, "policy": "a plan every 3,000 steps, with 32 redundant experts,", "start": "flags", "launch": "--enable-eplb", "stock": None,
    "steps": 4000, "evidence_steps": 2500, "ridge": 0.0, "hardware": "", "tokens_per_expert": 33.0, "microseconds": None, "by_redundant": None,
}  # fmt: skip
STOCK = VERDICT | {"system": "static", "policy": "a single plan,", "start": "file", "saved": 0.05}


def test_the_verdict_is_one_sentence_with_one_saving():
    """The policy and the interval; what it is compared with is in the evidence."""
    answer = worth(VERDICT)

    assert answer.sentence == (
        "Worth it on 8 GPUs. The recommended policy is a plan every 3,000 steps, with 32 redundant experts. It cuts expert time "
        "per step by 12.3% (95% interval 11.0 to 13.1%)."
    )
    assert answer.evidence.startswith(
        "Savings are of expert time, relative to the default placement, and assume that each layer"
    )
    assert answer.evidence.endswith(", in which it moved 25% of the slots per 1,000 steps.")
    assert "moved 25% of the slots (14 GB) per" in worth(VERDICT | {"moved_bytes": 14e9}).evidence
    assert "evaluated on the second, in which it moved no experts." in worth(VERDICT | {"moved_per_1000": 0.0}).evidence
    assert "default placement with 16 redundant experts" in worth(VERDICT | {"plain_redundant": 16}).evidence
    same = worth(VERDICT | {"saved": 0.1101, "saved_high": 0.1104}).sentence
    assert same.endswith("cuts expert time per step by 11.0%.")  # no interval where its ends are shown alike
    short = worth(VERDICT | {"verdict": "not enough evidence", "system": None, "steps": 400}).sentence
    assert "(a verdict needs 2,500 steps, this trace has 400): the plan is made from its mean load" in short
    brief = worth(VERDICT | {"verdict": "not enough evidence", "steps": 2000}).sentence
    assert "this trace has 2,000). On this short trace, the recommended policy is a plan every 3,000 steps" in brief


def test_without_a_number_of_gpus_the_command_is_named():
    """Which gives the verdict."""
    assert "Not evaluated. Run moetrace place t --gpus N." == worth(None, "moetrace place t --gpus N").sentence


def test_where_nothing_is_better_than_the_default_placement_nothing_is_saved():
    """The sentence names the reason instead of a saving of 0%."""
    found = worth(VERDICT | {"system": "none", "start": "nothing", "verdict": "not worth it"})

    assert found.sentence.startswith("Not worth it on 8 GPUs: no policy improves the balance of the default placement")
    assert found.evidence.startswith(
        "Savings are of expert time, and assume that each layer waits for its busiest GPU in every step"
    )
    notes = verdict_notes(VERDICT | {"system": "none", "start": "nothing", "holds": None})
    assert not any("at the beginning of the trace" in note for note in notes)


@pytest.mark.parametrize(
    ("start", "todo"),
    [
        (
            "file",
            "To deploy this policy, load the plan file of your system with its flags (on stderr; `deploy` in JSON).",
        ),
        (
            "flags",
            "start vLLM with its flags (on stderr; `verdict.launch` in JSON), and without a plan file.",
        ),
        ("replanning", "`moetrace.rebalance_experts` makes them"),
    ],
)
def test_what_to_deploy_is_the_recommended_policy(start, todo):
    """A file where the system reads one, flags where it plans by itself."""
    assert todo in deployment(VERDICT | {"start": start, "stock": STOCK})


def test_a_policy_that_is_not_worth_it_is_not_urged():
    """Whoever wants it nevertheless learns how."""
    assert deployment(VERDICT | {"verdict": "not worth it"}).startswith(
        "If you still want this policy, start vLLM with"
    )


@pytest.mark.parametrize(
    ("stock", "todo"),
    [
        ({"system": "none", "start": "nothing", "policy": "the default placement,"}, "by 5.0%: it needs nothing."),
        ({}, "a single plan, cuts expert time per step by 5.0%: load the plan file of your system"),
        (
            {"system": "vLLM", "start": "flags"},
            "start vLLM with its flags (on stderr; `verdict.launch` in JSON), and without a plan file.",
        ),
    ],
)
def test_where_a_system_has_to_be_changed_the_best_without_is_named(stock, todo):
    """And what it saves."""
    assert todo in deployment(VERDICT | {"start": "replanning", "stock": STOCK | stock})


def test_without_files_nothing_is_to_be_deployed():
    """A plan of some layers is not written, so no file is above."""
    whole, part = (verdict_notes(VERDICT | {"start": "file"}, files=files) for files in (True, False))

    assert "plan file" in whole[-1]
    assert whole[:-1] == part
    untested = [verdict_notes(VERDICT | {"system": None}, files=files) for files in (True, False)]
    assert [[deployment(VERDICT | {"system": None})], []] == untested


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {},
            "A plan made at the beginning of the trace and kept for 750 steps needs at most about 1% more expert time than this policy.",
        ),
        ({}, "Up to 32 redundant experts per layer improve the balance; further ones save less than 1%."),
        ({"enough_redundant": 0}, "Redundant experts would save less than 1%."),
        ({"holds": None}, "kept to its end needs"),
        ({"holds": 0}, "kept for less than 250 steps needs"),
        ({"start": "file"}, "about 1% more expert time than the best re-planning policy."),
        ({"floor": 1.31}, "With 32 redundant experts, no plan brings the busiest GPU below 1.31x."),
        ({"floor": 1.31, "redundant": 0}, "Without redundant experts, no plan brings the busiest GPU below 1.31x."),
    ],
)
def test_how_long_a_plan_holds_and_how_many_replicas_are_enough(more, expected):
    """Also where the answer is none, at once, or never."""
    assert expected in verdict_notes(VERDICT | more)[1]


@pytest.mark.parametrize(
    ("tokens", "ridge", "said"),
    [
        (33, 206, "are memory-bound on H200, because an expert gets 33 tokens per pass and the ridge is 206"),
        (4.25, 206, "gets 4.2 tokens per pass"),
        (150, 206, "are partly memory-bound"),
        (500, 206, "are compute-bound"),
        (33, 0, "expert time is proportional to tokens"),
    ],
)
def test_the_regime_is_named(tokens, ridge, said):
    """Memory-bound below half of the ridge, compute-bound above twice of it."""
    assert said in regime({"tokens_per_expert": tokens, "ridge": ridge, "hardware": "h200"})
    assert " on " not in regime({"tokens_per_expert": tokens, "ridge": ridge, "hardware": ""})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"worth_from": None}, ""),
        (
            {"worth_from": 0.5, "ridge": 206.0, "hardware": "h200"},
            "On H200, a plan saves 5% or more if experts get at least about 103 tokens per pass on average.",
        ),
        (
            {"worth_from": 0.5, "ridge": None, "hardware": "", "tokens_per_expert": 33.0},
            "on GPUs with a ridge of at most about 66 tokens.",
        ),
    ],
)
def test_the_knee_in_words(more, said):
    """In tokens where the ridge is known."""
    assert said in worthwhile(more)
    assert bool(said) == bool(worthwhile(more))
