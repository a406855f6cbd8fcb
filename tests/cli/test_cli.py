"""The command line: exit codes, what is on stdout, and one line on stderr for every mistake."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SAMPLE, long_table, thorough_but

from moetrace import __version__, open_trace
from moetrace.cli import BLAS_THREADS, run
from moetrace.reporting import figures

QUICK = ("--predictor", "window_mean", "--predictor", "ema", "--first", "500", "--every", "1000")


@pytest.fixture
def settled_file(settled, tmp_path):
    """The synthetic trace of 4,000 steps as a long Parquet file."""
    path = tmp_path / "settled.parquet"
    pq.write_table(long_table(settled), path)
    return path


@pytest.fixture
def ingested(moetrace, settled_file):
    """The command line of a workspace with that trace in it."""
    assert moetrace("ingest", settled_file).code == 0
    return moetrace


def test_ingest_says_what_it_wrote(moetrace, long_file):
    """The document has the promised fields, and the file is there."""
    done = moetrace("ingest", long_file, "--json")
    (trace,) = done.json["traces"]

    assert 0 == done.code
    assert {"name", "path", "steps", "layers", "experts", "tokens_per_step", "format", "findings"} <= set(trace)
    assert ("small", 60, 2, 4, 100, "parquet") == tuple(
        trace[key] for key in ("name", "steps", "layers", "experts", "tokens_per_step", "format")
    )
    assert "small" == open_trace(trace["path"]).name


def test_ingest_without_sources_takes_the_sample_traces(moetrace, monkeypatch, tmp_path):
    """The trace files lying directly in ./sample_traces."""
    monkeypatch.chdir(SAMPLE.parent.parent)
    done = moetrace("ingest", "--json", "-w", tmp_path / "w")

    assert 0 == done.code
    assert "gpt-moe-8e-a" in [trace["name"] for trace in done.json["traces"]]


def test_ingest_without_sources_or_samples_asks_for_one(moetrace):
    """A folder nobody named is not to be looked for."""
    done = moetrace("ingest")

    assert (2, 1) == (done.code, done.err.count("\n"))
    assert "name what to read, such as moetrace ingest log.csv: there is no ./sample_traces here" in done.err


def test_ingesting_twice_is_said_to_be_nothing(moetrace, long_file):
    """Exit code 0 both times."""
    moetrace("ingest", long_file)
    again = moetrace("ingest", long_file)

    assert (0, True) == (again.code, "already imported, unchanged" in again.out)


def test_a_folder_with_a_bad_file_is_done_with_skips(moetrace, long_file):
    """Exit code 3; the bad file is named on stderr and in the document, the good one is there."""
    (long_file.parent / "bad.parquet").write_bytes(b"PAR1")
    done = moetrace("ingest", long_file.parent, "--json")

    assert 3 == done.code
    assert ["small"] == [trace["name"] for trace in done.json["traces"]]
    assert [str(long_file.parent / "bad.parquet")] == [skipped["name"] for skipped in done.json["skipped"]]
    assert "bad.parquet" in done.err


def _column(name, values):
    return lambda table: table.set_column(table.schema.get_field_index(name), name, pa.array(values(table)))


MALFORMED = {
    "negative": (_column("tokens", lambda t: [-1, *t["tokens"].to_pylist()[1:]]), "column tokens, row 0"),
    "NaN": (_column("tokens", lambda t: [float("nan"), *t["tokens"].to_pylist()[1:]]), "column tokens, row 0"),
    "fractional": (_column("tokens", lambda t: [0.5, *t["tokens"].to_pylist()[1:]]), "column tokens, row 0"),
    "duplicate": (lambda t: pa.concat_tables([t, t.slice(len(t) - 1)]), "step 69, layer 5"),
    "experts differ": (lambda t: pa.concat_tables([t.slice(0, 247), t.slice(248)]), "step 40, layer 5"),
    "layer missing": (lambda t: pa.concat_tables([t.slice(0, 244), t.slice(248)]), "step 40"),
    "empty": (lambda t: t.slice(0, 0), "no rows"),
    "step of nothing": (_column("tokens", lambda t: [0] * 4 + t["tokens"].to_pylist()[4:]), "step 10, layer 3"),
    "shares": (lambda t: t.rename_columns(["step", "layer", "expert", "share"]), "--tokens-per-step"),
}


@pytest.mark.parametrize("fault", MALFORMED)
@pytest.mark.slow
def test_a_malformed_file_is_one_line_and_exit_code_1(moetrace, small, tmp_path, fault):
    """With the file and the place; nothing on stdout, nothing in the workspace."""
    change, place = MALFORMED[fault]
    pq.write_table(change(long_table(small)), tmp_path / "bad.parquet")
    done = moetrace("ingest", tmp_path / "bad.parquet")

    assert (1, "") == (done.code, done.out)
    assert 1 == done.err.count("\n")
    assert str(tmp_path / "bad.parquet") in done.err
    assert place in done.err
    assert "Traceback" not in done.err


def test_states_promises_its_fields(ingested):
    """Layers and windows, with the settle step where it is known to be."""
    document = ingested("states", "--json").json
    first, second = document["layers"]

    assert 1 == document["schema_version"]
    assert {"trace", "layer", "settle_step", "state"} <= set(first)
    assert {"trace", "layer", "from_step", "to_step", "state"} <= set(document["windows"][0])
    assert 1500 == pytest.approx(first["settle_step"], abs=250)
    assert (None, "transient") == (second["settle_step"], second["state"])


@pytest.mark.slow
def test_predict_promises_its_fields_and_writes_the_forecast(ingested):
    """Scores, summary, and a forecast of the steps after the end, shares summing to 1."""
    done = ingested("predict", "--horizon", 700, *QUICK, "--json")
    document = done.json
    forecast = pd.read_parquet(document["forecast"])

    assert (0, 700) == (done.code, document["horizon"])
    assert {
        "trace", "predictor", "layer", "horizon", "cutoff", "state", "error_rate", "error_noise", "step_error_rate",
        "step_noise", "status",
    } <= set(document["scores"][0])  # fmt: skip
    assert {
        "trace", "predictor", "horizon", "state", "error_rate", "error_noise", "step_error_rate", "step_noise", "cutoffs",
    } <= set(document["summary"][0])  # fmt: skip
    assert "all" in {row["state"] for row in document["summary"]}
    assert ["trace", "predictor", "layer", "step", "shares"] == list(forecast.columns)
    assert list(range(4001, 4701)) == sorted(forecast["step"].unique())
    assert np.allclose(1, [sum(shares) for shares in forecast["shares"]])
    assert 2 * 2 * 700 == len(forecast)


@pytest.mark.slow
def test_predict_says_how_sure_it_is_of_each_expert(ingested):
    """The mean share over the horizon with its intervals, in a file beside the forecast."""
    document = ingested("predict", "--horizon", 700, *QUICK, "--json").json
    means, forecast = pd.read_csv(document["means"]["settled"]), pd.read_parquet(document["forecast"])
    key = ["trace", "predictor", "layer"]
    shares = {name: np.stack(part["shares"].to_list()).mean(axis=0) for name, part in forecast.groupby(key)}

    assert 2 * 2 * 8 == len(means)
    assert all(np.allclose(shares[name], part["share"]) for name, part in means.groupby(key))
    assert (means["low_95"] <= means["low_80"]).all()
    assert (means["low_80"] < means["share"]).all()
    assert (means["share"] < means["high_80"]).all()
    assert (means["high_80"] <= means["high_95"]).all()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("predict", "--horizon", 5000), "the longest horizon is 3,500"),
        (("report", "--horizons", "5000"), "the longest horizon is 3,500"),
        (("place", "--gpus", 4, "--horizon", 5000), "the longest horizon is 3,500"),
        (("predict", "--horizon", 700, "--cutoffs", "2000,3900,50000"), "cutoff 3,900, 50,000 cannot be scored"),
        (("predict", "--horizon", 700, "--cutoffs", "2000,3900,50000"), "cutoffs from 1 to 3,300"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_scored_is_a_usage_error_and_nothing_is_written(ingested, tmp_path, argv, said):
    """With what would work; what was written before stays as it is."""
    ingested("predict", "--horizon", 700, *QUICK)
    before = {path: path.read_bytes() for path in (tmp_path / "cwd").rglob("*") if path.is_file()}
    done = ingested(*argv, *QUICK)

    assert (2, "", 1) == (done.code, done.out, done.err.count("\n"))
    assert said in done.err
    assert before == {path: path.read_bytes() for path in (tmp_path / "cwd").rglob("*") if path.is_file()}


def test_a_trace_too_short_to_fit_anything_is_an_error(ingested):
    """One line, with what is needed."""
    done = ingested("predict", "--steps", "1:240", "--horizon", 100, "--cutoffs", 100, "--predictor", "lstm")

    assert (1, 1) == (done.code, done.err.count("\n"))


@pytest.mark.slow
def test_csv_has_full_precision_and_json_no_nan(ingested):
    """The same numbers in both; what is missing is empty or null."""
    document = ingested("predict", "--horizon", 700, *QUICK, "--json").json
    rows = list(csv.DictReader(io.StringIO(ingested("predict", "--horizon", 700, *QUICK, "--format", "csv").out)))
    scores = ingested("predict", "--horizon", 700, *QUICK, "--format", "csv", "--table", "scores").out

    assert [row["error_rate"] for row in document["summary"]] == [float(row["error_rate"]) for row in rows]
    assert len(document["scores"]) == len(list(csv.DictReader(io.StringIO(scores))))


def test_selections_apply(ingested):
    """Only the layers and steps asked for."""
    document = ingested("states", "--layers", "1", "--steps", "1000:3000", "--json").json

    assert [1] == [row["layer"] for row in document["layers"]]
    assert (1000, 3000) == (document["windows"][0]["from_step"], document["windows"][-1]["to_step"])


@pytest.mark.slow
def test_report_prints_the_rows_of_a_figure_and_draws_it_for_a_column(ingested, tmp_path, monkeypatch):
    """Those of its file; of the width and in the style asked for, or a usage error."""
    known = figures.FIGURES["peaks"]
    monkeypatch.setattr("moetrace.reporting.study.possible", lambda *_: {"peaks": known})
    asked = ("report", *QUICK, "--horizons", "300", "--gpus", "1", "--folder", tmp_path / "r")
    look = ("--figure-width", "3.3in", "--style", "dark_background", "--figure-titles")
    done = ingested(*asked, *look, "--format", "csv", "--table", "course")
    drawn = (tmp_path / "r" / "figures" / "settled-peaks.png").read_bytes()
    refused = ingested("report", "--figure-width", "3pt")

    assert (tmp_path / "r" / "data" / "settled-course.csv").read_text() == done.out
    assert 363 == int.from_bytes(drawn[16:20])
    assert (2, "moetrace: a figure is 2 to 24 inches wide, such as 3.3in or 84mm, not 3pt\n") == (
        refused.code,
        refused.err,
    )


@pytest.mark.slow
def test_report_writes_everything_into_one_folder(ingested, tmp_path):
    """Tables as Markdown, CSV and JSON, figures as PNG, and one page that loads nothing."""
    done = ingested("report", *QUICK, "--horizons", "300,700", "--folder", tmp_path / "r", "--json")
    files = {str(path.relative_to(tmp_path / "r")) for path in (tmp_path / "r").rglob("*") if path.is_file()}
    page = (tmp_path / "r" / "report.html").read_text()

    assert 0 == done.code
    assert set(done.json["files"]) == {str(tmp_path / "r" / name) for name in files}
    assert {"report.md", "report.html", "data/settled-summary.csv", "data/settled-scores.json"} <= files
    assert {"load_share", "variance", "range", "error_course", "peaks", "settling"} <= {
        name.removeprefix("figures/settled-").removesuffix(".png") for name in files
    }
    assert "http" not in page
    assert "500, then every 1000 steps" in page
    assert {300, 700} == set(pd.read_csv(tmp_path / "r" / "data" / "settled-summary.csv")["horizon"])
    assert json.loads((tmp_path / "r" / "data" / "settled-layers.json").read_text())["rows"]


def test_list_remove_and_check(ingested):
    """What is there, that it is sound, and that it can go."""
    assert ["settled"] == [row["trace"] for row in ingested("list", "--json").json["traces"]]
    assert 0 == ingested("check").code
    assert 0 == ingested("remove", "settled").code
    assert [] == ingested("list", "--json").json["traces"]
    assert 1 == ingested("check").code


def test_a_damaged_trace_is_one_line(ingested):
    """Whatever the command."""
    path = Path("moetrace-out/traces/settled.parquet")
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    done = ingested("states")

    assert (1, "", 1) == (done.code, done.out, done.err.count("\n"))
    assert "is damaged" in done.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("states", "--layers", "x"), "list of layers"),
        (("states", "--steps", "5"), "range of steps"),
        (("states", "--table", "layers"), "--format csv"),
        (("states", "--format", "csv", "--table", "no"), "no table"),
        (("predict", "--horizon", "0"), "--horizon"),
        (("predict", "--cutoffs", "a"), "list of steps such as 3000,4000"),
        (("place", "--gpus", "4", "--redundant", "a"), "list of numbers of redundant experts such as 0,32,64"),
        (("report", "--horizons", "a"), "list of horizons such as 1000,2000"),
        (("states", "--json", "--format", "csv"), "--json and --format csv exclude each other"),
        (("predict", "--table", "scores"), "--format csv"),
        (("report", "--horizons", "0"), "list of horizons"),
        (("nonsense",), "nonsense"),
    ],
)
@pytest.mark.slow
def test_usage_errors_have_exit_code_2(ingested, argv, said):
    """And say what is wrong, on stderr."""
    done = ingested(*argv)

    assert (2, "") == (done.code, done.out)
    assert said in done.err


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("predict", "--predictor", "sw_agv"), 2, "did you mean 'sw_avg'?"),
        (("predict", "--predictor", "nope"), 2, "window_mean"),
        (("states", "--layers", "99"), 2, "it has 0, 1"),
        (("states", "setled"), 2, "did you mean 'settled'?"),
        (("check", "--fail-on", "colapse"), 2, "did you mean 'collapse'?"),
        (("ingest", "nothing"), 1, "does not exist"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_line(ingested, argv, code, said):
    """Naming what could have been meant; the wrong call of a command has exit code 2."""
    done = ingested(*argv)

    assert (code, "") == (done.code, done.out)
    assert said in done.err
    assert 1 == done.err.count("\n") or "Usage:" in done.err


@pytest.mark.slow
def test_output_goes_to_a_file_that_is_not_replaced_unasked(ingested, tmp_path):
    """--force replaces it."""
    path = tmp_path / "states.json"

    assert (0, "") == (lambda d: (d.code, d.out))(ingested("states", "--json", "-o", path))
    assert json.loads(path.read_text())["layers"]
    assert 1 == ingested("states", "--json", "-o", path).code
    assert 0 == ingested("states", "--json", "-o", path, "--force").code


@pytest.mark.parametrize(
    ("name", "more", "begins"),
    [
        ("a.json", (), '{\n  "schema_version"'),
        ("a.csv", (), "trace,layer,"),
        ("a.CSV", ("--table", "windows"), "trace,layer,from_step"),
        ("a.csv", ("--json",), '{\n  "schema_version"'),
        ("a.txt", (), "settled: "),
    ],
)
@pytest.mark.slow
def test_the_ending_of_the_output_says_its_format(ingested, tmp_path, name, more, begins):
    """Unless the format is given."""
    assert 0 == ingested("states", "-o", tmp_path / name, *more).code
    assert (tmp_path / name).read_text().startswith(begins)


def test_an_output_that_is_there_is_refused_before_anything_is_computed(ingested, tmp_path):
    """Not after an hour of work."""
    (tmp_path / "there.json").write_text("mine")
    done = ingested("predict", "--horizon", 700, *QUICK, "-o", tmp_path / "there.json")

    assert (1, True) == (done.code, "there.json exists: replace it with --force" in done.err)
    assert not (tmp_path / "cwd" / "moetrace-out" / "predict").exists()


def test_an_export_is_what_its_ending_says(ingested, tmp_path):
    """Unless --to says otherwise."""
    for name, begins in (("a.csv", b'"step"'), ("a.npz", b"PK"), ("a.parquet", b"PAR1")):
        assert 0 == ingested("export", "settled", "-o", tmp_path / name).code
        assert (tmp_path / name).read_bytes().startswith(begins)
    assert 0 == ingested("export", "settled", "--to", "long", "-o", tmp_path / "b.csv").code
    assert (tmp_path / "b.csv").read_bytes().startswith(b"PAR1")


@pytest.mark.slow
def test_a_plan_that_cannot_be_written_is_not_said_to_be(ingested, tmp_path):
    """A file lies where the folder of plans should be."""
    (tmp_path / "cwd" / "moetrace-out" / "place").write_text("mine")
    done = ingested("place", "--gpus", 4, "--horizon", 700, *QUICK)

    assert (1, False) == (done.code, "wrote the plan" in done.err)


@pytest.mark.slow
def test_quiet_leaves_stderr_empty(ingested):
    """No notes and no progress."""
    assert "" == ingested("predict", "--horizon", 700, *QUICK, "-q", "--json").err


@pytest.mark.slow
def test_tables_show_percentages_and_every_row(ingested):
    """Rounded for people; a column of numbers in percent says so."""
    out = ingested("predict", "--horizon", 700, *QUICK).out

    assert "window_mean" in out
    assert "%" in out
    assert "nan" not in out.lower()


def test_version_and_help(moetrace):
    """On stdout, exit code 0."""
    assert (0, f"moetrace {__version__}\n") == (lambda d: (d.code, d.out))(moetrace("--version"))
    assert "ingest" in moetrace("-h").out


def test_debug_shows_the_traceback(moetrace):
    """For those who want it."""
    from moetrace import MoetraceError

    with pytest.raises(MoetraceError):
        moetrace("--debug", "states", "nothing")


def _run(*argv, **more):
    return subprocess.Popen([sys.executable, "-m", "moetrace", *map(str, argv)], **more)


@pytest.mark.parametrize("delay", thorough_but([0.6], [0.6, 1.5, 3.0]))
@pytest.mark.slow
def test_an_interrupt_leaves_at_once_with_nothing_half_written(moetrace, tmp_path, delay):
    """Exit code 130, one line, no partial file, at whatever moment."""
    assert 0 == moetrace("ingest", SAMPLE, "-w", tmp_path / "w").code
    child = _run("predict", "-w", tmp_path / "w", stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)

    assert 130 == child.returncode
    assert "moetrace: interrupted\n" == err
    assert [] == [path for path in (tmp_path / "w").rglob("*") if path.name.startswith(".partial")]
    assert not (tmp_path / "w" / "predict").exists() or not list((tmp_path / "w" / "predict").iterdir())


@pytest.mark.thorough
def test_a_closed_pipe_ends_quietly(tmp_path):
    """As in `moetrace list --json | true`; what is exported is binary, and longer than a pipe."""
    read, write = os.pipe()
    os.close(read)
    assert 0 == _run("ingest", SAMPLE, "-w", tmp_path, "-q", stdout=subprocess.DEVNULL).wait()
    for argv in (("list", "--json", "-w", tmp_path), ("export", SAMPLE.stem, "-w", tmp_path, "-o", "-")):
        child = _run(*argv, stdout=write, stderr=subprocess.PIPE, text=True)
        _, err = child.communicate(timeout=20)

        assert (0, "") == (child.returncode, err)
    os.close(write)


@pytest.mark.slow
def test_blas_has_one_thread_unless_told():
    """The matrices are small: more threads are in each other's way."""
    script = """
import os, sys
from moetrace.cli import run
sys.argv = ["moetrace", "--version"]
try:
    run()
except SystemExit:
    import numpy, threadpoolctl
    blas = {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}
    print(blas, os.environ["OPENBLAS_NUM_THREADS"])
"""
    free = {name: value for name, value in os.environ.items() if name not in BLAS_THREADS}

    def said(**given):
        argv = [sys.executable, "-c", script]
        return subprocess.run(argv, env=free | given, capture_output=True, text=True, check=True).stdout

    assert said().endswith("{1} 1\n")
    assert said(OPENBLAS_NUM_THREADS="2").endswith(" 2\n")


def test_streams_that_the_shell_closed_are_opened_to_nowhere(monkeypatch):
    """What opens a file next would get their numbers."""
    monkeypatch.setattr(sys, "argv", ["moetrace", "--version"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for name in ("MPLBACKEND", *BLAS_THREADS):
        monkeypatch.setenv(name, "1")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)

    with pytest.raises(SystemExit) as left:
        run()

    opened = [sys.stdout, sys.stderr]
    assert (0, [os.devnull] * 2) == (left.value.code, [stream.name for stream in opened])
    for stream in opened:
        stream.close()
