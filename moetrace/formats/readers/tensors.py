"""What `torch.save` wrote: tensors, and dicts and lists of them, opened by torch's restricted unpickler alone."""

from __future__ import annotations

import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError, shown
from moetrace.formats.errors import library_errors, require
from moetrace.formats.stream.arrays import Array, Arrays
from moetrace.formats.stream.cells import Reading
from moetrace.formats.stream.tables import ValueFormat

ENDINGS = {".pt", ".pth"}
# Of the part of an archive that holds its keys; tensors lie beside it.
MOST_KEYS = 1 << 20
MOST_NAMES = 10_000


@dataclass(frozen=True)
class TensorsFormat(ValueFormat):
    """A tensor of counts, a dict with one, or a dict of tensors by layer, as `torch.save` writes them.

    *axes* says what the axes are, such as ``layers,steps,experts``; *tokens_per_step* turns shares into counts.
    """

    axes: str | None = None

    name: ClassVar[str] = "torch"
    needs: ClassVar[str] = (
        "a .pt file with a tensor (steps, layers, experts), a dict with counts and steps, or tensors by layer; --axes "
        "says which axis is what; the extra torch"
    )

    def claims(self, path: Path) -> bool:
        """A .pt file."""
        return is_torch(path)

    def read(self, path: Path) -> Reading:
        """Take the tensor that is the counts, or those of all layers."""
        document = loaded(path)
        found = {"counts": document} if not isinstance(document, dict) else document
        if len(found) > MOST_NAMES:
            raise TraceError(str(path), f"holds {len(found):,} names", "a trace needs counts, steps and layers")
        held = {str(name): tensor_array(value, path) for name, value in found.items()}
        arrays = {name: Array.held(array) for name, array in held.items() if array is not None}
        if not arrays:
            names = shown(list(document)) or "nothing" if isinstance(document, dict) else f"a {type(document).__name__}"
            raise TraceError(str(path), f"holds {names}", "give a tensor of counts, or a dict of tensors")
        axes = self.axes
        counters = isinstance(document, dict) and {"counts", "total_tokens"} <= set(document)
        if counters and axes is None and len(arrays["counts"].shape) == 2:  # LMDeploy's
            axes = "layers,experts"
        return Arrays(arrays, path, axes, self.values()).reading()


def is_torch(path: Path) -> bool:
    """Whether *path* is called as torch's files are and is an archive."""
    if not path.is_file() or path.suffix.lower() not in ENDINGS:
        return False
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def keys_of(path: Path) -> bytes:
    """The part of a `.pt` archive that holds its keys, not unpickled; empty for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as file:
                return file.read(MOST_KEYS)
    except Exception:  # noqa: BLE001 - whatever cannot be read has no keys
        return b""


def loaded(path: Path) -> Any:
    """What is in a `.pt` file, tensors as they are; raises `TraceError` without torch, and where it cannot read it."""
    try:
        import torch
    except ImportError as error:
        raise TraceError(str(path), "is a torch file", 'install torch: pip install "moetrace[torch]"') from error
    unpacked = 0
    with suppress(OSError, zipfile.BadZipFile, NotImplementedError, ValueError), zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    require(4 * unpacked, str(path), "what it unpacks to", "record fewer passes in a file")
    with library_errors(str(path), "cannot be opened", "dump it again; nothing but tensors is read"):
        return torch.load(path, map_location="cpu", weights_only=True)


def tensor_array(value: Any, path: Path) -> NDArray[Any] | None:
    """A tensor, a number or nested lists of them as an array, None for anything else."""
    import torch

    if isinstance(value, str | bytes | dict) or value is None:
        return None
    with library_errors(str(path), "holds no numbers", "dump it again"):
        if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
            value = torch.stack(list(value))
        if not isinstance(value, torch.Tensor):
            array = np.asarray(value)
            return array if array.dtype.kind in "iuf" else None
        # A tensor may be a view that repeats one number any number of times.
        require(32 * value.numel(), str(path), f"a tensor of the shape {tuple(value.shape)}", "save fewer steps in it")
        if value.dtype == torch.bfloat16:
            return np.asarray(value.detach().view(torch.int16).numpy().view("V2"))
        if value.is_sparse or value.is_quantized:
            return None
        return np.asarray(value.detach().numpy())
