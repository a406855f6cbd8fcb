"""Following a recording: each change once, and an end that scripts can read."""

import json

import numpy as np
import pytest

from moetrace import Recorder
from moetrace.record.follow import Change, follow
from moetrace.synthetic import LOUD, QUIET, Course, settling, synthetic_trace


def blocks(trace, recorder, size):
    """Record *trace* block by block; each call of what is returned records one, and then closes."""
    starts = iter(range(0, len(trace.steps), size))
    counts = trace.counts

    def more():
        start = next(starts, None)
        if start is None:
            recorder.close()
            return
        for i in range(start, min(start + size, len(trace.steps))):
            for j, layer in enumerate(trace.layers):
                recorder.add(layer, counts[i, j])
            recorder.step(int(trace.steps[i]))
        recorder.flush()

    return more


def changes_of(trace, tmp_path, size=500):
    """All changes seen while *trace* is recorded in blocks, and the last snapshot."""
    path = tmp_path / "run.parquet"
    snapshots = list(follow(path, blocks(trace, Recorder(path, block=size), size)))
    return [change for snapshot in snapshots for change in snapshot.changes], snapshots[-1]


@pytest.mark.slow
def test_a_layer_that_settles_is_told_once(tmp_path):
    """When it can be told, with the step since when; the snapshot of the closed trace is the last."""
    changes, last = changes_of(synthetic_trace([settling(1500, steps=4000)], seed=5), tmp_path)

    assert [("settled", 0)] == [(change.what, change.layer) for change in changes]
    assert 1500 == pytest.approx(changes[0].since, abs=300)
    assert 1500 < changes[0].step <= 3000
    assert (True, 4000, "stable") == (last.closed, last.step, last.layers[0].state)


@pytest.mark.slow
def test_a_layer_that_is_unsettled_again_is_told_too(tmp_path):
    """Settled first, then unsettled."""
    course = Course(steps=6000, changes=((1, LOUD), (1000, QUIET), (3500, LOUD)))
    changes, _ = changes_of(synthetic_trace([course]), tmp_path)

    assert ["settled", "unsettled"] == [change.what for change in changes]


@pytest.mark.slow
def test_a_collapse_is_told(tmp_path):
    """And that it is over."""
    even, taken = [1, 1, 1, 1], [200, 1, 1, 1]
    shares = np.array([even] * 1500 + [taken] * 1500 + [even] * 1500, float)
    counts = np.random.default_rng(0).multinomial(2000, shares / shares.sum(axis=1, keepdims=True))
    from moetrace import LoadTrace

    changes, _ = changes_of(LoadTrace.from_counts(counts[:, None]), tmp_path)

    assert ["collapsed", "recovered"] == [
        change.what for change in changes if change.what in ("collapsed", "recovered")
    ]


def test_nothing_is_seen_before_the_first_block(tmp_path):
    """A recording that has not begun is waited for."""
    path = tmp_path / "run.parquet"
    waited = []

    def wait():
        waited.append(1)
        if len(waited) == 3:
            with Recorder(path) as recorder:
                recorder.add(0, [1, 2])
                recorder.step()

    (snapshot,) = follow(path, wait)

    assert (3, 1, True, ()) == (len(waited), snapshot.step, snapshot.closed, snapshot.changes)


def test_nothing_new_is_no_snapshot(tmp_path):
    """Each block gives one, however often the files are looked at, and so does the end."""
    recorder, waited = Recorder(tmp_path / "run.parquet"), []

    def wait():
        waited.append(1)
        if len(waited) in (1, 4):
            recorder.add(0, [1, 2])
            recorder.step()
            recorder.add(0, [2, 1])
            recorder.step()
            recorder.flush()
        if len(waited) == 6:
            recorder.close()

    found = [(snapshot.step, snapshot.closed) for snapshot in follow(tmp_path / "run.parquet", wait)]

    assert [(2, False), (4, False), (4, True)] == found


@pytest.mark.parametrize(
    ("course", "code"), [(settling(800, steps=2500), 0), (Course(steps=2500, changes=((1, LOUD),)), 4)]
)
@pytest.mark.slow
def test_the_command_prints_a_line_a_change_and_has_exit_codes(moetrace, tmp_path, course, code):
    """0 where every layer is stable at the end, 4 where one is not."""
    path = tmp_path / "run.parquet"
    more = blocks(synthetic_trace([course]), Recorder(path), 2500)
    more()
    more()
    done = moetrace("states", path, "--follow", "--json", "--poll", "0.01")

    assert code == done.code
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [list(Change._fields)] * (code == 0) == [list(line) for line in lines]


def test_follow_wants_one_trace(moetrace):
    """Anything else is a usage error."""
    assert 2 == moetrace("states", "--follow").code
