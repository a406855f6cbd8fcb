"""Files of torch, read without torch: equal to what torch itself reads, and nothing else is built or run."""

import os
import pickle
import struct
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from dumps import torch_archive

from moetrace import TraceError, read_trace
from moetrace.formats.readers.tensors import loaded

COUNTS = np.arange(24, dtype=np.int64).reshape(3, 2, 4)


def of_type(name, t):
    """Counts as a tensor of the type of that *name*."""
    return t.tensor(COUNTS % 2).to(getattr(t, name))


DOCUMENTS = {
    "a dict": lambda t: {"counts": t.tensor(COUNTS), "step": 3, "name": "x", "none": None, "share": 0.5, "on": True},
    "nested": lambda t: [{"a": (t.tensor([1, 2]), [t.tensor(3)])}, -7, 1 << 40],
    "a view": lambda t: t.tensor(COUNTS)[1:, :, ::2],
    "transposed": lambda t: t.tensor(COUNTS).permute(2, 0, 1),
    "one storage for two": lambda t: (lambda whole: {"a": whole[:1], "b": whole[2]})(t.tensor(COUNTS)),
    "expanded": lambda t: t.tensor([[1], [2]]).expand(2, 5),
    "empty": lambda t: {"a": t.empty(0, 3), "b": t.tensor(7)},
    "a parameter": lambda t: {"w": t.nn.Parameter(t.ones(2, 2))},
    "a state of a module": lambda t: t.nn.Linear(2, 3).state_dict(),
    "a size and a device": lambda t: {"size": t.Size([2, 3]), "at": t.device("cpu"), "type": t.int64},
    "uint16": lambda t: t.tensor([1, 65535], dtype=t.uint16),
    **{
        name: partial(of_type, name)
        for name in ("float64", "float32", "float16", "int32", "int16", "int8", "uint8", "bool")
    },
}


def plain(torch, value):
    """What torch has built, in arrays and plain containers."""
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, torch.Tensor):
        return value.detach().numpy()
    if isinstance(value, dict):
        return {key: plain(torch, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(torch, part) for part in value)
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value


def assert_same(expected, found):
    """Alike in structure, type and numbers."""
    if isinstance(expected, dict):
        assert list(expected) == list(found)
        for key, value in expected.items():
            assert_same(value, found[key])
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(found)
        for one, other in zip(expected, found):
            assert_same(one, other)
    elif isinstance(expected, np.ndarray):
        assert (expected.dtype, expected.shape) == (found.dtype, found.shape)
        assert np.array_equal(expected, found)
    else:
        assert expected == found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_it_is_what_torch_reads(tmp_path, name):
    """Of everything that its own restricted reader takes, in the tests of dumps and here."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    torch.save(DOCUMENTS[name](torch), path)

    assert_same(plain(torch, torch.load(path, weights_only=True)), loaded(path))


def test_a_dump_is_read_where_there_is_no_torch(tmp_path, monkeypatch):
    """The default dump of SGLang, whose counts are one tensor."""
    counts = np.random.default_rng(0).multinomial(100, [0.25] * 4, size=(5, 2)).astype(np.int32)
    torch_archive(tmp_path / "dump.pt", {"rank": 0, "logical_count": counts})
    monkeypatch.setitem(sys.modules, "torch", None)

    found = read_trace(tmp_path / "dump.pt")

    assert "sglang" == found.info.format
    assert np.array_equal(counts, found.counts)


def archive(path, pickled, **storages):
    """A file of torch with that pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        for key, data in storages.items():
            file.writestr(f"x/data/{key.removeprefix('k')}", data)
    return path


def tensor(offset=0, size=(2,), stride=(1,), name=b"ctorch._utils\n_rebuild_tensor_v2\n"):
    """The instructions of one tensor of int64."""

    def numbers(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", n) for n in values) + b"t"

    storage = b"(X\x07\x00\x00\x00storagectorch\nLongStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
    return (
        b"\x80\x02"
        + name
        + b"("
        + storage
        + b"J"
        + struct.pack("<i", offset)
        + numbers(size)
        + numbers(stride)
        + b"\x89NtR."
    )


class Run:
    """Calls something when it is unpickled."""

    def __init__(self, call, *argv):
        self.call, self.argv = call, argv

    def __reduce__(self):
        return self.call, self.argv


TWO = np.array([5, 6]).tobytes()
HOSTILE = {
    "a call of the system": (pickle.dumps(Run(os.system, "touch was-run"), 2), "holds posix.system"),
    "an open file": (pickle.dumps(Run(open, "was-run", "w"), 2), "holds io.open"),
    "eval": (b"cbuiltins\neval\n(X\x04\x00\x00\x00nonetR.", "holds builtins.eval"),
    "a newer protocol": (pickle.dumps(Run(open, "was-run", "w"), 4), "cannot be opened"),
    "a state of a type": (b"ctorch\nLongStorage\n}b.", "sets a state of"),
    "an instance by name": (b"(ios\nsystem\n.", "cannot be opened"),
    "a memo of any size": (b"]r\xff\xff\xff\xffX\x01\x00\x00\x00a.", None),
    "beyond its storage": (tensor(offset=1), "is beyond its storage"),
    "before its storage": (tensor(offset=1, stride=(-1,)), "is beyond its storage"),
    "one number any number of times": (tensor(size=(2**30, 2**30), stride=(0, 0)), "would take"),
    "no storage": (b"X\x04\x00\x00\x00spamQ.", "cannot be opened"),
    "a path as a key": (b"(X\x07\x00\x00\x00storagectorch\nLongStorage\nX\x05\x00\x00\x00../../X\x03\x00\x00\x00cpuK\x02tQ.", "cannot be opened"),
    "cut": (tensor()[:-5], "cannot be opened"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_else_is_built_or_run(tmp_path, monkeypatch, name):
    """One line that names what it is, no memory, and no file that would show that something ran."""
    monkeypatch.chdir(tmp_path)
    pickled, said = HOSTILE[name]
    path = archive(tmp_path / "x.pt", pickled, k0=TWO)

    if said is None:
        assert isinstance(loaded(path), str)
    else:
        with pytest.raises(TraceError, match=said) as raised:
            loaded(path)
        assert "\n" not in str(raised.value)
    assert not Path("was-run").exists()


def test_a_tensor_by_hand_is_read(tmp_path):
    """So that what is refused above is refused for its fault."""
    assert [5, 6] == loaded(archive(tmp_path / "x.pt", tensor(), k0=TWO)).tolist()


def test_the_byte_order_is_that_of_the_file(tmp_path):
    """As machines of either kind write it."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", tensor())
        file.writestr("x/byteorder", "big")
        file.writestr("x/data/0", np.array([5, 6], ">i8").tobytes())

    assert [5, 6] == loaded(path).tolist()
