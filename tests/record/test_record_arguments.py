"""What a recorder is given: taken as it can be written, or refused where it is given."""

import enum
import json
import os
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moetrace import SettingError, TraceError, open_trace
from moetrace.record import Recorder


@pytest.fixture
def path(tmp_path):
    """Where the trace will lie."""
    return tmp_path / "run.parquet"


def recorded(path, steps=(1,), layers=(0,), counts=(3, 4), **settings):
    """The trace of these steps, written and read back."""
    with Recorder(path, **settings) as recorder:
        for step in steps:
            for layer in layers:
                recorder.add(layer, counts)
            recorder.step(step)
    return open_trace(path)


class Device(enum.Enum):
    """An enumeration: its value is noted."""

    GPU = 1


class Kind(enum.StrEnum):
    """An enumeration of texts."""

    MOE = "moe"


class Tensor:
    """What a torch tensor shows of itself."""

    shape = (2,)

    def tolist(self):
        """Its numbers."""
        return [1.5, float("nan")]


class Without:
    """A tensor that has no data."""

    shape = (2,)

    def tolist(self):
        """It cannot say them."""
        raise RuntimeError("Cannot copy out of meta tensor; no data!")


def within_itself():
    """A list that contains itself."""
    endless = []
    endless.append(endless)
    return endless


