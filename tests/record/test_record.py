"""The recorder: what is added comes back, and a restart replaces."""

import numpy as np
import pytest

from moetrace import SettingError, TraceError, WorkspaceError, open_trace, read_trace
from moetrace.formats import convert, sources_in
from moetrace.record import Recorder, read_parts


def counts_of(step, layer, experts=4):
    """Counts that tell step and layer apart, and do not only grow, as a counter's would, shape (experts,)."""
    return np.arange(experts) + 10 * layer + 100 * (step ^ 1)


def record(recorder, first, last, layers=(2, 4), plus=0):
    """Record the steps from *first* to *last*, each count higher by *plus*."""
    for step in range(first, last + 1):
        for layer in layers:
            recorder.add(layer, counts_of(step, layer) + plus)
        recorder.step(step)


def expected_counts(first, last, layers=(2, 4), plus=0):
    """What `record` has added, shape (steps, layers, experts)."""
    return np.array([[counts_of(step, layer) + plus for layer in layers] for step in range(first, last + 1)])


@pytest.fixture
def path(tmp_path):
    """Where the trace will lie."""
    return tmp_path / "run.parquet"


def test_what_was_added_is_in_the_trace(path):
    """Counts, steps, layers and what is known of the run come back; the parts are gone."""
    with Recorder(path, model="tiny", top_k=2, notes={"seed": 3}, block=7) as recorder:
        record(recorder, 1, 30)
        recorder.note(loss=[3.5, 2.5])

    trace = open_trace(path)

    assert np.array_equal(expected_counts(1, 30), trace.counts)
    assert list(range(1, 31)) == trace.steps.tolist()
    assert (2, 4) == trace.layers
    assert ("run", "tiny", 2) == (trace.name, trace.info.model, trace.info.top_k)
    assert {"seed": 3, "loss": [3.5, 2.5]} == trace.info.notes
    assert [path] == list(path.parent.iterdir())


def test_what_is_noted_last_is_kept(path):
    """A note, or an assumption, after the last block was written is in the trace."""
    with Recorder(path, block=5) as recorder:
        record(recorder, 1, 10)
        recorder.note(loss=[1.5])
        recorder.assume("nothing")
    trace = open_trace(path)

    assert ({"loss": [1.5]}, "nothing") == (trace.info.notes, trace.info.assumptions[0])
    assert np.array_equal(expected_counts(1, 10), trace.counts)


def test_micro_batches_are_added_up(path):
    """Several adds of one layer in one step are one count; what was passed in is left as it was."""
    first = np.array([1, 2])
    with Recorder(path) as recorder:
        recorder.add(0, first)
        recorder.add(0, [10, 20])
        recorder.add(0, [100.0, 200.0])
        recorder.step()

    assert [111, 222] == open_trace(path).counts[0, 0].tolist()
    assert [1, 2] == first.tolist()


def test_all_layers_may_be_added_at_once(path):
    """The same as one by one, the first time and later, beside others and again; mistakes are the same errors."""
    both = np.array([[1, 2], [3, 4]])
    with Recorder(path) as recorder:
        for _ in range(2):
            recorder.add_layers([0, 1], both)
            recorder.step()
        recorder.add(1, [10, 0])
        recorder.add_layers([0, 1], both)
        both[0, 0] = 99
        recorder.step()
        for wrong, said in (
            (-both, "expert 0 has -"),
            (both << 40, "tokens in one step"),
            (both[:, :1], "1 experts where 2"),
        ):
            with pytest.raises(TraceError, match=said):
                recorder.add_layers([0, 1], wrong)
        recorder.add_layers([0, 1], both)
        recorder.add(2, [1, 1])
        with pytest.raises(TraceError, match="layer 2 was not there before"):
            recorder.step()
    with pytest.raises(TraceError, match="is closed"):
        recorder.add_layers([0, 1], both)

    assert [[[1, 2], [3, 4]], [[1, 2], [3, 4]], [[1, 2], [13, 4]]] == open_trace(path).counts.tolist()


def test_steps_count_from_one_or_as_told(path):
    """Steps are numbered from 1, may be given, and may leave gaps."""
    with Recorder(path) as recorder:
        for step in (None, None, 10, None):
            recorder.add(0, [1, 1])
            recorder.step(step)

    assert [1, 2, 10, 11] == open_trace(path).steps.tolist()


def test_parts_can_be_read_while_the_run_goes_on(path):
    """The folder of parts is one source, of `read_parts`, `read_trace` and `ingest` alike."""
    recorder = Recorder(path, top_k=2, block=5)
    record(recorder, 1, 13)
    parts = path.with_suffix(".parts")

    lazy = read_parts(parts)
    info = convert(parts, path.parent / "copy.parquet", name="copy")

    assert [parts] == sources_in(parts)
    assert np.array_equal(expected_counts(1, 10), lazy.counts)
    assert np.array_equal(expected_counts(1, 10), read_trace(parts).counts)
    assert np.array_equal(expected_counts(1, 10), open_trace(path.parent / "copy.parquet").counts)
    assert ("parts", 2) == (info.format, info.top_k)


