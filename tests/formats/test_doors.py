"""The two general doors: a data frame, and a query of DuckDB."""

import re
import sys

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from conftest import long_table

from moetrace import SettingError, TraceError, from_frame, open_trace, read_trace
from moetrace.formats import Query

FRAMES = {"pandas": lambda table: table.to_pandas(), "Polars": pl.from_arrow, "Arrow": lambda table: table}


@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_of_any_library_is_a_trace(small, kind):
    """Its columns may have any names, its rows any order, and there may be others."""
    table = long_table(small).append_column("note", pa.array(["x"] * small.counts.size))
    table = table.rename_columns(["it", "block", "e", "n", "note"])
    table = table.take(np.random.default_rng(0).permutation(len(table)))

    found = from_frame(FRAMES[kind](table), step="it", layer="block", expert="e", tokens="n", name="run", top_k=2)

    assert np.array_equal(small.counts, found.counts)
    assert np.array_equal(small.steps, found.steps)
    assert (small.layers, "run", 2) == (found.layers, found.name, found.info.top_k)


def test_one_layer_needs_no_column(small):
    """Where that is said."""
    frame = long_table(small).to_pandas().query("layer == @small.layers[0]").drop(columns="layer")

    assert np.array_equal(small.counts[:, :1], from_frame(frame, layer=None).counts)
    with pytest.raises(TraceError, match=r"no column layer among step, expert, tokens; .*layer='NAME'.*layer=None"):
        from_frame(frame)


def test_an_expert_without_a_row_is_idle_where_that_is_said(small):
    """Else the first hole is named."""
    frame = long_table(small).to_pandas()
    frame = frame.drop(frame.index[-2])

    with pytest.raises(TraceError, match=r"experts where others have.*--idle-experts"):
        from_frame(pd.concat([frame, frame.assign(step=frame["step"] + 10**6)]))
    found = from_frame(frame, idle_experts=True)
    assert small.counts.shape == found.counts.shape
    assert 0 == found.counts.ravel()[-2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": -1}, r"column tokens, row 0: -1 is negative"),
        ({"tokens": 0.5}, r"column tokens, row 0: 0.5 is not a whole"),
        ({"step": None}, r"column step, row 0: is null"),
        ({"expert": "first"}, r"holds columns that are not numbers: .*column expert"),
        ({"tokens": [["a"]]}, r"data frame"),
    ],
)
def test_bad_values_are_named_by_column_and_row(small, change, said):
    """As those of a file are."""
    frame = long_table(small).to_pandas()
    ((name, value),) = change.items()
    frame[name] = pd.Series([value, *frame[name][1:]], dtype=object if isinstance(value, str | list) else None)
    frame = frame if value is not None else frame.assign(step=frame["step"].astype("Int64"))

    with pytest.raises(TraceError, match=said):
        from_frame(frame)


def test_shares_become_counts():
    """Where the tokens of a step are given."""
    frame = pd.DataFrame({"step": [1, 1], "layer": [0, 0], "expert": [0, 1], "tokens": [0.25, 0.75]})

    assert [[[2, 6]]] == from_frame(frame, tokens_per_step=8).counts.tolist()


@pytest.mark.parametrize("given", [np.ones((2, 2)), [1, 2], {"step": [1]}])
def test_what_is_not_a_frame_is_refused(given):
    """With what takes it."""
    with pytest.raises(SettingError, match=r"is not a data frame: .*LoadTrace.from_counts"):
        from_frame(given)


def test_a_column_that_is_there_twice_is_refused():
    """Which of them is meant is not guessed."""
    frame = pd.DataFrame([[1, 0, 0, 5, 6]], columns=["step", "layer", "expert", "tokens", "tokens"])

    with pytest.raises(TraceError, match="has 2 columns called tokens"):
        from_frame(frame)


@pytest.fixture
def rows(small, moetrace, tmp_path, monkeypatch):  # which changes the folder, too
    """The rows of a trace in two CSV files, in the current folder."""
    monkeypatch.chdir(tmp_path)
    frame = long_table(small).to_pandas()
    half = frame["step"] <= int(small.steps[20])
    frame[half].to_csv("part1.csv", index=False)
    frame[~half].to_csv("part2.csv", index=False)
    return tmp_path


@pytest.mark.slow
def test_a_query_is_a_trace(small, rows, moetrace):
    """Named by its first file; unchanged files have no effect, and changed ones are another source."""
    argv = ("ingest", "--sql", "SELECT step, layer, expert, sum(tokens) AS tokens FROM 'part*.csv' GROUP BY ALL")

    assert 0 == moetrace(*argv, "-w", rows).code
    trace = open_trace(rows / "traces" / "part.parquet")
    assert np.array_equal(small.counts, trace.counts)
    assert ("sql", True) == (trace.info.format, trace.info.source.startswith("query"))
    assert moetrace(*argv, "-w", rows, "--json").json["traces"][0]["unchanged"]
    (rows / "part2.csv").write_text((rows / "part2.csv").read_text() + "\n")
    done = moetrace(*argv, "-w", rows)
    assert (1, True) == (done.code, "is taken by a trace of query" in done.err)


def test_a_query_from_python(small, rows):
    """As any other source."""
    found = read_trace(Query("SELECT * FROM 'part*.csv'"))

    assert np.array_equal(small.counts, found.counts)
    assert Query("SELECT 1").stem == "query"


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT step, layer, expert FROM 'part1.csv'", "has no column tokens among step, layer, expert"),
        ("SELECT * FROM 'nowhere.csv'", "cannot be run: IO Error: No files found"),
        ("SELEC", "cannot be run: Parser Error"),
        ("SET threads = 1", "gives no rows|has no column step"),
        ("SELECT *, 'x'::INT FROM 'part1.csv'", "query .* cannot be"),
        ("SELECT step, layer, expert, -tokens AS tokens FROM 'part1.csv'", "column tokens, row 0: -.* is negative"),
    ],
)
@pytest.mark.slow
def test_a_query_that_gives_no_counts_is_one_line(rows, moetrace, query, said):
    """With the first line of DuckDB's error."""
    done = moetrace("ingest", "--sql", query, "-w", rows)

    assert (1, 1) == (done.code, done.err.count("\n"))
    assert re.search(said, done.err), done.err


@pytest.mark.slow
def test_without_duckdb_the_extra_is_named(rows, moetrace, monkeypatch):
    """It is optional."""
    monkeypatch.setitem(sys.modules, "duckdb", None)

    done = moetrace("ingest", "--sql", "SELECT 1", "-w", rows)

    assert (1, True) == (done.code, 'pip install "moetrace[sql]"' in done.err)


def test_an_unknown_shape_prints_the_query_that_fits(small, rows, moetrace):
    """With the names of its columns; run as it is printed, it gives the counts."""
    long_table(small).rename_columns(["step", "layer", "expert", "n routed"]).to_pandas().to_csv("odd.csv", index=False)

    done = moetrace("ingest", "odd.csv", "-w", rows)
    query = done.err.partition("--sql '")[2].partition("' (docs/recipes.md)")[0]

    assert 'SELECT step, layer, expert, "n routed" AS tokens FROM "odd.csv"' == query
    assert 0 == moetrace("ingest", "--sql", query, "-w", rows).code
    assert np.array_equal(small.counts, open_trace(rows / "traces" / "odd.parquet").counts)
