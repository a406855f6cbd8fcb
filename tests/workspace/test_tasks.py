"""Kept results: equal to those computed in memory, never computed twice, and none the worse for a kill."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest

from moetrace import LoadTrace, SettingError, TraceError, evaluate, forecast_end, open_trace, predictor, save_trace
from moetrace.files import replacing
from moetrace.forecasting.predictors import base
from moetrace.forecasting.windows import covered_horizons
from moetrace.synthetic import settling, synthetic_trace
from moetrace.workspace.results import Store
from moetrace.workspace.tasks import compute
from moetrace.workspace.work import Source, Work

HORIZONS = [300, 500]
FITTED: list[int] = []


@dataclass(frozen=True)
class Pooling(base.Predictor):
    """Learns the mean load of the experts over all layers."""

    name = "pooling"
    pools_layers = True
    refit_growth = 1.5
    weight: float = 1.0

    def fit(self, histories):
        FITTED.append(len(histories))
        return FittedPooling(self.weight * np.mean([load.mean_shares for load in histories], axis=0))

    def load(self, path):
        return FittedPooling(np.load(path))


@dataclass(frozen=True, eq=False)
class FittedPooling(base.Fitted):
    """The mean load."""

    shares: np.ndarray

    def forecast(self, history, horizon):
        return base.Forecast(base.constant(self.shares[: history.experts], horizon))

    def save(self, path):
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, self.shares)


SECONDS = ["fit_seconds", "forecast_seconds"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A trace of three layers and 2,000 steps, as a file."""
    courses = [settling(step, steps=2000, tokens=2000, experts=6) for step in (500, 900, 1500)]
    path = tmp_path_factory.mktemp("traces") / "made.parquet"
    save_trace(synthetic_trace(courses, name="made", seed=3), path)
    return path


def work(path, *specs, horizons=HORIZONS, layers=None, last=None, **other):
    """What to compute of the trace at *path*: window_mean and ema unless *specs* say otherwise."""
    source = Source(path, layers, last=last)
    made = [predictor(spec) if isinstance(spec, str) else spec for spec in specs or ("window_mean", "ema")]
    return Work(source, made, horizons, covered_horizons(source.open(), horizons), **other)


@pytest.fixture
def store(tmp_path):
    """An empty one."""
    return Store(tmp_path / "parts")


def untimed(frame):
    """The scores without the seconds they took."""
    return frame.drop(columns=SECONDS)


def assert_same(expected, actual):
    """Scores, shares and forecasts are equal to the last bit."""
    pd.testing.assert_frame_equal(untimed(expected.scores), untimed(actual.scores), check_exact=True)
    pd.testing.assert_frame_equal(expected.backtest.shares, actual.backtest.shares, check_exact=True)
    for (_, a), (_, b) in zip(expected.forecasts(), actual.forecasts(), strict=True):
        assert a[:3] == b[:3]
        assert np.array_equal(a.shares, b.shares)
        assert np.array_equal(a.deviation, b.deviation)


ALL = ("sw_avg", "arima", "lstm:updates=3", "auto", "level", "window_mean", "ema")


def test_kept_results_are_those_of_evaluate(path, store):
    """Scores, shares and forecasts of every predictor, in the same order, to the last bit."""
    found = compute(work(path, *ALL, ahead=True), store)
    trace, made = open_trace(path), [predictor(spec) for spec in ALL]
    expected = evaluate(trace, made, HORIZONS)

    pd.testing.assert_frame_equal(untimed(expected.scores), untimed(found.scores), check_exact=True)
    pd.testing.assert_frame_equal(expected.shares, found.backtest.shares, check_exact=True)
    for horizon in HORIZONS:
        kept = [coming for _, coming in found.forecasts() if len(coming.shares) == horizon]
        for a, b in zip(forecast_end(trace, made, horizon, scores=expected.scores), kept, strict=True):
            assert (a[:3], a.status) == (b[:3], b.status)
            assert np.array_equal(a.shares, b.shares)
            assert np.array_equal(a.deviation, b.deviation)


def test_two_processes_make_the_same(path, store, tmp_path):
    """To the last bit, with what was learned once, here."""
    asked = work(path, "window_mean", "level", Pooling(), ahead=True)
    told = []
    found = compute(asked, store, lambda done, total: told.append((done, total)), jobs=2)

    assert_same(compute(asked, Store(tmp_path / "serial")), found)
    assert (told[-1][1], told[-1][1]) == told[-1]
    assert list(range(1, len(told) + 1)) == [done for done, _ in told]


def test_a_second_run_makes_nothing(path, store):
    """And writes nothing."""
    asked = work(path, "window_mean", Pooling(), ahead=True)
    first = compute(asked, store)
    before = {file: file.stat().st_mtime_ns for file in store.root.rglob("*")}
    again = compute(asked, store)

    assert (24, 0) == (first.made, first.found)
    assert (0, 24) == (again.made, again.found)
    assert before == {file: file.stat().st_mtime_ns for file in store.root.rglob("*")}


