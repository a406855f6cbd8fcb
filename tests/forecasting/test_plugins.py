"""Predictors of others: the example of the how-to, at hand and installed, in commands, workers and the cache."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import ROOT

from moetrace import Forecast, SettingError, check_predictor, predictor
from moetrace.forecasting.keys import settings_of
from moetrace.forecasting.predictors import PREDICTORS
from moetrace.forecasting.predictors.base import Untrained, constant

EXAMPLE = re.search(r"```python\n(# drift.py\n.*?)```", (ROOT / "docs" / "plugins.md").read_text(), re.DOTALL)[1]


@pytest.fixture
def at_hand(tmp_path, monkeypatch):
    """The example as a file in the working directory."""
    (tmp_path / "drift.py").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("drift", None)


@pytest.mark.parametrize("name", [name for name in PREDICTORS if name != "lstm"])
def test_our_own_keep_what_plug_ins_have_to(name):
    """The function that a plug-in is tested with."""
    check_predictor(predictor(name))


def test_the_example_is_found_in_the_working_directory(at_hand):
    """With its settings, and it passes the check."""
    found = predictor("drift:DriftAware:pull=2")

    assert ("drift_aware", 1000, 2.0) == (found.name, found.window, found.pull)
    check_predictor(found)


def run(folder, *argv, **env):
    """A command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "moetrace", *argv], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **env},
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_one_has_a_name_also_in_workers(tmp_path):
    """As a package of another folder, with two processes; the cache knows its source."""
    site = tmp_path / "site"
    (site / "drift-1.0.dist-info").mkdir(parents=True)
    (site / "drift.py").write_text(EXAMPLE)
    (site / "drift-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: drift\nVersion: 1.0\n")
    (site / "drift-1.0.dist-info" / "entry_points.txt").write_text(
        "[moetrace.predictors]\ndrift_aware = drift:DriftAware\n"
    )
    trace, env = ROOT / "sample_traces" / "gpt-moe-8e-a.parquet", {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    run(tmp_path, "ingest", str(trace), "--quiet", **env)
    argv = ("predict", "gpt-moe-8e-a", "--layers", "2,4", "--steps", ":4000", "--predictor", "window_mean")

    both = run(
        tmp_path, *argv, "--predictor", "drift_aware", "--jobs", "2", "--format", "csv", "--table", "scores", **env
    )
    (site / "drift.py").write_text(EXAMPLE.replace("self.pull * moved", "2 * self.pull * moved"))
    other = run(tmp_path, *argv, "--predictor", "drift_aware", "--format", "csv", "--table", "scores", **env)

    assert {"window_mean", "drift_aware"} == {line.split(",")[1] for line in both.splitlines()[1:]}
    rows = [[line for line in text.splitlines() if ",drift_aware," in line] for text in (both, other)]
    assert len(rows[0]) == len(rows[1])
    assert [row.split(",")[6] for row in rows[0]] != [row.split(",")[6] for row in rows[1]]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere:Class", "nowhere:Class: the module cannot be imported"),
        ("drift:Nothing", "drift:Nothing: the module has no Nothing"),
        ("drift:np", "drift:np: is no subclass of moetrace.Predictor"),
        ("drift:DriftAware:size=3", "drift_aware has no setting 'size'; it has window, pull"),
        ("nowhere", "there is no predictor 'nowhere'"),
    ],
)
def test_what_is_none_is_refused(at_hand, spec, said):
    """In a line that names it."""
    with pytest.raises(SettingError, match=re.escape(said)):
        predictor(spec)


def test_a_name_of_ours_is_taken(at_hand):
    """Two columns of one name could not be told apart."""
    (at_hand / "drift.py").write_text(EXAMPLE.replace('"drift_aware"', '"level"'))

    with pytest.raises(SettingError, match="is called level, like one of moetrace"):
        predictor("drift:DriftAware")


def test_the_source_of_a_plug_in_is_part_of_its_key(at_hand):
    """A change of the module gives new numbers, not cached ones."""
    before = settings_of(predictor("drift:DriftAware"))
    sys.modules.pop("drift")
    (at_hand / "drift.py").write_text(EXAMPLE + "\n# changed\n")
    import linecache

    linecache.clearcache()

    assert before != settings_of(predictor("drift:DriftAware"))


@dataclass(frozen=True)
class Faulty(Untrained):
    """Breaks one rule."""

    name = "faulty"
    fault: str = ""

    def forecast(self, history, horizon):
        """The mean, but for the fault."""
        shares = np.array(constant(history.mean_shares, horizon))
        if self.fault == "shape":
            shares = shares[:-1]
        if self.fault == "sum":
            shares = 2 * shares
        if self.fault == "numbers":
            shares[3] = np.nan
        if self.fault == "begin":
            shares[0] *= 1 + 1 / horizon
        if self.fault == "still":
            shares = np.full_like(shares, 1 / history.experts)
        return Forecast(shares)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("shape", "has the shape"), ("sum", "do not sum to 1"), ("numbers", "are no numbers"),
        ("begin", "a shorter horizon"), ("still", "never moved"),
    ],
)  # fmt: skip
def test_the_check_notices_each_fault(fault, said):
    """And passes a predictor without one."""
    check_predictor(Faulty())

    with pytest.raises(AssertionError, match=said):
        check_predictor(Faulty(fault))
