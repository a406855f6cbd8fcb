"""Prefill and decode of a server's passes, and recordings that are read before they are closed."""

import numpy as np
import pytest

from moetrace import ReadOptions, TraceError, read_trace
from moetrace.cli import main
from moetrace.record import Recorder

EVERY = np.array([[[5, 3], [4, 4]], [[2, 0], [1, 1]], [[9, 1], [5, 5]]])
DECODE = np.array([[[2, 1], [3, 0]], [[2, 0], [1, 1]], [[0, 0], [0, 0]]])


def recorded(folder, *, close, decode=DECODE):
    """The path of a recording of three passes, the second of decode tokens alone and the third without any."""
    for name, counts in (("run", EVERY), ("run-decode", decode)):
        recorder = Recorder(folder / f"{name}.parquet", top_k=2)
        for step, layers in zip((1, 2, 3), counts):
            if layers.any():
                for layer, tokens in enumerate(layers):
                    recorder.add(layer, tokens)
                recorder.step(step)
        (recorder.close if close else recorder.release)()
    return folder / ("run.parquet" if close else "run.parts")


def of_phase(path, phase):
    """That phase of it."""
    return read_trace(path, options=ReadOptions(settings={"phase": phase}))


@pytest.mark.parametrize("close", [True, False], ids=["closed", "parts"])
def test_phases_are_told_by_the_trace_beside(tmp_path, close):
    """Decode is that, prefill the rest; passes without a token of a phase are no steps of it."""
    path = recorded(tmp_path, close=close)
    decode, prefill = of_phase(path, "decode"), of_phase(path, "prefill")

    assert ([1, 2], [1, 3], 2) == (decode.steps.tolist(), prefill.steps.tolist(), prefill.info.top_k)
    assert np.array_equal(DECODE[:2], decode.counts)
    assert np.array_equal((EVERY - DECODE)[[0, 2]], prefill.counts)


def test_a_trace_alone_has_no_phases(tmp_path):
    """The error names the file that it takes."""
    path = recorded(tmp_path, close=True)
    (tmp_path / "run-decode.parquet").unlink()
    with pytest.raises(TraceError, match=r"run.parquet: does not distinguish.*needs run-decode.parquet beside it"):
        of_phase(path, "decode")


def test_decode_tokens_of_another_recording_are_refused(tmp_path):
    """They are more than all tokens."""
    path = recorded(tmp_path, close=True, decode=DECODE + 3)
    with pytest.raises(TraceError, match="has fewer tokens than run-decode"):
        of_phase(path, "prefill")


def test_a_recording_is_read_by_its_name_before_it_is_closed(tmp_path):
    """As after a kill."""
    recorded(tmp_path, close=False)
    assert 0 == main(["ingest", str(tmp_path / "run.parquet"), "-w", str(tmp_path / "out"), "-q"])

    assert np.array_equal(EVERY, read_trace(tmp_path / "out" / "traces" / "run.parquet").counts)
