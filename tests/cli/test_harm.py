"""Nothing of anybody's is harmed: outputs, hostile traces, odd terminals, and two commands at a time."""

import errno
import itertools
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import thorough_but
from processes import exit_code, forked, in_turn

from moetrace import Finding, LoadTrace, TraceError, TraceInfo, open_trace, save_trace
from moetrace.errors import printable
from moetrace.formats import conversion
from moetrace.reporting.tables import csv

HOSTILE = {
    "path": "../../../x",
    "absolute": "/tmp/x",
    "escape": "a\x1b[31mred\x1b]0;title\x07",
    "surrogate": "half \ud800",
    "nul": "a\0b",
    "lines": "a\nmoetrace: fine",
    "mathematics": r"$\frac{a}{b$",
    "markup": "<script>alert(1)</script> [red]x[/red] | `a`",
    "formula": "=cmd|' /C calc'!A0",
    "long": "x" * 5000,
    "empty": "",
}
QUICK = ("--predictor", "window_mean", "--cutoffs", "600")


def trace_of(name="t", steps=1200):
    counts = np.random.default_rng(1).multinomial(400, [0.4, 0.3, 0.2, 0.1], size=(steps, 2))
    return LoadTrace.from_counts(counts, name=name)


@pytest.fixture
def ingested(moetrace, tmp_path):
    """The command line in a workspace with one small trace, ``t``."""
    save_trace(trace_of(), tmp_path / "t.parquet")
    assert 0 == moetrace("ingest", tmp_path / "t.parquet").code
    return moetrace


# --- outputs ----------------------------------------------------------------------------------


def test_a_dash_is_the_standard_output(ingested, tmp_path):
    """And no file of that name."""
    done = ingested("states", "--json", "-o", "-")

    assert 2 == len(done.json["layers"])
    assert not (tmp_path / "cwd" / "-").exists()


def test_a_link_is_followed(ingested, tmp_path):
    """The file it points to is replaced, and only with --force; the link stays. One that points nowhere makes a file."""
    target, link, fresh = tmp_path / "target", tmp_path / "link", tmp_path / "fresh"
    target.write_text("before")
    link.symlink_to(target)
    fresh.symlink_to(tmp_path / "new")

    assert (1, "before") == (ingested("states", "--json", "-o", link).code, target.read_text())
    assert 0 == ingested("states", "--json", "-o", link, "--force").code
    assert 0 == ingested("states", "--json", "-o", fresh).code
    assert (True, True) == (link.is_symlink(), fresh.is_symlink())
    assert json.loads(target.read_text())["layers"] == json.loads((tmp_path / "new").read_text())["layers"]


