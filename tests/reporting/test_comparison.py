"""Two traces in words: how far apart, whether a plan or a set transfers, and what to do."""

import pandas as pd
import pytest

from moetrace.reporting.comparison import (
    comparison_notes,
    comparison_screen,
    distance_sentence,
    plan_sentence,
    set_sentence,
)

ROW = {"a": "x", "b": "y", "distance": 0.162, "noise": 0.0015, "sorted_distance": 0.054, "same": False, "order": "same"}
NOTED = "The loads of x and y differ by 16.2% of the token choices; two samples of one load would differ by 0.15%."
PLAN = {
    "gpus": 8, "from_step": 501, "to_step": 1000, "slower_than_own_low": 0.01, "slower_than_own_high": 0.07,
    "slower_than_default_low": -0.00001, "slower_than_default_high": 0.04, "slower_than_own_memory_bound": 0.002,
    "slower_than_default_memory_bound": -0.001, "slower_than_own": 0.06, "slower_than_default": 0.03,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, NOTED),
        ({"order": "permuted"}, f"{NOTED} The experts are in another order: by rank, the shares differ by 5.4%, which is noise."),
        ({"order": "different"}, f"{NOTED} Expert numbers mean different experts in each, as with two seeds; by rank, the shares differ by 5.4%."),
        ({"order": "unknown"}, f"{NOTED} Whether expert numbers mean the same in both is unknown; by rank, the shares differ by 5.4%."),
        ({"same": None}, "The loads of x and y differ by 16.2% of the token choices; noise floor unknown (too few steps)."),
        (
            {"same": True, "distance": 0.001},
            "The loads of x and y are the same within the noise floor: they differ by 0.10% of the token choices; two samples of one load would differ by 0.15%.",
        ),
    ],
)  # fmt: skip
def test_the_distance_is_beside_its_noise(changes, sentence):
    """And what it consists of."""
    assert sentence == distance_sentence(ROW | changes)


@pytest.mark.parametrize(
    ("own", "default", "advice"),
    [
        (0.06, 0.03, "A plan from x is 6.0% slower on y than its own plan and 3.0% slower than none: make it from y."),
        (0.06, -0.03, "A plan from x is 6.0% slower on y than its own plan and 3.0% faster than none: it still helps, but make it from y if you can."),
        (0.002, -0.2, "A plan from x is 0.2% slower on y than its own plan and 20.0% faster than none: it transfers."),
        (0.0001, -0.2, "A plan from x is as fast on y as its own plan and 20.0% faster than none: it transfers."),
        (0.0, -0.005, "A plan from x is as fast on y as its own plan and 0.5% faster than none: the plan of y saves only 0.50%: leave the default placement."),
        (0.002, 0.004, "A plan from x is 0.2% slower on y than its own plan and 0.4% slower than none: the plan of y saves only 0.00%: leave the default placement."),
    ],
)  # fmt: skip
def test_a_plan_ends_in_advice(own, default, advice):
    """By what it costs, and by what a plan is worth at all."""
    found = PLAN | {"slower_than_own": own, "slower_than_default": default}

    assert [advice] == plan_sentence(ROW | {"transfer": found})
    assert [] == plan_sentence(ROW | {"transfer": {}})


def test_a_set_ends_in_advice():
    """Within a point of its own set it transfers."""
    found = {"slots": 4, "hit_rate": 0.5, "own_hit_rate": 0.52}
    one = "A set of 4 experts per layer from x covers 50.0% of the token choices of y, its own set 52.0%: choose it from y."

    assert [one] == set_sentence(ROW | {"transfer": found})
    assert "it transfers." in set_sentence(ROW | {"transfer": found | {"own_hit_rate": 0.5099}})[0]


def test_the_notes_of_a_set_have_its_bounds():
    """What chance covers, what the best set would, and on which steps that was seen."""
    found = {"hit_rate": 0.5, "random_hit_rate": 0.25, "best_hit_rate": 0.625, "from_step": 501, "to_step": 1000}

    chance, where = comparison_notes(ROW | {"transfer": found})

    assert "Experts taken at random would cover 25.0%, the best set in hindsight 62.5%." == chance
    assert where.startswith("Scored on steps 501 to 1,000 of y.")
    assert [] == comparison_notes(ROW | {"transfer": {}})


def test_of_many_layers_those_that_differ_most_are_shown():
    """All with --all; what is unknown is a dash."""
    names = ("distance", "noise", "halves", "sorted_distance", "rank_correlation", "overlap")
    layers = pd.DataFrame({"layer": range(20), **{name: [n / 100 for n in range(20)] for name in names}})
    layers.loc[19, ["noise", "rank_correlation"]] = float("nan")
    document = ROW | {"top": 3, "transfer": PLAN}
    screen = comparison_screen(document, layers, every=False)
    columns = dict(screen.columns)

    assert [str(n) for n in range(19, 7, -1)] == columns["layer"]
    assert (8, "-", "18.00%", "-", "19%") == (
        screen.hidden, columns["noise floor"][0], columns["noise floor"][1], columns["rank correlation"][0], columns["top 3 in common"][0],
    )  # fmt: skip
    assert 20 == len(dict(comparison_screen(document, layers, every=True).columns)["layer"])
    assert NOTED == screen.notes[0]
    alone = comparison_screen(document | {"transfer": {}}, layers, every=False)
    assert (NOTED, False) == (alone.sentence, NOTED in alone.notes)
    assert "+1.0% to +7.0% compared with its own plan, +0.0% to +4.0% compared with none" in screen.notes[1]
    assert "memory-bound, +0.2% and -0.1%: add --hardware." in screen.notes[1]
    assert "Scored on steps 501 to 1,000 of y." in screen.notes[2]
