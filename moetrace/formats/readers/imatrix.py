"""Importance matrices of llama.cpp (`llama-imatrix`, GGUF): how many tokens of a text each expert got."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from moetrace.errors import TraceError
from moetrace.formats.readers.arrays import Array, array_reading
from moetrace.formats.sources import WRITE_AGAIN, extra, library_errors
from moetrace.formats.stream.cells import Format, Reading
from moetrace.formats.stream.columns import Values
from moetrace.formats.stream.text import begins_with

MAGIC = b"GGUF"
# The counts of a layer stand beside the sums of each of its three matrices, and are equal: the first there is counts.
KEY = re.compile(r"blk\.(\d{1,9})\.ffn_(gate|up|down|gate_up)_exps\.weight\.counts")


@dataclass(frozen=True)
class ImatrixFormat(Format):
    """A GGUF file of llama-imatrix, of an MoE model; the extra gguf.

    It is one window of all layers: a step. Several files, of one text each, are steps by ``--merge steps``.
    """

    name: ClassVar[str] = "imatrix"

    def claims(self, path: Path) -> bool:
        return begins_with(path, MAGIC)

    def read(self, path: Path) -> Reading:
        """The counts of every layer that has several experts."""
        where, by_layer = str(path), dict[str, Array]()
        with extra("gguf", where):
            from gguf import GGUFReader
        with library_errors(where, "is no GGUF file", WRITE_AGAIN):
            for tensor in GGUFReader(path).tensors:
                if match := KEY.fullmatch(tensor.name):
                    by_layer.setdefault(match[1], Array.held(np.asarray(tensor.data, np.float64).ravel()))
        if not by_layer:
            raise TraceError(where, "has no counts of experts", "give what llama-imatrix writes for an MoE model")
        return array_reading(by_layer, path, None, Values(where), ("all of the text is one step",))
