"""Importance matrices of llama.cpp: the counts of one text, and what holds none."""

import sys

import numpy as np
import pytest

from moetrace import ReadOptions, TraceError, read_trace

gguf = pytest.importorskip("gguf")
COUNTS = np.array([[[10, 0, 30, 24], [16, 16, 31, 1]]])


def imatrix(path, counts=COUNTS[0], layers=(1, 4), kinds=("gate", "up", "down")):
    """As `llama-imatrix` writes it: sums and counts of each matrix of experts, and of one that all tokens pass."""
    writer = gguf.GGUFWriter(str(path), "")
    writer.add_string("general.type", "imatrix")
    writer.add_uint32("imatrix.chunk_count", 4)
    sums = {"blk.0.attn_q.weight": np.array([[64]])}
    sums |= {
        f"blk.{layer}.ffn_{kind}_exps.weight": own[:, None] for layer, own in zip(layers, counts) for kind in kinds
    }
    for name, own in sums.items():
        writer.add_tensor(f"{name}.in_sum2", np.ones((len(own), 8), np.float32))
        writer.add_tensor(f"{name}.counts", own.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kinds", [("gate", "up", "down"), ("down",), ("gate_up", "down")])
def test_the_counts_of_every_layer_are_one_step(tmp_path, kinds):
    """Whatever matrices the experts have, and whatever the file is called."""
    found = read_trace(imatrix(tmp_path / "imatrix_unsloth.gguf_file", kinds=kinds))

    assert ("imatrix", (1, 4), [1]) == (found.info.format, found.layers, found.steps.tolist())
    assert np.array_equal(COUNTS, found.counts)


def test_files_of_several_texts_are_steps(tmp_path):
    """In the order in which they are given."""
    paths = [imatrix(tmp_path / f"step_{n}.gguf", n * COUNTS[0]) for n in (1, 2)]

    found = read_trace(paths, options=ReadOptions(merge="steps", accept=("smoothed", "cumulative")))

    assert np.array_equal(np.concatenate([COUNTS, 2 * COUNTS]), found.counts)


def test_what_holds_no_experts_is_refused(tmp_path):
    """A dense model, a file that is cut, layers of different sizes: one line each."""
    path = imatrix(tmp_path / "x.gguf", counts=(), layers=())
    with pytest.raises(TraceError, match="has no counts of experts"):
        read_trace(path)
    path = imatrix(tmp_path / "y.gguf", counts=(np.array([1, 2]), np.array([1, 2, 3])))
    with pytest.raises(TraceError, match=r"layers of unlike shapes \(2,\) and \(3,\)"):
        read_trace(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TraceError, match="is no GGUF file"):
        read_trace(path)


def test_without_the_library_its_extra_is_named(tmp_path, monkeypatch):
    """In one line."""
    path = imatrix(tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)

    with pytest.raises(TraceError, match=r'pip install "moetrace\[gguf\]"'):
        read_trace(path)
