"""What the lines of errors advise works: layers and steps taken first, idle experts filled, ends that are not whole."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import long_table
from dumps import megatron

import moetrace as mt
from moetrace import ReadOptions, TraceError, open_trace, read_trace


def names(trace):
    return [finding.name for finding in trace.info.findings]


def counter(trace, path):
    """A row for each expert that had any token."""
    table = long_table(trace)
    pq.write_table(table.filter(pa.compute.greater(table["tokens"], 0)), path)
    return path


def idle_trace(small, *idle):
    """The small trace with *idle* experts, and some idle now and then."""
    from moetrace import LoadTrace

    counts = small.counts.copy()
    counts[::7, 0, 2] = 0
    counts[..., list(idle)] = 0
    return LoadTrace.from_counts(counts, steps=small.steps, layers=small.layers)


@pytest.mark.parametrize("idle", [(), (3,), (1,), (2, 3)])
def test_experts_without_a_row_are_idle_where_that_is_said(small, tmp_path, idle):
    """Counters leave them out; the line that refuses names the option."""
    trace = idle_trace(small, *idle)
    path = counter(trace, tmp_path / "dump.parquet")

    with pytest.raises(TraceError, match="--idle-experts"):
        read_trace(path, options=ReadOptions(experts=4))
    found = read_trace(path, options=ReadOptions(idle_experts=True, experts=4))

    assert np.array_equal(trace.counts, found.counts)
    assert "an expert without a row had no tokens" in found.info.assumptions


def test_the_number_of_experts_is_the_highest_unless_said(small, tmp_path):
    """Of the whole file, not of its first step."""
    trace = idle_trace(small)
    path = counter(trace.select(), tmp_path / "dump.parquet")

    assert np.array_equal(trace.counts, read_trace(path, options=ReadOptions(idle_experts=True)).counts)


def test_experts_are_as_many_as_was_said_in_any_format(small, tmp_path):
    """Also where rows are whole."""
    pq.write_table(long_table(small), tmp_path / "dump.parquet")
    np.save(tmp_path / "dump.npy", small.counts)

    for path in (tmp_path / "dump.parquet", tmp_path / "dump.npy", megatron(small, tmp_path)):
        assert 4 == read_trace(path, options=ReadOptions(experts=4)).experts
    for path in (tmp_path / "dump.parquet", tmp_path / "dump.npy"):
        with pytest.raises(TraceError, match=r"expert 3 is there|expert 4 is missing"):
            read_trace(path, options=ReadOptions(experts=3))
        with pytest.raises(TraceError, match="expert 4 is missing"):
            read_trace(path, options=ReadOptions(experts=5))


def test_experts_keep_their_numbers(moetrace, small, tmp_path):
    """Counted from 1 they are so in findings and in what is exported; it is said."""
    trace = idle_trace(small, 2)
    table = long_table(trace)
    table = table.set_column(2, "expert", pa.compute.add(table["expert"], 1))
    pq.write_table(table, tmp_path / "dump.parquet")

    done = moetrace("ingest", tmp_path / "dump.parquet")
    moetrace("export", "dump", "-o", "again.csv")
    exported = read_trace("again.csv")

    found = open_trace("moetrace-out/traces/dump.parquet")
    assert "experts are numbered from 1 to 4, and keep their numbers" in " ".join(found.info.assumptions)
    assert "numbered from 1" in done.err + done.out
    assert (1, 1) == (found.info.first_expert, exported.info.first_expert)
    assert np.array_equal(trace.counts, exported.counts)
    checked = moetrace("check", "dump", "--json").json["findings"]
    assert {"no token in the last 1000 steps for experts 3"} == {
        row["evidence"] for row in checked if row["name"] == "dead"
    }


def test_the_first_number_may_be_said(small, tmp_path):
    """Of arrays, which have none; and against what the rows seem to say."""
    np.save(tmp_path / "dump.npy", small.counts)

    assert 1 == read_trace(tmp_path / "dump.npy", options=ReadOptions(first_expert=1)).info.first_expert
    table = long_table(idle_trace(small, 0)).to_pandas()
    pq.write_table(pa.Table.from_pandas(table[table.tokens > 0]), tmp_path / "dump.parquet")
    found = read_trace(tmp_path / "dump.parquet", options=ReadOptions(first_expert=0, idle_experts=True))
    assert np.array_equal(idle_trace(small, 0).counts, found.counts)


def unlike(folder, kind):
    """Layers 0 and 1 of four experts, layer 2 of two."""
    rows = [
        {"step": step, "layer": layer, "counts": list(range(1, width + 1))}
        for step in (1, 2)
        for layer, width in ((0, 4), (1, 4), (2, 2))
    ]
    path = folder / f"dump.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        flat = [(r["step"], r["layer"], e, n) for r in rows for e, n in enumerate(r["counts"])]
        pq.write_table(pa.table(dict(zip(("step", "layer", "expert", "tokens"), zip(*flat)))), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_layers_of_unlike_numbers_of_experts_are_named_and_can_be_chosen(tmp_path, kind):
    """By following the advice of the line."""
    path = unlike(tmp_path, kind)

    with pytest.raises(TraceError, match=r"unlike numbers of experts: 4 in 0, 1 and 2 in 2") as caught:
        read_trace(path)
    advised = re.search(r"--layers (\d+(?:,\d+)*)", str(caught.value))[1]
    found = read_trace(path, options=ReadOptions(layers=tuple(map(int, advised.split(",")))))
    assert (0, 1) == found.layers
    assert 2 == read_trace(path, options=ReadOptions(layers=(2,))).experts


@pytest.mark.parametrize("how", ["sum", "experts", "layers"])
def test_a_selection_comes_before_merging(small, tmp_path, how):
    """What does not fit together may lie outside of it."""
    for rank in range(2):
        layers = [3, 5] if how != "layers" else [3 + 4 * rank, 5 + 4 * rank]
        last = 60 if rank else 50
        table = long_table(small.select(last=9 + last)).to_pandas()
        table["layer"] = table["layer"].map(dict(zip((3, 5), layers)))
        table.loc[table.step >= 40, "step"] += rank
        pq.write_table(pa.Table.from_pandas(table), tmp_path / f"rank{rank}.parquet")
    paths = sorted(tmp_path.iterdir())

    with pytest.raises(TraceError, match="choose those they share with --steps"):
        read_trace(paths, options=ReadOptions(merge=how))
    found = read_trace(paths, options=ReadOptions(merge=how, last=39, layers=(3,)))
    assert (30, (3,)) == (len(found.steps), found.layers)


@pytest.mark.parametrize("how", ["sum", "experts", "layers"])
def test_a_part_that_ended_early_ends_the_trace(small, tmp_path, how):
    """What the others have from there on is left out, and said."""
    for rank, last in enumerate((69, 66)):
        table = long_table(small.select(last=last)).to_pandas()
        table["layer"] += 10 * rank if how == "layers" else 0
        pq.write_table(pa.Table.from_pandas(table), tmp_path / f"rank{rank}.parquet")

    found = read_trace(sorted(tmp_path.iterdir()), options=ReadOptions(merge=how))

    assert 66 == found.steps[-1]
    assert "unfinished" in names(found)
    assert "rank1.parquet ended before step 67" in found.info.findings[0].evidence


def test_replicas_may_be_idle_where_that_is_said(small, tmp_path):
    """Steps in the middle, and at the end."""
    kept = {0: range(10, 70), 1: [*range(10, 30), *range(33, 60)]}
    for rank, steps in kept.items():
        table = long_table(small).to_pandas()
        pq.write_table(pa.Table.from_pandas(table[table.step.isin(steps)]), tmp_path / f"rank{rank}.parquet")
    paths = sorted(tmp_path.iterdir())

    with pytest.raises(TraceError, match="--idle-experts"):
        read_trace(paths, options=ReadOptions(merge="sum"))
    found = read_trace(paths, options=ReadOptions(merge="sum", idle_experts=True))

    there = np.isin(np.arange(10, 70), kept[1])[:, None, None]
    assert np.array_equal(small.counts * (1 + there), found.counts)
    assert "idle" in names(found)
    assert "and 12 more" in next(f.evidence for f in found.info.findings if f.name == "idle")


def test_ranks_whose_last_line_was_cut_off_are_read(small, tmp_path):
    """The step that is not whole is left out of all ranks."""
    path = megatron(small, tmp_path)
    last = path / "tokens_per_expert" / "rank1.jsonl"
    last.write_text(last.read_text()[:-95])

    found = read_trace(path)

    assert np.array_equal(small.counts[:-1], found.counts)
    assert {"cut", "unfinished"} == set(names(found))


def test_a_layer_that_begins_late_can_be_left_out(small, tmp_path):
    """By either way that the line names."""
    table = long_table(small).to_pandas()
    pq.write_table(pa.Table.from_pandas(table[(table.layer == 3) | (table.step >= 20)]), tmp_path / "dump.parquet")

    with pytest.raises(TraceError, match=r"layer 5: the layer is missing.*--accept incomplete.*--layers"):
        read_trace(tmp_path / "dump.parquet")
    chosen = read_trace(tmp_path / "dump.parquet", options=ReadOptions(layers=(3,)))
    later = read_trace(tmp_path / "dump.parquet", options=ReadOptions(accept=("incomplete",)))
    assert np.array_equal(small.counts[:, :1], chosen.counts)
    assert np.array_equal(small.counts[10:], later.counts)


@pytest.mark.slow
def test_plans_name_experts_as_the_source_does(tmp_path):
    """Systems that read the plan count from 0 all the same."""
    counts = np.random.default_rng(0).multinomial(400, [0.4, 0.3, 0.2, 0.1], size=(300, 1))
    plans = {}
    for first in (0, 1):
        np.save(tmp_path / "dump.npy", counts)
        trace = read_trace(tmp_path / "dump.npy", options=ReadOptions(first_expert=first))
        plans[first] = mt.place(trace, 2, predictor=["window_mean"], horizon=50)

    numbers = [{expert for own in plans[first].frames["plans"]["experts"] for expert in own} for first in (0, 1)]
    assert [{0, 1, 2, 3}, {1, 2, 3, 4}] == numbers
    assert plans[0].slots == plans[1].slots


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_what_was_taken_for_what_is_always_said(small, tmp_path, kind):
    """Sizes, where numbers begin, and which column holds the counts."""
    path = tmp_path / f"dump.{kind}"
    pq.write_table(long_table(small), path) if kind == "parquet" else np.save(path, small.counts)

    said = read_trace(path).info.assumptions

    first = 3 if kind == "parquet" else 0
    assert f"60 steps x 2 layers x 4 experts, layers numbered from {first}, experts from 0" in said
    assert (
        "column tokens holds the counts" if kind == "parquet" else "axes are steps, layers, experts: 60 x 2 x 4"
    ) in said