NOTES = [
    (np.float32(0.5), 0.5),
    (np.float64(0.5), 0.5),
    (np.longdouble(0.5), 0.5),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (np.str_("a"), "a"),
    (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    (np.array(2.5), 2.5),
    (np.array([1.0, np.nan, np.inf]), [1.0, None, None]),
    (np.array(["2026-01-02"], "M8[ns]"), ["2026-01-02T00:00:00"]),
    (np.datetime64("2026-01-02"), "2026-01-02T00:00:00"),
    (Tensor(), [1.5, None]),
    (pd.Series([1, 2]), [1, 2]),
    (pd.Timestamp("2026-01-02"), "2026-01-02T00:00:00"),
    (float("nan"), None),
    (float("-inf"), None),
    (2**63, 2**63),
    (Path("a/b"), "a/b"),
    (date(2026, 1, 2), "2026-01-02"),
    (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00+00:00"),
    (timedelta(seconds=90), "0:01:30"),
    ({3, 1, 2}, [1, 2, 3]),
    ({"b", 1}, ["b", 1]),
    ((1, (2, None)), [1, [2, None]]),
    ({1: {"x": np.float32(1)}}, {"1": {"x": 1.0}}),
    (range(3), [0, 1, 2]),
    (Kind.MOE, "moe"),
    (Device.GPU, 1),
]
NOT_SERIALISABLE = [
    object(),
    1j,
    b"bytes",
    Decimal("0.1"),
    2**64,
    Without(),
    np.ndarray,
    10**5000,
    (part for part in "ab"),
    within_itself(),
    {(1, 2): 3},
    [1, [object()]],
    "x" * (17 << 20),
]


@pytest.mark.parametrize(("given", "said"), NOTES, ids=[str(said)[:20] for _, said in NOTES])
@pytest.mark.slow
def test_a_note_becomes_plain_json(path, given, said):
    """Numbers, arrays and tensors, paths and dates, sets; NaN and infinity are null; in the file as on the way."""
    notes = recorded(path, notes={"x": given}).info.notes
    recorder = Recorder(path.with_name("other.parquet"))
    recorder.note(x=given)

    assert {"x": said} == notes == recorder._info.notes
    assert json.dumps(notes, allow_nan=False)


@pytest.mark.parametrize("value", NOT_SERIALISABLE, ids=lambda value: type(value).__name__)
@pytest.mark.slow
def test_a_note_that_json_cannot_hold_is_refused_at_once(path, value):
    """By its name, in the constructor and in `note`; the recording goes on without it."""
    with pytest.raises(SettingError, match=r"note 'loss' cannot be stored as JSON|assumptions take 17 MiB"):
        Recorder(path, notes={"loss": value})
    assert [] == list(path.parent.iterdir())
    with Recorder(path) as recorder:
        with pytest.raises(SettingError, match=r"note 'loss' cannot be stored as JSON|assumptions take 17 MiB"):
            recorder.note(good=1, loss=value)
        recorder.add(0, [1])
        recorder.step()

    assert {} == open_trace(path).info.notes


def test_a_note_is_what_it_was_when_it_was_given(path):
    """What happens to the list afterwards does not matter."""
    curve = [1.0]
    recorder = Recorder(path, notes={"curve": curve})
    curve.append(object())

    assert {"curve": [1.0]} == recorder._info.notes


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("notes", ["a"]),
        ("name", 3),
        ("name", ""),
        ("name", "a/b"),
        ("name", "x" * 200),
        ("model", 7),
        ("model", ""),
        ("top_k", 0),
        ("top_k", "2"),
        ("top_k", 2.5),
        ("top_k", True),
        ("block", 0),
        ("block", 1.5),
        ("block", "10"),
        ("block", float("nan")),
        ("on_error", "ignore"),
        ("on_error", []),
        ("path", None),
        ("path", ""),
        ("path", "run.parts"),
        ("path", "a\0b"),
        ("path", "\udc80"),
    ],
)
def test_a_setting_that_is_none_is_refused(tmp_path, monkeypatch, argument, value):
    """By its name, before anything is on the disk."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match=rf"^{argument}="):
        Recorder(**{"path": "run.parquet", argument: value})

    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("layer", [-1, 2**31, 1.5, "0", None, True, float("nan"), [0], np.array([1]), 10**400])
def test_a_layer_that_is_none_is_refused(path, layer):
    """Layers are whole numbers of 31 bits."""
    with pytest.raises(TraceError, match=r"the first step: layer .* is invalid; give an integer from 0"):
        Recorder(path).add(layer, [1, 2])


@pytest.mark.parametrize("step", [2**53 + 1, 2**63, -(2**60), float("nan"), float("inf"), 1.5, "x", True, [1]])
@pytest.mark.parametrize("method", ["step", "resume_from"])
@pytest.mark.slow
def test_a_step_that_is_none_is_refused(path, method, step):
    """Steps are whole numbers up to 2**53; the recorder is as it was before."""
    recorder = Recorder(path)
    recorder.add(0, [1, 2])
    with pytest.raises(TraceError, match=r"step .* is invalid; give an integer"):
        getattr(recorder, method)(step)
    recorder.step(7)
    recorder.close()

    assert [7] == open_trace(path).steps.tolist()


@pytest.mark.parametrize("assumption", [None, 3, "", ["a"]])
def test_an_assumption_that_is_no_text_is_refused(path, assumption):
    """By its name."""
    with pytest.raises(SettingError, match=r"^assumption="):
        Recorder(path).assume(assumption)


@pytest.mark.parametrize(
    ("adds", "message"),
    [
        ([[2**62, 2**62]], r"layer 0: 9\.22e\+18 tokens in one step"),
        ([[2**40, 1]], "tokens in one step"),
        ([[2**39, 2**38], [2**39, 0]], "tokens in one step"),
        ([np.array([2**63], np.uint64)], "expert 0 has 9223372036854775808 tokens"),
        ([[1e300]], "expert 0 has 1e"),
        ([[1, [2]]], "cannot be read as an array"),
        ([[True, False]], "counts are bool"),
    ],
)
def test_counts_that_would_overflow_are_refused(path, adds, message):
    """So many that their sums over experts or steps leave 64 bits; what was added before stays."""
    recorder = Recorder(path)
    for counts in adds[:-1]:
        recorder.add(0, counts)
    with pytest.raises(TraceError, match=message):
        recorder.add(0, adds[-1])

    assert adds[:-1] == [counts.tolist() for counts in recorder._adding.values()]


def test_the_largest_of_all_is_written_and_read(path, moetrace):
    """What is taken is a trace: the outermost layers, steps and counts there may be."""
    steps, layers = (-(2**53), 0, 2**53), (0, np.int64(5), np.float32(7), 2**31 - 1)
    trace = recorded(path, steps, layers, (0, 2**40), top_k=np.int32(2), model="m" * 10_000, block=np.int64(2))

    assert list(steps) == trace.steps.tolist()
    assert (0, 5, 7, 2**31 - 1) == trace.layers
    assert 2 == trace.info.top_k
    assert {0, 2**40} == set(trace.counts.ravel().tolist())
    assert 0 == moetrace("ingest", path).code


def test_a_path_that_is_no_file_is_refused(tmp_path):
    """A folder, and a folder of parts that is a file; the line says what to give."""
    from moetrace import WorkspaceError

    (tmp_path / "folder").mkdir()
    (tmp_path / "run.parts").write_text("")
    with pytest.raises(WorkspaceError, match="is a folder: give the path of a file"):
        Recorder(tmp_path / "folder", force=True)
    with pytest.raises(WorkspaceError, match=r"run\.parts.*cannot be written"):
        Recorder(tmp_path / "run.parquet")


def test_a_working_directory_whose_name_is_not_utf8_is_refused(tmp_path, monkeypatch):
    """Before anything is recorded that could not be written there."""
    odd = tmp_path / os.fsdecode(b"odd\xff")
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(SettingError, match=r"^path=.*UTF-8"):
        Recorder("run.parquet")

    assert [] == list(odd.iterdir())
