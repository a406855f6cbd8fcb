"""The trace: what it refuses, and how it is cut."""

import hashlib
import pickle
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest

import moetrace
from moetrace import LoadTrace, SettingError, TraceError, TraceInfo
from moetrace.errors import shown
from moetrace.trace import stride_of


def test_shares_of_every_step_sum_to_one(small):
    """Share is count over the layer's total in that step."""
    load = small.layer(3)

    assert np.allclose(1, load.shares.sum(axis=1))
    assert np.array_equal(load.counts, np.rint(load.shares * load.totals[:, None]))


def test_mean_shares_weigh_steps_by_their_tokens():
    """A step of twice the tokens counts twice."""
    trace = LoadTrace.from_counts([[[1, 0]], [[0, 2]]])

    assert pytest.approx(trace.layer(0).mean_shares) == [1 / 3, 2 / 3]


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([[[1, -1]]], "is negative"),
        ([[[1.5, 1.0]]], "is not a whole"),
        ([[[np.nan, 1.0]]], "is not a whole"),
        ([[[0, 0]]], "no tokens at all"),
        (np.zeros((0, 1, 2)), "shape"),
        ([[1, 2]], "shape"),
        ([[["a", "b"]]], "not numbers"),
        ([[[1, 2]], [[1, -1]]], "bad, column counts, row 1: -1 is negative"),
        (np.array([[[2**63, 1]]], np.uint64), f"row 0: {2**63} is beyond 64 bits"),
        ([[[1, 2]], [[2**62, 2**62]]], "bad, step 2, layer 0: the counts up to here add up to"),
    ],
)
def test_what_is_no_trace_is_refused(counts, said):
    """Each refusal names the trace and says what is wrong."""
    with pytest.raises(TraceError, match=said):
        LoadTrace.from_counts(counts, name="bad")


@pytest.mark.parametrize("steps", [[1, 1], [2, 1], [1], [1.0, 2.0]])
def test_steps_must_increase(steps):
    """Repeated, falling, too few or fractional steps are refused."""
    with pytest.raises(TraceError):
        LoadTrace.from_counts(np.ones((2, 1, 2)), steps=steps)


def test_windows_count_steps_not_rows():
    """Where every tenth step was logged, a window of 50 steps holds five rows."""
    load = LoadTrace.from_counts(np.ones((100, 1, 2)), steps=np.arange(0, 1000, 10)).layer(0)

    assert load.stride == 10
    assert load.rows(50) == 5
    assert load.last(50).steps.tolist() == [950, 960, 970, 980, 990]
    assert load.after(500, 20).steps.tolist() == [510, 520]
    assert load.until(505).steps[-1] == 500


def test_a_window_of_few_rows_is_all_of_them():
    """However far apart they are."""
    load = LoadTrace.from_counts(np.ones((3, 1, 2)), steps=[0, 1000, 2000]).layer(0)

    assert [0, 1000, 2000] == load.last(50).steps.tolist()
    assert [2000] == load.last(1).steps.tolist()


def test_a_layer_is_read_by_its_number():
    """It knows it, and the number of its first expert; what is too large is named with step and layer."""
    counts = {3: np.array([[1, 2], [3, 4]]), 5: np.array([[5, 6], [2**62, 2**62]])}
    trace = LoadTrace(TraceInfo("t", first_expert=1), np.array([10, 20]), (3, 5), 2, counts.__getitem__)

    load = trace.layer(3)

    assert ("t", 3, [1, 2]) == (load.trace, load.layer, list(load.expert_numbers))
    assert [[1, 2], [3, 4]] == load.counts.tolist()
    assert hashlib.sha256(counts[5].astype("<i8").tobytes()).hexdigest() == trace.digest(5)
    with pytest.raises(TraceError, match=r"t, step 20, layer 5: the counts up to here"):
        trace.layer(5)


def test_of_many_things_the_first_are_shown():
    """And how many there are, where that is not all."""
    assert ("a, b", "a, b, ... (3)") == (shown("ab", 2), shown("abc", 2))


def test_the_version_is_that_of_the_installed_package():
    """Every other name is one of the public ones."""
    assert version("moetrace") == moetrace.__version__
    assert moetrace.LoadTrace is LoadTrace


def test_select_keeps_layers_and_steps(small):
    """A selection is the same trace, cut."""
    cut = small.select(layers=[5], first=20, last=29)

    assert cut.layers == (5,)
    assert list(range(20, 30)) == cut.steps.tolist()
    assert np.array_equal(small.layer(5).counts[10:20], cut.layer(5).counts)


@pytest.mark.parametrize("selection", [{"layers": [4]}, {"first": 100}, {"last": 1}])
def test_a_selection_of_nothing_is_refused(small, selection):
    """Unknown layers and empty ranges of steps name what there is."""
    with pytest.raises(SettingError, match=r"it has"):
        small.select(**selection)


def test_the_stride_is_the_median_of_the_last_distances(monkeypatch):
    """Of as many as are looked at; 1 where all steps are logged, or one is."""
    monkeypatch.setattr("moetrace.trace.MOST_DISTANCES", 4)

    assert [1, 1, 1, 10] == [stride_of(np.array(steps)) for steps in ([], [7], [3, 4, 5], [0, 1, 2, 3, 13, 23, 33, 34])]


def test_layers_of_a_small_trace_are_read_once(monkeypatch):
    """What is computed of one is computed once, too; of a larger trace, and in a copy for a worker, nothing is held."""
    trace = LoadTrace.from_counts(np.ones((10, 2, 4), np.int64))
    trace.layer(1)
    copy = pickle.loads(pickle.dumps(trace._opened))

    assert trace.layer(1) is trace.layer(1)
    assert ({1}, set()) == (set(trace._opened), set(copy))
    monkeypatch.setattr("moetrace.trace.SMALL", trace.counts.nbytes - 1)
    large = replace(trace)
    assert large.layer(1) is not large.layer(1)
