"""Delimited text, JSON lines and NumPy arrays: delimiters, compression, layouts, and what is refused."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pytest
from conftest import long_table
from test_formats_parquet import nested, wide, wide_by_layer

from moetrace import ReadOptions, TraceError, read_trace

LAYOUTS = {"long": long_table, "wide by layer": wide_by_layer, "wide": wide}


def compressed(data: bytes, name: str) -> bytes:
    """*data* as it is, by gzip or by zstd."""
    return {"": bytes, ".gz": gzip.compress, ".zst": lambda raw: pa.compress(raw, "zstd", asbytes=True)}[name](data)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_delimited_text_gives_the_same_trace(small, tmp_path, layout, delimiter, ending):
    """Whatever the delimiter, the layout and the compression."""
    text = LAYOUTS[layout](small).to_pandas().to_csv(index=False, sep=delimiter)
    path = tmp_path / f"dump.csv{ending}"
    path.write_bytes(compressed(text.encode(), ending))

    found = read_trace(path)

    assert np.array_equal(small.counts, found.counts)
    assert small.layers == found.layers


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "nested"])
def test_json_lines_give_the_same_trace(small, tmp_path, layout, ending):
    """One object a line, long, wide or nested."""
    rows = {**LAYOUTS, "nested": nested}[layout](small).to_pylist()
    path = tmp_path / f"dump.jsonl{ending}"
    path.write_bytes(compressed("".join(json.dumps(row) + "\n" for row in rows).encode(), ending))

    assert np.array_equal(small.counts, read_trace(path).counts)


def test_a_byte_order_mark_is_no_part_of_the_header(small, tmp_path):
    """Text saved by a spreadsheet begins with one."""
    path = tmp_path / "dump.csv"
    path.write_text(long_table(small).to_pandas().to_csv(index=False), encoding="utf-8-sig")

    assert np.array_equal(small.counts, read_trace(path).counts)


def test_compression_is_told_by_the_content(small, tmp_path):
    """A gzip file that lost its ending is still one."""
    path = tmp_path / "dump.csv"
    path.write_bytes(gzip.compress(long_table(small).to_pandas().to_csv(index=False).encode()))

    assert np.array_equal(small.counts, read_trace(path).counts)


REFUSED = {
    "text in a count": ("step,layer,expert,tokens\n1,0,0,many\n", r"column tokens"),
    "a fraction": ("step,layer,expert,tokens\n1,0,0,3\n1,0,1,1.5\n", r"column tokens, row 1: 1.5"),
    "an empty cell": ("step,layer,expert,tokens\n1,0,0,3\n1,0,1,\n", r"column tokens, row 1: is null"),
    "a short row": ("step,layer,expert,tokens\n1,0,0,3\n1,0\n", r"cannot be read.*Expected 4 columns"),
    "no header": ("1,0,0,3\n1,0,1,4\n", r"has no header"),
    "one column": ("nothing\nhere\n", r"no header"),
    "utilisation": ("step,layer,expert,utilization\n1,0,0,1.5\n", r"utilisation.*no totals.*--experts"),
    "no rows": ("step,layer,expert,tokens\n", r"holds no rows"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_bad_text_is_refused_by_place(tmp_path, fault):
    """The message names the file, and the column and row where there is one."""
    text, said = REFUSED[fault]
    path = tmp_path / "dump.csv"
    path.write_text(text)

    with pytest.raises(TraceError, match=rf"^{path}.*{said}"):
        read_trace(path)


def test_names_that_are_no_utf8_are_refused(tmp_path):
    """Where a header was saved in another encoding."""
    (tmp_path / "dump.csv").write_bytes(b"s\xfbep,layer\n1,2\n")

    with pytest.raises(TraceError, match="UTF-8"):
        read_trace(tmp_path / "dump.csv")


def test_utilisation_becomes_counts_where_the_totals_are_known(small, tmp_path):
    """The load over the mean load of 4 experts, 100 tokens in all."""
    frame = long_table(small).to_pandas()
    frame["utilization"] = frame.pop("tokens") / 25
    frame.to_csv(tmp_path / "dump.csv", index=False)

    found = read_trace(tmp_path / "dump.csv", format="csv:tokens_per_step=100:experts=4")

    assert np.array_equal(small.counts, found.counts)


@pytest.mark.parametrize("shape", ["all layers", "one layer"])
def test_a_plain_array_is_numbered(small, tmp_path, shape):
    """Steps from 1 and layers from 0, and said so."""
    counts = small.counts if shape == "all layers" else small.counts[:, 0]
    np.save(tmp_path / "dump.npy", counts)

    axes = ":axes=steps,experts" if counts.ndim == 2 else None
    found = read_trace(tmp_path / "dump.npy", format=axes)

    assert np.array_equal(counts.reshape(found.counts.shape), found.counts)
    assert (1, 0) == (found.steps[0], found.layers[0])
    assert "steps are numbered from 1" in found.info.assumptions


def test_nothing_is_unpickled(tmp_path):
    """An array of objects is refused before anything in it is run."""
    np.save(tmp_path / "dump.npy", np.array([{"a": 1}], object), allow_pickle=True)

    with pytest.raises(TraceError, match="nothing is unpickled"):
        read_trace(tmp_path / "dump.npy")


def test_loads_of_a_megatron_fork_have_their_layers_first(small, tmp_path):
    """One .npz for each rank, to be added up."""
    paths = [tmp_path / f"mcore_ep_loads_rank{rank}_7.npz" for rank in range(2)]
    for path, part in zip(paths, (small.counts // 2, small.counts - small.counts // 2)):
        np.savez(path, loads=np.moveaxis(part, 1, 0).astype(np.int32), metadata="mcore_ep_load_dump_v1")

    found = read_trace(paths, options=ReadOptions(merge="sum"))

    assert np.array_equal(small.counts, found.counts)
    assert any("layers, steps, experts: 2 x 60 x 4" in text for text in found.info.assumptions)


@pytest.mark.parametrize("line", ["[" * 30_000 + "]" * 30_000, '{"a":' * 30_000 + "1" + "}" * 30_000])
@pytest.mark.parametrize("before", ["", '{"step": 1, "layer": 0, "tokens_per_expert": [1, 2]}\n' * 3])
def test_json_lines_nested_too_deep_are_one_line(line, before, tmp_path):
    """Arrow would end the process, and with it the other sources of a command; brackets in texts do not count."""
    path = tmp_path / "x.jsonl"
    path.write_text(f'{before}{{"step": 2, "layer": 0, "tokens_per_expert": {line}}}\n')

    with pytest.raises(TraceError, match=rf"line {before.count(chr(10)) + 1}: is nested more than 200 deep"):
        read_trace(path, format="jsonl")
    path.write_text('{"step": 1, "layer": 0, "note": "[[[", "tokens_per_expert": [1, 2]}\n' * 300)
    with pytest.raises(TraceError, match="is there 300 times"):  # brackets in texts nest nothing
        read_trace(path, format="jsonl")