@pytest.mark.parametrize(
    ("change", "made"),
    [
        ({}, 0),
        ({"specs": ("window_mean", "ema", "level")}, 6),
        ({"specs": ("ema", "window_mean")}, 0),
        ({"specs": ("window_mean", "ema:decay=0.8")}, 6),
        ({"horizons": [300]}, 0),
        ({"horizons": [300, 400]}, 6),
        ({"layers": (0, 2)}, 0),
        ({"last": 1990}, 12),
        ({"ahead": True}, 12),
    ],
    ids=str,
)
def test_a_change_makes_what_depends_on_it(path, store, change, made):
    """And nothing else; three layers, two predictors, two horizons are twelve results."""
    compute(work(path), store)
    asked = dict(change)

    assert made == compute(work(path, *asked.pop("specs", ()), **asked), store).made


def test_another_layer_is_computed_alone(path, store):
    """Except by a predictor that learns from all layers."""
    compute(work(path, "ema", Pooling(), layers=(0, 1)), store)

    assert 2 == compute(work(path, "ema"), store).made
    assert 6 == compute(work(path, Pooling()), store).made


def test_other_counts_under_the_same_name_are_computed(path, store, tmp_path):
    """Only the layer that changed; the trace knows its digests."""
    compute(work(path), store)
    counts = open_trace(path).counts.copy()
    counts[100, 1, :2] += (1, -1)
    changed = LoadTrace.from_counts(counts, name="made")
    save_trace(changed, tmp_path / "made.parquet")

    assert 4 == compute(work(tmp_path / "made.parquet"), store).made


def test_other_code_is_other_results(path, store, monkeypatch):
    """Whoever changes a predictor is not shown stored numbers."""
    compute(work(path), store)
    monkeypatch.setattr("moetrace.workspace.results.code_digest", lambda: "edited")

    assert 12 == compute(work(path), store).made


def test_a_kept_fit_is_not_made_again(path, store):
    """Not even when every score has to be."""
    first = compute(work(path, Pooling()), store)
    expected = untimed(first.scores)
    for part in store.root.rglob("*.scores.parquet"):
        part.unlink()
    FITTED.clear()
    again = compute(work(path, Pooling()), store)

    assert (6, []) == (again.made, FITTED)
    pd.testing.assert_frame_equal(expected, untimed(again.scores), check_exact=True)
    pd.testing.assert_series_equal(first.scores["fit_seconds"], again.scores["fit_seconds"])


def test_other_runs_to_train_on_are_part_of_the_name(path, store, tmp_path):
    """What was learned elsewhere gives other results; the trace itself is refused."""
    other = synthetic_trace([settling(400, steps=1000, experts=6)], name="other", seed=8)
    save_trace(other, tmp_path / "other.parquet")
    trained = work(path, Pooling(), train_on=[Source(tmp_path / "other.parquet")])
    expected = evaluate(open_trace(path), [Pooling()], HORIZONS, train_on=[other]).scores
    compute(work(path, Pooling()), store)
    found = compute(trained, store)

    assert 6 == found.made
    pd.testing.assert_frame_equal(untimed(expected), untimed(found.scores), check_exact=True)
    with pytest.raises(SettingError, match="made itself"):
        compute(replace(trained, train_on=[Source(path)]), store)


@pytest.mark.parametrize("jobs", [1, 2])
def test_damage_is_the_same_line_from_every_process(path, tmp_path, store, jobs):
    """A layer that is not as it was written."""
    damaged = tmp_path / "made.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)

    with pytest.raises(TraceError, match=r"made.parquet: is damaged: .*; ingest its source again"):
        compute(work(damaged), store, jobs=jobs)


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_tasks import work
from moetrace.workspace.tasks import compute
from moetrace.workspace.results import Store

compute(work(Path(sys.argv[1]), "sw_avg", "arima", "level", ahead=True), Store(Path(sys.argv[2])), jobs=int(sys.argv[3]))
"""


def started(path, store, jobs):
    """A run in a process of its own."""
    here = os.path.dirname(__file__)  # noqa: PTH120 - as text, for the command line
    return subprocess.Popen([sys.executable, "-c", RUN, path, store.root, str(jobs), here])


def killed(path, store, jobs, parts):
    """Whether a run was killed once *parts* files were there, before it ended by itself."""
    child = started(path, store, jobs)
    while child.poll() is None and len(list(store.root.rglob("*.parquet"))) < parts:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    return child.wait() == -signal.SIGKILL


def test_killed_and_run_again_is_as_if_never_killed(path, store, tmp_path):
    """Three kills between results; nothing half-written is left, and what was made is not made again."""
    asked = work(path, "sw_avg", "arima", "level", ahead=True)
    assert [True] * 3 == [killed(path, store, 1, parts) for parts in (1, 15, 30)]
    there = len(list(store.root.rglob("*.scores.parquet")))
    resumed = compute(asked, store)

    assert 0 < there <= resumed.found < resumed.found + resumed.made == 36
    assert [] == list(store.root.rglob(".partial-*"))
    assert_same(compute(asked, Store(tmp_path / "whole")), resumed)
