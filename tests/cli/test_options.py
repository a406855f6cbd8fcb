"""What people expect of options: a file of defaults, names for systems, endings of files, help in every way."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from conftest import thorough_but

from moetrace import LoadTrace, save_trace
from moetrace.cli import COMMANDS, app
from moetrace.doctor import KINDS
from moetrace.forecasting.predictors import PREDICTORS


@pytest.fixture
def here(moetrace):
    """The working directory of the commands."""
    return Path.cwd()


@pytest.fixture
def ingested(moetrace, settled, tmp_path):
    """A workspace with a trace of layers 0 and 1."""
    save_trace(settled, tmp_path / "one.parquet")
    assert 0 == moetrace("ingest", tmp_path / "one.parquet").code
    return moetrace


def test_a_file_has_the_defaults_of_options(ingested, here):
    """For every command that has the option, or for one; what is given on the command line comes first."""
    (here / "moetrace.toml").write_text('steps = ":3000"\n[states]\nlayers = "0"\n')

    document = json.loads(ingested("states", "one", "--json").out)
    first = json.loads(ingested("states", "one", "--json", "--layers", "1").out)

    assert ([0], [1]) == tuple([row["layer"] for row in found["layers"]] for found in (document, first))
    assert 3000 >= max(row["to_step"] for row in document["windows"])


def test_pyproject_may_hold_them(ingested, here):
    """In its table; a file that is no TOML is another tool's."""
    (here / "pyproject.toml").write_text('[tool.moetrace.states]\nlayers = "0"\n')
    document = json.loads(ingested("states", "one", "--json").out)
    (here / "pyproject.toml").write_text("nonsense")

    assert [0] == [row["layer"] for row in document["layers"]]
    assert 0 == ingested("states", "one").code


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("worspace = 1\n", "moetrace.toml: there is no option 'worspace'"),
        ("[list]\nlayers = '2'\n", "there is no option 'layers'"),
        ("x", "moetrace.toml: is no TOML"),
    ],
)
def test_a_file_with_a_mistake_is_one_line(moetrace, here, text, told):
    """Which names it."""
    (here / "moetrace.toml").write_text(text)

    done = moetrace("list")

    assert (2, 1) == (done.code, done.err.count("\n"))
    assert told in done.err


def test_an_ending_that_is_no_format_is_refused(ingested, here):
    """Unless the format is given; nothing is written."""
    bad, good = ingested("states", "one", "-o", "s.xlsx"), ingested("states", "one", "-o", "s.x", "--format", "csv")

    assert (2, False, 0) == (bad.code, Path("s.xlsx").exists(), good.code)
    assert ".xlsx is no format" in bad.err
    assert 0 == ingested("states", "one", "-o", "s.txt").code


def test_an_option_that_means_nothing_is_not_offered(ingested):
    """A trace is removed as a whole, and listed as a whole."""
    assert 2 == ingested("remove", "one", "--layers", "0").code
    assert 2 == ingested("list", "--steps", ":5").code
    assert 0 == ingested("states", "one").code


def test_what_would_be_removed_is_shown(ingested):
    """And is still there."""
    done = ingested("remove", "one", "--dry-run")

    assert (0, 1) == (done.code, done.err.count("would remove"))
    assert 0 == ingested("states", "one").code


