"""Odd traces: every command gives the right answer, or one line; warnings are errors."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import thorough_but

from moetrace.forecasting.predictors import PREDICTORS
from moetrace.record import Recorder

RNG = np.random.default_rng(0)
LOAD = RNG.multinomial(300, [0.4, 0.3, 0.2, 0.1], size=(1500, 2))
ONE = LOAD[:, :1]  # what is odd about the steps needs no second layer


def _vanishing():
    counts = np.zeros((1500, 1, 4), np.int64)
    counts[0] = 100
    counts[1:, :, 2] = 400
    return counts


def _swapping():
    counts = np.zeros((1500, 1, 2), np.int64)
    counts[::2, :, 0] = counts[1::2, :, 1] = 100
    return counts


def _jittered():
    return np.cumsum(1000 + RNG.integers(-30, 31, 1500)) + 1_700_000_000_000


ODD = {
    "near 2^63": {"counts": np.full((600, 1, 2), 2**62 - 1)},
    "two of 2^62": {"counts": np.where(np.arange(600)[:, None, None] < 2, 2**62, 10) * np.ones((1, 1, 2), np.int64)},
    "2^50 everywhere": {"counts": np.full((1500, 1, 4), 2**50)},
    "random distances": {"counts": ONE[:400], "steps": np.cumsum(RNG.integers(1, 40, 400))},
    "far apart": {"counts": ONE[:40], "steps": 500 * np.arange(40)},
    "eleven checkpoints": {
        "counts": ONE[:11],
        "steps": [0, 540, 1080, 2160, 4320, 5400, 6480, 7560, 8640, 9720, 9800],
    },
    "milliseconds": {"counts": ONE[:300], "steps": _jittered()[:300]},
    "tokens as steps": {"counts": ONE[:60], "steps": 4_194_304 * np.arange(1, 61)},
    "first step, then one expert": {"counts": _vanishing()},
    "one expert": {"counts": np.full((1500, 1, 1), 77)},
    "constant": {"counts": np.tile([10, 20, 30, 40], (1500, 2, 1))},
    "all zero but one": {"counts": np.tile([0, 0, 300, 0], (1500, 1, 1))},
    "two that swap": {"counts": _swapping()},
    "one step": {"counts": LOAD[:1]},
    "two steps": {"counts": LOAD[:2]},
    "ten steps": {"counts": LOAD[:10]},
    "one token a step": {"counts": RNG.multinomial(1, [0.25] * 4, size=(1500, 1))},
    "layer 2^31": {"counts": LOAD[:300], "layers": [1, 2**31]},
    "layer 2^31 - 1": {"counts": LOAD[:700], "layers": [1, 2**31 - 1]},
    "steps below 0": {"counts": ONE, "steps": np.arange(-700, 800)},
    "steps to 2^53": {"counts": ONE, "steps": 2**53 - 1500 + np.arange(1500)},
}
# Figures, and the compilation of the LSTM, take longer than all the rest: the oddest traces have them.
ODDEST = ("near 2^63", "far apart", "two that swap", "one step")
BUT_LSTM = [f"--predictor={name}" for name in PREDICTORS if name != "lstm"]
COMMANDS = (
    ("states",),
    ("predict", "--horizon", "300"),
    ("report", "--predictor", "level", "--figures", "none"),
    ("place", "--gpus", "2", "--horizon", "300", "--predictor", "window_mean"),
    ("hot", "--cold", "1"),
    ("check",),
    ("list",),
)


def write(path, counts, steps=None, layers=None):
    """The counts (steps, layers, experts) as a nested Parquet dump."""
    n, width, _ = counts.shape
    steps = np.arange(1, n + 1) if steps is None else np.asarray(steps)
    layers = np.arange(width) if layers is None else np.asarray(layers)
    rows = [list(map(int, row)) for row in counts.reshape(n * width, -1)]
    table = {
        "step": np.repeat(steps, width),
        "layer": np.tile(layers, n),
        "counts": pa.array(rows, pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(table), path)


def check_document(value, where=""):
    """Numbers in a JSON document are numbers, and shares and errors are possible ones."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key in {"share", "error_noise", "step_noise", "abs_points", "coverage_80"} and part is not None:
                assert 0 <= part <= 1 or (key.endswith("noise") and part < 2), (where, key, part)
            if key in {"error_rate", "step_error_rate", "window_mean_error_rate"} and part is not None:
                assert 0 <= part <= 2 + 1e-9, (where, key, part)
            check_document(part, f"{where}.{key}")
    elif isinstance(value, list):
        for part in value:
            check_document(part, where)
    elif isinstance(value, float):
        assert math.isfinite(value), where


def check_answer(moetrace, command):
    """An exit code that says so, one line for an error, and a document of possible numbers."""
    done = moetrace(*command, "--json")

    assert "Traceback" not in done.err
    assert done.code in {0, 1, 2}, (command, done.err)
    if done.code and command[0] != "check":
        assert 1 == done.err.count("\n"), (command, done.err)
    if done.out:
        check_document(json.loads(done.out, parse_constant=lambda text: pytest.fail(text)), command[0])
    if command[0] in {"states", "check", "list"}:  # the others have tables of the same numbers
        shown = moetrace(*command, *(["--show", "all"] if command[0] == "states" else []))
        assert (done.code, False) == (shown.code, "nan" in shown.out.lower().split()), command


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough_but(["one step", "near 2^63", "ten steps"], ODD))
def test_every_command_has_an_answer_or_one_line(moetrace, tmp_path, name, request):
    """No traceback, no warning, no NaN in JSON, shares within 0 and 1."""
    if name not in ODDEST:
        request.getfixturevalue("undrawn")
    write(tmp_path / "odd.parquet", **ODD[name])
    accept = ("--accept", "cumulative", "--accept", "smoothed")
    ingested = moetrace("ingest", tmp_path / "odd.parquet", *accept, "--json")
    if ingested.code:
        assert (1, 1) == (ingested.code, ingested.err.count("\n")), ingested.err
        return
    for command in COMMANDS:
        less = BUT_LSTM if command[0] == "predict" and name not in ODDEST else []
        check_answer(moetrace, (*command, *less))


@pytest.mark.slow
@pytest.mark.parametrize("steps", thorough_but([2], [1, 2, 10]))
def test_a_short_recording_has_an_answer_or_one_line(moetrace, tmp_path, steps):
    """As it lies where it was recorded, and ingested; while it is recorded, too."""
    path = tmp_path / "run.parquet"
    with Recorder(path, block=4) as recorder:
        for step in range(1, steps + 1):
            for layer in (0, 1):
                recorder.add(layer, LOAD[step, layer])
            recorder.step(step)
        going_on = moetrace("ingest", tmp_path / "run.parts", "--name", "parts", "--json")
        assert going_on.code in {0, 1, 2}, going_on.err
        assert "Traceback" not in going_on.err
    moetrace("remove", "parts")

    for command in COMMANDS:
        check_answer(moetrace, (command[0], *([path] if command[0] != "list" else []), *command[1:]))
    ingested = moetrace("ingest", path, "--json")
    assert (0, steps) == (ingested.code, ingested.json["traces"][0]["steps"]), ingested.err
    states = moetrace("states", "run", "--json").json["layers"]
    assert ["unknown", "unknown"] == [row["state"] for row in states]
    for command in COMMANDS:
        check_answer(moetrace, command)
