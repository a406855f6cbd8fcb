"""What `torch.save` wrote, read without torch: tensors become arrays, and nothing else is built from the pickle.

An archive has one pickle, which names the storage of each tensor; storages lie beside it as plain numbers. The pickle
is read by `_Reader`, which knows few instructions and calls nothing but its own functions: no name is ever imported.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.formats.sources import library_errors, require
from moetrace.formats.stream.text import begins_with

ZIP_MAGIC = b"PK"
TORCH_ENDINGS = {".pt", ".pth"}
# Of the pickle, for a look at its keys.
MOST_KEYS = 1 << 20
# The types of storages, by torch's names; bfloat16, which NumPy lacks, is kept as its two bytes.
STORAGES = {
    "FloatStorage": "f4", "DoubleStorage": "f8", "HalfStorage": "f2", "LongStorage": "i8", "IntStorage": "i4",
    "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?", "BFloat16Storage": "V2",
    "UntypedStorage": "u1",
}  # fmt: skip
DTYPES = {
    "float32": "f4", "float64": "f8", "float16": "f2", "int64": "i8", "int32": "i4", "int16": "i2", "int8": "i1",
    "uint8": "u1", "bool": "?", "bfloat16": "V2", "uint16": "u2", "uint32": "u4", "uint64": "u8",
}  # fmt: skip
REFUSED = "save tensors, numbers and texts alone"


# What a pickle of tensors is made of. Nothing else is done, whatever the pickle asks for.
OPCODES = (
    "PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND",
    "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL",
    "BINPERSID", "REDUCE", "BUILD",
)  # fmt: skip


@dataclass(frozen=True)
class _Storage:
    """The numbers of one or several tensors as *data*, of a *dtype*."""

    data: bytes
    dtype: np.dtype[Any]


class _Mapping(dict[Any, Any]):
    """An ordered dictionary of the pickle."""


class _Reader(pickle._Unpickler):
    """Reads the pickle of an archive at *path*: `OPCODES` alone, and calls of our own functions alone.

    It is the reader in Python: that in C has an array for its memo, of any size that a file asks for.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in OPCODES
    }

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        names, own = archive.namelist(), pickle_in(archive)
        self.archive, self.folder, self.path = archive, own.removesuffix("data.pkl"), path
        self.storages: dict[str, _Storage] = {}
        order = f"{self.folder}byteorder"
        self.order: Any = ">" if order in names and archive.read(order) == b"big" else "<"
        super().__init__(io.BytesIO(archive.read(own)))

    def find_class(self, module: str, name: str) -> Any:
        """Our function for a name of torch, or a type; raises `TraceError` for any other."""
        if module in ("torch", "torch.storage") and name in STORAGES:
            return np.dtype(STORAGES[name]).newbyteorder(self.order)
        if module == "torch" and name in DTYPES:
            return name
        known: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            # The type stands behind the gradient and the hooks where it has no storage of its own.
            "torch._utils._rebuild_tensor_v3": lambda storage, *rest: self._tensor(
                _Storage(storage.data, np.dtype(DTYPES[rest[5]]).newbyteorder(self.order)), *rest
            ),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "collections.OrderedDict": _Mapping,
            "collections.Counter": _Mapping,
            "torch.Size": tuple,
            "torch.device": lambda *name: ":".join(map(str, name)),
        }
        if f"{module}.{name}" not in known:
            raise TraceError(str(self.path), f"holds {module}.{name}, which is no tensor", REFUSED)
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that a tensor names: its type, its key, and where it was."""
        kind, dtype, key, _device, _length = pid
        if kind != "storage" or not str(key).isalnum():
            raise ValueError(f"{pid!r} is no storage")
        if key not in self.storages:
            self.storages[key] = _Storage(self.archive.read(f"{self.folder}data/{key}"), dtype)
        return self.storages[key]

    def _build(self) -> None:
        """A state, such as the versions of a module's parameters, is only for an ordered dictionary, and not used."""
        self.stack.pop()  # type: ignore[attr-defined]
        if not isinstance(self.stack[-1], _Mapping):  # type: ignore[attr-defined]
            raise TraceError(str(self.path), f"sets a state of {type(self.stack[-1]).__name__}", REFUSED)  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = _build

    def _tensor(
        self, storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any
    ) -> NDArray[Any]:
        """The tensor of that *size*, a copy of numbers that are *stride* apart from *offset* on."""
        values = np.frombuffer(storage.data, storage.dtype)
        last = offset + sum((n - 1) * apart for n, apart in zip(size, stride, strict=True))
        if min([offset, *size, *stride]) < 0 or (0 not in size and last >= len(values)):
            raise ValueError(f"a tensor of the size {tuple(size)} is beyond its storage")
        # It may be a view that repeats one number any number of times.
        require(32 * math.prod(size), str(self.path), f"a tensor of the shape {tuple(size)}", "save fewer steps in it")
        apart = [values.itemsize * n for n in stride]
        return np.lib.stride_tricks.as_strided(values[offset:], tuple(size), apart).copy()


def is_torch(path: Path) -> bool:
    """Whether *path* is called as torch's files are and is an archive."""
    return path.suffix.lower() in TORCH_ENDINGS and begins_with(path, ZIP_MAGIC)


def pickle_in(archive: zipfile.ZipFile) -> str:
    """The name of the pickle in the *archive* of a `.pt` file."""
    return next(name for name in archive.namelist() if name.endswith("data.pkl"))


def keys_of(path: Path) -> bytes:
    """The beginning of the pickle, which holds its keys, as it is; empty for other files."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(pickle_in(archive)) as file:
            return file.read(MOST_KEYS)
    except Exception:  # noqa: BLE001 - whatever cannot be read has no keys
        return b""


def loaded(path: Path) -> Any:
    """What is in a `.pt` file, tensors as arrays (bfloat16 as two bytes each).

    Raises `TraceError` if it is damaged, or holds anything but tensors, numbers, text and plain containers.
    """
    unpacked = 0
    with suppress(OSError, zipfile.BadZipFile, NotImplementedError, ValueError), zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    require(4 * unpacked, str(path), "what it unpacks to", "record fewer passes in a file")
    damaged = "cannot be opened", f"it is damaged, or holds more than tensors: {REFUSED}"
    with library_errors(str(path), *damaged), zipfile.ZipFile(path) as archive:
        return _Reader(archive, path).load()


def tensor_array(value: Any, path: Path) -> NDArray[Any] | None:
    """A tensor, a number or nested lists of them as an array, None for anything else."""
    if isinstance(value, str | bytes | dict) or value is None:
        return None
    with library_errors(str(path), "holds no numbers", "give lists of one length"):
        bfloat16 = isinstance(value, list | tuple) and len(value) > 0 and getattr(value[0], "dtype", None) == "V2"
        array = np.stack(value) if bfloat16 else np.asarray(value)
        return array if array.dtype.kind in "iufbV" and not array.dtype.hasobject else None
