"""The states: settle steps that are known are found, and nothing after the cutoff is seen."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from moetrace import LoadTrace, classify, fluctuation, state_at
from moetrace.analysis import states
from moetrace.analysis.movement import Changes, movement
from moetrace.analysis.states import (
    AGAIN,
    FROM_START,
    NEVER,
    PROMISE,
    RULE,
    SETTLED,
    STABLE,
    TRANSIENT,
    UNKNOWN,
    Rule,
    Run,
    _hysteresis,
    classify_expert,
    rank_correlation,
    rank_runs,
)
from moetrace.analysis.variogram import expected_movement
from moetrace.record.follow import USUALLY_NOTICED
from moetrace.synthetic import LOUD, QUIET, Course, settling, synthetic_trace

spec = importlib.util.spec_from_file_location("change_points", ROOT / "benchmarks" / "change_points.py")
change_points = importlib.util.module_from_spec(spec)
spec.loader.exec_module(change_points)


def layer_of(course, seed=0):
    """The states of a trace with one layer."""
    return classify(synthetic_trace([course], seed=seed).layer(0))


@pytest.mark.parametrize("tokens", [2000, 500_000])
@pytest.mark.parametrize("experts", [8, 64])
@pytest.mark.slow
def test_a_known_settle_step_is_found(experts, tokens):
    """Within 200 steps, whatever the number of experts and tokens."""
    found = layer_of(settling(3000, experts=experts, tokens=tokens))

    assert pytest.approx(found.settle_step, abs=200) == 3000
    assert [run.state for run in found.runs] == [TRANSIENT, STABLE]


def test_topics_that_sequences_share_do_not_move_the_answer():
    """Over-dispersed sampling is noise, not fluctuation."""
    found = layer_of(settling(3000, tokens=2048, concentration=200))

    assert pytest.approx(found.settle_step, abs=250) == 3000


def test_a_layer_that_never_settles_has_no_settle_step():
    """Loud to the end is transient throughout."""
    found = layer_of(Course(changes=((1, LOUD),)))

    assert (found.settle_step, found.state, len(found.runs)) == (None, TRANSIENT, 1)


def test_a_layer_can_be_stable_from_the_start():
    """Quiet throughout is stable from the first step."""
    found = layer_of(Course(changes=((1, QUIET),)))

    assert (found.settle_step, found.state, len(found.runs)) == (1, STABLE, 1)


def test_a_layer_can_be_unsettled_again():
    """Loud, quiet, loud are three windows, and it has not settled."""
    found = layer_of(Course(changes=((1, LOUD), (1500, QUIET), (4000, LOUD))))

    assert [run.state for run in found.runs] == [TRANSIENT, STABLE, TRANSIENT]
    assert found.settle_step is None
    assert pytest.approx(found.runs[-1].from_step, abs=500) == 4000


def test_windows_cover_every_step_once():
    """Runs follow each other without gap or overlap."""
    found = layer_of(Course(changes=((1, LOUD), (1500, QUIET), (4000, LOUD))))

    assert (found.runs[0].from_step, found.runs[-1].to_step) == (1, 6000)
    assert [run.to_step + 1 for run in found.runs[:-1]] == [run.from_step for run in found.runs[1:]]


@pytest.mark.parametrize("cutoff", [500, 1000, 2000, 2500, 3000])
def test_the_state_at_a_cutoff_sees_nothing_after_it(settled, cutoff):
    """A load that jumps every 200 steps from the next one on changes nothing."""
    load = settled.layer(0)
    jumps = np.random.default_rng(0).integers(1, 1000, (40, load.experts)) ** 2
    garbage = np.repeat(jumps, 200, axis=0)[200 - cutoff % 200 :][: len(load.steps)]
    spoiled = replace(load, counts=np.where(load.steps[:, None] > cutoff, garbage, load.counts))

    assert state_at(load, cutoff) == state_at(spoiled, cutoff)
    assert (STABLE if cutoff >= 2500 else TRANSIENT) == state_at(spoiled, cutoff)
    assert TRANSIENT == classify(spoiled).state


@pytest.mark.parametrize("steps", [1, 2, 30, 399, 450, 849])
def test_what_is_too_short_to_judge_is_unknown(steps):
    """Stable is what has been shown to be; with 850 steps a hold fits behind two windows."""
    found = layer_of(Course(steps=steps, changes=((1, QUIET),)))

    assert (found.settle_step, found.state, found.outcome) == (None, UNKNOWN, UNKNOWN)
    assert STABLE == layer_of(Course(steps=850, changes=((1, QUIET),))).state


@pytest.mark.parametrize(("steps", "state"), [(399, UNKNOWN), (400, TRANSIENT), (600, TRANSIENT)])
def test_what_is_short_and_moves_is_transient(steps, state):
    """That takes two windows, and no hold."""
    assert state == layer_of(Course(steps=steps, changes=((1, 0.03),))).state


@pytest.mark.parametrize(
    ("stride", "rows", "state"),
    [
        (40, 60, STABLE),
        (100, 120, STABLE),
        (100, 13, UNKNOWN),
        (200, 100, STABLE),
        (201, 100, UNKNOWN),
        (1000, 11, UNKNOWN),
    ],
)
@pytest.mark.slow
def test_steps_logged_far_apart_are_judged_in_rows(stride, rows, state):
    """Five of them are a window, and five borders a hold; further apart than 200 steps nothing can be told."""
    course = Course(steps=stride * rows, experts=32, tokens=10**6, changes=((1, 1e-5),))
    load = synthetic_trace([course]).layer(0)
    sparse = replace(load, steps=load.steps[::stride], counts=load.counts[::stride])

    assert state == classify(sparse).state
    assert state == state_at(sparse, int(sparse.steps[-1]))
    assert (UNKNOWN if state == UNKNOWN else STABLE) == rank_runs(sparse)[-1].state


def test_what_noise_hides_is_unknown():
    """Five rows of few tokens say nothing about 4 % of movement; more of them do."""
    for tokens, state in ((500, UNKNOWN), (20_000, STABLE)):
        load = synthetic_trace([Course(steps=12_000, experts=8, tokens=tokens, changes=((1, 1e-5),))]).layer(0)
        sparse = replace(load, steps=load.steps[::50], counts=load.counts[::50])
        assert state == classify(sparse).state


@pytest.mark.parametrize("kind", ["settles", "unsettles", "jumps"])
@pytest.mark.slow
def test_a_border_lies_where_the_load_suddenly_changed(kind):
    """Half of them within 50 steps, all within 150, whatever the number of experts and tokens."""
    errors = []
    for seed in range(18):
        rng = np.random.default_rng([seed, 78])
        at, experts, tokens = int(rng.integers(1500, 4000)), (8, 16, 64)[seed % 3], (5000, 100_000)[seed % 2]
        before, after = {"settles": (LOUD, QUIET), "unsettles": (QUIET, LOUD), "jumps": (QUIET, QUIET)}[kind]
        course = Course(steps=5500, experts=experts, tokens=tokens, changes=((1, before), (at, after)))
        load = synthetic_trace([course], seed=seed).layer(0)
        if kind == "jumps":
            load = replace(load, counts=np.where(load.steps[:, None] >= at, load.counts[:, ::-1], load.counts))
        wanted = STABLE if kind == "settles" else TRANSIENT
        begins = [run.from_step for run in classify(load).runs[1:] if run.state == wanted]
        errors.append(min(abs(begin - at) for begin in begins))

    assert np.median(errors) <= 50
    assert max(errors) <= 150


def test_a_gradual_change_has_no_sudden_border():
    """A layer that calms down over 2,000 steps settles where the rule says, not where movement fell the most."""
    found = layer_of(Course(tokens=100_000, changes=((1, LOUD), (3000, QUIET)), width=2000))
    changes = Changes(
        synthetic_trace([Course(tokens=100_000, changes=((1, LOUD), (3000, QUIET)), width=2000)]).layer(0)
    )

    assert changes.border(2400, 3700, falls=True) is None
    assert found.judged[found.steps[: len(found.judged)] < found.settle_step][-1] >= RULE.settle_below


def test_borders_need_moments_on_both_sides():
    """None in a handful of moments, and none where movement does the opposite."""
    changes = Changes(jumping())

    assert 1001 == pytest.approx(changes.border(500, 1400, falls=False), abs=50)
    assert changes.border(980, 1020, falls=False) is None
    assert changes.border(1300, 2900, falls=False) is None


@pytest.mark.parametrize("after", [100, 200, 500])
def test_a_jump_makes_a_layer_transient_at_once(after):
    """Within 100 steps of it, from the past alone; the step before it is still stable."""
    load = synthetic_trace([Course(steps=5000, tokens=100_000, changes=((1, QUIET),))]).layer(0)
    load = replace(load, counts=np.where(load.steps[:, None] >= 4000, load.counts[:, ::-1], load.counts))

    assert STABLE == state_at(load, 3999)
    assert TRANSIENT == state_at(load, 4000 + after)


def test_a_load_that_stands_still_and_wanders_is_no_promise():
    """What moves by 3 % a window is stable to the rule, and by over 5 % in 1,000 steps: nobody can plan on it."""
    moving = synthetic_trace([Course(changes=((1, 0.03 / 133**0.5),), tokens=100_000)]).layer(0)
    calm = synthetic_trace([Course(changes=((1, 0.01 / 133**0.5),), tokens=100_000)]).layer(0)

    assert (STABLE, STABLE) == (classify(moving).state, classify(calm).state)
    assert (TRANSIENT, STABLE) == (state_at(moving, 6000), state_at(calm, 6000))
    assert expected_movement(moving, 1000) > PROMISE > expected_movement(calm, 1000)


def test_steps_logged_every_tenth_time_settle_at_the_same_step():
    """Windows count steps, not rows."""
    load = synthetic_trace([settling(6000, steps=12_000, tokens=100_000)]).layer(0)
    sparse = replace(load, steps=load.steps[::10], counts=load.counts[::10])

    assert classify(load).settle_step == pytest.approx(classify(sparse).settle_step, abs=200)


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        (((1, LOUD), (3000, QUIET)), SETTLED),
        (((1, QUIET),), FROM_START),
        (((1, LOUD),), NEVER),
        (((1, LOUD), (1500, QUIET), (4000, LOUD)), AGAIN),
    ],
)
def test_the_outcome_says_it_in_words(changes, outcome):
    """And a layer that is unsettled again says since when."""
    found = layer_of(Course(changes=changes))

    assert outcome == found.outcome
    assert (found.unsettled_step is None) == (outcome != AGAIN)
    assert outcome != AGAIN or 4000 == pytest.approx(found.unsettled_step, abs=500)


def test_the_interval_holds_the_settle_step_and_the_truth():
    """For a sudden change and for a slow one; a layer that never settles has none."""
    for course in (settling(3000), settling(3000, width=800)):
        found = layer_of(course, seed=3)
        low, high = found.settle_interval

        assert low <= found.settle_step <= high
        assert low <= 3000 <= high
        assert high - low < 2000
    assert layer_of(Course(changes=((1, LOUD),))).settle_interval is None
    assert (1, 1) == layer_of(Course(changes=((1, QUIET),))).settle_interval


def test_the_order_of_the_experts_is_a_second_opinion():
    """It settles near the known step."""
    runs = rank_runs(synthetic_trace([settling(3000, experts=64, tokens=100_000)]).layer(0))

    assert [TRANSIENT, STABLE] == [run.state for run in runs]
    assert 3000 == pytest.approx(runs[-1].from_step, abs=500)


def test_ranks_alone_do_not_settle_a_single_expert():
    """There is no order to look at."""
    load = LoadTrace.from_counts(np.ones((2000, 1, 1))).layer(0)

    assert [UNKNOWN] == [run.state for run in rank_runs(load)]


def test_two_experts_have_an_order():
    """One that lasts is stable from the start."""
    load = LoadTrace.from_counts(np.tile([7, 3], (3000, 1, 1))).layer(0)

    assert (Run(1, 3000, STABLE),) == rank_runs(load)


def test_one_expert_can_be_restless_in_a_settled_layer():
    """Its own state is that of its share against all the others."""
    rng = np.random.default_rng(0)
    walk = np.exp(np.cumsum(rng.normal(0, 0.02, 6000))) * 0.3
    shares = np.stack([walk, *[np.ones(6000)] * 7], axis=1)
    counts = rng.multinomial(20_000, shares / shares.sum(axis=1, keepdims=True))
    load = LoadTrace.from_counts(counts[:, None]).layer(0)

    assert TRANSIENT == classify_expert(load, 0).state
    assert STABLE == classify_expert(load, 5).state
    assert STABLE == classify(load).state


def test_the_rule_can_be_given_other_numbers():
    """A layer that moves by 2 % a window is stable at 4 % and transient at 1 %."""
    load = synthetic_trace([Course(changes=((1, 0.02 / 133**0.5),), tokens=100_000)]).layer(0)

    assert STABLE == classify(load).state
    assert TRANSIENT == classify(load, Rule(settle_below=0.01, unsettle_above=0.015)).state


def walking(steps=1130, seed=0):
    """A layer of four experts that wander, one of them all but dead, for naive twins: 1,130 steps are no whole blocks."""
    rng = np.random.default_rng(seed)
    walk = np.exp(np.cumsum(rng.normal(0, 0.01, (steps, 4)), axis=0)) * [0.5, 0.3, 0.2, 0.0005]
    return LoadTrace.from_counts(rng.multinomial(2000, walk / walk.sum(axis=1, keepdims=True))[:, None]).layer(0)


def jumping():
    """A layer that stands still without noise but for step 1,001, where its load jumps for good."""
    counts = np.tile([5000, 5000], (3000, 1))
    counts[1000:] = [9000, 1000]
    return LoadTrace.from_counts(counts[:, None]).layer(0)


def naive_movement(load, window, block):
    """Squared movement at every border that has a window on each side, expert by expert and step by step."""
    shares, n, first = load.shares, len(load.steps), len(load.steps) % block
    lag = min(10, block // 2)
    found = {}
    for border in range(first + window, n - window + 1, block):
        squared = 0.0
        for e in range(load.experts):
            before = sum(shares[t, e] for t in range(border - window, border)) / window
            after = sum(shares[t, e] for t in range(border, border + window)) / window
            scatter = 0.0
            for t in range(border - window, border + window):
                other = t - lag if t - lag >= first else t + lag  # the first steps have none before them
                scatter += (shares[t, e] - shares[other, e]) ** 2 / 2 / (2 * window)
            middle = max((before + after) / 2, 0.01 / load.experts)
            squared += ((after - before) ** 2 - 2 * scatter / window) / middle
        found[int(load.steps[min(border, n - 1)])] = squared
    return found


@pytest.mark.parametrize(("window", "block"), [(200, 50), (130, 50), (8, 8)])
def test_movement_equals_its_naive_twin(window, block):
    """The change from window to window less what noise makes of it; windows are whole blocks that end with the trace."""
    load = walking()
    expected = naive_movement(load, window // block * block, block)

    steps, squared, _ = movement(load, window)

    assert list(expected) == steps.tolist()
    assert list(expected.values()) == pytest.approx(squared.tolist(), rel=1e-9, abs=1e-12)


def test_noise_alone_moves_nothing():
    """The squared movement of a load that stands still is 0 on average: all of its noise is taken off, and no more."""
    tokens, window = 5000, 200
    counts = np.random.default_rng(0).multinomial(tokens, [0.4, 0.3, 0.2, 0.1], size=(100_000, 1))
    of_noise = 2 * 3 / tokens / window

    _, squared, noise = movement(LoadTrace.from_counts(counts).layer(0), window)

    assert 0 == pytest.approx(squared.mean() / of_noise, abs=0.1)
    assert of_noise == pytest.approx(noise.mean(), rel=0.01)


def test_what_is_judged_is_the_mean_movement_over_the_hold():
    """Ten borders of blocks of 50 steps are 500 steps."""
    load = walking()
    squared = list(naive_movement(load, 200, 50).values())
    expected = [max(0, sum(squared[i : i + 10]) / 10) ** 0.5 for i in range(len(squared) - 9)]

    found = classify(load)

    assert expected == pytest.approx(found.judged.tolist(), rel=1e-9)
    assert [max(0, value) ** 0.5 for value in squared] == pytest.approx(found.movement.tolist(), rel=1e-9)


@given(st.lists(st.sampled_from([0.01, 0.02, 0.03, 0.04, 0.05])))
def test_states_change_only_beyond_both_thresholds(values):
    """Stable from below the lower one until above the upper one; what lies between leaves the state as it is."""
    expected, state = [], False
    for value in values:
        state = True if value < 0.02 else False if value > 0.04 else state
        expected.append(state)

    assert expected == _hysteresis(np.array(values), 0.02, 0.04).tolist()


def test_a_state_lasts_while_movement_lies_between_the_thresholds():
    """What moves by 5 % a window is stable after 3 % and transient after 12 %."""
    between, loud = 0.05 / 133**0.5, 0.12 / 133**0.5
    rule = Rule(settle_below=0.03, unsettle_above=0.08)
    calm, wild = (
        classify(synthetic_trace([Course(changes=((1, first), (2500, between)), tokens=10**6)]).layer(0), rule)
        for first in (0.015 / 133**0.5, loud)
    )

    assert [STABLE] == [run.state for run in calm.runs]
    assert [TRANSIENT] == [run.state for run in wild.runs]


def test_a_jump_is_where_the_level_changes():
    """Stable up to a block before it, and from its first step on, with an interval of a block on either side."""
    found = classify(jumping())

    assert 1001 == found.steps[found.movement.argmax()]
    assert [201, 2801] == [found.steps[0], found.steps[-1]]
    assert (Run(1, 950, STABLE), Run(951, 1000, TRANSIENT), Run(1001, 3000, STABLE)) == found.runs
    assert (1001, (951, 1051)) == (found.settle_step, found.settle_interval)
    assert found.movement_in(1001, 3000) < 0.01 < found.movement_in(1, 3000)


def test_a_jump_between_rows_that_are_far_apart_takes_a_row():
    """The transient part is as long as a row where that is longer than a block, and so is either side of the interval."""
    load = jumping().last(2100).between(901, 1200)
    sparse = replace(load, steps=100 * load.steps)

    found = classify(sparse)

    assert (Run(100_000, 100_099, TRANSIENT), Run(100_100, 120_000, STABLE)) == found.runs[1:]
    assert (100_000, 100_200) == found.settle_interval


@pytest.mark.parametrize("stride", change_points.STRIDES)
@pytest.mark.parametrize("size", change_points.SIZES)
@pytest.mark.slow
def test_jumps_of_the_level_are_located(stride, size):
    """Within a block in 90% of cases, intervals right in 95%, however sparsely steps were logged."""
    found = change_points.located(range(20), stride, size)

    assert len(found) >= 16
    assert np.mean([abs(late) <= max(50, stride) for late, _ in found]) >= 0.9
    assert np.mean([held for _, held in found]) >= 0.95


@pytest.mark.parametrize("stride", [1, 10])
@pytest.mark.thorough
def test_bounds_of_the_begin_of_a_drift_are_true(stride):
    """In 95% of 200 synthetic drifts, half of them a line, half of them a random walk."""
    found = change_points.unsettled(range(200), stride)

    assert len(found) >= 80
    assert np.mean([held for _, held in found]) >= 0.95


@pytest.mark.thorough
def test_a_drift_is_noticed_as_late_as_is_announced():
    """What `states --follow` announces is the median and the 90% quantile over drifts."""
    late = change_points.noticed(range(0, 40))

    assert np.quantile(late, [0.5, 0.9]) == pytest.approx(USUALLY_NOTICED, abs=60)


def test_a_gap_makes_no_stable_layer_transient():
    """Steps 2,000 to 2,600 are missing, and the level jumps at 3,001: nothing changed before it, and nothing after."""
    load = change_points.jump(1, 1, 0.5)
    kept = (load.steps < 2000) | (load.steps > 2600)
    found = classify(replace(load, steps=load.steps[kept], counts=load.counts[kept]))

    assert ([STABLE, TRANSIENT, STABLE], 3001) == ([run.state for run in found.runs], found.settle_step)
    assert found.movement_in(1, 2950) < 0.04 > found.movement_in(3001, 6000)


def test_the_interval_reaches_to_where_movement_is_clear_and_a_block_beyond():
    """From the last moment clearly above the rule before the settle step to the first clearly below after it."""
    found = layer_of(settling(3000, width=800), seed=3)
    moments = list(zip(found.steps.tolist(), found.judged.tolist()))
    above = [step for step, judged in moments if step < found.settle_step and judged > 2 * RULE.unsettle_above]
    below = [step for step, judged in moments if step >= found.settle_step and judged < RULE.settle_below / 2]

    assert (above[-1] - 50, below[0] + 50) == found.settle_interval


def test_a_sudden_border_has_an_interval_of_blocks():
    """One before and two after it; where a layer becomes unstable again gradually, all that the rule looked at."""
    sudden = layer_of(Course(steps=5000, tokens=100_000, changes=((1, QUIET), (3000, LOUD))))
    slow = layer_of(Course(steps=12_000, tokens=100_000, changes=((1, QUIET), (6000, LOUD)), width=8000), seed=1)

    assert [AGAIN, AGAIN] == [sudden.outcome, slow.outcome]
    assert pytest.approx(sudden.unsettled_step, abs=50) == 3000
    assert (sudden.unsettled_step - 50, sudden.unsettled_step + 100) == sudden.unsettled_interval
    assert (slow.unsettled_step - 200, slow.unsettled_step + 900) == slow.unsettled_interval


def test_an_interval_that_nothing_bounds_reaches_to_the_ends():
    """From the first step where movement never was clear before, for a hold where it never is clear after."""
    load = synthetic_trace([Course(changes=((1, 0.09 / 133**0.5), (3000, 0.033 / 133**0.5)), tokens=10**6)]).layer(0)
    found = classify(load)

    assert SETTLED == found.outcome
    assert (1, found.settle_step + RULE.hold) == found.settle_interval


def test_movement_between_two_steps_is_its_root_mean_square():
    """Of the windows that lie between them, both steps included; NaN where there is none."""
    found = classify(walking())
    inside = found.movement[2:6]

    first, last = int(found.steps[2]) - found.span, int(found.steps[5]) + found.span - 1
    assert float(np.sqrt(np.mean(inside**2))) == pytest.approx(found.movement_in(first, last))
    assert found.movement_in(first + 1, last - 1) == pytest.approx(float(np.sqrt(np.mean(inside[1:-1] ** 2))))
    assert np.isnan(found.movement_in(2, 3))


def test_states_of_an_expert_are_those_of_it_and_the_rest():
    """With thresholds relative to its own share: 4 % of a share p is 4 % sqrt(p / (1 - p)) for the pair."""
    changes = ((1, LOUD), (2500, QUIET), (8000, LOUD))
    load = synthetic_trace([Course(steps=12_000, experts=4, tokens=50_000, changes=changes)]).layer(0)
    for expert in range(4):
        rest = [sum(row[e] for e in range(4) if e != expert) for row in load.counts]
        pair = LoadTrace.from_counts(np.stack([load.counts[:, expert], rest], axis=1)[:, None]).layer(0)
        p = load.counts[:, expert].sum() / load.counts.sum()
        scale = (p / (1 - p)) ** 0.5
        expected = classify(pair, Rule(200, 2000, 0.04 * scale, 0.06 * scale))

        found = classify_expert(load, expert)

        assert expected.runs == found.runs
        assert expected.judged == pytest.approx(found.judged)
        assert found.trace == load.trace


def test_an_expert_with_no_token_and_one_with_all_are_stable():
    """Neither moves, whatever its share is divided by."""
    load = LoadTrace.from_counts(np.tile([7, 0], (4000, 1, 1))).layer(0)

    assert [STABLE, STABLE] == [classify_expert(load, expert).state for expert in range(2)]


@pytest.mark.parametrize("dead", [0, 1, 40, 63])
def test_rank_correlation_is_that_of_scipy(dead):
    """Equal loads, as those of dead experts, share their ranks."""
    rng = np.random.default_rng(0)
    a = rng.dirichlet(np.ones(64), size=5)
    b = a * np.exp(rng.normal(0, 0.3, a.shape))
    a[:, :dead] = b[:, :dead] = 0
    expected = [spearmanr(x, y).statistic for x, y in zip(a, b)]

    assert expected == pytest.approx(rank_correlation(a, b), rel=1e-12)


def test_loads_without_an_order_agree_with_any():
    """Where all experts have the same load, no order was lost."""
    even, other = np.full((1, 4), 0.25), np.array([[0.1, 0.2, 0.3, 0.4]])

    assert [1, 1, 1] == [float(rank_correlation(*pair)[0]) for pair in ((even, even), (even, other), (other, even))]


def naive_rank_losses(load, block=50, k=4):
    """What the rank correlation of adjacent windows loses beyond 1.5 times that of interleaved blocks, by border."""
    first = len(load.steps) % block
    means = [load.shares[a : a + block].mean(axis=0) for a in range(first, len(load.steps), block)]
    lost = []
    for i in range(k, len(means) - k + 1):
        around = means[i - k : i + k]
        adjacent = spearmanr(sum(around[:k]), sum(around[k:])).statistic
        interleaved = spearmanr(sum(around[::2]), sum(around[1::2])).statistic
        lost.append(
            (int(load.steps[min(first + i * block, len(load.steps) - 1)]), 1 - adjacent - 1.5 * (1 - interleaved))
        )
    return lost


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_states_by_rank_equal_their_naive_twin(seed):
    """Judged by the mean loss over 1,000 steps, with a lower and an upper threshold."""
    changes = ((1, LOUD), (2500, QUIET), (5500, LOUD))
    course = Course(steps=8030, experts=16, tokens=20_000, changes=changes)
    load = synthetic_trace([course], seed=seed).layer(0)
    lost = naive_rank_losses(load)
    runs, state = [], None
    for i in range(len(lost) - 19):
        judged = sum(loss for _, loss in lost[i : i + 20]) / 20
        now = STABLE if judged < 0.005 else TRANSIENT if judged > 0.01 else state or TRANSIENT
        if now != state:
            runs.append((1 if state is None else lost[i][0], now))
        state = now

    assert {TRANSIENT, STABLE} == {state for _, state in runs}
    assert runs == [(run.from_step, run.state) for run in rank_runs(load)]


def naive_fluctuation(shares, window, every):
    """Variance and range of each whole window, in a loop."""
    ends = [end for end in range(window, len(shares) + 1) if end % every == 0]
    parts = [shares[end - window : end] for end in ends]
    return np.array([part.var(axis=0) for part in parts]), np.array([np.ptp(part, axis=0) for part in parts])


@pytest.mark.parametrize("windows", [(10, 100, 200), (200, 30, 70), (40,)])
@pytest.mark.parametrize("at_a_time", [1, 60, 1 << 15])
@pytest.mark.parametrize("spike", [0, 10**9])
def test_fluctuation_equals_its_naive_twin(windows, spike, at_a_time, monkeypatch):
    """Also after a spike that a cumulative sum would not forget, in any order of windows, however much is done at a time."""
    monkeypatch.setattr("moetrace.analysis.tables.CACHED_VALUES", at_a_time)
    counts = np.random.default_rng(0).multinomial(10_000, [0.5, 0.3, 0.2], size=503)
    counts[100, 0] += spike
    load = LoadTrace.from_counts(counts[:, None]).layer(0)
    every = np.gcd.reduce(windows)

    found = fluctuation(load, windows)

    assert list(windows) == [each.window for each in found]
    for each in found:
        variance, reach = naive_fluctuation(load.shares, each.window, every)
        assert np.allclose(variance, each.variance, rtol=1e-12, atol=0)
        assert np.allclose(reach, each.range, rtol=1e-12, atol=0)
        assert list(range(-(-each.window // every) * every, 504, every)) == each.steps.tolist()


def test_fluctuation_leaves_out_windows_longer_than_the_trace():
    """One of 100 steps has a window of 100 and none of 200, one of 9 steps has none."""
    load = LoadTrace.from_counts(np.ones((100, 1, 2))).layer(0)

    assert [10, 100] == [found.window for found in fluctuation(load)]
    assert [] == fluctuation(load.last(9))


def test_the_state_at_a_cutoff_is_that_of_the_whole_history(monkeypatch):
    """Where little of it is looked at: it settles, moves a little for long, and is stable still."""
    course = Course(steps=9000, experts=8, tokens=50_000, changes=((1, 0.02), (2500, 0.00002), (5000, 0.008)))
    load, rule = synthetic_trace([course]).layer(0), replace(RULE, unsettle_above=0.5)
    looked_at, judged = [], states._judged
    monkeypatch.setattr(states, "_judged", lambda part, rule: looked_at.append(len(part.steps)) or judged(part, rule))

    assert [TRANSIENT, STABLE] == [run.state for run in judged(load, rule).runs]
    assert not any(run.state == STABLE for run in judged(load.last(2000), rule).runs)
    assert STABLE == states._state_now(load, rule, 2000)
    assert [2000, 4000, 8000] == looked_at
    assert TRANSIENT == states._state_now(load.until(2000), rule, 500)


@pytest.mark.parametrize(("rows", "experts"), [(3000, 8), (1999, 1), (400, 300)])
def test_work_on_some_values_at_a_time_changes_nothing(monkeypatch, rows, experts):
    """Movement and its noise, to rounding."""
    counts = np.random.default_rng(rows).multinomial(20 * experts, np.full(experts, 1 / experts), size=rows)
    load = LoadTrace.from_counts(counts[:, None]).layer(0)
    whole = movement(load, 200)
    monkeypatch.setattr("moetrace.analysis.movement.VALUES_AT_A_TIME", 500)

    for expected, found in zip(whole, movement(load, 200)):
        assert np.asarray(expected) == pytest.approx(np.asarray(found), rel=1e-12)
