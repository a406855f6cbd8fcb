"""Importance matrices of llama.cpp (`llama-imatrix`, GGUF): how many tokens of a text each expert got."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moetrace.errors import TraceError
from moetrace.formats.errors import WRITE_AGAIN, extra, library_errors
from moetrace.formats.location import step_in_name
from moetrace.formats.stream.cells import Format, Reading, dense_cells
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
        where = str(path)
        by_layer: dict[int, Any] = {}
        with extra("gguf", where):
            from gguf import GGUFReader
        with library_errors(where, "is no GGUF file", WRITE_AGAIN):
            for tensor in GGUFReader(path).tensors:
                if match := KEY.fullmatch(tensor.name):
                    by_layer.setdefault(int(match[1]), np.asarray(tensor.data, np.float64).ravel())
        if not by_layer:
            raise TraceError(where, "has no counts of experts", "give what llama-imatrix writes for an MoE model")
        layers, experts = sorted(by_layer), {len(counts) for counts in by_layer.values()}
        if len(experts) > 1:
            raise TraceError(where, f"has layers of {min(experts)} and {max(experts)} experts", WRITE_AGAIN)
        cube = np.stack([by_layer[layer] for layer in layers])[None]
        values, step = Values(), step_in_name(path)
        return Reading(
            lambda: iter([dense_cells(np.array([step or 1]), layers, values.counts(cube, "counts", 0, where))]),
            rows=cube.size,
            assumptions=("all of the text is one step",),
            steps_are_implicit=step is None,
            where=where,
            collector=values.collector,
        )
