"""Many files as one trace, passes as steps, restarts, and what of a source is taken."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import long_table

from moetrace import LoadTrace, ReadOptions, TraceError, read_trace


def written(folder, name, counts, steps=None, layers=None):
    """A long Parquet file of *counts*."""
    path = folder / f"{name}.parquet"
    pq.write_table(long_table(LoadTrace.from_counts(counts, steps=steps, layers=layers)), path)
    return path


def segments(trace, *ranges):
    """The long table of stretches of a trace, one after the other."""
    return pa.concat_tables([long_table(trace.select(first=a, last=b)) for a, b in ranges])


def names(trace):
    """The names of the findings of a trace."""
    return [found.name for found in trace.info.findings]


def test_a_file_for_each_layer_has_its_number_in_the_name(small, tmp_path):
    """A folder of layer_<N>.npy, of which the numbers need not follow each other."""
    paths = [tmp_path / f"layer_{layer}.npy" for layer in small.layers]
    for i, path in enumerate(paths):
        np.save(path, small.counts[:, i])

    found = read_trace(paths, options=ReadOptions(merge="layers"))

    assert (small.layers, True) == (found.layers, np.array_equal(small.counts, found.counts))
    assert f"layer {small.layers[1]}, by the name of the file" in found.info.assumptions


SPLITS = {
    "sum": lambda t: [t.counts // 2, t.counts - t.counts // 2],
    "experts": lambda t: [t.counts[..., :2], t.counts[..., 2:]],
    "layers": lambda t: [t.counts[:, :1], t.counts[:, 1:]],
    "steps": lambda t: [t.counts[:25], t.counts[25:]],
}


def test_parts_that_number_experts_differently_are_a_question(small, tmp_path):
    """From 0 and from 1; expert-parallel ranks have numbers of their own."""
    first, second = SPLITS["experts"](small)
    for name, counts in (("a", small.counts), ("b", small.counts), ("c", first), ("d", second)):
        table = long_table(LoadTrace.from_counts(counts, steps=small.steps))
        numbers = pc.add(table["expert"], {"b": 1, "d": 1}.get(name, 0))
        pq.write_table(table.set_column(2, "expert", numbers), tmp_path / f"{name}.parquet")
    paths = {name: tmp_path / f"{name}.parquet" for name in "abcd"}

    with pytest.raises(
        TraceError, match=r"b.parquet: numbers experts from 1, and .*a.parquet from 0; .*--first-expert"
    ):
        read_trace([paths["a"], paths["b"]], options=ReadOptions(merge="sum"))
    found = read_trace([paths["c"], paths["d"]], options=ReadOptions(merge="experts"))
    assert np.array_equal(small.counts, found.counts)


@pytest.mark.parametrize("how", SPLITS)
def test_parts_become_the_trace_they_are_parts_of(small, tmp_path, how):
    """Replicas, expert-parallel and pipeline ranks, and segments of a run."""
    first, second = SPLITS[how](small)
    cut = 25 if how == "steps" else 0
    layers = [[3], [5]] if how == "layers" else [[3, 5], [3, 5]]
    end = cut or None
    paths = [
        written(tmp_path, "rank0", first, small.steps[:end], layers[0]),
        written(tmp_path, "rank1", second, small.steps[cut:], layers[1]),
    ]

    found = read_trace(paths, options=ReadOptions(merge=how))

    assert np.array_equal(small.counts, found.counts)
    assert np.array_equal(small.steps, found.steps)
    assert small.layers == found.layers
    assert f"2 files merged by {how}" in found.info.assumptions[0]


def test_ranks_are_put_in_the_order_of_their_numbers(small, tmp_path):
    """Rank 10 comes after rank 9."""
    paths = [written(tmp_path, f"rank{i}", small.counts[..., :1] + i) for i in range(11)]

    found = read_trace(sorted(paths), options=ReadOptions(merge="experts"))

    assert np.array_equal(small.counts[..., 0] + 10, found.counts[..., 10])


def test_names_may_hold_any_character(small, tmp_path):
    """A superscript is no number."""
    paths = [written(tmp_path, f"m²_rank{i}", small.counts) for i in range(2)]

    assert np.array_equal(2 * small.counts, read_trace(paths, options=ReadOptions(merge="sum")).counts)


def test_a_missing_rank_is_named(small, tmp_path):
    """Ranks 0, 1 and 3: rank 2 is not there."""
    paths = [written(tmp_path, f"rank{i}", small.counts) for i in (0, 1, 3)]

    with pytest.raises(TraceError, match="rank 2 is missing"):
        read_trace(paths, options=ReadOptions(merge="sum"))


def test_a_rank_that_is_there_twice_is_named(small, tmp_path):
    """Two files of one rank would count its tokens twice."""
    (tmp_path / "again").mkdir()
    paths = [written(folder, "rank0", small.counts) for folder in (tmp_path, tmp_path / "again")]

    with pytest.raises(TraceError, match=r"rank0.parquet: is rank 0, and so is .*rank0.parquet"):
        read_trace(paths, options=ReadOptions(merge="sum"))


@pytest.mark.parametrize(
    ("how", "change", "said"),
    [
        ("sum", {"steps": np.arange(2, 62)}, r"rank1.*has step 2 where another part has step 1"),
        ("experts", {"layers": [0, 2]}, r"rank1.*has layers 0, 2, and .*rank0.* has 0, 1"),
        ("layers", {}, r"rank1.*has layer 0, and so has the part before it"),
    ],
)
def test_parts_that_do_not_fit_are_named(small, tmp_path, how, change, said):
    """Other steps, other layers, the same layers."""
    counts = small.counts[: change.pop("counts", None)]
    paths = [written(tmp_path, "rank0", small.counts), written(tmp_path, "rank1", counts, **change)]

    with pytest.raises(TraceError, match=said):
        read_trace(paths, options=ReadOptions(merge=how))


def test_several_sources_need_a_merge(small, tmp_path):
    """Nothing is guessed about files given together."""
    paths = [written(tmp_path, f"rank{i}", small.counts) for i in range(2)]

    with pytest.raises(TraceError, match="--merge"):
        read_trace(paths)


@pytest.mark.parametrize("rows", [7, 1000])
def test_a_restart_is_a_finding_and_the_last_steps_count(small, tmp_path, rows):
    """Steps 10 to 49, then 40 to 69 again with other counts."""
    again = LoadTrace.from_counts(small.counts[:, :, ::-1], steps=small.steps, layers=small.layers)
    table = pa.concat_tables([segments(small, (10, 49)), segments(again, (40, 69))])
    pq.write_table(table, tmp_path / "dump.parquet", row_group_size=rows)

    found = read_trace(tmp_path / "dump.parquet")

    assert ["restart"] == names(found)
    assert "steps 40 to 49 are there again" in found.info.findings[0].evidence
    assert np.array_equal(small.counts[:30], found.counts[:30])
    assert np.array_equal(again.counts[30:], found.counts[30:])


def test_a_restart_may_leave_half_a_step_behind(small, tmp_path):
    """A run that was killed while it wrote its last step."""
    cut = segments(small, (10, 49)).slice(0, 39 * 8 + 5)
    pq.write_table(pa.concat_tables([cut, segments(small, (40, 69))]), tmp_path / "dump.parquet")

    found = read_trace(tmp_path / "dump.parquet")

    assert np.array_equal(small.counts, found.counts)


def test_a_restart_between_segments_is_one_too(small, tmp_path):
    """Segments of a run that overlap."""
    paths = [tmp_path / f"part{i}.parquet" for i in range(2)]
    pq.write_table(segments(small, (10, 49)), paths[0])
    pq.write_table(segments(small, (40, 69)), paths[1])

    found = read_trace(paths, options=ReadOptions(merge="steps"))

    assert ["restart"] == names(found)
    assert np.array_equal(small.counts, found.counts)


def test_a_log_begun_anew_is_refused_until_accepted(small, tmp_path):
    """All steps twice can be two ranks in one file as well."""
    pq.write_table(segments(small, (10, 69), (10, 69)), tmp_path / "dump.parquet")

    with pytest.raises(TraceError, match=r"--merge sum.*--accept repeated"):
        read_trace(tmp_path / "dump.parquet")
    found = read_trace(tmp_path / "dump.parquet", options=ReadOptions(accept=("repeated",)))
    assert ["repeated"] == names(found)
    assert np.array_equal(small.counts, found.counts)


def test_layers_one_after_the_other_are_no_restart(small, tmp_path):
    """A log sorted by layer goes back to the first step for each."""
    table = long_table(small).sort_by([("layer", "ascending"), ("step", "ascending")])
    pq.write_table(table, tmp_path / "dump.parquet")

    found = read_trace(tmp_path / "dump.parquet")

    assert [] == names(found)
    assert np.array_equal(small.counts, found.counts)


@pytest.mark.parametrize("passes", [1, 7, 20, 60])
def test_passes_are_added_up_into_steps(small, tmp_path, passes):
    """Every N passes, numbered from 1; passes left over are no step, and that is a finding."""
    path = written(tmp_path, "dump", small.counts)

    found = read_trace(path, options=ReadOptions(bin=passes))

    expected = [small.counts[i : i + passes].sum(axis=0) for i in range(0, 60 - passes + 1, passes)]
    assert np.array_equal(expected, found.counts)
    assert list(range(1, len(expected) + 1)) == found.steps.tolist()
    left_over = [finding.place for finding in found.info.findings if finding.name == "unfinished"]
    assert ([f"step {len(expected) + 1}"] if 60 % passes else []) == left_over
    with pytest.raises(TraceError, match="has 60 passes, which make no step of 61; choose --bin 60 or less"):
        read_trace(path, options=ReadOptions(bin=61))


def test_the_only_step_is_held_against_the_tokens_that_were_expected(tmp_path):
    """Of several, the last may be a part of one."""
    path = written(tmp_path, "dump", np.full((6, 1, 2), [1, 2]))

    for passes in (3, 6):
        with pytest.raises(TraceError, match=f"{3 * passes} tokens where {6 * passes} were expected"):
            read_trace(path, options=ReadOptions(bin=passes, tokens=3, top_k=2))


def test_empty_passes_may_be_added_up(small, tmp_path):
    """A serving log has passes without a token; alone they are refused, or left out if that is accepted."""
    counts = small.counts.copy()
    counts[[5, 6]] = 0
    np.save(tmp_path / "dump.npy", counts)

    with pytest.raises(TraceError, match=r"step 6, layer 0: the layer has no tokens.*--accept empty.*--bin"):
        read_trace(tmp_path / "dump.npy")
    binned = read_trace(tmp_path / "dump.npy", options=ReadOptions(bin=10))
    without = read_trace(tmp_path / "dump.npy", options=ReadOptions(accept=("empty",)))
    assert np.array_equal(counts[:10].sum(axis=0), binned.counts[0])
    assert np.array_equal(np.delete(counts, [5, 6], axis=0), without.counts)
    assert ["empty", "gap"] == names(without)


def test_layers_and_steps_are_selected(small, tmp_path):
    """What is left out is not even looked at."""
    path = written(tmp_path, "dump", small.counts, small.steps, small.layers)

    found = read_trace(path, options=ReadOptions(layers=(5,), first=20, last=29))

    assert np.array_equal(small.counts[10:20, 1:], found.counts)
    assert (5,) == found.layers
    for wrong, said in ((ReadOptions(layers=(4,)), "has no layer 4"), (ReadOptions(first=99), "has no step left")):
        with pytest.raises(TraceError, match=said):
            read_trace(path, options=wrong)


def test_incomplete_steps_are_left_out_if_accepted(small, tmp_path):
    """A layer is missing in one step."""
    table = long_table(small)
    pq.write_table(pa.concat_tables([table.slice(0, 100), table.slice(104)]), tmp_path / "dump.parquet")

    with pytest.raises(TraceError, match=r"the layer is missing in this step.*--accept incomplete"):
        read_trace(tmp_path / "dump.parquet")
    found = read_trace(tmp_path / "dump.parquet", options=ReadOptions(accept=("incomplete",)))
    assert np.array_equal(np.delete(small.counts, 12, axis=0), found.counts)
    assert ["incomplete", "gap"] == names(found)


def test_expected_tokens_are_those_of_all_passes_of_a_step(small, tmp_path):
    """100 tokens in each of 7 passes; the last step holds fewer."""
    path = written(tmp_path, "dump", small.counts)

    found = read_trace(path, options=ReadOptions(bin=7, tokens_per_step=100))

    assert "tokens-differ" not in names(found)
    assert 700 == found.counts[0, 0].sum()
