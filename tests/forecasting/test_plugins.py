"""Predictors of others: the example of the how-to, at hand and installed, in commands, workers and the cache."""

import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass

import numpy as np
import pytest
from conftest import ROOT, SAMPLE

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

    assert ("drift_aware", {"window": 1000, "pull": 2.0}) == (found.name, asdict(found))
    check_predictor(found)


def run(folder, *argv):
    """A command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "moetrace", *argv], cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    return done.stdout


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The example as a package of another folder, which processes see, and a workspace with a trace."""
    folder = tmp_path / "site"
    about = folder / "drift-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / "drift.py").write_text(EXAMPLE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: drift\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[moetrace.predictors]\ndrift_aware = drift:DriftAware\n")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
    run(tmp_path, "ingest", str(SAMPLE), "--quiet")
    return folder


def scored(folder, *argv, also=("--predictor", "window_mean")):
    """The rows of the installed predictor among the scores of a command on two layers."""
    spec = (
        "moetrace-out/traces/gpt-moe-8e-a.parquet",
        "--layers",
        "2,4",
        "--steps",
        ":4000",
        "--predictor",
        "drift_aware",
    )
    text = run(folder, argv[0], *spec, *argv[1:], *also, "--format", "csv", "--table", "scores")
    rows = [line.split(",")[:7] for line in text.splitlines()]
    assert {"window_mean", "drift_aware"} == {row[1] for row in rows[1:]} or not also
    return [row for row in rows if row[1] == "drift_aware"]


@pytest.mark.thorough
def test_an_installed_one_has_a_name_also_in_workers(site, tmp_path):
    """With two processes; the cache knows its source, and `--list-predictors` shows it."""
    both = scored(tmp_path, "predict", "--jobs", "2")
    (site / "drift.py").write_text(EXAMPLE.replace("self.pull * moved", "2 * self.pull * moved"))
    other = scored(tmp_path, "predict", also=())

    assert len(both) == len(other)
    assert [row[6] for row in both] != [row[6] for row in other]
    assert "drift_aware" in run(tmp_path, "predict", "--list-predictors", "--json")


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # of the libraries, about sockets and loops
def test_an_installed_one_is_in_a_report_and_on_a_cluster(site, cluster, tmp_path):
    """With the same numbers as by `predict`, alone."""
    address, _ = cluster
    spread = ("--dask", address, "--horizons", "1000", "--gpus", "1", "--figures", "none")
    reported = scored(tmp_path, "report", *spread, "-w", "other", "--folder", "page")

    assert reported == scored(tmp_path, "predict")
    assert "drift_aware" in (tmp_path / "page" / "report.html").read_text()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nowhere:Class", "nowhere:Class: the module cannot be imported"),
        ("drift:Nothing", "drift:Nothing: the module has no Nothing"),
        ("drift:np", "drift:np: is no moetrace.Predictor"),
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
