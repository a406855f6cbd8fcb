"""Omni-infer's activation counts: a CSV of layers by experts for each range of steps."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc

from moetrace.errors import TraceError
from moetrace.formats.sources import by_rank, library_errors
from moetrace.formats.stream.cells import Cells, Format, Reading, dense_cells
from moetrace.formats.stream.columns import Values
from moetrace.formats.stream.text import opened
from moetrace.words import Phase

NAME = re.compile(r"topk_ids_count_.*?_(?P<phase>prefill|decode|all)_step(?P<first>\d{1,15})to(?P<last>\d{1,15})\.csv")
LAYER = re.compile(r"layer_(\d{1,15})")
# Text of one matrix: 1,000 layers of 4,000 experts. A packed file can hold any amount of it.
MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class OmniFormat(Format):
    """The folder of topk_ids_count_<time>_<mode>_step<a>to<b>.csv; --phase where it holds prefill and decode."""

    phase: Phase | None = None
    name: ClassVar[str] = "omni-infer"

    def claims(self, path: Path) -> bool:
        return bool(_files(path))

    def read(self, path: Path) -> Reading:
        """Every file is one step, numbered by the last step of its range."""
        files = [(match, file) for match, file in _files(path) if self.phase in (None, match["phase"])]
        if not files:
            raise TraceError(str(path), "holds no file topk_ids_count_<time>_<mode>_step<a>to<b>.csv", "check --phase")
        phases = sorted({match["phase"] for match, _ in files})
        if len(phases) > 1:
            raise TraceError(str(path), f"holds counts of {' and '.join(phases)}", "choose one with --phase")
        files.sort(key=lambda found: int(found[0]["last"]))
        spans = {int(match["last"]) - int(match["first"]) for match, _ in files}
        assumptions = ["each file is one step, the sum over its range, numbered by the last step of it"]
        assumptions += [f"ranges are of {min(spans) + 1} to {max(spans) + 1} steps"] if len(spans) > 1 else []
        values = Values(str(path))
        cells = lambda: (_cells(file, int(match["last"]), values) for match, file in files)  # noqa: E731
        return values.reading(cells, assumptions=tuple(assumptions))


def _files(path: Path) -> list[tuple[re.Match[str], Path]]:
    inside = path.iterdir() if path.is_dir() else [path]
    return [(match, child) for child in by_rank(inside) if (match := NAME.fullmatch(child.name))]


def _cells(path: Path, step: int, values: Values) -> Cells:
    with library_errors(str(path), "is no matrix of layers by experts", "rows layer_0 ..., columns ep_0 ..."):
        with opened(path) as stream:
            text = stream.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it is longer than {MOST_BYTES >> 20} MiB")
        table = pc.read_csv(pa.BufferReader(text))
        labels = table.column(0).to_pylist()
        counts = np.stack([column.to_numpy() for column in table.columns[1:]], axis=1)  # (layers, experts)
        layers = [int(LAYER.fullmatch(label)[1]) for label in labels]  # type: ignore[index]
    return dense_cells(np.array([step]), layers, replace(values, where=str(path)).counts(counts, "ep")[None])
