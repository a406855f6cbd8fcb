"""`moetrace hot`: the answer, the documents, the files, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest

from moetrace import LoadTrace, TraceInfo, save_trace

QUICK = ("--horizon", "100", "--cutoffs", "100,200,300", "--quiet")


@pytest.fixture
def served(moetrace, tmp_path):
    """The command, on a trace of two layers of eight experts numbered from 1, a few tokens a step."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(6, np.array([30, 5, 20, 5, 25, 5, 5, 5]) / 100, size=(500, 2))
    info = TraceInfo("served", first_expert=1)
    save_trace(LoadTrace.from_counts(counts, layers=[3, 4], info=info), tmp_path / "served.parquet")
    return lambda *argv: moetrace("hot", tmp_path / "served.parquet", *argv)


@pytest.mark.slow
def test_the_answer_comes_first(served):
    """Then the methods, then what else there is to say."""
    lines = served("--slots", "3", *QUICK).out.splitlines()

    assert lines[0].startswith("served: Keeping 3 of 8 experts per layer covers ")
    rows = [line.split("  ")[0].strip() for line in lines]
    assert "LRU cache" in rows
    assert "best set in hindsight" in rows
    assert "ms/step" not in "".join(lines)


@pytest.mark.slow
def test_the_document_has_what_programs_rely_on(served):
    """Sets with the numbers of the source, scores, their means, and files from 0 on."""
    document = served("--slots", "3", "--cold", "2", "--json", *QUICK).json

    (first, second) = document["sets"]
    assert ["served", 3, 3] == [first["trace"], first["layer"], first["slots"]]
    assert [1, 5, 3] == first["experts"]
    assert {"trace", "layer", "cutoff", "method", "slots", "hit_rate", "active_hit_rate"} <= set(document["scores"][0])
    assert {"trace", "method", "slots", "hit_rate", "active_hit_rate"} <= set(document["summary"][0])
    methods = {row["method"] for row in document["scores"]}
    assert {"level", "window_mean", "lru", "lfu", "refreshed", "oracle_static", "oracle"} == methods
    assert {3, 1, 2, 4} == {row["slots"] for row in document["scores"] if row["allocation"] == "equal"}
    assert {1, 2} == {sum(own["layer"] == layer for own in document["cold"]) // 2 * n for layer, n in ((3, 1), (4, 2))}
    assert 3 == document["answers"][0]["slots"]
    files = {file["system"]: file["path"] for file in document["deploy"]}
    assert document["files"] == list(files.values())
    assert {"3": [0, 4, 2], "4": [e - 1 for e in second["experts"]]} == json.loads(Path(files["JSON"]).read_text())
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in document["figures"])


@pytest.mark.thorough
def test_a_total_is_divided_and_layers_are_renumbered(served):
    """Files that need as many experts in every layer are named as missing, in one line."""
    found = served("--total", "5", "--first-layer", "0", "--model-layers", "4", "--json", "--horizon", "100")

    assert 5 == sum(len(row["experts"]) for row in found.json["sets"])
    assert "moetrace: no file for ExLlamaV3: it keeps as many experts in every layer: use --slots" in found.err
    files = {file["system"]: file for file in found.json["deploy"]}
    assert ["0", "1"] == list(json.loads(Path(files["JSON"]["path"]).read_text()))
    assert "Layers are numbered" not in found.err
    assert "--kt-gpu-experts-ratio" in files["KTransformers"]["flags"]
    assert "Layers are numbered from 3" in served("--cover", "0.8", "--horizon", "100").err


@pytest.mark.slow
def test_a_short_trace_is_scored_over_less(served):
    """Which is said."""
    found = served("--slots", "2")

    assert (
        "served: 500 steps are too few for sets that stay 1,000: they are scored over 125 (--horizon sets" in found.err
    )


@pytest.mark.thorough
def test_bytes_and_bandwidth_give_milliseconds(served):
    """So many missing experts in both layers, each in a millisecond."""
    found = served("--slots", "3", "--expert-bytes", "25MB", "--bandwidth", "25GB/s", "--json", *QUICK).json
    rows = [row for row in found["summary"] if row["state"] == "all"]

    assert [2 * row["loads"] for row in rows] == pytest.approx([row["ms_per_step"] for row in rows])
    assert "ms/step" in served("--slots", "3", "--expert-bytes", "25MB", "--bandwidth", "25GB", *QUICK).out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--slots", "9"), "slots must be above 0 and at most 8"),
        (("--slots", "2", "--total", "3"), "slots and total exclude each other"),
        (("--cover", "nan"), "cover must be above 0"),
        (("--cold", "8"), "cold must be from 0 to 7"),
        (("--expert-bytes", "1MB"), "--expert-bytes and --bandwidth go together"),
        (("--expert-bytes", "1MB", "--bandwidth", "0"), "a bandwidth must be above 0, got '0'"),
        (("--bandwidth", "fast"), "is not a number of bytes"),
        (("--horizon", "5000"), "the longest horizon is"),
        (("--cutoffs", "9000"), "cutoff 9,000 cannot be scored"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_done_is_a_usage_error(served, argv, message):
    """With what would work, and nothing is written."""
    found = served(*argv)

    assert 2 == found.code
    assert message in found.err
    assert not Path("moetrace-out/hot").exists()


@pytest.mark.slow
def test_a_step_alone_is_no_history(served):
    """Sets are made from it and written, and the answer says that they were not tested; a horizon cannot be had."""
    found, asked = served("--steps", "1:1"), served("--steps", "1:1", "--horizon", "5")

    assert 0 == found.code
    assert "Not tested: it has too few steps" in found.out
    assert 2 == asked.code
    assert "record more steps" in asked.err
