"""Folders of ranks and logs of single tokens: how they are put together, and what is refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dumps import chosen, megatron, megatron_router, omni

from moetrace import ReadOptions, TraceError, read_trace


def tpe(folder, rank, lines):
    """A rank file of (iter, layer, micro-batches)."""
    folder.mkdir(exist_ok=True)
    records = [{"iter": i, "block": "decoder", "layer": layer, "tpe": batches} for i, layer, batches in lines]
    (folder / f"rank{rank}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def four_ranks(folder):
    """Two experts on each of four ranks, two steps, two micro-batches."""
    for rank in range(4):
        tpe(folder, rank, [(step, 1, [[rank, 1], [step, 0]]) for step in (100, 200)])


def test_all_ranks_hold_other_experts_unless_told(tmp_path):
    """Four ranks of two experts are eight experts, and this is said."""
    four_ranks(tmp_path / "tokens_per_expert")

    found = read_trace(tmp_path / "tokens_per_expert")

    assert [[[100, 1, 101, 1, 102, 1, 103, 1]], [[200, 1, 201, 1, 202, 1, 203, 1]]] == found.counts.tolist()
    assert "8 experts: every rank of a stage holds others" in found.info.assumptions


def test_replicas_are_added_up_where_the_experts_are_known(tmp_path):
    """Expert-parallel ranks come first in the numbering, then data-parallel ones."""
    four_ranks(tmp_path / "tokens_per_expert")

    found = read_trace(tmp_path / "tokens_per_expert", format="megatron:experts=4")

    assert [[[202, 2, 204, 2]], [[402, 2, 404, 2]]] == found.counts.tolist()
    assert (100, 200) == tuple(found.steps)


def test_pipeline_stages_are_stacked(tmp_path):
    """Layers are numbered anew in every stage, as its modules are."""
    four_ranks(tmp_path / "tokens_per_expert")

    found = read_trace(tmp_path / "tokens_per_expert", format="megatron:stages=2:experts=4")

    assert (1, 3) == found.layers
    assert [[100, 1, 101, 1], [102, 1, 103, 1]] == found.counts[0].tolist()


def test_a_missing_rank_of_a_folder_is_named(tmp_path):
    """Also without --merge."""
    four_ranks(tmp_path / "tokens_per_expert")
    (tmp_path / "tokens_per_expert" / "rank2.jsonl").unlink()

    with pytest.raises(TraceError, match="rank 2 is missing"):
        read_trace(tmp_path / "tokens_per_expert")


def test_ranks_that_make_no_model_are_refused(tmp_path):
    """Four ranks of two experts are no three stages."""
    four_ranks(tmp_path / "tokens_per_expert")

    with pytest.raises(TraceError, match="4 ranks of 2 experts make no 3 stages"):
        read_trace(tmp_path / "tokens_per_expert", format=":experts=8:stages=3")


def test_a_restart_in_every_rank_is_one_finding(small, tmp_path):
    """All ranks went back to the same checkpoint."""
    path = megatron(small, tmp_path)
    for rank in (path / "tokens_per_expert").iterdir():
        lines = rank.read_text().splitlines(keepends=True)
        rank.write_text("".join(lines[: 40 * 3] + lines[30 * 3 :]))

    found = read_trace(path)

    assert ["restart"] == [finding.name for finding in found.info.findings]
    assert np.array_equal(small.counts, found.counts)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"iter": 1, "block": "decoder", "layer": 0, "tpe": [[1, 2], [3]]}, "unlike length"),
        ({"iter": 1, "block": "decoder", "layer": 0, "tpe": []}, "unlike length"),
        ({"iter": 1, "block": "decoder", "layer": 0, "tpe": [[1, -2]]}, "counts that are negative"),
        ({"block": "decoder", "layer": 0, "tpe": [[1, 2]]}, "column iter, row 0: is null"),
        ({"iter": 1.5, "block": "decoder", "layer": 0, "tpe": [[1, 2]]}, "cannot be read"),
    ],
)
def test_bad_records_of_a_rank_are_refused(tmp_path, line, said):
    """By file and row."""
    path = tmp_path / "rank0.jsonl"
    path.write_text(json.dumps(line) + "\n")

    with pytest.raises(TraceError, match=rf"rank0.jsonl.*{said}"):
        read_trace(path)


def test_pipeline_stages_of_router_traces_are_told_by_their_layers(small, tmp_path):
    """Ranks with other layers are no replicas."""
    both = megatron_router(small, tmp_path)
    lines = [line for rank in both.iterdir() for line in rank.read_text().splitlines(keepends=True)]
    for rank, layer in enumerate(small.layers):
        mine = [line for line in lines if json.loads(line)["layer"] == layer]
        mine.sort(key=lambda line: json.loads(line)["step"])
        (tmp_path / f"router_trace_rank{rank}.jsonl").write_text("".join(mine))

    found = read_trace(tmp_path)

    assert np.array_equal(small.counts, found.counts)
    assert 1 == found.info.top_k


def choices_of(counts, tokens):
    """Choices (tokens, 1) of the steps of one layer."""
    return [choice for i, step in enumerate(counts) for choice in chosen(step, i)[:tokens]]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "npy"])
def test_tokens_are_counted_into_steps(small, tmp_path, kind):
    """Where no step is named, every N tokens are one."""
    ids = choices_of(small.counts[:, 0], 100)
    path = tmp_path / f"topk_ids.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"topk_ids": ids}), path, row_group_size=33)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"topk_ids": row}) + "\n" for row in ids))
    else:
        np.save(path, np.array(ids, np.int16))

    found = read_trace(path, options=ReadOptions(tokens=100))

    assert np.array_equal(small.counts[:, :1], found.counts)
    assert "routing" == found.info.format
    with pytest.raises(TraceError, match="--tokens N"):
        read_trace(path)


@pytest.mark.slow
def test_layers_of_a_token_table_are_counted_apart(small, tmp_path):
    """A row for each token and layer, layers in turn."""
    rows = [
        {"layer": layer, "expert_ids": ids}
        for i in range(60)
        for layer, ids in sorted(
            (layer, ids) for j, layer in enumerate(small.layers) for ids in chosen(small.counts[i, j])
        )
    ]
    (tmp_path / "dump.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = read_trace(tmp_path / "dump.jsonl", options=ReadOptions(tokens=100))

    assert np.array_equal(small.counts, found.counts)
    assert small.layers == found.layers


def test_an_array_may_hold_layers(tmp_path):
    """(tokens, layers, k), as servers return it."""
    ids = np.random.default_rng(0).random((40, 3, 5)).argsort(axis=2)[..., :2].astype(np.int16)
    np.save(tmp_path / "routed_experts.npy", ids)

    found = read_trace(tmp_path / "routed_experts.npy", format="routing:tokens=10:experts=6")

    expected = [[np.bincount(ids[i : i + 10, j].ravel(), minlength=6) for j in range(3)] for i in range(0, 40, 10)]
    assert np.array_equal(expected, found.counts)
    assert 2 == found.info.top_k


def test_padding_is_not_counted_and_strange_experts_are_refused(tmp_path):
    """-1 stands for no choice."""
    for ids, spec, expected in (
        ([[0], [1], [-1], [1]], ":tokens=4", [[[1, 2]]]),
        ([[0], [2]], ":tokens=2:experts=2", "expert 2 was chosen"),
        ([[0], [-2]], ":tokens=2", "holds expert -2"),
        ([[0], [1, 2]], ":tokens=2", "another number of experts"),
    ):
        pq.write_table(pa.table({"indices": ids}), tmp_path / "dump.parquet")
        if isinstance(expected, list):
            assert expected == read_trace(tmp_path / "dump.parquet", format=spec).counts.tolist()
        else:
            with pytest.raises(TraceError, match=expected):
                read_trace(tmp_path / "dump.parquet", format=spec)


def test_ranges_of_steps_are_steps_of_one_phase(small, tmp_path):
    """Prefill and decode are not mixed."""
    folder = omni(small, tmp_path)
    first = folder / "topk_ids_count_20250527_093605_decode_step10to10.csv"
    (folder / first.name.replace("decode", "prefill")).write_bytes(first.read_bytes())

    with pytest.raises(TraceError, match=r"decode and prefill.*--phase"):
        read_trace(folder)
    assert np.array_equal(small.counts, read_trace(folder, format=":phase=decode").counts)
    first.write_text(",ep_0,ep_1\nlayer,1,2\n")
    with pytest.raises(TraceError, match=r"step10to10.csv: is no matrix of layers by experts"):
        read_trace(folder, format=":phase=decode")
