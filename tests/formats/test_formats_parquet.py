"""Parquet dumps: three layouts, one trace; and what is refused, by file, column and row or step."""

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from conftest import long_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moetrace import LoadTrace, ReadOptions, TraceError, read_trace
from moetrace.formats import sources_in


def wide_by_layer(trace):
    """One row per step and layer, a column per expert."""
    counts = trace.counts
    rows = counts.reshape(-1, trace.experts)
    return pa.table(
        {
            "iteration": np.repeat(trace.steps, len(trace.layers)),
            "layer_id": np.tile(trace.layers, len(trace.steps)),
            **{f"expert_{e}": rows[:, e] for e in range(trace.experts)},
        }
    )


def wide(trace):
    """One row per step, a column per layer and expert."""
    columns = {
        f"layer_{layer}_expert_{e}": trace.counts[:, i, e]
        for i, layer in enumerate(trace.layers)
        for e in range(trace.experts)
    }
    return pa.table({"step": trace.steps, **columns})


def nested(trace, kind=None):
    """One row per step and layer, counts in a list."""
    rows = trace.counts.reshape(-1, trace.experts).tolist()
    return pa.table(
        {
            "step": np.repeat(trace.steps, len(trace.layers)),
            "layer": np.tile(trace.layers, len(trace.steps)),
            "counts": pa.array(rows, kind or pa.list_(pa.int32())),
        }
    )


