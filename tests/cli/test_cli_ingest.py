"""`moetrace ingest`: options, names, what is said, and exit codes."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import long_table

from moetrace import open_trace
from moetrace.formats import FORMATS


def test_layers_and_steps_restrict_what_is_ingested(moetrace, small, long_file):
    """The trace holds these alone, and its settings say so."""
    done = moetrace("ingest", long_file, "--layers", 5, "--steps", "20:29", "--json")

    trace = open_trace(done.json["traces"][0]["path"])
    assert np.array_equal(small.counts[10:20, 1:], trace.counts)
    assert {"layers": [5], "first": 20, "last": 29} == trace.info.settings


def test_a_canonical_file_is_restricted_too(moetrace, small, long_file):
    """Also where nothing needs converting."""
    moetrace("ingest", long_file)

    moetrace("ingest", "moetrace-out/traces/small.parquet", "--layers", 3, "--name", "less")

    assert (3,) == open_trace("moetrace-out/traces/less.parquet").layers


def test_the_same_options_again_do_nothing_and_others_are_refused(moetrace, long_file):
    """Options are part of what a trace is."""
    moetrace("ingest", long_file, "--layers", 5, "--bin", 2)

    again = moetrace("ingest", long_file, "--layers", 5, "--bin", 2)
    other = moetrace("ingest", long_file, "--bin", 3)

    assert (0, 1) == (again.code, other.code)
    assert "already imported, unchanged" in again.out
    assert "read with other options" in other.err


def test_ranks_are_merged_under_the_name_of_their_folder(moetrace, small, tmp_path):
    """One trace of all files in a folder."""
    folder = tmp_path / "run7"
    folder.mkdir()
    for rank in range(2):
        pq.write_table(long_table(small), folder / f"rank{rank}.parquet")

    done = moetrace("ingest", folder, "--merge", "sum", "--json")

    (trace,) = done.json["traces"]
    assert ("run7", 200) == (trace["name"], trace["tokens_per_step"])
    assert {"merge": "sum"} == trace["settings"]
    assert 0 == moetrace("ingest", folder, "--merge", "sum").code


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--merge", "sum"], 2, "goes with several files"),
        (["--merge", "product"], 2, "'product'"),
        (["--accept", "nothing"], 2, "there is no finding 'nothing'"),
        (["--bin", "0"], 2, "--bin"),
        (["--from", "parqet"], 2, "did you mean 'parquet'?"),
        (["--from", "parquet:stages=2"], 2, "parquet has no setting 'stages'; it has tokens_per_step, experts, column"),
        (["--from", "parquet:experts=many"], 2, "parquet:experts is a whole number above 0, not 'many'"),
        (["--stages", "2"], 2, "parquet has no setting 'stages'"),
        (["--pattern", "(?P<layer>.)(?P<expert>.)"], 2, "has no use for --pattern"),
        (["--axes", "steps,layers,experts"], 2, "parquet has no setting 'axes'"),
        (["--ignore", "0"], 2, "parquet has no setting 'ignore'"),
        (["--idle-experts", "--sql", "SELECT 1"], 2, "--sql goes without sources"),
        (["--column", "colour=red"], 2, "--column is role=name"),
        (["--phase", "decode"], 2, "has no column for the phase"),
        (["--tokens", "5"], 2, "with --top-k as well"),
    ],
)
def test_options_that_make_no_sense_are_refused(moetrace, long_file, argv, code, said):
    """With usage errors apart from those of the data."""
    done = moetrace("ingest", long_file, *argv)

    assert code == done.code
    assert said in done.err


def test_a_flag_is_short_for_a_setting_of_the_format(moetrace, small, tmp_path):
    """It is part of what the trace is, as the setting is; a format that has none of that name refuses it."""
    frame = long_table(small).to_pandas()
    frame["utilization"] = frame.pop("tokens") / 25
    frame.to_csv(tmp_path / "dump.csv", index=False)
    argv = ("ingest", tmp_path / "dump.csv", "--tokens-per-step", 100)

    done = moetrace(*argv, "--experts", 4, "--json")
    again = moetrace(*argv, "--experts", 4)
    named = moetrace(*argv, "--from", "csv:experts=4", "--name", "other", "--json")

    assert {"tokens_per_step": 100, "experts": 4} == done.json["traces"][0]["settings"]
    assert "already imported, unchanged" in again.out
    first, other = (open_trace(run.json["traces"][0]["path"]) for run in (done, named))
    assert np.array_equal(small.counts, first.counts)
    assert np.array_equal(small.counts, other.counts)


def test_a_setting_that_one_of_the_sources_does_not_take_is_a_usage_error(moetrace, small, long_file, tmp_path):
    """Nothing is written, also not of the others."""
    np.save(tmp_path / "dump.npy", small.counts)

    done = moetrace("ingest", long_file, tmp_path / "dump.npy", "--column", "tokens=tokens")

    assert 2 == done.code
    assert "numpy has no setting 'column'; it has tokens_per_step" in done.err
    assert [] == moetrace("list", "--json").json["traces"]


def test_a_finding_that_is_an_error_stops_the_ingest_until_accepted(moetrace, small, long_file):
    """Nothing is left behind by the first try."""
    refused = moetrace("ingest", long_file, "--tokens-per-step", 50)
    taken = moetrace("ingest", long_file, "--tokens-per-step", 50, "--accept", "tokens-differ", "--json")

    assert 1 == refused.code
    assert "100 tokens where 50 were expected, exactly 2 times that" in refused.err
    assert "--accept tokens-differ" in refused.err
    assert ["tokens-differ"] == [finding["name"] for finding in taken.json["traces"][0]["findings"]]


def test_the_formats_are_listed_with_what_they_need(moetrace):
    """All that are registered."""
    listed = moetrace("ingest", "--list-formats", "--json").json["formats"]

    assert list(FORMATS) == [row["format"] for row in listed]


def test_a_folder_of_generic_ranks_says_what_it_is_taken_for(moetrace, small, tmp_path):
    """And names --merge; files of other names are traces of their own without a word."""
    for name in ("rank0", "rank1"):
        pq.write_table(long_table(small), tmp_path / f"{name}.parquet")

    done = moetrace("ingest", tmp_path)

    assert "2 files of ranks are 2 traces; one of all has --merge sum where ranks are replicas" in done.err
    for name in ("rank0", "rank1"):
        (tmp_path / f"{name}.parquet").rename(tmp_path / f"run-{name[-1]}.parquet")
    assert "--merge" not in moetrace("ingest", tmp_path).err
