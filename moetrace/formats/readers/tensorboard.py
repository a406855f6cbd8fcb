"""TensorBoard event files: one scalar for each layer and expert, told by its tag."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moetrace.errors import TraceError
from moetrace.formats.errors import library_errors
from moetrace.formats.stream.cells import Cells, Reading
from moetrace.formats.stream.tables import SHARE_NAMES, UTILISATION_NAMES, TableFormat, Values

MARK = ".tfevents."
PATTERN = r"layer[_/.-]?(?P<layer>\d{1,15}).*?expert[_/.-]?(?P<expert>\d{1,15})"
# Of a layer's or expert's number.
MOST_DIGITS = 15
# Scalars handed on at a time.
BATCH = 1 << 16


@dataclass(frozen=True)
class TensorboardFormat(TableFormat):
    """Event files whose tags name a layer and an expert, such as ``moe/layer_3/expert_7``.

    *pattern* is a regular expression for the tags, with the groups ``layer`` and ``expert``.
    """

    pattern: str | None = None

    name: ClassVar[str] = "tensorboard"
    needs: ClassVar[str] = "event files with tags like layer_3/expert_7, or --pattern; the extra tensorboard"

    def claims(self, path: Path) -> bool:
        """An event file, or a folder with such."""
        return MARK in path.name if path.is_file() else any(MARK in child.name for child in path.iterdir())

    def read(self, path: Path) -> Reading:
        """Stream the scalars whose tags match; several files of a folder follow each other by name."""
        files = sorted(child for child in path.iterdir() if MARK in child.name) if path.is_dir() else [path]
        try:
            pattern = re.compile(self.pattern or PATTERN, re.IGNORECASE)
        except re.error as error:
            raise TraceError(
                str(path), f"--pattern is no regular expression: {error}", "see the Python manual"
            ) from None
        if not {"layer", "expert"} <= set(pattern.groupindex):
            raise TraceError(
                str(path), "--pattern names no layer and expert", "use (?P<layer>\\d+) and (?P<expert>\\d+)"
            )
        values = self.values()
        return Reading(
            lambda: _cells(files, pattern, values, str(path)),
            assumptions=(f"tags are matched by {pattern.pattern}",),
            where=str(path),
            collector=values.collector,
        )


def _cells(files: list[Path], pattern: re.Pattern[str], values: Values, where: str) -> Iterator[Cells]:
    rows: list[tuple[int, int, int, float]] = []
    template = None
    for file in files:
        for step, tag, value in _scalars(file):
            match = pattern.search(tag)
            if match is None:
                continue
            kind = re.sub(r"\d+", "#", tag)
            if template not in (None, kind):
                raise TraceError(where, f"has tags like {template} and like {kind}", "choose one kind with --pattern")
            template = kind
            # A batch ends with a step, so that each is looked at as a whole.
            if len(rows) >= BATCH and rows[-1][0] != step:
                yield _batch(rows, kind, values, where)
                rows = []
            rows.append((step, _number(match, "layer", where), _number(match, "expert", where), value))
    if rows:
        yield _batch(rows, template or "", values, where)


def _number(match: re.Match[str], name: str, where: str) -> int:
    """The number that a group of the pattern found; raises `TraceError` when it is none that fits."""
    text = match[name] or ""
    if not text.isdecimal() or len(text) > MOST_DIGITS:
        raise TraceError(f"{where}, tag {match.string[:80]}", f"has {text[:80]!r} as its {name}", "check --pattern")
    return int(text)


def _batch(rows: list[tuple[int, int, int, float]], tag: str, values: Values, where: str) -> Cells:
    step, layer, expert, value = (np.array(part) for part in zip(*rows))
    return Cells(step, layer, expert, values.counts(value.astype(np.float32), _kind(tag), 0, f"{where}, tags {tag}"))


def _kind(tag: str) -> str:
    """What the values of a tag are, by the words in it."""
    words = set(re.findall(r"[a-z]+", tag.lower()))
    return next((name for name in (*UTILISATION_NAMES, *SHARE_NAMES) if name in words), "tokens")


def _scalars(path: Path) -> Iterator[tuple[int, str, float]]:
    """Step, tag and value of every scalar in an event file, in the order of writing."""
    for event in _events(path):
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                yield event.step, value.tag, value.simple_value
            elif kind == "tensor":
                from tensorboard.util.tensor_util import make_ndarray

                # One number may stand for a tensor of any size.
                if any(dim.size != 1 for dim in value.tensor.tensor_shape.dim):
                    continue
                array = make_ndarray(value.tensor)
                if array.size == 1 and array.dtype.kind in "iuf":
                    yield event.step, value.tag, float(array.reshape(()))


def _events(path: Path) -> Iterator[Any]:
    try:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    except ImportError as error:
        raise TraceError(
            str(path), "is an event file", 'install tensorboard: pip install "moetrace[tensorboard]"'
        ) from error
    if path.stat().st_size == 0:
        raise TraceError(str(path), "is empty", "is it the right file?")
    with library_errors(str(path), "cannot be read", "write it again"):
        yield from LegacyEventFileLoader(str(path)).Load()
