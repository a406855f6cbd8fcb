"""Bad files, each made from nothing: what is wrong with it, its name and content, and what is said about it."""

import gzip
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import long_table
from thrift import footer, pages, patched

from moetrace import LoadTrace

SMALL = LoadTrace.from_counts(np.random.default_rng(1).multinomial(100, [0.4, 0.3, 0.2, 0.1], size=(60, 2)))


class Evil:
    """Unpickling it leaves a mark."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def parquet(table: pa.Table | dict, **options: object) -> bytes:
    """A Parquet file in memory."""
    sink = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), sink, **options)
    return sink.getvalue()


def csv() -> bytes:
    """The small trace as CSV."""
    return long_table(SMALL).to_pandas().to_csv(index=False).encode()


def npz(**arrays: np.ndarray) -> bytes:
    """A packed archive."""
    sink = io.BytesIO()
    np.savez_compressed(sink, **arrays)
    return sink.getvalue()


def npy_header(shape: tuple[int, ...], kind: str = "<i8") -> bytes:
    """The header of an array, without the array."""
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": kind, "fortran_order": False, "shape": shape})
    return sink.getvalue()


def archive(name: str, content: bytes, claimed: int | None = None) -> bytes:
    """A zip archive of one member, whose directory may claim another size."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(name, content)
    data = sink.getvalue()
    return data if claimed is None else data.replace(struct.pack("<I", len(content)), struct.pack("<I", claimed))


def flipped(data: bytes, place: int) -> bytes:
    """*data* with one byte turned over."""
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def long(**columns: object) -> bytes:
    """A long Parquet file of these columns, the others all 0 and the tokens all 1."""
    n = len(next(iter(columns.values())))
    zero = np.zeros(n, np.int64)
    return parquet({"step": zero, "layer": zero, "expert": zero, "tokens": zero + 1, **columns})


def evil_array() -> bytes:
    """An array of objects, as `np.save` pickles it."""
    sink = io.BytesIO()
    np.save(sink, np.array([Evil()], dtype=object), allow_pickle=True)
    return sink.getvalue()


def _saved(array: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array)
    return sink.getvalue()