def test_parts_are_ingested_under_the_name_of_the_run(path, moetrace):
    """`moetrace ingest run.parts` makes the trace `run`."""
    recorder = Recorder(path, block=5)
    record(recorder, 1, 5)

    outcome = moetrace("ingest", path.with_suffix(".parts"), "--json")

    assert 0 == outcome.code
    assert [("run", 5, "parts")] == [(t["name"], t["steps"], t["format"]) for t in outcome.json["traces"]]


def test_memory_holds_one_block(path):
    """After each block nothing is held."""
    recorder = Recorder(path, block=5)

    record(recorder, 1, 10)

    assert [] == recorder._block
    assert 2 == len(list(path.with_suffix(".parts").glob("part-*.parquet")))


def test_a_run_goes_on_after_a_restart(path):
    """Steps that are run again replace the old ones, and the trace says which."""
    first = Recorder(path, block=10, model="m", notes={"seed": 1})
    record(first, 1, 100)
    first._parts.release()  # as a kill does

    with Recorder(path, block=10, resume=True) as again:
        assert 100 == again.last_step
        again.resume_from(90)
        record(again, 91, 120, plus=1)
    trace = open_trace(path)

    expected = np.concatenate([expected_counts(1, 90), expected_counts(91, 120, plus=1)])
    assert np.array_equal(expected, trace.counts)
    assert ("m", {"seed": 1}) == (trace.info.model, trace.info.notes)
    assert [("restart", "steps 91 to 100 were recorded again after a restart")] == [
        (found.name, found.evidence) for found in trace.info.findings if found.name == "restart"
    ]


def test_what_was_given_up_is_left_out(path):
    """A run that went back and has not come as far again ends where it is now."""
    recorder = Recorder(path, block=10)
    record(recorder, 1, 45)
    recorder.resume_from(20)
    record(recorder, 21, 30, plus=1)
    recorder.close()
    trace = open_trace(path)

    assert np.array_equal(np.concatenate([expected_counts(1, 20), expected_counts(21, 30, plus=1)]), trace.counts)
    assert "steps 31 to 45 of the run that was given up are left out" in trace.info.findings[0].evidence


def test_going_back_before_the_first_step_starts_over(path):
    """A restart from nothing replaces everything."""
    recorder = Recorder(path, block=4)
    record(recorder, 1, 10)
    recorder.resume_from(0)
    record(recorder, 1, 3, plus=5)
    recorder.close()

    assert np.array_equal(expected_counts(1, 3, plus=5), open_trace(path).counts)


def test_a_closed_trace_can_be_gone_on_with(path):
    """`resume=True` takes a finished trace as the first part, with its findings."""
    with Recorder(path, block=10) as recorder:
        record(recorder, 1, 20)
        recorder.resume_from(15)
        record(recorder, 16, 20)

    with Recorder(path, resume=True) as recorder:
        record(recorder, 21, 25)
    trace = open_trace(path)

    assert np.array_equal(expected_counts(1, 25), trace.counts)
    assert ["steps 16 to 20 were recorded again after a restart"] == [
        found.evidence for found in trace.info.findings if found.name == "restart"
    ]


def test_resume_without_anything_there_begins(path):
    """The same line of a script serves the first start and every restart."""
    with Recorder(path, resume=True) as recorder:
        record(recorder, 1, 3)

    assert 3 == len(open_trace(path).steps)


def test_an_error_leaves_the_parts(path):
    """When training fails, what was recorded stays readable and can be resumed."""
    with pytest.raises(TraceError, match="step 25 comes after"), Recorder(path, block=10) as recorder:
        record(recorder, 1, 25) or record(recorder, 25, 25)

    assert 25 == len(read_parts(path.with_suffix(".parts")).steps)
    assert 25 == Recorder(path, resume=True).last_step


def test_what_is_there_is_not_overwritten(path):
    """A trace or its parts are only continued or replaced when asked."""
    with Recorder(path) as recorder:
        record(recorder, 1, 3)
    with pytest.raises(WorkspaceError, match=r"run\.parquet exists: .*resume=True.*force=True"):
        Recorder(path)
    with Recorder(path, force=True) as recorder:
        record(recorder, 5, 6)

    assert [5, 6] == open_trace(path).steps.tolist()


def test_two_recorders_of_one_path_are_refused(path):
    """A second process that writes the same parts is told to take a path of its own."""
    recorder = Recorder(path)

    with pytest.raises(WorkspaceError, match="another recorder"):
        Recorder(path, resume=True)
    with pytest.raises(WorkspaceError, match="another recorder"):
        Recorder(path, force=True)

    record(recorder, 1, 2)
    recorder.close()
    assert 2 == len(open_trace(path).steps)


