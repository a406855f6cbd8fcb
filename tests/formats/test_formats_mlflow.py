"""Runs that MLflow keeps: which folder is meant, which metrics are read, and what is refused."""

import numpy as np
import pytest
from dumps import mlflow

from moetrace import ReadOptions, TraceError, read_trace
from moetrace.formats.readers import mlflow as reader


@pytest.fixture
def run(small, tmp_path):
    """The folder of a run."""
    return mlflow(small, tmp_path)


@pytest.mark.parametrize("up", [0, 1, 2])
def test_a_folder_with_a_single_run_stands_for_it(small, run, up):
    """The run itself, its experiment, and mlruns; and the folder of its metrics."""
    for path in ([run, *run.parents][up], run / "metrics"):
        assert np.array_equal(small.counts, read_trace(path).counts)


def test_of_several_runs_one_has_to_be_named(small, run):
    """The line names one."""
    other = run.with_name("ff00")
    run.rename(other)
    mlflow(small, run.parents[2])

    with pytest.raises(TraceError, match=r"holds 2 runs; give the folder of one, such as .*0a1b2c"):
        read_trace(run.parent)


def test_values_logged_out_of_order_are_sorted_by_step(small, run, monkeypatch):
    """As when a run was resumed; also in small pieces."""
    for file in (run / "metrics").rglob("expert_*"):
        lines = file.read_text().splitlines()
        file.write_text("\n".join(lines[30:] + lines[:30]) + "\n")
    monkeypatch.setattr(reader, "BATCH", 7)

    found = read_trace(run)

    assert np.array_equal(small.counts, found.counts)
    assert np.array_equal(small.steps, found.steps)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1795645363292 many 70", r"layer_3/expert_1: cannot be read"),
        ("1795645363292 2.5 70", r"layer_3/expert_1, column value, row 60: 2.5 is not a whole"),
        ("1795645363292 2.0", r"layer_3/expert_1: cannot be read"),
    ],
)
def test_a_bad_line_is_named(run, line, said):
    """By the file of its metric, and its row."""
    file = run / "metrics" / "moe" / "layer_3" / "expert_1"
    file.write_text(file.read_text() + line + "\n")

    with pytest.raises(TraceError, match=said):
        read_trace(run)


def test_metrics_of_two_kinds_are_a_question(run):
    """And without a match some of those there are named."""
    (run / "metrics" / "layer_3_expert_1_share").write_text("1 0.5 10\n")
    with pytest.raises(TraceError, match="choose one kind with --pattern"):
        read_trace(run)
    with pytest.raises(TraceError, match="no metric names a layer and an expert"):
        read_trace(run, options=ReadOptions(), format="mlflow:pattern=(?P<layer>x)(?P<expert>y)")
