"""Kept results: equal to those computed in memory, never computed twice, and none the worse for a kill."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import thorough_but

from moetrace import (
    LoadTrace,
    ResultFolder,
    SettingError,
    TraceError,
    evaluate,
    open_trace,
    predictor,
    runner,
    save_trace,
)
from moetrace.files import replacing
from moetrace.forecasting.predictors import base
from moetrace.synthetic import settling, synthetic_trace

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
        shares = [load.mean_shares for load in histories]
        FITTED.append(len(shares))
        return FittedPooling(self.weight * np.mean(shares, axis=0))

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
    """A trace of three layers and 1,600 steps, as a file."""
    courses = [settling(step, steps=1600, tokens=2000, experts=6) for step in (500, 900, 1300)]
    path = tmp_path_factory.mktemp("traces") / "made.parquet"
    save_trace(synthetic_trace(courses, name="made", seed=3), path)
    return path


def computed(path, *specs, results=None, horizons=HORIZONS, layers=None, last=None, jobs=1, dask=None, **other):
    """What comes of evaluating the trace at *path*: window_mean and ema unless *specs* say otherwise."""
    trace = open_trace(path).select(layers, last=last)
    predictors = [predictor(spec) if isinstance(spec, str) else spec for spec in specs or ("window_mean", "ema")]
    return evaluate(trace, predictors, horizons, results=results, run=runner(jobs, dask), **other)


@pytest.fixture
def store(tmp_path):
    """An empty folder of results."""
    return ResultFolder(tmp_path / "parts")


def untimed(frame):
    """The scores without the seconds they took."""
    return frame.drop(columns=SECONDS)


def assert_same(expected, actual):
    """Scores, shares and forecasts are equal to the last bit."""
    pd.testing.assert_frame_equal(untimed(expected.scores), untimed(actual.scores), check_exact=True)
    pd.testing.assert_frame_equal(expected.shares, actual.shares, check_exact=True)
    for a, b in zip(expected.forecasts(), actual.forecasts(), strict=True):
        assert (a[:4], a.status) == (b[:4], b.status)
        assert np.array_equal(a.shares, b.shares)
        assert all(np.array_equal(a.half_widths[percent], b.half_widths[percent]) for percent in (80, 95))


ALL = ("sw_avg", "arima", "lstm:updates=3", "auto", "level", "window_mean", "ema")


@pytest.fixture(scope="module")
def in_memory(path):
    """What comes of every predictor, computed in memory."""
    return computed(path, *ALL, ahead=True)


@pytest.mark.parametrize("jobs", thorough_but([1], [1, 2]))
@pytest.mark.slow
def test_results_in_a_folder_are_those_in_memory(path, store, in_memory, jobs):
    """Scores, shares and forecasts of every predictor, in the same order, to the last bit, on one core and two."""
    assert_same(in_memory, computed(path, *ALL, ahead=True, results=store, jobs=jobs))


@pytest.mark.slow
def test_processes_hand_over_what_is_kept_in_memory(path):
    """Without a folder, what workers make comes back to the one that asked."""
    asked = ("window_mean", "level", Pooling())

    assert_same(computed(path, *asked, ahead=True), computed(path, *asked, ahead=True, jobs=2))


@pytest.mark.slow
def test_progress_counts_fits_and_layers(path, store):
    """Two fits for all layers are tasks, and so are three layers, whoever does them."""
    told = []
    computed(path, Pooling(), "ema", results=store, jobs=2, progress=lambda done, total: told.append((done, total)))

    assert [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)] == told


def test_a_second_run_makes_nothing(path, store):
    """And writes nothing."""
    first = computed(path, "window_mean", Pooling(), ahead=True, results=store)
    before = {file: file.stat().st_mtime_ns for file in store.root.rglob("*")}
    again = computed(path, "window_mean", Pooling(), ahead=True, results=store)

    assert (24, 0) == (first.computed, first.reused)
    assert (0, 24) == (again.computed, again.reused)
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
        ({"last": 1590}, 12),
        ({"ahead": True}, 12),
    ],
    ids=str,
)
@pytest.mark.slow
def test_a_change_makes_what_depends_on_it(path, store, change, made):
    """And nothing else; three layers, two predictors, two horizons are twelve results."""
    computed(path, results=store)
    asked = dict(change)

    assert made == computed(path, *asked.pop("specs", ()), results=store, **asked).computed


@pytest.mark.slow
def test_another_layer_is_computed_alone(path, store):
    """Except by a predictor that learns from all layers."""
    computed(path, "ema", Pooling(), layers=(0, 1), results=store)

    assert 2 == computed(path, "ema", results=store).computed
    assert 6 == computed(path, Pooling(), results=store).computed


@pytest.mark.slow
def test_other_counts_under_the_same_name_are_computed(path, store, tmp_path):
    """Only the layer that changed; the trace knows its digests."""
    computed(path, results=store)
    counts = open_trace(path).counts.copy()
    counts[100, 1, :2] += (1, -1)
    changed = LoadTrace.from_counts(counts, name="made")
    save_trace(changed, tmp_path / "made.parquet")

    assert 4 == computed(tmp_path / "made.parquet", results=store).computed


@pytest.mark.parametrize("what", ["code_digest", "library_versions"])
@pytest.mark.slow
def test_other_code_and_other_libraries_are_other_results(path, store, monkeypatch, what):
    """Whoever changes a predictor, or installs another NumPy, is not shown kept numbers."""
    computed(path, results=store)
    monkeypatch.setattr(f"moetrace.forecasting.keys.{what}", lambda: "changed")

    assert 12 == computed(path, results=store).computed


@pytest.mark.slow
def test_a_kept_fit_is_not_made_again(path, store):
    """Not even when every score has to be."""
    first = computed(path, Pooling(), results=store)
    for part in store.root.rglob("*.scores.parquet"):
        part.unlink()
    FITTED.clear()
    again = computed(path, Pooling(), results=store)

    assert (6, []) == (again.computed, FITTED)
    pd.testing.assert_frame_equal(untimed(first.scores), untimed(again.scores), check_exact=True)
    pd.testing.assert_series_equal(first.scores["fit_seconds"], again.scores["fit_seconds"])


@pytest.mark.slow
def test_other_runs_to_train_on_are_part_of_the_name(path, store, tmp_path):
    """What was learned elsewhere gives other results; the trace itself is refused."""
    other = synthetic_trace([settling(400, steps=1000, experts=6)], name="other", seed=8)
    computed(path, Pooling(), results=store)
    found = computed(path, Pooling(), train_on=[other], results=store)

    assert 6 == found.computed
    assert_same(computed(path, Pooling(), train_on=[other]), found)
    with pytest.raises(SettingError, match="made itself"):
        computed(path, Pooling(), train_on=[open_trace(path)], results=store)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda _: b"", lambda data: data[:99] + b"x" + data[100:]])
@pytest.mark.parametrize(
    "kind",
    thorough_but(["scores.parquet", "npz"], ["scores.parquet", "shares.parquet", "forecast.parquet", "npz", "json"]),
)
@pytest.mark.slow
def test_damaged_results_are_made_anew(path, tmp_path, kind, damage):
    """With a note that names the file; the numbers are those of before."""
    notes = []
    store = ResultFolder(tmp_path / "parts", notes.append)
    first = computed(path, Pooling(), ahead=True, results=store)
    expected = (untimed(first.scores), first.shares, list(first.forecasts()))
    damaged = next(store.root.rglob(f"*.{kind}"))
    damaged.write_bytes(damage(damaged.read_bytes()))
    if kind in {"npz", "json"}:  # which are read only where something has to be made of them
        for made in [*store.root.rglob("*.scores.parquet"), *store.root.rglob("*.forecast.parquet")]:
            made.unlink()
    again = computed(path, Pooling(), ahead=True, results=store)

    assert [f"{damaged} was damaged: it is made anew"] == notes
    assert again.computed
    pd.testing.assert_frame_equal(expected[0], untimed(again.scores), check_exact=True)
    pd.testing.assert_frame_equal(expected[1], again.shares, check_exact=True)
    assert all(np.array_equal(a.shares, b.shares) for a, b in zip(expected[2], again.forecasts(), strict=True))


def test_results_of_one_layer_are_never_those_of_another(path, tmp_path):
    """A file that was copied over another's is noticed and made anew."""
    store = ResultFolder(tmp_path / "parts")
    expected = untimed(computed(path, "ema", results=store).scores)
    first, second = (next(store.root.rglob(f"layer-{n}/horizon-300.*.scores.parquet")) for n in (0, 1))
    second.write_bytes(first.read_bytes())
    again = computed(path, "ema", results=store)

    assert 1 == again.computed
    pd.testing.assert_frame_equal(expected, untimed(again.scores), check_exact=True)


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.slow
def test_a_trace_that_changes_under_a_run_is_one_line(path, tmp_path, store, jobs):
    """What was opened is what is read: another trace in its place is no part of the answer."""
    place = tmp_path / "made.parquet"
    place.write_bytes(path.read_bytes())
    counts, trace = open_trace(place).counts, open_trace(place)
    save_trace(LoadTrace.from_counts(counts[:, :, ::-1], name="made"), place)

    with pytest.raises(TraceError, match=r"made.parquet: changed while it was read; run the same command again"):
        evaluate(trace, [predictor("ema")], HORIZONS, results=store, run=runner(jobs))


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.slow
def test_damage_is_the_same_line_from_every_process(path, tmp_path, store, jobs):
    """A layer that is not as it was written."""
    damaged = tmp_path / "made.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)

    with pytest.raises(TraceError, match=r"made.parquet: is damaged: .*; ingest its source again"):
        computed(damaged, results=store, jobs=jobs)