DIAGONAL = np.arange(300_000)
GOOD = parquet(long_table(SMALL))
PAGED = parquet(long_table(SMALL), write_page_checksum=True, compression="none", use_dictionary=False)
# What a file is called, what is in it, and a part of what is said about it.
FILES = {
    "empty Parquet": ("x.parquet", b"", "is empty"),
    "empty CSV": ("x.csv", b"", "has no header"),
    "empty JSON lines": ("x.jsonl", b"", "is empty"),
    "empty array": ("x.npy", b"", "cannot be read as NumPy"),
    "truncated Parquet": ("x.parquet", GOOD[: len(GOOD) // 2], "magic bytes not found"),
    "truncated gzip": ("x.csv.gz", gzip.compress(csv())[:-200], "cannot be read"),
    "truncated archive": ("x.npz", npz(counts=SMALL.counts)[:-30], "cannot be read as NumPy"),
    "truncated array": ("x.npy", npy_header((60, 2, 4)) + bytes(100), "no such 3,840 bytes"),
    "CSV named Parquet": ("x.parquet", csv(), "magic bytes not found"),
    "archive named Parquet": ("x.parquet", npz(counts=SMALL.counts), "magic bytes not found"),
    "picture named CSV": ("x.csv", b"\x89PNG\r\n\x1a\n" + bytes(200), "has no header"),
    "wrong magic": ("x.parquet", b"PARX" + GOOD[4:-4] + b"PARX", "magic bytes not found"),
    "unknown kind": ("x.dat", b"what is this", "unrecognised format"),
    "pickle": ("x.pkl", pickle.dumps(Evil()), "is a .pkl file, which is not read, as it may run code"),
    "spreadsheet": ("x.xlsx", npz(counts=SMALL.counts), "is a .xlsx file, which is not read"),
    "rows of an unknown step": (
        "x.csv",
        b"when,layer,expert,tokens\n1,0,0,5\n1,0,1,6\n2,0,0,5\n2,0,1,6\n",
        "name columns that were not recognised with --column step=NAME",
    ),
    "columns without a name": ("x.csv", b",step,depth,e,n\n0,1,0,0,5\n", "no layout fits its columns (unnamed), step"),
    "corrupt archive": ("x.npz", flipped(npz(counts=SMALL.counts), 200), "cannot be read as NumPy"),
    "corrupt gzip": ("x.csv.gz", flipped(gzip.compress(csv()), 200), "cannot be read"),
    "objects": ("x.npy", evil_array(), "nothing is unpickled"),
    "objects in an archive": ("x.npz", archive("counts.npy", evil_array()), "nothing is unpickled"),
    "pickle named array": ("x.npy", pickle.dumps(Evil()), "nothing is unpickled"),
    "pickle named archive": ("x.npz", pickle.dumps(Evil()), "nothing is unpickled"),
    "array that says 100 GB": ("x.npy", npy_header((10**6, 100, 125)), "no such 100,000,000,000 bytes"),
    "archive that says 100 GB": ("x.npz", archive("counts.npy", npy_header((10**6, 100, 125))), "no such 100,000,000"),
    "member that says 4 GB": ("x.npz", archive("counts.npy", npy_header((1000, 100, 5000)), 2**32 - 9), "ends 4,000,000 bytes early"),
    "negative shape": ("x.npy", npy_header((-1, 4)), "shape is (-1, 4)"),
    "shape beyond 64 bits": ("x.npy", npy_header((2**62, 2**62, 4)), "has no such"),
    "member with a path": ("x.npz", archive("../../counts.npy", b"no array"), "cannot be read as NumPy"),
    "expert beyond all": ("x.parquet", long(expert=np.array([0, 10**12])), "expert 1 is missing"),
    "as many layers as experts": ("x.parquet", long(layer=DIAGONAL, expert=DIAGONAL), "300,000 layers of 300,000 experts"),
    "choice beyond all": ("x.parquet", parquet({"step": [1], "topk_ids": [[10**12]]}), "of memory, and there are"),
    "one expert after all": ("x.jsonl", b'{"step": 1, "layer": 0, "topk_ids": [[4000000000000]]}\n', "would take"),
    "columns of no use": ("x.csv", ",".join(f"c{i}" for i in range(150_000)).encode() + b"\n", "has 150,000 columns"),
    "a line longer than memory": ("x.csv.gz", gzip.compress(b"step,layer,expert,tokens\n" + b"1" * (20 << 20)), "cannot be read"),
    "deep JSON": ("x.jsonl", b"[" * 100_000 + b"\n", "is nested more than 200 deep"),
    "not UTF-8": ("x.csv", b"st\xe9p,layer,expert,tokens\n1,0,0,5\n", "whose name is not UTF-8"),
    "row without counts": ("x.parquet", parquet({"step": [1, 2], "layer": [0, 0], "counts": [[1, 2], []]}), "row 1: is an empty list"),
    "encrypted": ("x.parquet", b"PARE" + GOOD[4:-4] + b"PARE", "encrypted"),
}  # fmt: skip

# Bytes of memory that there are for the bombs, small files that ask for a lot.
LITTLE_MEMORY = 100 << 20
BOMBS = {
    "one step without end": ("x.parquet", lambda: long(step=np.zeros(3_000_000, np.int64)), "more than 1,"),
    "one list without end": ("x.parquet", lambda: parquet({"step": [1], "counts": [np.zeros(3_000_000, np.int64)]}), "a list of 3,000,000"),
    "packed text": ("x.csv.gz", lambda: gzip.compress(b"step,layer,expert,tokens\n" + b"1,0,0,5\n" * 3_000_000), "step 1, with more than"),
    "packed JSON": ("x.jsonl.gz", lambda: gzip.compress(b'{"step":1,"layer":0,"expert":0,"tokens":5}\n' * 1_500_000), "step 1, with more than"),
    "Fortran array": ("x.npy", lambda: _saved(np.asfortranarray(np.zeros((3000, 10, 200)))), "the array, which has to be held whole"),
    "rank of a fork": ("mcore_ep_loads_0.npz", lambda: npz(loads=np.zeros((10, 3000, 200), np.int64)), "the array, which has to be held whole"),
    "one step of an array": ("x.npz", lambda: npz(counts=np.ones((2, 10, 200_000), np.int64)), "one step of it"),
}  # fmt: skip

# --- Parquet files with the defects that writers have really had ---------------------------------

TABLE = long_table(SMALL)
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
