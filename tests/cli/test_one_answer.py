"""Two commands never answer one question differently: numbers of experts, the verdict, traces that need no balancing."""

import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, thorough_but

from moetrace import LoadTrace, TraceInfo, save_trace

HOT = np.array([5, 60, 5, 5, 5, 10, 5, 5])
QUICK = ("--predictor", "window_mean", "--cutoffs", "1000,2000")


@pytest.fixture(params=thorough_but([1], [0, 1]))
def numbered(request, moetrace, tmp_path):
    """Commands on a trace whose experts are numbered from 0 or 1, one of them hot and one idle; and that number."""
    rng = np.random.default_rng(3)
    counts = rng.multinomial(4000, HOT / 100, size=(4000, 2))
    counts[:, :, 6] = 0
    info = TraceInfo("numbered", first_expert=request.param)
    save_trace(LoadTrace.from_counts(counts, info=info), tmp_path / "numbered.parquet")
    return moetrace, tmp_path / "numbered.parquet", request.param


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_every_command_calls_an_expert_by_one_number(numbered, tmp_path):
    """The hot one and the idle one, in findings, sentences, tables and plans; the tables of any two can be joined."""
    moetrace, path, first = numbered
    hot, idle, every = first + 1, first + 6, set(range(first, first + 8))

    check = moetrace("check", path, "--json").json["findings"]
    states = pd.read_csv(io.StringIO(moetrace("states", path, "--format", "csv", "--table", "experts").out))
    place = moetrace("place", path, "--gpus", "4", *QUICK, "--json").json["plans"]
    keep = moetrace("hot", path, *QUICK, "--slots", "7", "--cold", "1", "--json").json
    predict = moetrace("predict", path, *QUICK, "--json").json
    report = moetrace("report", path, *QUICK, "--figures", "none", "--folder", tmp_path / "r", "--json").json
    data = tmp_path / "r" / "data"

    assert {f"no token in the last 1000 steps for experts {idle}"} == {
        row["evidence"] for row in check if row["name"] == "dead"
    }
    shares = dict(states.loc[states["layer"] == 0, ["expert", "share"]].to_numpy())
    assert (hot, idle, every) == (max(shares, key=shares.get), min(shares, key=shares.get), set(shares))
    assert every == {expert for row in place for expert in row["experts"]}
    assert all(hot == row["experts"][0] and {*row["experts"]} == every - {idle} for row in keep["sets"])
    assert {idle} == {row["expert"] for row in keep["cold"]}
    tables = {
        "states": states.drop_duplicates(["layer", "expert"])[["layer", "expert", "share"]],
        "predict": pd.read_csv(predict["means"]["numbered"])[["layer", "expert", "share"]],
        "report": pd.read_csv(data / "numbered-last_shares.csv").drop_duplicates(["layer", "expert"])[
            ["layer", "expert", "actual"]
        ],
    }
    balance = pd.read_csv(data / "numbered-balance.csv")
    assert {hot} == set(balance["hottest"])
    assert f"expert {hot} gets" in (tmp_path / "r" / "report.md").read_text()
    tables["report"] = tables["report"].rename(columns={"actual": "share"})
    for own in tables.values():
        for other in tables.values():
            both = own.merge(other, on=["layer", "expert"], how="outer")
            assert len(both) == 16
            assert both["share_x"].to_numpy() == pytest.approx(both["share_y"].to_numpy(), abs=0.01)
    assert report["page"].endswith("report.html")


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough_but(["gpt-moe-8e-a"], ["gpt-moe-8e-a", "gpt-moe-8e-b"]))
@pytest.mark.usefixtures("undrawn")
def test_place_and_report_have_one_verdict(name, moetrace, tmp_path):
    """On every small sample trace: the sentence of the screen is that of the page, with its figures."""
    shutil.copy(ROOT / "sample_traces" / f"{name}.parquet", tmp_path / f"{name}.parquet")
    moetrace("ingest", tmp_path / f"{name}.parquet")

    less = (*QUICK, "--layers", "2,4", "--steps", ":5000")
    place = moetrace("place", name, "--gpus", "4", *less)
    report = moetrace("report", name, "--gpus", "4", *less, "--figures", "none")

    sentence = " ".join(place.out.partition("\n\n")[0].split()).removeprefix(f"{name}: ")
    assert "cuts expert time per step by" in sentence
    page = (tmp_path / "cwd" / "moetrace-out" / "report" / "report.md").read_text()
    assert sentence in page.replace("\\", "")
    assert sentence in " ".join(report.out.split())
    assert "--gpus sets it" not in report.err


@pytest.mark.slow
@pytest.mark.parametrize("redundant", [0, 1])
@pytest.mark.parametrize("kind", ["uniform", "constant", "two experts"])
def test_a_load_that_needs_no_balancing_is_not_worth_it(kind, redundant, moetrace, tmp_path):
    """With and without redundant experts; a uniform load that scatters, one that does not, and two experts."""
    rng = np.random.default_rng(0)
    experts = 2 if kind == "two experts" else 8
    share = np.full(experts, 1 / experts)
    counts = rng.multinomial(400_000, share, size=(4000, 2))
    if kind == "constant":
        counts = np.full((4000, 2, experts), 1000)
    save_trace(LoadTrace.from_counts(counts, info=TraceInfo("even")), tmp_path / "even.parquet")
    gpus = 2 if kind == "two experts" else 8
    slots = ("--gpus", gpus, "--redundant", redundant * gpus)

    done = moetrace("place", tmp_path / "even.parquet", *slots, *QUICK, "--json")

    assert 0 == done.code, done.err
    assert "not worth it" == json.loads(done.out)["verdict"]["verdict"]
