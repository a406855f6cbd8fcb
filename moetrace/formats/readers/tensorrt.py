"""TensorRT-LLM's expert statistics: `meta_info.json` and a safetensors file for each rank."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moetrace.errors import TraceError
from moetrace.formats.sources import WRITE_AGAIN, check_ranks, extra, library_errors, rank_files
from moetrace.formats.stream.cells import Cells, Format, Source, dense_cells
from moetrace.formats.stream.columns import Values
from moetrace.formats.stream.merge import by_layers

META = "meta_info.json"
RANK = re.compile(r"rank\d+\.safetensors")
KEY = re.compile(r"(\d{1,15})_(\d{1,15})")


@dataclass(frozen=True)
class TensorrtFormat(Format):
    """The folder of EXPERT_STATISTIC_PATH with meta_info.json and rank<R>.safetensors; the extra safetensors.

    It has tensors ``{iteration}_{layer}``, and ranks are added up.
    """

    name: ClassVar[str] = "tensorrt-llm"

    def claims(self, path: Path) -> bool:
        return (path / META).is_file() and bool(rank_files(path, RANK))

    def read(self, path: Path) -> Source:
        """Ranks with the same layers are added up; others are pipeline stages."""
        files = rank_files(path, RANK)
        if not path.is_dir() or not files:
            raise TraceError(str(path), "is no folder with rank<R>.safetensors", "give the folder of the statistics")
        check_ranks(files)
        with library_errors(str(path / META), "cannot be read", "it is written by rank 0"):
            top_k = json.loads((path / META).read_text(encoding="utf-8")).get("num_experts_per_token")
        ranks = []
        for file in files:
            with library_errors(str(file), "is not a safetensors file", WRITE_AGAIN), _opened(file) as tensors:
                names = list(tensors.keys())
            other = [name for name in names if not KEY.fullmatch(name)]
            if other or not names:
                problem = f"has {other[0]!r} among its tensors" if other else "holds no tensors"
                raise TraceError(str(file), problem, "statistics have tensors named {iteration}_{layer}")
            keys = sorted((int(step), int(layer)) for step, layer in (name.split("_") for name in names))
            values, known = Values(str(file)), {"top_k": top_k} if isinstance(top_k, int) else {}
            cells = partial(_cells, file, keys, values)
            reading = values.reading(cells, known=known)
            ranks.append((sorted({layer for _, layer in keys}), reading))
        return by_layers(ranks, str(path))


def _opened(path: Path) -> Any:
    with extra("safetensors", str(path)):
        from safetensors import safe_open
    with suppress(ImportError):  # it makes bfloat16 known to NumPy, and comes with jax
        import ml_dtypes  # noqa: F401
    return safe_open(path, framework="numpy")


def _cells(path: Path, keys: list[tuple[int, int]], values: Values) -> Iterator[Cells]:
    with library_errors(str(path), "cannot be read", WRITE_AGAIN), _opened(path) as file:
        for step, layer in keys:
            raw = file.get_tensor(f"{step}_{layer}").reshape(1, 1, -1)
            counts = values.counts(raw, f"{step}_{layer}")
            yield dense_cells(np.array([step]), [layer], counts)
