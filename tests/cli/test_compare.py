"""`moetrace compare`: the answer, the document, parts of one trace, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest

import moetrace as mt

SHARES = np.array([[30, 5, 20, 5, 25, 5, 5, 5], [5, 5, 5, 60, 10, 5, 5, 5]]) / 100


@pytest.fixture
def compare(moetrace, tmp_path, monkeypatch):
    """The command, where ``a`` and ``b`` have two layers of other loads, and ``c`` has more experts."""
    rng = np.random.default_rng(0)
    for name, shares in (("a", SHARES), ("b", SHARES[:, ::-1]), ("c", np.full((2, 9), 1 / 9))):
        counts = np.stack([rng.multinomial(400, own, size=600) for own in shares], axis=1)
        mt.save_trace(mt.LoadTrace.from_counts(counts, layers=[3, 4], name=name), tmp_path / f"{name}.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *argv: moetrace("compare", *argv)


def test_the_answer_comes_first(compare):
    """How far apart the loads are, in one sentence, and then each layer."""
    found = compare("a.parquet", "b.parquet")
    lines = found.out.splitlines()

    assert 0 == found.code
    assert lines[0].startswith("The loads of a and b differ by ")
    assert ["3", "4"] == [line.split()[0] for line in lines if line.startswith((" 3 ", " 4 "))]
    assert "Next: moetrace compare a.parquet b.parquet --gpus 4" in found.err
    assert max(map(len, lines)) <= 100


def test_a_plan_and_a_set_answer_first_where_they_are_asked_for(compare):
    """With what to do."""
    found = compare("a.parquet", "b.parquet", "--gpus", "4", "--slots", "2").out
    text = " ".join(found.split())

    assert text.startswith("A plan from a is ")
    assert "slower on b than its own plan" in text
    assert "A set of 2 experts per layer from a covers" in text
    assert text.index("choose it from b") < text.index("The loads of a and b differ") < text.index("add --hardware")
    assert "add --hardware" not in compare("a.parquet", "b.parquet", "--gpus", "4", "--hardware", "h200").out


def test_the_document_has_what_programs_rely_on(compare):
    """Layers, whether they are the same, and the transfer; as CSV the layers."""
    document = compare("a.parquet:1-300", "a.parquet:301-", "--gpus", "4", "--slots", "2", "--json").json
    rows = compare("a.parquet:1-300", "a.parquet:301:600", "--format", "csv").out.splitlines()

    assert ("a:1-300", "a:301-600", True) == (document["a"], document["b"], document["same"])
    assert {"layer", "distance", "noise", "rank_correlation", "overlap"} <= set(document["layers"][0])
    assert {"slower_than_own", "slower_than_default", "hit_rate", "own_hit_rate"} <= set(document["transfer"])
    assert (451, 600) == (document["transfer"]["from_step"], document["transfer"]["to_step"])
    assert [row["layer"] for row in document["layers"]] == [3, 4] == [int(row.split(",")[0]) for row in rows[1:]]
    assert {} == compare("a.parquet", "b.parquet", "--json").json["transfer"]


def test_layers_and_steps_are_chosen_on_both_sides(compare):
    """With the options, and by order where layers have other numbers."""
    counts = mt.open_trace("b.parquet").counts
    mt.save_trace(mt.LoadTrace.from_counts(counts, layers=[7, 8], name="d"), "d.parquet")
    found = compare("a.parquet", "d.parquet", "--steps", "1:200", "--json")

    assert [3, 4] == [row["layer"] for row in found.json["layers"]]
    assert "Layers are compared in order: [3, 4] of a with [7, 8]" in found.err
    assert [4] == [row["layer"] for row in compare("a.parquet", "b.parquet", "--layers", "4", "--json").json["layers"]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("a.parquet", "a.parquet"), "share the steps 1 to 600: give parts that share none, such as a:1-300 a:301-600"),
        (("a.parquet:1-400", "a.parquet:400-"), "share the steps 400 to 400"),
        (("a.parquet", "c.parquet"), "a has 8 experts and c has 9"),
        (("a.parquet", "x"), "there is no trace 'x'"),
        (("a.parquet:700-", "b.parquet"), "a has no step in 700:"),
        (("a.parquet", "b.parquet", "--gpus", "3"), "try --redundant 1"),
        (("a.parquet", "b.parquet", "--slots", "9"), "slots must be above 0 and at most 8"),
        (("a.parquet",), "missing argument 'B'"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_done_is_a_usage_error(compare, argv, message):
    """With what would work."""
    found = compare(*argv)

    assert 2 == found.code
    assert message in found.err
    assert "" == found.out


def test_a_part_is_no_part_where_a_file_is_called_so(tmp_path):
    """The file is meant; names of one stem have their folders before them."""
    (tmp_path / "x").mkdir()
    trace = mt.LoadTrace.from_counts(np.ones((9, 1, 2), int))
    for name in ("a:1-2.parquet", "x/b.parquet", "b.parquet"):
        mt.save_trace(trace, tmp_path / name)
    (tmp_path / "a:1-2.parquet").rename(tmp_path / "a:1-2")
    parts = mt.Workspace(Path("w")).parts([str(tmp_path / name) for name in ("a:1-2", "x/b.parquet:3-4", "b.parquet")])

    assert [9, 2, 9] == [len(part.steps) for part in parts]
    assert ["a:1-2", "x/b:3-4", f"{tmp_path.name}/b"] == [part.name for part in parts]