RUN = """
import sys
from pathlib import Path
sys.path += sys.argv[4:]
from test_tasks import computed
from moetrace import ResultFolder

store = ResultFolder(Path(sys.argv[2]))
computed(Path(sys.argv[1]), "sw_avg", "arima", "level", ahead=True, results=store, jobs=int(sys.argv[3]))
"""


def started(path, store, jobs):
    """A run in a process of its own."""
    here = Path(__file__).parent
    return subprocess.Popen([sys.executable, "-c", RUN, path, store.root, str(jobs), here, here.parent])


def killed(path, store, jobs, parts):
    """Whether a run was killed once *parts* files were there, before it ended by itself."""
    child = started(path, store, jobs)
    while child.poll() is None and len(list(store.root.rglob("*.parquet"))) < parts:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    return child.wait() == -signal.SIGKILL


@pytest.mark.thorough
def test_killed_and_run_again_is_as_if_never_killed(path, store, tmp_path):
    """Three kills between results; nothing half-written is left, and what was made is not made again."""
    asked = ("sw_avg", "arima", "level")
    assert [True] * 3 == [killed(path, store, 1, parts) for parts in (1, 15, 30)]
    there = len(list(store.root.rglob("*.scores.parquet")))
    resumed = computed(path, *asked, ahead=True, results=store)

    assert 0 < there <= resumed.reused < resumed.reused + resumed.computed == 36
    assert [] == list(store.root.rglob(".partial-*"))
    assert_same(computed(path, *asked, ahead=True), resumed)