LAYOUTS = {
    "long": long_table,
    "wide by layer": wide_by_layer,
    "wide": wide,
    "nested": nested,
    "nested, fixed size": lambda trace: nested(trace, pa.list_(pa.int64(), trace.experts)),
    "nested, floats": lambda trace: nested(trace, pa.list_(pa.float64())),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_trace(small, tmp_path, layout):
    """Counts, steps and layers are those of the trace, whatever the layout."""
    pq.write_table(LAYOUTS[layout](small), tmp_path / "dump.parquet")

    found = read_trace(tmp_path / "dump.parquet")

    assert np.array_equal(small.counts, found.counts)
    assert np.array_equal(small.steps, found.steps)
    assert small.layers == found.layers


@pytest.mark.parametrize("rows", [1, 7, 100_000])
def test_row_groups_may_have_any_size(small, tmp_path, rows):
    """Blocks are cut between steps, not between row groups."""
    pq.write_table(long_table(small), tmp_path / "dump.parquet", row_group_size=rows)

    assert np.array_equal(small.counts, read_trace(tmp_path / "dump.parquet").counts)


def test_rows_may_come_in_any_order(small, tmp_path):
    """A shuffled dump is sorted."""
    order = np.random.default_rng(0).permutation(small.counts.size)
    pq.write_table(long_table(small).take(order), tmp_path / "dump.parquet")

    assert np.array_equal(small.counts, read_trace(tmp_path / "dump.parquet").counts)


def test_a_hive_partitioned_folder_is_one_trace(small, tmp_path):
    """Partitions by layer become one trace; the folder is one source."""
    folder = tmp_path / "dump"
    ds.write_dataset(long_table(small), folder, format="parquet", partitioning=["layer"], partitioning_flavor="hive")

    assert [folder] == sources_in(folder)
    assert np.array_equal(small.counts, read_trace(folder).counts)


def test_a_folder_means_every_trace_file_in_it(long_file):
    """Other files are passed over in silence."""
    (long_file.parent / "notes.txt").write_text("nothing")
    (long_file.parent / "again.parquet").write_bytes(long_file.read_bytes())

    assert [path.name for path in sources_in(long_file.parent)] == ["again.parquet", "small.parquet"]


def test_names_are_matched_leniently_and_reported(small, tmp_path):
    """Columns under other names are found, and said."""
    table = long_table(small).rename_columns(["Global_Step", "layer idx", "Expert-ID", "token_count"])
    pq.write_table(table, tmp_path / "dump.parquet")

    found = read_trace(tmp_path / "dump.parquet")

    assert np.array_equal(small.counts, found.counts)
    assert "column Global_Step is the step" in found.info.assumptions


def test_shares_become_counts_where_the_tokens_are_known(small, tmp_path):
    """float32 shares times the tokens of a step are whole counts again."""
    table = long_table(small)
    share = (table["tokens"].to_numpy() / 100).astype(np.float32)
    pq.write_table(table.drop(["tokens"]).append_column("share", pa.array(share)), tmp_path / "dump.parquet")

    found = read_trace(tmp_path / "dump.parquet", options=ReadOptions(tokens_per_step=100))

    assert np.array_equal(small.counts, found.counts)
    with pytest.raises(TraceError, match="--tokens-per-step"):
        read_trace(tmp_path / "dump.parquet")
    with pytest.raises(TraceError, match=r"row \d+: a share of .* is not a whole count"):
        read_trace(tmp_path / "dump.parquet", options=ReadOptions(tokens_per_step=37))


def _changed(column, row, value, kind=None):
    def change(table):
        values = table[column].to_pylist()
        values[row] = value
        i = table.schema.get_field_index(column)
        return table.set_column(i, column, pa.array(values, kind))

    return change


MALFORMED = {
    "negative": (_changed("tokens", 9, -1), r"column tokens, row 9: -1 is negative"),
    "NaN": (_changed("tokens", 9, float("nan"), pa.float64()), r"column tokens, row 9: nan is not a whole"),
    "null": (_changed("tokens", 9, None), r"column tokens, row 9: is null"),
    "fractional": (_changed("tokens", 9, 1.5, pa.float64()), r"column tokens, row 9: 1.5 is not a whole"),
    "duplicate": (lambda t: pa.concat_tables([t, t.slice(479, 1)]), r"step 69, layer 5: expert 3 is there 2 times"),
    "other number of experts": (
        lambda t: t.filter(pa.compute.invert(pa.compute.and_(pa.compute.equal(t["layer"], 5), pa.compute.equal(t["expert"], 3)))),
        r"step 10: layers have unlike numbers of experts: 4 in 3 and 3 in 5; .*--layers 3, .*--idle-experts",
    ),
    "missing layer": (lambda t: pa.concat_tables([t.slice(0, 100), t.slice(104)]), r"step 22, layer 5: the layer is missing"),
    "missing expert": (lambda t: pa.concat_tables([t.slice(0, 101), t.slice(102)]), r"step 22, layer 5: there are 3 experts"),
    "late layer": (_changed("layer", 100, 7), r"step 10, layer 7: the layer is missing"),
    "strange expert": (_changed("expert", 100, 7), r"expert 4 is missing"),
    "no rows": (lambda t: t.slice(0, 0), r"holds no rows"),
    "no tokens": (
        lambda t: t.set_column(3, "tokens", pa.array(np.where((t["step"].to_numpy() == 12) & (t["layer"].to_numpy() == 3), 0, t["tokens"]))),
        r"step 12, layer 3: the layer has no tokens",
    ),
    "text": (lambda t: t.set_column(3, "tokens", pa.array(["x"] * len(t))), r"column tokens: holds text, not numbers"),
    "fractional step": (_changed("step", 3, 10.5, pa.float64()), r"column step, row 3: 10.5 is not a whole"),
    "no step": (lambda t: t.drop(["step"]), r"expert 0 is there 60 times; .* --column step=NAME"),
    "no counts": (lambda t: t.drop(["tokens"]), r"no layout fits"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_dumps_are_refused_by_place(small, tmp_path, fault):
    """The message names the file, the column or step, and what is wrong."""
    change, said = MALFORMED[fault]
    path = tmp_path / "dump.parquet"
    pq.write_table(change(long_table(small)), path)

    with pytest.raises(TraceError, match=rf"^{path}.*{said}.*"):
        read_trace(path).counts  # noqa: B018


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1xxxxPAR1", b"\0" * 1000])
def test_what_is_no_parquet_is_refused(tmp_path, content):
    """Empty, cut and made-up files end in one line."""
    (tmp_path / "dump.parquet").write_bytes(content)

    with pytest.raises(TraceError):
        read_trace(tmp_path / "dump.parquet")


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=hnp.arrays(np.int64, hnp.array_shapes(min_dims=3, max_dims=3, max_side=6), elements=st.integers(1, 2**40)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_any_trace_survives_any_layout(tmp_path, counts, layout, seed):
    """Counts written and read again are the same, 64-bit ones too, in any order of rows."""
    if layout == "nested":
        counts = counts % 1000 + 1
    trace = LoadTrace.from_counts(counts)
    table = LAYOUTS[layout](trace)
    order = np.random.default_rng(seed).permutation(len(table))
    pq.write_table(table.take(order), tmp_path / "dump.parquet")

    assert np.array_equal(counts, read_trace(tmp_path / "dump.parquet").counts)