@pytest.mark.parametrize(("answer", "left"), [("n", ["one"]), ("y", [])])
def test_a_terminal_is_asked_before_a_trace_is_removed(ingested, monkeypatch, answer, left):
    """Whoever says no keeps it."""
    terminal = io.StringIO(f"{answer}\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)

    done = ingested("remove", "one")

    assert (bool(left), True) == (bool(done.code), "would remove" in done.err)
    assert left == [row["trace"] for row in ingested("list", "--json").json["traces"]]


def test_a_range_of_layers(ingested):
    """From and to, or a list; a number below zero is no range."""
    document = json.loads(ingested("states", "one", "--layers", "0-0,1", "--json").out)

    assert [0, 1] == [row["layer"] for row in document["layers"]]
    assert 2 == ingested("states", "one", "--layers", "-2").code


def test_findings_are_explained(moetrace):
    """One, or all; an unknown one is refused."""
    one, every, bad = moetrace("explain", "collapse"), moetrace("explain"), moetrace("explain", "colapse")

    assert f"collapse ({KINDS['collapse'].severity}): {KINDS['collapse'].advice}\n" == one.out
    assert len(KINDS) == every.out.count("\n")
    assert (2, True) == (bad.code, "colapse" in bad.err)


def test_help_and_version_in_the_usual_ways(moetrace):
    """As a word, and by a letter."""
    assert moetrace("states", "--help").out == moetrace("help", "states").out
    assert moetrace("--version").out == moetrace("-V").out


def test_waiting_is_said_and_ends(moetrace, here):
    """For a recording that does not begin."""
    done = moetrace("states", "--follow", "nope.parquet", "--timeout", "0.05", "--poll", "0.01")

    assert 4 == done.code
    assert "Waiting for nope.parquet, which does not exist yet" in done.err
    assert "nothing new in nope.parquet for 0.05 seconds" in done.err


def test_severity_comes_with_the_list(moetrace, here):
    """A router that has collapsed is named by ingest and by list, with its layer."""
    Path("log.csv").write_text(
        "step,layer,expert,tokens\n"
        + "".join(f"{s},{la},{e},{97 if la and not e else 1}\n" for s in range(60) for la in (0, 1) for e in range(4))
    )

    done, listed = moetrace("ingest", "log.csv"), moetrace("list", "--json")

    assert "The router has collapsed in log: run moetrace states to see the experts." in " ".join(done.out.split())
    assert "collapsed, layer 1" == json.loads(listed.out)["traces"][0]["imbalance"]


@pytest.mark.slow
def test_only_the_systems_that_are_named_compete(ingested):
    """Their files are written and their policies replayed, beside one plan and ours."""
    asked = ("place", "one", "--gpus", "4", "--predictor", "window_mean", "--cutoffs", "2000", "--system", "SGLang")
    done = ingested(*asked, "--json").json

    assert {"SGLang", "SGLang, planning by itself"} == {file["system"] for file in done["deploy"]}
    assert {"none", "static", "SGLang", "moetrace", "moetrace by state"} == {row["system"] for row in done["policies"]}
    shown = ingested(*asked, "--show", "summary,policies").out
    assert {"oracle", "chosen", "recommended"} < {*shown.split()}
    assert not re.search("node|stock", shown)  # nodes are shown where there are several, the other in documents alone
    bad = ingested("place", "one", "--gpus", "4", "--system", "sgl")
    assert (2, True) == (bad.code, "sgl" in bad.err)


def test_predictors_are_listed(moetrace):
    """With their settings and what they forecast."""
    found = json.loads(moetrace("predict", "--list-predictors", "--json").out)["predictors"]

    assert list(PREDICTORS) == [row["predictor"] for row in found]
    assert all(row["forecast"] for row in found)
    shown = moetrace("predict", "--list-predictors").out
    assert "7 predictors are known." in shown
    lines = [next(line for line in shown.splitlines() if row["forecast"] in line) for row in found]
    assert list(PREDICTORS) == [line.split()[0] for line in lines]
    assert 1 == len({line.index(row["forecast"]) for line, row in zip(lines, found)})  # words begin below each other


def test_columns_that_a_terminal_has_no_room_for_are_named(ingested, monkeypatch):
    """And not shown."""
    monkeypatch.setenv("COLUMNS", "40")

    shown = ingested("states", "one", "--show", "layers").out

    (line,) = re.findall(r"Too wide for here: ([\w, \n]+); --format csv has all", shown)
    columns = ingested("states", "one", "--format", "csv", "--table", "layers").out.splitlines()[0].split(",")
    left_out = line.replace("\n", " ").split(", ")
    assert set(left_out) < set(columns)
    assert not set(left_out) & set(shown.partition("Too wide")[0].split())


@pytest.mark.parametrize("steps", thorough_but([2], [1, 2, 3, 9]))
@pytest.mark.slow
def test_a_trace_of_a_few_windows_gets_an_answer(moetrace, here, steps):
    """A plan, a forecast and a page, what could be scored and what could not."""
    counts = np.random.default_rng(0).multinomial(640, np.array([6, 6, *np.ones(14)]) / 26, size=(steps, 2))
    save_trace(LoadTrace.from_counts(counts), here / "few.parquet")

    placed = moetrace("place", "few.parquet", "--gpus", "4", "--redundant", "4", "--json")
    shown = moetrace("place", "few.parquet", "--gpus", "4")
    forecast, page = moetrace("predict", "few.parquet"), moetrace("report", "few.parquet", "--figures", "none")

    assert [0, 0, 0, 0] == [done.code for done in (placed, shown, forecast, page)]
    assert {"SGLang", "TensorRT-LLM"} < {file["system"] for file in placed.json["deploy"]}
    assert 8 == len(placed.json["plans"])
    assert f"(a verdict needs 2,500 steps, this trace has {steps})" in " ".join(shown.out.split())
    assert ("saved, but not scored" in forecast.out) == (steps < 4)
    assert "Worth balancing?" in page.out


def test_every_command_names_the_same_worst_layer(moetrace, here):
    """Of two layers that are as severe, the one with the higher peak."""
    counts = np.tile([[[30, 2, 2, 2, 2, 2, 2, 2], [40, 1, 1, 1, 1, 1, 1, 1]]], (60, 1, 1))
    save_trace(LoadTrace.from_counts(counts), here / "two.parquet")
    moetrace("ingest", "two.parquet")

    listed, states = moetrace("list", "--json"), moetrace("states", "two")

    severity, _, layer = json.loads(listed.out)["traces"][0]["imbalance"].partition(", layer ")
    assert "1" == layer
    assert severity in ("severe", "collapsed")
    assert "layer 1" in states.out.partition(":")[2][:60]


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            "states --foo",
            "there is no option --foo (did you mean --follow, --force, --format?) (see moetrace states -h)",
        ),
        ("stats", "there is no command 'stats'; did you mean 'states'? There are ingest, states, "),
        ("predict --horizon x", "--horizon is not a whole number (see moetrace predict -h)"),
        ("predict --horizon 0", "--horizon has to be 1 or more (see moetrace predict -h)"),
        ("place x --gpus 4 --tolerance y", "--tolerance is not a number (see moetrace place -h)"),
        (
            "ingest --merge foo",
            "--merge: 'foo' is not one of 'sum', 'experts', 'layers', 'steps' (see moetrace ingest -h)",
        ),
        ("place --gpus", "option --gpus requires an argument (see moetrace place -h)"),
        ("list extra", "nothing more is expected here than options, got extra (see moetrace list -h)"),
        ("remove", "missing argument 'names' (see moetrace remove -h)"),
    ],
)
def test_usage_errors_are_one_line(moetrace, command, line):
    """In the shape of all errors, without the words of the library, and with the help that says more."""
    done = moetrace(*command.split())

    assert (2, "", 1) == (done.code, done.out, done.err.count("\n"))
    assert done.err.startswith(f"moetrace: {line}")
    assert re.search(r" \(see moetrace.* -h\)$", done.err)


