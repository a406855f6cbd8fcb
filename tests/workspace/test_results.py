"""The store: what goes in comes out, damage is one line, and names say what a result depends on."""

import errno

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrace import ResultFolder, evaluate, open_trace, predictor, save_trace
from moetrace.files import file_name
from moetrace.forecasting.evaluation import FORECAST, SCORES, SHARES, Result
from moetrace.forecasting.keys import settings_of
from moetrace.forecasting.layers import EndForecast
from moetrace.workspace.results import writing_forecast

RESULT = Result("a trace", "arima:order=5,1,5", 3, 1000, "0123")
HALF_WIDTHS = {80: np.array([1 / 3, 0.1]), 95: np.array([0.5, 0.2])}
COMING = EndForecast("a", "p", 3, 11, np.array([[0.25, 0.75], [0.1 + 0.2, 0.7]]), 1 / 7, HALF_WIDTHS, "ok")


@pytest.fixture
def store(tmp_path):
    """An empty one."""
    return ResultFolder(tmp_path / "parts")


def test_scores_and_shares_come_back(store):
    """Both frames, to the last bit."""
    scores = pd.DataFrame({"predictor": ["p", "p"], "cutoff": [1, 2], "error_rate": [0.1, float("nan")]})
    shares = pd.DataFrame({"expert": [0, 1], "predicted": [1 / 3, 2 / 3]})
    assert not store.has(SCORES, RESULT)
    store.put(SCORES, RESULT, scores)
    assert store.has(SCORES, RESULT)
    assert not store.has(SHARES, RESULT)
    store.put(SHARES, RESULT, shares)

    assert store.has(SHARES, RESULT)
    pd.testing.assert_frame_equal(scores, store.get(SCORES, RESULT), check_exact=True)
    pd.testing.assert_frame_equal(shares, store.get(SHARES, RESULT), check_exact=True)


@pytest.mark.parametrize("intervals", [True, False])
def test_scores_alone_have_no_shares(store, small, intervals):
    """Neither a file of them, nor are they missed; with intervals both are needed."""
    asked = {"trace": small, "predictors": [predictor("window_mean")], "horizons": [5], "cutoffs": [20]}
    asked |= {"intervals": intervals, "results": store}
    first = evaluate(**asked)
    kinds = [path.suffixes[-2][1:] for path in store.root.rglob("*.parquet")]
    again = evaluate(**asked)
    for path in store.root.rglob("*.shares.parquet"):
        path.unlink()

    assert {"scores", "shares"} if intervals else {"scores"} == set(kinds)
    assert (first.computed, again.computed) == (len(small.layers), 0)
    assert evaluate(**asked).computed == (len(small.layers) if intervals else 0)


def test_a_forecast_comes_back(store):
    """Shares, the expected error, intervals and status, to the last bit."""
    store.put(FORECAST, RESULT, COMING)
    found = store.get(FORECAST, RESULT)

    assert np.array_equal(COMING.shares, found.shares)
    assert [80, 95] == list(found.half_widths)
    assert all(np.array_equal(HALF_WIDTHS[percent], found.half_widths[percent]) for percent in HALF_WIDTHS)
    assert found.expected_error == 1 / 7
    assert (COMING[:4], "ok") == (found[:4], found.status)


@pytest.mark.parametrize(
    "name", ["..", "a/b", "../x", ".", "", "lstm:seed=3", "x" * 300, "C:\\x", "\udcff", "\0", "a\n"]
)
def test_names_stay_inside_the_folder(name):
    """Whatever a trace or a predictor is called."""
    safe = file_name(name)

    assert not set("/\\:\n\0") & set(safe)
    assert safe not in {".", ".."}
    assert 0 < len(safe.encode()) <= 100


@given(st.text(), st.text())
@pytest.mark.slow
def test_two_names_never_become_one(a, b):
    """Nor does one become two."""
    assert (a == b) == (file_name(a) == file_name(b))


