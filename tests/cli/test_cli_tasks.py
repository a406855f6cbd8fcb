"""What `predict` and `report` say of results that are kept."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import long_table

from moetrace import LoadTrace, save_trace

QUICK = ("--predictor", "window_mean", "--predictor", "ema")


@pytest.fixture
def ingested(moetrace, settled, tmp_path):
    """The command line of a workspace with a trace of two layers and 4,000 steps in it."""
    pq.write_table(long_table(settled), tmp_path / "settled.parquet")
    assert moetrace("ingest", tmp_path / "settled.parquet").code == 0
    return moetrace


@pytest.mark.slow
def test_the_same_command_again_does_nothing_and_says_so(ingested):
    """Exit code 0, the same document, and a line on stderr; quiet is quiet."""
    first = ingested("predict", *QUICK, "--json")
    again = ingested("predict", *QUICK, "--json")

    assert "cached results" not in first.err
    assert "settled: reusing all 8 cached results\n" in again.err
    assert (0, first.json) == (again.code, again.json)
    assert "" == ingested("predict", *QUICK, "--json", "--quiet").err


@pytest.mark.slow
def test_another_predictor_is_computed_alone(ingested):
    """The rest is found, by two processes too."""
    ingested("predict", *QUICK)
    more = ingested("predict", *QUICK, "--predictor", "level", "--jobs", 2)

    assert "settled: reusing 8 of 12 cached results\n" in more.err


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_report_finds_what_predict_computed(ingested):
    """At the horizons they have in common; the report forecasts nothing after the end."""
    ingested("predict", *QUICK, "--horizon", "2000")
    report = ingested("report", *QUICK, "--layers", 0)

    assert "settled: reusing 2 of 4 cached results\n" in report.err


@pytest.mark.slow
def test_removing_a_trace_removes_its_results(ingested, tmp_path):
    """The same trace read again starts anew."""
    ingested("predict", *QUICK)
    parts = tmp_path / "cwd" / "moetrace-out" / "parts"
    assert ["settled"] == [folder.name for folder in parts.iterdir()]
    ingested("remove", "settled")

    assert [] == list(parts.iterdir())


@pytest.mark.slow
def test_a_damaged_result_is_made_anew(ingested, tmp_path):
    """With a note that names the file, and the same answer."""
    expected = ingested("predict", *QUICK).out
    part = next((tmp_path / "cwd").rglob("*.scores.parquet"))
    part.write_bytes(part.read_bytes()[:-9])
    done = ingested("predict", *QUICK)

    assert (0, expected) == (done.code, done.out)
    assert f"{part.name} was damaged: it is made anew" in done.err


@pytest.mark.thorough
def test_a_long_trace_says_that_its_cutoffs_are_far_apart(moetrace, tmp_path):
    """Once, and not to who asked for a distance."""
    counts = np.tile([3, 1], (60_000, 1, 1))
    save_trace(LoadTrace.from_counts(counts, name="long"), tmp_path / "long.parquet")
    argv = ("predict", tmp_path / "long.parquet", "--predictor", "window_mean", "--horizon", "10")
    found, asked = moetrace(*argv, "--json"), moetrace(*argv, "--every", "30000", "--json")

    assert 1 == found.err.count("long: cutoffs 2,000 steps apart, for its length (--every sets it)")
    assert [500, *range(2000, 59_000, 2000)] == [row["cutoff"] for row in found.json["scores"]]
    assert "apart" not in asked.err
