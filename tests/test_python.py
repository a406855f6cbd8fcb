"""What is easily done wrong from Python ends in a sentence of ours, and a path may be a text everywhere."""

import numpy as np
import pandas as pd
import pytest

import moetrace as mt

TRACE = mt.synthetic_trace([mt.settling(500, steps=1500)])
COUNTS = TRACE.counts


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: mt.read_trace(COUNTS), "a ndarray is not a path to read from: moetrace.from_frame makes"),
        (lambda: mt.read_trace(pd.DataFrame({"step": [1]})), "a DataFrame is not a path to read from"),
        (lambda: TRACE.select(0), r"layers are several, such as \[0, 1\], not 0"),
        (lambda: TRACE.select("0"), "layers are several"),
        (lambda: mt.fluctuation(TRACE.layer(0), 100), r"windows are several, such as \[100, 200\], not 100"),
        (lambda: mt.evaluate(TRACE, mt.Level(), [100]), r"predictors are several, such as \[mt.Level\(\)\]"),
        (lambda: mt.evaluate(TRACE, "level", [100]), "predictors are several"),
        (lambda: mt.evaluate(TRACE, ["level"], [100]), r"'level' is no predictor: mt.predictor\('level'\) makes one"),
        (lambda: mt.evaluate(TRACE, [mt.Level], [100]), r"Level is a class: Level\(\) makes a predictor"),
        (lambda: mt.evaluate(TRACE, [mt.Level()], 100), r"horizons are several, such as \[1000\], not 100"),
        (lambda: mt.evaluate(TRACE, [mt.Level()], [100], 500), "cutoffs are several"),
        (lambda: mt.hot(TRACE, predictor=mt.Level()), r"predictor are several, such as \['level', mt.Ema\(\)\]"),
        (lambda: mt.hot(TRACE, predictor=[mt.Level(), "level"]), "level is given twice"),
        (lambda: mt.hot(TRACE, cutoffs=500), "cutoffs are several"),
        (lambda: mt.export_trace(TRACE, "x.csv", "cvs"), "there is no kind of export 'cvs'; did you mean 'csv'"),
    ],
)
def test_a_wrong_argument_is_a_sentence(wrong, said):
    """One alone for several, a name or a class for a thing, an array for a path."""
    with pytest.raises(mt.MoetraceError, match=said):
        wrong()


@pytest.mark.slow
def test_a_path_may_be_a_text(tmp_path, monkeypatch):
    """Wherever one is given: what is written there is read from there."""
    monkeypatch.chdir(tmp_path)
    mt.save_trace(TRACE, "run.parquet")
    mt.export_trace(TRACE, "run.csv", "csv")
    place, kept = mt.Workspace("out"), mt.ResultFolder("parts")
    done = place.ingest("run.csv")
    test = mt.evaluate(TRACE, [mt.WindowMean()], [100], [1000], results=kept)
    again = mt.evaluate(TRACE, [mt.WindowMean()], [100], [1000], results=kept)
    found = mt.study(TRACE, [mt.WindowMean()], [100], [1000])

    assert np.array_equal(COUNTS, mt.open_trace("run.parquet").counts)
    assert (["run"], True) == (place.names(), np.array_equal(COUNTS, done.trace.counts))
    assert ((1, 0), (0, 1)) == ((test.computed, test.reused), (again.computed, again.reused))
    assert "report.html" == mt.write_report({"t": found.frames}, "my", kinds=())[-1].name
    assert [1500] == [look.step for look in mt.follow("run.parquet", pause=lambda: None)]