def test_nothing_given_is_a_wish_for_help(moetrace):
    """Its lines are lines."""
    assert "\nCommands:\n  ingest " in moetrace().err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("moetrace states ru", ["run"]),
        ("moetrace states -w elsewhere ru", []),
        ("moetrace remove r", ["run"]),
        ("moetrace predict --predictor l", ["lstm", "level"]),
        ("moetrace ingest --from js", ["jsonl", "json"]),
        ("moetrace ingest --accept col", ["collapse"]),
        ("moetrace explain col", ["collapse"]),
    ],
)
def test_values_are_completed(moetrace, small, monkeypatch, capsys, words, found):
    """As bash asks for it: traces, predictors, formats, findings."""
    save_trace(small, Path("run.parquet"))
    assert 0 == moetrace("ingest", "run.parquet").code
    asked = {"_MOETRACE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()

    with pytest.raises(SystemExit):
        app(prog_name="moetrace")

    assert found == capsys.readouterr().out.split()


@pytest.mark.slow
def test_a_horizon_alone_is_scored_where_the_trace_allows_it(moetrace):
    """Also after fewer than the usual 500 steps; one that is longer than the trace is refused."""
    counts = np.random.default_rng(0).multinomial(500, [0.4, 0.3, 0.2, 0.1], size=(300, 1))
    save_trace(LoadTrace.from_counts(counts, name="short"), Path("short.parquet"))
    less = ("--predictor", "window_mean", "--json")

    found = moetrace("predict", "short.parquet", "--horizon", "280", *less)

    assert (0, {20}, 280) == (found.code, {row["cutoff"] for row in found.json["scores"]}, found.json["horizon"])
    assert 2 == moetrace("predict", "short.parquet", "--horizon", "300", *less).code


def test_the_standard_input_is_a_source(moetrace, monkeypatch):
    """With its format; without it, a usage error that asks for one."""
    table = b"step,layer,expert,tokens\n1,0,0,5\n1,0,1,7\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(table)))

    assert "name its format, such as --from csv" in moetrace("ingest", "-").err
    found = moetrace("ingest", "-", "--from", "csv", "--json")

    assert (0, ["stdin"], 2) == (
        found.code,
        [own["name"] for own in found.json["traces"]],
        found.json["traces"][0]["experts"],
    )


def test_replacing_a_trace_asks_on_a_terminal(ingested, settled, monkeypatch):
    """No is no; --yes does not ask."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    Path("other").mkdir()
    save_trace(settled.select([0]), Path("other/one.parquet"))
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    refused = ingested("ingest", "other/one.parquet", "--force")
    kept = ingested("list", "--json").json["traces"][0]["layers"]
    replaced = ingested("ingest", "other/one.parquet", "--force", "--yes")

    assert (1, 2) == (refused.code, kept)
    assert "Replace one in moetrace-out?" in refused.err
    assert 0 == replaced.code
    assert 1 == ingested("list", "--json").json["traces"][0]["layers"]


def test_a_usage_error_names_the_help_of_its_command(moetrace):
    """Also where the last option lacks its value, which is noticed before the command is."""
    assert "(see moetrace place -h)" in moetrace("place", "--gpus").err
    assert "(see moetrace place -h)" in moetrace("place", "--gpsu", 4).err
    assert "(see moetrace -h)" in moetrace("plac").err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_listing_has_the_first_line_of_each_help(name):
    """It is written down apart from the command, which is loaded when it is called."""
    group: Any = typer.main.get_command(app)
    command = group.commands[name]

    assert COMMANDS[name].line == command.help.partition("\n")[0]
