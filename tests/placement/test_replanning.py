"""How often to plan: when plans are made, what they leave of the load, and for how long one holds."""

import numpy as np
import pytest

from moetrace import LoadTrace, SettingError, evaluate, predictor
from moetrace.forecasting.windows import replanning_windows
from moetrace.placement.plan import evenness, in_order, replan
from moetrace.placement.replanning import plan_holds, replanning_frame, replanning_summary
from moetrace.placement.step_peak import StepLoad
from moetrace.synthetic import settling, synthetic_trace

EVERY = [500, 1000]


def judged(trace, every=EVERY, first=500):
    """Backtest at the cutoffs of the plans, and what became of them on 4 GPUs."""
    windows = replanning_windows(trace, every, first)
    test = evaluate(trace, [predictor("window_mean"), predictor("level")], every, windows)
    return test, replanning_frame(trace, test, 4)


@pytest.fixture(scope="module")
def trace():
    """A synthetic layer that settles at step 2,000."""
    return synthetic_trace([settling(2000, steps=4700, tokens=8000)], name="made", seed=5)


@pytest.fixture(scope="module")
def frame(trace):
    return judged(trace)[1]


def test_plans_of_every_distance_are_compared_on_the_same_steps(trace):
    """From the first cutoff to the last whole stretch of the longest distance."""
    covered = replanning_windows(trace, EVERY, 500)

    assert list(range(500, 4500, 500)) == list(covered)
    assert [[500, 1000], [500]] * 4 == list(covered.values())


@pytest.mark.parametrize(
    ("every", "said"),
    [
        ([0], "above 0"),
        ([300, 1000], "multiples of the shortest"),
        ([5000], "after the first 500 steps there are 4200"),
    ],
)
def test_distances_that_cannot_be_compared_are_refused(trace, every, said):
    """With the way out."""
    with pytest.raises(SettingError, match=said):
        replanning_windows(trace, every, 500)


def test_sparse_logs_are_planned_in_training_steps():
    """Every tenth step was logged from step 100,000 on; no plan is for steps that a gap swallowed."""
    counts = np.random.default_rng(0).multinomial(5000, np.full(8, 1 / 8), size=(400, 1))
    steps = 100_000 + 10 * np.arange(400)
    whole = replanning_windows(LoadTrace.from_counts(counts, name="sparse", steps=steps), [500, 1000], 1000)
    kept = (steps < 102_000) | (steps >= 102_700)
    gap = replanning_windows(LoadTrace.from_counts(counts[kept], name="gap", steps=steps[kept]), [500, 1000], 1000)

    assert [100_999, 101_499, 101_999, 102_499, 102_999, 103_499][: len(whole)] == list(whole)
    assert [500] not in [gap.get(101_999)]
    assert 1000 in gap[101_999]


def test_every_stretch_is_what_replaying_the_plans_gives(trace, frame):
    """A naive twin: go through the stretches, keep the plan, make another when it is due."""
    load, start = trace.layer(0), in_order(trace.experts, 4)
    own = frame[frame["strategy"] == "window_mean"]
    for every in (*EVERY, None):
        rows = own[own["replan_every"].isna() if every is None else own["replan_every"] == every]
        plan = start
        for row in rows.itertuples():
            due = row.cutoff == 500 if every is None else (row.cutoff - 500) % every == 0
            moved = None
            if due:
                seen = load.until(row.cutoff).last(1000)
                before, plan = plan, replan(plan, StepLoad.of(seen.counts, seen.mean_shares))
                moved = plan.moved(before) if row.cutoff > 500 else None
            expected = evenness(plan, load.after(row.cutoff, 500).counts)
            assert (row.peak_over_mean, row.balance) == pytest.approx(tuple(expected))
            assert row.moved == moved or (moved is None and row.moved != row.moved)


def test_each_strategy_has_a_row_for_each_distance_and_stretch(frame):
    """Experts in order only once: nothing is planned there."""
    sizes = frame.groupby(["strategy", "replan_every"], dropna=False).size()

    assert {8} == set(sizes)
    assert ["in_order", "window_mean", "level", "oracle"] == frame["strategy"].unique().tolist()
    assert 1 == len(sizes["in_order"])
    assert 3 == len(sizes["oracle"])


def test_a_plan_counts_for_the_state_it_was_made_in(trace):
    """The one made at the first cutoff is a transient one to the end."""
    test, frame = judged(trace)
    states = test.scores.drop_duplicates("cutoff").set_index("cutoff")["state"]
    own = frame[frame["strategy"] == "level"]

    assert {"transient", "stable"} == set(states)
    assert {"transient"} == set(own[own["replan_every"].isna()]["state"])
    for row in own[own["replan_every"] == 1000].itertuples():
        assert states[row.cutoff - (row.cutoff - 500) % 1000] == row.state


def test_the_summary_is_relative_to_the_shortest_distance(frame):
    """Over the same stretches; what is moved is told for one plan and for 1,000 steps."""
    summary = replanning_summary(frame)
    own = summary[(summary["strategy"] == "level") & (summary["state"] == "all")].set_index("replan_every")
    often, seldom = (own.loc[n] for n in EVERY)

    assert (0, 0, 0) == tuple(often[["difference", "difference_low", "difference_high"]])
    assert seldom["difference"] == pytest.approx(seldom["peak_over_mean"] - often["peak_over_mean"])
    # Seven plans after the first one in eight stretches of 500 steps.
    assert often["moved_per_1000"] == pytest.approx(often["moved"] * 7 / 8 * 2)
    assert summary.loc[summary["strategy"] == "in_order", "difference"].isna().all()


def test_a_plan_holds_as_long_as_the_load():
    """To the end where nothing moves; where the load turns around at step 2,500, only a new plan helps."""
    rng, shares = np.random.default_rng(1), np.array([0.3, 0.26, 0.12, 0.1, 0.07, 0.06, 0.05, 0.04])
    turned = shares[[0, 2, 4, 5, 6, 7, 3, 1]]  # the first and the last share a GPU of the plan for the load before
    still, turning = (
        LoadTrace.from_counts(
            np.stack([rng.multinomial(20_000, shares if t < at else turned, size=1) for t in range(4500)]), name="x"
        )
        for at in (9999, 2500)
    )

    calm, moved = (replanning_summary(judged(made)[1]) for made in (still, turning))

    assert plan_holds(calm, "level", "all") is None
    assert 500 == plan_holds(moved, "window_mean", "all")


def test_the_command_says_how_long_a_plan_holds(moetrace, settled, tmp_path):
    """And has the rows in JSON; distances that do not fit are one line, before anything is computed or written."""
    from moetrace import save_trace

    save_trace(settled, tmp_path / "settled.parquet")
    argv = ("place", tmp_path / "settled.parquet", "--gpus", "4", "--predictor", "level", "--cutoffs", "1000")

    bad = moetrace(*argv, "--replan", "400,1000")
    found = moetrace(*argv, "--replan", "500,1000", "--json")

    assert (2, 1) == (bad.code, bad.err.count("\n"))
    assert "give multiples of the shortest" in bad.err
    assert {"in_order", "level", "window_mean", "oracle"} == {row["strategy"] for row in found.json["replanning"]}
    assert {500, 1000, None} == {row["replan_every"] for row in found.json["stretches"]}
    assert "a plan by level holds for " in found.err
    assert "within 1 % of the mean load of planning every 500 steps" in found.err
    assert 5 == len(found.json["files"])
    assert b"\x89PNG" == (tmp_path / "cwd" / found.json["figures"][0]).read_bytes()[:4]
    assert " if made while stable" in moetrace(*argv, "--replan", "500,1000").err
