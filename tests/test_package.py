"""What is published: it builds, is well formed, and runs without the repository."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from conftest import ROOT, SAMPLE

from moetrace.cli import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and source package, built from a copy of what goes into them."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("moetrace", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    _run("-m", "build", "--no-isolation", "--outdir", dist, source)
    return dist


def _run(*argv, **more):
    done = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, **more)
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


def test_checkers_have_nothing_to_say(built):
    """The readers of metadata and of wheels that the index and packagers use."""
    pytest.importorskip("twine", reason="twine is not installed")
    _run("-m", "twine", "check", "--strict", *built.iterdir())
    _run("-m", "check_wheel_contents", *built.glob("*.whl"))


@pytest.mark.thorough
def test_the_wheel_runs_without_the_repository(built, tmp_path):
    """Unpacked elsewhere, it reads a trace and writes the page: its templates are with it."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    place = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(tmp_path / "site")}}

    assert str(tmp_path / "site") in _run("-c", "import moetrace; print(moetrace.__file__)", **place)
    _run("-m", "moetrace", "ingest", SAMPLE, **place)
    _run("-m", "moetrace", "report", "--predictor", "window_mean", "--layers", "4", "--steps", ":4000", **place)
    assert (tmp_path / "moetrace-out" / "report" / "report.html").stat().st_size > 100_000


def test_the_citation_names_the_version():
    """That of `pyproject.toml`, where it stands for everything else."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_windows_is_refused_in_a_line(monkeypatch):
    """Before anything is imported that needs locks and forks."""
    monkeypatch.setattr(sys, "platform", "win32")

    with pytest.raises(SystemExit, match="not on Windows"):
        run()
