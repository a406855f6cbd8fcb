"""The measured curve of an expert."""

import subprocess
import sys

import pytest

from moetrace.errors import SettingError
from moetrace.placement.measure import main, measured
from moetrace.placement.step_time import read_curve

SMALL = ("--hidden", "64", "--ffn", "32", "--dtype", "float32", "--experts", "4", "--repeats", "3")


def test_a_curve_is_measured_and_read(tmp_path, capsys):
    """The file is what --expert-time reads; many tokens take longer than one."""
    path = tmp_path / "curve.csv"

    assert 0 == main([*SMALL, "--tokens", "1", "4096", "-o", str(path)])

    (one, short), (many, long) = read_curve(path).curve
    assert (1, 4096) == (one, many)
    assert short < long
    assert 0 == main([*SMALL, "--tokens", "2", "1"])
    assert [["tokens", "microseconds"], ["1"], ["2"]] == [
        line.split(",")[: 2 - bool(i)] for i, line in enumerate(capsys.readouterr().out.splitlines())
    ]


@pytest.mark.parametrize("wrong", [{"dtype": "float31"}, {"dtype": "nn"}, {"device": "abacus"}])
def test_what_torch_does_not_have_is_refused(wrong):
    """In one line."""
    with pytest.raises(SettingError) as caught:
        measured(8, 8, tokens=[1], experts=1, **wrong)
    assert 1 == len(str(caught.value).splitlines())


def test_the_script_ends_in_a_line():
    """Not in a traceback."""
    argv = [sys.executable, "-m", "moetrace.placement.measure", *SMALL[:4], "--dtype", "x"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (2, 1) == (done.returncode, done.stderr.count("\n"))