def test_a_cleanup_that_was_cut_short_does_no_harm(path):
    """Parts without their marker are rubbish: the trace was in place before the marker went."""
    with Recorder(path, block=2) as recorder:
        record(recorder, 1, 4)
    parts = path.with_suffix(".parts")
    parts.mkdir()
    (parts / "part-00000001.parquet").write_bytes(b"half gone")

    with Recorder(path, resume=True) as recorder:
        record(recorder, 5, 6)

    assert np.array_equal(expected_counts(1, 6), open_trace(path).counts)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1, -1], "step after 1, layer 3: expert 1 has -1 tokens"),
        ([1, 0.5], r"expert 1 has 0.5 tokens"),
        ([1, np.nan], "expert 1 has nan tokens"),
        ([1, 2, 3], "3 experts where 2 were before"),
        ([[1, 2]], r"shape \(1, 2\)"),
        (["a", "b"], "give one number of tokens for each expert"),
        ([], r"shape \(0,\)"),
    ],
)
def test_counts_that_are_none_are_refused(path, counts, message):
    """Negative and fractional counts, another number of experts, another shape."""
    recorder = Recorder(path)
    recorder.add(3, [1, 2])
    recorder.step()

    with pytest.raises(TraceError, match=message):
        recorder.add(3, counts)


@pytest.mark.parametrize(
    ("layers", "step", "message"),
    [
        ([1], None, "step 6: layer 3 is missing"),
        ([1, 3, 4], None, "step 6: layer 4 was not there before"),
        ([], None, "no layer was added"),
        ([1, 3], 5, r"step 5 comes after step 5; .*resume_from\(4\)"),
    ],
)
def test_steps_that_do_not_fit_are_refused(path, layers, step, message):
    """A missing or new layer, nothing at all, and a step that goes back."""
    recorder = Recorder(path)
    record(recorder, 5, 5, layers=(1, 3))
    for layer in layers:
        recorder.add(layer, [1, 2, 3, 4])

    with pytest.raises(TraceError, match=message):
        recorder.step(step)


def test_a_layer_without_tokens_is_refused(path):
    """A step in which no expert of a layer has tokens is no step."""
    recorder = Recorder(path)
    recorder.add(0, [0, 0])

    with pytest.raises(TraceError, match="step 1, layer 0: no expert has any tokens"):
        recorder.step()


def test_a_closed_recorder_takes_nothing_more(path):
    """Closing twice is nothing; adding after it says how to go on."""
    recorder = Recorder(path)
    record(recorder, 1, 2)
    recorder.close()
    recorder.close()

    with pytest.raises(TraceError, match="is closed; continue it"):
        recorder.add(2, [1, 2, 3, 4])


def test_nothing_recorded_is_said(path):
    """Closing without a step says so and leaves nothing behind."""
    with pytest.raises(TraceError, match="no step was recorded"):
        Recorder(path).close()

    assert [] == list(path.parent.iterdir())


@pytest.mark.parametrize("settings", [{"block": 0}, {"resume": True, "force": True}])
def test_settings_that_make_no_sense_are_refused(path, settings):
    """A block without steps; going on and replacing at once."""
    with pytest.raises(SettingError):
        Recorder(path, **settings)


def test_parts_of_other_layers_are_refused(path):
    """Going on with another model under the same path is an error that names the layer."""
    with Recorder(path) as recorder:
        record(recorder, 1, 2)
    recorder = Recorder(path, resume=True)

    with pytest.raises(TraceError, match="layer 4 is missing"):
        record(recorder, 3, 3, layers=(2,))


@pytest.mark.parametrize("settings", [{"force": True}, {"resume": True}])
def test_a_link_is_followed(path, tmp_path, settings):
    """The file that it points to is replaced or continued; the link stays, and one that points nowhere makes a file."""
    target = tmp_path / "elsewhere" / "real.parquet"
    target.parent.mkdir()
    path.symlink_to(target)
    for first in (1, 3):
        with Recorder(path, **settings) as recorder:
            record(recorder, first, first + 1)

    assert (True, False) == (path.is_symlink(), target.is_symlink())
    assert [3, 4] == open_trace(target).steps.tolist()[-2:]
    assert ("resume" in settings) == (open_trace(target).steps[0] == 1)
    assert [target] == list(target.parent.iterdir())


def test_a_recorder_that_was_released_can_be_continued(path):
    """By another one, in the same process."""
    recorder = Recorder(path)
    record(recorder, 1, 3)
    recorder.release()
    with Recorder(path, resume=True) as other:
        record(other, 4, 5)

    assert np.array_equal(expected_counts(1, 5), open_trace(path).counts)
