"""Whatever a command does, a function of the same name does, with the same options; and what it finds shows itself."""

import inspect
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
from conftest import long_table, thorough_but
from matplotlib.figure import Figure

import moetrace as mt
from moetrace.cli import app

TRACE = mt.synthetic_trace([mt.settling(500, steps=3000), mt.settling(900, steps=3000)], name="run")
GROUP: Any = typer.main.get_command(app)
COMMANDS = GROUP.commands
# What only a terminal or a shell needs: what and how to print, where to, whether to ask, to watch a run (`mt.follow`).
TERMINAL = {"help", "all", "show", "format", "json", "table", "output", "force", "quiet", "no_progress", "yes"}
TERMINAL |= {"experts", "sensitivity", "list_predictors", "list_formats", "follow", "poll", "until_settled", "timeout"}
# Each with one of the traces that a command takes, and settings that make it quick.
QUICK = {
    "states": {},
    "check": {},
    "predict": {"horizon": 500, "predictor": ["window_mean"]},
    "place": {"gpus": 4, "horizon": 500, "predictor": ["window_mean"]},
    "hot": {"slots": 2, "horizon": 500},
    "report": {"horizons": [500], "gpus": 1, "predictor": ["window_mean"], "figures": ()},
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """What is written by default is written to a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"help"}))
def test_every_command_is_a_function_with_its_options(name):
    """Under their names, numbers with one default; a command that takes several traces has a function for one."""
    signature = inspect.signature(getattr(mt, name))
    options = {parameter.name for parameter in COMMANDS[name].params} - TERMINAL

    assert set() == {{"traces": "trace"}.get(own, own) if name != "report" else own for own in options} - {
        *signature.parameters
    }
    assert "moetrace " + name in inspect.getdoc(getattr(mt, name))
    numbers = {own.name: own.default for own in COMMANDS[name].params if isinstance(own.default, int | float)}
    both = numbers.keys() & {*signature.parameters}
    assert {own: numbers[own] for own in both} == {own: signature.parameters[own].default for own in both}


@pytest.mark.parametrize("name", thorough_but(["states", "check"], QUICK))
@pytest.mark.slow
def test_a_trace_is_a_path_a_name_a_trace_or_a_frame(name, monkeypatch, tmp_path):
    """And what is found of it is the same: the answer, and the main table."""
    monkeypatch.setattr("moetrace.reporting.study.possible", lambda *_: {})
    path = tmp_path / "moetrace-out" / "traces" / "run.parquet"
    path.parent.mkdir(parents=True)
    mt.save_trace(TRACE, path)
    given = (TRACE, "run", path, str(path), long_table(TRACE).to_pandas())
    found = [getattr(mt, name)(own, **QUICK[name]) for own in given]
    tables = [own.frame().drop(columns=["trace", "seconds"], errors="ignore") for own in found]

    assert 1 == len({own.sentence for own in found[:4]})
    assert found[-1].sentence.replace("trace:", "run:", 1) == found[0].sentence or name in ("check", "report")
    for table in tables[1:]:
        pd.testing.assert_frame_equal(tables[0], table)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.slow
def test_a_result_shows_itself(name, monkeypatch):
    """In a line, in a notebook, as a table, and as a picture where there is one."""
    monkeypatch.setattr("moetrace.reporting.study.possible", lambda *_: {})
    found = getattr(mt, name)(TRACE, **QUICK[name])
    shown = found._repr_html_()

    assert f"<moetrace.{name}: {found.sentence}>" == repr(found)
    assert shown.startswith("<p><strong>")
    for heading, cells in found.screen().columns:
        assert f"<th>{escape(heading)}</th>" in shown
        assert all(f"<td>{escape(cell)}</td>" in shown for cell in cells)
    for table in found.frames:
        assert found.frame(table) is found.frames[table]
    for drawing in found.drawings:
        assert found.figure(drawing).axes
        mine = Figure().add_subplot()
        assert mine.figure is found.figure(drawing, ax=mine, style="ggplot")
        assert mine.get_xlabel()
        assert not mine.figure.legends
    assert len(found.drawings) == {"states": 1, "predict": 1, "place": 2, "hot": 2}.get(name, 0)
    with pytest.raises(mt.SettingError, match="there is no table 'x'"):
        found.frame("x")
    if not found.drawings:
        with pytest.raises(mt.SettingError, match="there is no figure"):
            found.figure()


def test_a_path_may_be_that_of_a_dump():
    """Which is read; what is no trace of any kind is refused."""
    long_table(TRACE).to_pandas().to_csv("log.csv", index=False)
    Path("x.csv").write_text("nonsense")

    assert np.array_equal(TRACE.counts, mt.states("log.csv").value.counts)
    with pytest.raises(mt.TraceError, match=r"x\.csv"):
        mt.states("x.csv")


def test_what_a_notebook_shows_is_no_live_html():
    """A name may be anything."""
    trace = mt.LoadTrace.from_counts(TRACE.counts[:50], name="<script>")

    assert "<script>" not in mt.states(trace)._repr_html_()
    assert "&lt;script&gt;" in mt.states(trace)._repr_html_()


@pytest.mark.slow
def test_a_result_has_the_attributes_of_what_it_is_made_from():
    """And no others."""
    found = mt.hot(TRACE, slots=2)

    assert [2, 2] == [len(own) for own in found.sets.values()]
    assert found.answer.slots == 2
    with pytest.raises(AttributeError, match="the result of hot has no attribute 'nonsense'"):
        found.nonsense  # noqa: B018


def test_parts_are_chosen_as_on_the_command_line():
    """Layers, and a pair of steps of which either may be None."""
    found = mt.states(TRACE, layers=[1], steps=(1000, None))

    assert ([1], 1000, 3000) == (list(found.layers), int(found.steps[0]), int(found.steps[-1]))
    assert 500 == mt.states(TRACE, steps=(None, 500)).steps[-1]


@pytest.mark.slow
def test_files_are_written_where_a_folder_is_given(tmp_path):
    """Forecasts, plans, sets and pictures, and nothing without one."""
    predicted = mt.predict(TRACE, 500, predictor=["window_mean"], folder=tmp_path / "p")
    placed = mt.place(TRACE, 4, horizon=500, predictor=["window_mean"], folder=tmp_path / "q", system=["sglang"])
    kept = mt.hot(TRACE, 2, folder=tmp_path / "r")

    for found in (predicted, placed, kept):
        assert all((tmp_path / path).stat().st_size for path in found.files)
    assert {"SGLang"} == {own["system"].partition(",")[0] for own in placed.deploy}
    assert ("file", placed.deploy[0]["flags"]) == (placed.verdict.start, placed.verdict.launch)
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in placed.files if path.endswith(".png"))
    assert any("Saved the experts to keep" in note for note in kept.notes)
    assert {"p", "q", "r"} == {path.name for path in tmp_path.iterdir()}
    mt.predict(TRACE, 500, predictor=["window_mean"])
    assert {"p", "q", "r"} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_results_are_cached_where_a_workspace_is_given(tmp_path):
    """As on the command line, which finds them there."""
    settings = {"predictor": ["window_mean"], "workspace": tmp_path / "w"}
    first, second = (mt.predict(TRACE, 500, **settings) for _ in range(2))

    assert (0, first.computed) == (second.computed, second.reused)


def test_a_workspace_is_filled_listed_and_emptied(tmp_path):
    """By functions alone."""
    long_table(TRACE.select(last=200)).to_pandas().to_csv("log.csv", index=False)
    done = mt.ingest("log.csv", name="mine", workspace="w")
    again = mt.ingest(["log.csv"], name="mine", workspace="w")

    assert ([False], [True]) == ([own.unchanged for own in done.value], [own.unchanged for own in again.value])
    assert ["mine"] == mt.list(workspace="w").frame()["trace"].tolist()
    assert np.array_equal(TRACE.counts[:200], mt.states("mine", workspace="w").value.counts)
    path = mt.export("mine", "out.csv", workspace="w")
    assert len(path.read_text().splitlines()) == 200 * 2 * 8 + 1
    with pytest.raises(mt.WorkspaceError, match="force"):
        mt.export("mine", "out.csv", workspace="w")
    assert path == mt.export("mine", "out.csv", "wide", force=True, workspace="w")
    kept = mt.remove("mine", dry_run=True, workspace="w")
    assert kept == mt.remove(["mine"], workspace="w")
    assert 0 == len(mt.list(workspace="w").frame())
    assert {"dead"} == set(mt.explain("dead")) < set(mt.explain())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: mt.place(TRACE), "missing option gpus N"),
        (lambda: mt.place(TRACE, gpus=3), "try redundant=1"),
        (lambda: mt.place(TRACE, gpus=4, redundant=-1), "redundant experts must be 0 or more, got -1"),
        (lambda: mt.place(TRACE, gpus=4, horizn=3), "there is no argument of place 'horizn'; did you mean 'horizon'?"),
        (lambda: mt.place(TRACE, gpus=4, system="sglang"), r"system are several, such as \['sglang'\]"),
        (lambda: mt.place(TRACE, gpus=4, hardware="h200", ridge=3), "either the hardware or its ridge"),
        (lambda: mt.place(TRACE, gpus=4, hardware="h2"), "or give ridge"),
        (lambda: mt.states(3), "a trace is a LoadTrace, a data frame, a path or a name, not a int"),
        (lambda: mt.states("gone"), "there is no trace 'gone'"),
        (lambda: mt.states(TRACE, layers=[9]), "run has no layer 9"),
        (lambda: mt.states(TRACE, steps="1:9"), r"steps are a pair such as \(1000, 9000\), not '1:9'"),
        (lambda: mt.predict(TRACE, 9000), "the longest horizon is 2,999"),
        (lambda: mt.predict(TRACE, predictor="ema"), "predictor are several"),
        (lambda: mt.predict(TRACE, predictor=["emma"]), "there is no predictor 'emma'; did you mean 'ema'?"),
        (lambda: mt.hot(TRACE, expert_bytes=1e6), "expert_bytes and bandwidth go together"),
        (lambda: mt.compare(TRACE, TRACE.select(layers=[0])), "layers selects some"),
        (lambda: mt.check(TRACE, fail_on=["ded"]), "there is no finding 'ded'; did you mean 'dead'"),
        (lambda: mt.report(TRACE, figures="jpg"), r"figures are several, such as \['png'\], not 'jpg'"),
        (lambda: mt.report(TRACE, figures=["jpg"]), "unknown figure format 'jpg'"),
        (lambda: mt.report(TRACE, figure_width="3pt"), "a figure is 2 to 24 inches wide"),
        (lambda: mt.hot(TRACE, 2).figure(style="gplot"), "did you mean 'ggplot'"),
        (lambda: mt.ingest("gone.csv"), "gone.csv"),
        (lambda: mt.ingest(sql="SELECT 1", merge="sum"), "sql goes without sources and without merge"),
        (lambda: mt.remove("gone"), "there is no trace 'gone'"),
        (lambda: mt.explain("ded"), "did you mean 'dead'"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_wrong_argument_is_refused_by_its_name(wrong, said):
    """As on the command line, but with the name that the function has for it."""
    with pytest.raises(mt.MoetraceError, match=said) as refused:
        wrong()

    assert "--" not in str(refused.value)


@pytest.mark.parametrize("name", ["place", "hot", "report"])
@pytest.mark.slow
def test_the_progress_of_several_stages_only_grows(name, monkeypatch):
    """In percent of the whole, from the first call to 100."""
    monkeypatch.setattr("moetrace.reporting.study.possible", lambda *_: {})
    said = []
    getattr(mt, name)(
        TRACE, **QUICK[name] | ({"gpus": 2} if name == "report" else {}), progress=lambda *own: said.append(own)
    )
    done = [own for own, _ in said]

    assert {100} == {whole for _, whole in said}
    assert sorted(done) == done
    assert (True, 100) == (done[0] < 50, done[-1])