@pytest.mark.parametrize("command", [("states", "--json"), ("export", "t", "--to", "csv")])
def test_a_pipe_is_written_into(ingested, tmp_path, command):
    """Without --force, and it stays a pipe."""
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    done = ingested(*command, "-o", pipe)
    reader.join()

    assert 0 == done.code
    assert read[0].startswith(("{", '"step","layer"'))
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_socket_is_refused(ingested, tmp_path):
    """A listener on it would have to be spoken to; a pipe does the same."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        done = ingested("states", "--json", "-o", tmp_path / "s")

    assert (1, True) == (done.code, "s is a socket: give the path of a file" in done.err)


@pytest.mark.parametrize("device", ["/dev/null", "/dev/stdout", "/dev/fd/1"])
@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.thorough
def test_a_device_stays_what_it_is(ingested, tmp_path, device, force):
    """Also where /dev/stdout is a pipe or a file."""
    before = Path("/dev/null").stat().st_mode, Path("/dev/stdout").lstat().st_mode
    argv = ["states", "--json", "-o", device, *force]
    os.mkfifo(tmp_path / "pipe")
    piped = forked(argv, tmp_path / "cwd", tmp_path / "pipe", tmp_path / "err")
    read = (tmp_path / "pipe").read_text()
    filed = forked(argv, tmp_path / "cwd", tmp_path / "file", tmp_path / "err")
    codes = [exit_code(process) for process in (piped, filed)]

    assert [0, 0] == codes
    assert before == (Path("/dev/null").stat().st_mode, Path("/dev/stdout").lstat().st_mode)
    if device != "/dev/null":
        assert json.loads(read)["layers"] == json.loads((tmp_path / "file").read_text())["layers"]


def test_a_folder_is_no_output(ingested, tmp_path):
    """One line."""
    done = ingested("states", "-o", tmp_path, "--force")

    assert (1, 1) == (done.code, done.err.count("\n"))
    assert "is a folder" in done.err


# --- hostile traces ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", thorough_but(["escape"], HOSTILE))
@pytest.mark.slow
def test_whatever_a_trace_is_called_it_stays_in_its_place(moetrace, tmp_path, name):
    """Every command ends well, nothing is written outside, and nothing raw reaches a terminal."""
    hostile = HOSTILE[name]
    finding = Finding("drift", "warning", hostile, hostile, hostile)
    info = TraceInfo(name=hostile, model=hostile, source=hostile, assumptions=(hostile,), findings=(finding,))
    path = tmp_path / "in" / "odd.parquet"
    path.parent.mkdir()
    save_trace(replace(trace_of(), info=info), path)
    outside = {file for file in tmp_path.rglob("*") if tmp_path / "cwd" not in file.parents}
    drawn = (
        [("report", path, *QUICK, "--horizons", "200", "--figures", "none")]
        if name in {"path", "mathematics", "markup"}
        else []
    )
    for command in (
        ("ingest", path), ("list",), ("states",), ("check",), ("predict", *QUICK, "--horizon", 200),
        ("predict", path, *QUICK, "--horizon", 200), ("states", path, "--json"), ("check", path, "--format", "csv"),
        *drawn,
    ):  # fmt: skip
        done = moetrace(*command)

        assert done.code in (0, 1 if command[0] == "check" else 0), (command, done.err)
        assert all(line == "" or line.isprintable() for line in f"{done.out}{done.err}".split("\n")), command
    assert outside == {file for file in tmp_path.rglob("*") if tmp_path / "cwd" not in file.parents}


@pytest.mark.parametrize("name", thorough_but([], ["$x$ {y", "=1+1 <b>&amp;", "ünï 'q\""]))
@pytest.mark.slow
def test_a_file_may_be_called_anything(moetrace, tmp_path, name):
    """The page shows the name as text, the figures draw it."""
    save_trace(trace_of(), tmp_path / f"{name}.parquet")
    done = moetrace("report", tmp_path / f"{name}.parquet", *QUICK, "--horizons", "200", "--layers", "0", "--json")

    assert (0, name) == (done.code, done.json["scores"][0]["trace"])


def test_the_name_of_an_opened_trace_is_one():
    """Texts of a file have nothing in them that a terminal would act on."""
    assert r"a\x1b[31m\ud800\n\u202e" == printable("a\x1b[31m\ud800\n\u202e")
    assert "plain ünï 漢字" == printable("plain ünï 漢字")


def test_the_metadata_of_a_file_are_checked_when_it_is_opened(tmp_path):
    """A name that is no name is that of the file."""
    save_trace(replace(trace_of(), info=TraceInfo(name="../x", assumptions=("\x1b[2J",))), tmp_path / "mine.parquet")
    opened = open_trace(tmp_path / "mine.parquet")

    assert ("mine", (r"\x1b[2J",)) == (opened.name, opened.info.assumptions)


def test_no_cell_is_run_by_a_spreadsheet():
    """Numbers stay numbers, also negative ones."""
    import pandas as pd

    frame = pd.DataFrame({"trace": ["=1+1", "@x", "+1", "-a", "fine"], "value": [-1, 2, 3, 4, 5]})

    assert ["trace,value", "'=1+1,-1", "'@x,2", "'+1,3", "'-a,4", "fine,5"] == csv(frame).split()


# --- quiet, mistakes --------------------------------------------------------------------------


def test_quiet_hides_no_warning(moetrace, tmp_path):
    """Notes are hidden; what the doctor warns of is said."""
    trace = trace_of()
    counts = np.concatenate([trace.counts, 3 * trace.counts])
    save_trace(LoadTrace.from_counts(counts, name="t"), tmp_path / "t.parquet")
    assert 0 == moetrace("export", tmp_path / "t.parquet", "--to", "csv", "-o", tmp_path / "t.csv").code
    done = moetrace("ingest", tmp_path / "t.csv", "-q")

    assert "warning: batch-change" in done.err
    assert "assumed" not in done.err


def test_place_without_gpus_shows_an_example(ingested):
    """Exit code 2."""
    done = ingested("place")

    assert 2 == done.code
    assert "moetrace place gpt-moe-8e-a --gpus 4" in done.err


# --- the environment --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    thorough_but(
        [{"COLUMNS": "abc"}, {"PYTHONIOENCODING": "ascii"}],
        [
            {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            {"PYTHONIOENCODING": "ascii"},
            {"PYTHONIOENCODING": "latin-1"},
            {"COLUMNS": ""},
            {"COLUMNS": "abc"},
            {"COLUMNS": "0"},
            {"TERM": "dumb", "NO_COLOR": "1"},
        ],
    ),
    ids=str,
)
@pytest.mark.slow
def test_every_command_speaks_to_every_terminal(tmp_path, environment):
    """Tables fall back to ASCII; names with other characters are shown somehow."""
    save_trace(trace_of(), tmp_path / "träce.parquet")
    commands = [["ingest", "träce.parquet", "--name", "t"], ["states"], ["states", "träce.parquet"], ["list"]]

    for code, err in in_turn(commands, cwd=tmp_path, env={**os.environ, **environment}):
        # Without UTF-8 a file with another name than ASCII has may not be found, and that is one line.
        assert 0 == code or ("LC_ALL" in environment and (1, 1) == (code, err.count("\n"))), err


@pytest.mark.slow
def test_a_folder_whose_name_is_no_utf8(tmp_path):
    """As a workspace, and as where a dump lies: a result, or one line."""
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    Path(os.fsdecode(odd)).mkdir()
    save_trace(trace_of(), tmp_path / "t.parquet")
    (tmp_path / "t.parquet").rename(Path(os.fsdecode(odd)) / "t.parquet")
    commands = [
        ["ingest", odd + b"/t.parquet"], ["ingest", odd + b"/t.parquet", "-w", odd + b"/out"],
        ["states", "-w", odd + b"/out"], ["states", odd + b"/t.parquet"],
        ["predict", *QUICK, "--horizon", "200", "-w", odd + b"/out", "--json"],
        ["report", *QUICK, "--horizons", "200", "-w", odd + b"/out", "--json"],
    ]  # fmt: skip

    for command, (code, err) in zip(commands, in_turn(commands, cwd=tmp_path)):
        assert code == 0 or (1, 1) == (code, err.count("\n")), (command, err)


# --- two at a time ----------------------------------------------------------------------------

AT_ONCE = {
    "ingest": ["ingest", "../other.parquet", "--name", "t", "--force"],
    "predict": ["predict", *QUICK, "--horizon", "200", "--json"],
    "place": ["place", *QUICK, "--horizon", "200", "--gpus", "2", "--json"],
    "hot": ["hot", *QUICK, "--horizon", "200", "--json"],
    "states": ["states", "--json"],
    "remove": ["remove", "t"],
}


@pytest.mark.parametrize(
    ("a", "b"),
    thorough_but([("ingest", "remove"), ("ingest", "predict")], itertools.combinations_with_replacement(AT_ONCE, 2)),
)
@pytest.mark.slow
def test_two_commands_at_a_time_give_a_result_or_a_line(ingested, tmp_path, a, b):
    """Never a mixture of two traces, a traceback, or half a file."""
    cwd = tmp_path / "cwd"
    save_trace(LoadTrace.from_counts(trace_of().counts[:, :, ::-1], name="other"), tmp_path / "other.parquet")
    streams = [(tmp_path / f"out-{i}", tmp_path / f"err-{i}") for i in range(2)]
    both = [forked(AT_ONCE[name], cwd, *own) for name, own in zip((a, b), streams)]
    for name, process, (out, err) in zip((a, b), both, streams):
        code = exit_code(process)

        assert "Traceback" not in err.read_text(), (name, err.read_text())
        assert code in (0, 1, 2), (name, err.read_text())
        if code == 0 and "--json" in AT_ONCE[name]:
            json.loads(out.read_text())
    assert [] == list(cwd.rglob(".partial-*"))
    for path in (cwd / "moetrace-out" / "traces").glob("*.parquet"):
        assert 1200 == len(open_trace(path).layer(0).steps)


@pytest.mark.parametrize(
    "argv",
    [
        ("ingest", "t.parquet"),
        ("states", "t.parquet"),
        ("predict", "t.parquet", "--predictor", "ema", "--horizon", 700),
        ("report", "t.parquet", "--predictor", "ema", "--horizons", 700),
        ("place", "t.parquet", "--gpus", 2, "--predictor", "ema"),
        ("hot", "t.parquet"),
        ("export", "t.parquet", "-o", "x.csv"),
        ("check", "t.parquet"),
    ],
    ids=lambda argv: argv[0],
)
@pytest.mark.slow
def test_a_working_directory_whose_name_is_not_utf8_is_named(ingested, tmp_path, monkeypatch, argv):
    """One line with what to do, and nothing is left; what needs no path there works."""
    odd = tmp_path / os.fsdecode(b"odd\xff")
    odd.mkdir()
    shutil.copy(tmp_path / "cwd" / "moetrace-out" / "traces" / "t.parquet", odd)
    monkeypatch.chdir(odd)
    done = ingested(*argv)

    assert (1, "", 1) == (done.code, done.out, done.err.count("\n"))
    assert "not UTF-8" in done.err or "no UTF-8" in done.err
    assert 0 == ingested("states", "t", "-w", tmp_path / "cwd" / "moetrace-out").code


RUN = "import sys; from moetrace.cli import run; run()"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.thorough
def test_closed_streams_are_as_the_null_device(ingested, tmp_path, closed):
    """The result is written where it can be, and the exit code is that of the command."""
    shell = f'"$0" -c "{RUN}" states t --json {closed}'
    done = subprocess.run(["sh", "-c", shell, sys.executable], cwd=tmp_path / "cwd", capture_output=True, text=True)
    wrong = subprocess.run(
        ["sh", "-c", shell.replace(" t ", " u "), sys.executable], cwd=tmp_path / "cwd", capture_output=True
    )

    assert (0, 2) == (done.returncode, wrong.returncode)
    assert (closed == "2>&-") == done.stdout.startswith("{")
    assert "Traceback" not in done.stderr


@pytest.mark.thorough
def test_an_unknown_backend_of_matplotlib_does_not_matter(ingested, tmp_path):
    """Figures are drawn without one."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, "report", "t", *QUICK, "--layers", "0", "--horizons", "200", "-q"],
        cwd=tmp_path / "cwd", env={**os.environ, "MPLBACKEND": "nonsense"}, capture_output=True, text=True,
    )  # fmt: skip

    assert (0, "") == (done.returncode, done.stderr)