@pytest.mark.parametrize(
    ("a", "b"), [("run.1", "run-1"), ("model.v1", "model-v1"), ("a/b", "a_b"), ("x" * 200, "x" * 201)]
)
def test_names_that_look_alike_are_told_apart(a, b):
    """Those that a simpler rule would have made one."""
    assert file_name(a) != file_name(b)


def test_settings_tell_predictors_apart():
    """The default spelled out is the default; anything else is another."""
    assert settings_of(predictor("sw_avg")) == settings_of(predictor("sw_avg:window=500"))
    assert settings_of(predictor("sw_avg")) != settings_of(predictor("sw_avg:window=501"))
    assert settings_of(predictor("sw_avg")) != settings_of(predictor("window_mean"))


def test_digests_are_those_of_the_counts(small, tmp_path):
    """A layer that is the same in another trace has the same."""
    save_trace(small, tmp_path / "a.parquet")
    save_trace(small.select(layers=[5]), tmp_path / "b.parquet")

    both, one = open_trace(tmp_path / "a.parquet"), open_trace(tmp_path / "b.parquet")
    assert both.digest(5) == one.digest(5)
    assert both.digest(3) != both.digest(5)


def test_the_forecast_file_has_a_row_for_every_step(tmp_path):
    """Columns as documented, shares as lists."""
    ahead = EndForecast("a", "p", 3, 11, np.array([[0.25, 0.75], [0.5, 0.5]]), 0.1, HALF_WIDTHS, "ok")
    list(writing_forecast(tmp_path / "f.parquet", [ahead, ahead._replace(trace="b")]))
    rows = pq.read_table(tmp_path / "f.parquet").to_pylist()

    assert {"trace": "a", "predictor": "p", "layer": 3, "step": 12, "shares": [0.5, 0.5]} == rows[1]
    assert [("a", 11), ("a", 12), ("b", 11), ("b", 12)] == [(row["trace"], row["step"]) for row in rows]


def test_the_same_forecast_file_is_not_written_again(tmp_path):
    """The key decides; a damaged file is replaced."""
    path = tmp_path / "f.parquet"
    list(writing_forecast(path, [COMING], "key"))
    list(writing_forecast(path, iter([COMING._replace(trace="b")]), "key"))
    assert {"a"} == set(pq.read_table(path)["trace"].to_pylist())

    list(writing_forecast(path, [COMING._replace(trace="b")], "another"))
    assert {"b"} == set(pq.read_table(path)["trace"].to_pylist())

    path.write_bytes(b"")
    list(writing_forecast(path, [COMING._replace(trace="b")], "another"))
    assert {"b"} == set(pq.read_table(path)["trace"].to_pylist())


@pytest.mark.slow
def test_a_flipped_bit_in_a_forecast_file_is_repaired(tmp_path):
    """The same forecast writes the file again where a byte of its pages differs, and leaves a sound one as it is."""
    path = tmp_path / "forecast.parquet"
    whole = [*writing_forecast(path, [COMING], "key")] and path.read_bytes()
    times = path.stat().st_mtime_ns
    assert 1 == len([*writing_forecast(path, [COMING], "key")])
    assert times == path.stat().st_mtime_ns

    for place in range(4, len(whole) - 8, 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert 1 == len([*writing_forecast(path, [COMING], "key")])
        assert pq.read_table(path).equals(pq.read_table(path_of(tmp_path, whole)))


def path_of(folder, content):
    """A file with that *content*."""
    path = folder / "whole.parquet"
    path.write_bytes(content)
    return path


def test_a_lack_of_memory_is_not_called_damage(store, monkeypatch):
    """Neither of a cached result nor of the forecast file, which is not written again."""

    def short(*_args, **_settings):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    store.put(FORECAST, RESULT, COMING)
    path = store.root / "forecast.parquet"
    list(writing_forecast(path, [COMING], "key"))
    monkeypatch.setattr(pq, "ParquetFile", short)

    with pytest.raises(OSError, match="Cannot allocate"):
        store.get(FORECAST, RESULT)
    with pytest.raises(OSError, match="Cannot allocate"):
        list(writing_forecast(path, [COMING], "key"))
