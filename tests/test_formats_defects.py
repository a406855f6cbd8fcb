"""Parquet files with the defects that writers have really had: one line each, or the right numbers."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import long_table
from thrift import footer, pages, patched

from moetrace import LoadTrace, read_trace

COUNTS = np.random.default_rng(1).multinomial(100, [0.4, 0.3, 0.2, 0.1], size=(60, 2))
TABLE = long_table(LoadTrace.from_counts(COUNTS))
TOKENS = TABLE.column_names.index("tokens")


def written(table: pa.Table = TABLE, **options: object) -> bytes:
    """A Parquet file in memory, its columns not compressed."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="none", **options)
    return sink.getvalue()


def negative_dictionary() -> bytes:
    """The dictionary of a column holds -n values."""
    data = written()
    number = pages(data, 0, TOKENS)[0][7][1]
    return patched(data, number, -number.value)


def dictionary(n: int) -> bytes:
    """The dictionary of a column says it has *n* values more."""
    data = written()
    number = pages(data, 0, TOKENS)[0][7][1]
    return patched(data, number, number.value + n)


def page_values(n: int, **options: object) -> bytes:
    """A page says that it has *n* values more than it has levels."""
    data = written(**options)
    page = pages(data, 0, TOKENS)[-1]
    number = (page[5] if 5 in page else page[8])[1]
    return patched(data, number, number.value + n)


def chunk_values(n: int) -> bytes:
    """The footer says that a column has *n* values more than the others."""
    data = written()
    number = footer(data)[4][0][1][TOKENS][3][5]
    return patched(data, number, number.value + n)


def group_rows(n: int) -> bytes:
    """The footer says that a row group has *n* rows more."""
    data = written()
    number = footer(data)[4][0][3]
    return patched(data, number, number.value + n)


def unequal_columns() -> bytes:
    """The tokens have fewer values than the steps: in the pages, and in the footer."""
    data = page_values(-8)
    number = footer(data)[4][0][1][TOKENS][3][5]
    return patched(data, number, number.value - 8)


def nulls_in_required() -> bytes:
    """A column with nulls that the schema says has none."""
    tokens = TABLE["tokens"].to_pylist()
    tokens[17] = None
    data = written(TABLE.set_column(TOKENS, "tokens", pa.array(tokens, pa.int64())))
    return patched(data, footer(data)[2][1 + TOKENS][3], 0)


def wrong_checksum() -> bytes:
    """The checksum of a page is another one."""
    data = written(write_page_checksum=True)
    number = pages(data, 0, TOKENS)[-1][4]
    return patched(data, number, number.value ^ 1)


def flipped_under_checksum() -> bytes:
    """A bit of a page is another one, and its checksum tells."""
    data = written(write_page_checksum=True, use_dictionary=False)
    place = pages(data, 0, TOKENS)[0][4].end + 200
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def negative_sizes(field: int) -> bytes:
    """The size of a page is negative."""
    data = written()
    number = pages(data, 0, TOKENS)[-1][field]
    return patched(data, number, -number.value)


def offset(n: int) -> bytes:
    """The pages of a column begin elsewhere."""
    data = written(use_dictionary=False)
    number = footer(data)[4][0][1][TOKENS][3][9]
    return patched(data, number, number.value + n)


DEFECTS = {
    "negative count of a dictionary": negative_dictionary,
    "dictionary with too many": lambda: dictionary(3),
    "dictionary with too few": lambda: dictionary(-3),
    "more values than levels": lambda: page_values(8),
    "fewer values than levels": lambda: page_values(-8),
    "negative count of values": lambda: page_values(-1000),
    "more values than levels, second version": lambda: page_values(8, data_page_version="2.0"),
    "fewer values than levels, second version": lambda: page_values(-8, data_page_version="2.0"),
    "more rows in the footer": lambda: group_rows(8),
    "fewer rows in the footer": lambda: group_rows(-8),
    "negative rows in the footer": lambda: group_rows(-1000),
    "columns of unequal length": unequal_columns,
    "nulls in a required column": nulls_in_required,
    "wrong checksum": wrong_checksum,
    "flipped bit under a checksum": flipped_under_checksum,
    "negative packed size": lambda: negative_sizes(3),
    "negative unpacked size": lambda: negative_sizes(2),
    "pages elsewhere": lambda: offset(7),
    "pages before the file": lambda: offset(-3000),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_refused_in_one_line(moetrace, tmp_path, defect):
    """Exit code 1, the file is named, nothing is left."""
    (tmp_path / "x.parquet").write_bytes(DEFECTS[defect]())

    done = moetrace("ingest", tmp_path / "x.parquet")

    assert (1, "", 1) == (done.code, done.out, done.err.count("\n")), done.err
    assert f"{tmp_path / 'x.parquet'}" in done.err
    assert [] == list((tmp_path / "cwd").rglob("*.parquet"))


@pytest.mark.parametrize("content", [written, lambda: chunk_values(8), lambda: chunk_values(-8)])
def test_a_file_whose_pages_are_sound_is_read(tmp_path, content):
    """Also where only the footer miscounts the values of a column, of which there are as many as rows."""
    (tmp_path / "x.parquet").write_bytes(content())

    assert np.array_equal(COUNTS, read_trace(tmp_path / "x.parquet").counts)