@pytest.mark.parametrize("address", ["nonsense", "", "tcp://", "foo://127.0.0.1:1", "tcp://127.0.0.1:x", "http://a b"])
def test_what_is_not_an_address_of_a_cluster_is_a_usage_error(ingested, address):
    """At once, before anything waits for it."""
    done = ingested("predict", "t", "--dask", address)

    assert (2, True) == (done.code, "is not the address of a Dask cluster, such as tcp://host:8786" in done.err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full on this system")
@pytest.mark.parametrize("argv", [["list"], ["export", "t", "--to", "csv", "-o", "-"]], ids=lambda argv: argv[0])
@pytest.mark.slow
def test_a_full_standard_output_is_named(ingested, tmp_path, argv):
    """As what it is, and not as a file."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", RUN, *argv], cwd=tmp_path / "cwd", stdout=full, stderr=subprocess.PIPE, text=True
        )

    assert 1 == done.returncode
    assert "moetrace: the standard output cannot be written: No space left on device; choose a file" in done.stderr


@pytest.mark.parametrize("to", ["csv", "npz", "long"])
@pytest.mark.parametrize("output", ["x.out", "-", "/dev/null"])
@pytest.mark.slow
def test_an_export_to_a_full_disk_names_no_temporary_file(ingested, monkeypatch, tmp_path, to, output):
    """But the file that was asked for, or the folder of temporary files where that is full."""

    def full(*_args, **_settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None)

    for kind in conversion.LAYOUTS:
        monkeypatch.setitem(conversion.LAYOUTS, kind, full)
    done = ingested("export", "t", "--to", to, "-o", output)

    assert (1, "") == (done.code, done.out)
    place = tempfile.gettempdir() if output != "x.out" else tmp_path / "cwd" / "x.out"
    assert done.err.startswith(f"moetrace: {place}: cannot be written: No space left on device; free some space")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("can't start new thread"),
     ImportError("libjax_common.so: failed to map segment from shared object")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_lack_of_memory_is_not_called_damage(ingested, monkeypatch, error):
    """Whatever the system or a library calls it, also where a reader takes it for damage."""

    def short(*_args):
        try:
            raise error
        except (OSError, MemoryError) as cause:
            raise TraceError("t.parquet", "is damaged", "ingest its source again") from cause

    monkeypatch.setattr("moetrace.workspace.traces.open_trace", short)
    done = ingested("states", "t")

    assert (1, "moetrace: out of memory: choose fewer layers or steps with --layers and --steps\n") == (
        done.code,
        done.err,
    )


@pytest.mark.parametrize("argv", [["list"], ["states"], ["states", "t"], ["remove", "u"]], ids=" ".join)
def test_traces_that_cannot_be_listed_are_not_taken_for_none(ingested, monkeypatch, argv):
    """The error names their folder."""

    def refused(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", refused)
    monkeypatch.setattr(Path, "exists", lambda _path: False)
    done = ingested(*argv)

    assert (1, True) == (done.code, "traces: cannot be listed: Permission denied; check its permissions" in done.err)
