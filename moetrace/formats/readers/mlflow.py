"""Runs that MLflow keeps in a folder: a file for each metric, such as ``metrics/moe/layer_3/expert_7``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moetrace.errors import TraceError
from moetrace.formats.errors import library_errors, require
from moetrace.formats.stream.cells import Cells, Reading, starts_of
from moetrace.formats.stream.tables import ValueFormat
from moetrace.formats.stream.tags import no_match, tags_by
from moetrace.formats.stream.values import Values
from moetrace.formats.stream.wide import one_kind
from moetrace.trace import Counts, Steps

METRICS, MARK = "metrics", "meta.yaml"
# Of a line of a metric.
COLUMNS = ("timestamp", "value", "step")
# Cells handed on at a time, and bytes that are held for each byte of the files: numbers, their order, a sorted copy.
BATCH, HELD = 1 << 20, 3


@dataclass(frozen=True)
class MlflowFormat(ValueFormat):
    """The folder of a run whose metrics name a layer and an expert, or a folder that holds one such run.

    *pattern* is a regular expression for the names of the metrics, with the groups ``layer`` and ``expert``.
    """

    pattern: str | None = None

    name: ClassVar[str] = "mlflow"
    needs: ClassVar[str] = "the folder of a run with a metric for each layer and expert: layer_3/expert_7, or --pattern"

    def claims(self, path: Path) -> bool:
        """The folder of a run, of its metrics, of an experiment, or mlruns."""
        return path.is_dir() and bool(_runs(path))

    def read(self, path: Path) -> Reading:
        """Match the names of the metrics, and hand on their values in the order of the steps."""
        where, runs = str(path), _runs(path)
        if not runs:
            raise TraceError(where, f"holds no run, {MARK} beside {METRICS}", "is it the right folder?")
        if len(runs) > 1:
            raise TraceError(where, f"holds {len(runs)} runs", f"give the folder of one, such as {runs[0]}")
        tags, values = tags_by(self.pattern, where), self.values()
        metrics = runs[0] / METRICS
        named = {file.relative_to(metrics).as_posix(): file for file in sorted(metrics.rglob("*")) if file.is_file()}
        matched = {name: found for name in named if (found := tags.match(name, where)) is not None}
        if not matched:
            raise no_match(list(named), "metric", where)
        kind = one_kind(list(matched), set(), where)
        series = [_Series(named[name], *found, kind) for name, found in matched.items()]
        return Reading(
            lambda: _cells(series, values, where),
            assumptions=(tags.assumption,),
            where=where,
            collector=values.collector,
        )


def _runs(path: Path) -> list[Path]:
    """The folders of runs that *path* is, is part of, or holds."""
    if path.name == METRICS:
        path = path.parent
    found = [path, *(child for depth in ("*", "*/*") for child in sorted(path.glob(depth)))]
    runs = [folder for folder in found if (folder / MARK).is_file() and (folder / METRICS).is_dir()]
    return runs[:1] if path in runs else runs


@dataclass(frozen=True)
class _Series:
    """The *file* of one metric, and what it is of."""

    file: Path
    layer: int
    expert: int
    kind: str

    def read(self, values: Values) -> tuple[Steps, Counts]:
        """Its steps and counts."""
        import pyarrow.csv as pc

        where = str(self.file)
        read: Any = pc.ReadOptions(column_names=COLUMNS, use_threads=False)
        types: Any = {"value": "double", "step": "int64", "timestamp": "int64"}
        with library_errors(where, "cannot be read", "each line is a time, a value and a step"):
            table = pc.read_csv(self.file, read, pc.ParseOptions(delimiter=" "), pc.ConvertOptions(column_types=types))
        counts = values.counts(table.column("value").to_numpy(), "value", 0, where, self.kind)
        return table.column("step").to_numpy(), counts


def _cells(series: list[_Series], values: Values, where: str) -> Iterator[Cells]:
    """The cells of all metrics, by step."""
    size = sum(own.file.stat().st_size for own in series)
    require(HELD * size, where, f"a run of {size:,} bytes", "export its metrics as CSV")
    found = [own.read(values) for own in series]
    lengths = [len(steps) for steps, _ in found]
    layer, expert = (np.repeat([getattr(own, name) for own in series], lengths) for name in ("layer", "expert"))
    step, counts = (np.concatenate(parts) for parts in zip(*found))
    order = np.argsort(step, kind="stable")
    # A batch ends with a step, so that each is looked at as a whole.
    begins = starts_of(step[order])
    first = begins[np.searchsorted(begins, np.arange(0, len(order), BATCH), "right") - 1]
    for a, b in pairwise([*np.unique(first), len(order)]):
        rows = order[a:b]
        yield Cells(step[rows], layer[rows], expert[rows], counts[rows])
