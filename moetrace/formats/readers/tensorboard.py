"""TensorBoard event files: one scalar for each layer and expert, or one vector for each layer, as its tag says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moetrace.formats.sources import WRITE_AGAIN, extra, library_errors
from moetrace.formats.stream.cells import Cells, Reading
from moetrace.formats.stream.columns import Tags, ValueFormat, Values, no_match, one_kind, tags_by
from moetrace.formats.stream.text import refuse_empty

MARK = ".tfevents."
# Scalars handed on at a time.
BATCH = 1 << 16
# Experts of a layer in one vector, and tags kept to be shown where none matches.
MOST_EXPERTS = 1 << 16
MOST_TAGS = 1000


@dataclass(frozen=True)
class TensorboardFormat(ValueFormat):
    """Event files with tags like layer_3/expert_7, vectors tagged layer_3, or --pattern; the extra tensorboard.

    *pattern* is a regular expression for the tags, with the groups ``layer`` and ``expert``, or ``layer`` alone.
    """

    pattern: str | None = None
    name: ClassVar[str] = "tensorboard"

    def claims(self, path: Path) -> bool:
        return any(MARK in file.name for file in _files(path))

    def read(self, path: Path) -> Reading:
        """Stream the scalars whose tags match; several files of a folder follow each other by name."""
        tags, values = tags_by(self.pattern, str(path)), self.values(path)
        cells = partial(_cells, path, tags, values)
        return values.reading(cells, assumptions=(tags.assumption,))


def _files(path: Path) -> list[Path]:
    """The event files that *path* is or holds, also a folder further down."""
    if not path.is_dir():
        return [path]
    inside = sorted(path.iterdir())
    deeper = [child for folder in inside if folder.is_dir() for child in sorted(folder.iterdir())]
    return [child for child in (*inside, *deeper) if MARK in child.name]


def _cells(path: Path, tags: Tags, values: Values) -> Iterator[Cells]:
    """The cells of the scalars and vectors whose tag, or else the folder of whose file, names what they are of."""
    where = str(path)
    rows: list[tuple[int, int, int, float]] = []
    seen: set[str] = set()
    others: dict[str, None] = {}
    kind, last = "tokens", None

    def batch() -> Cells:
        step, layer, expert, value = (np.array(part) for part in zip(*rows))
        rows.clear()
        name = next(iter(seen))
        own = replace(values, where=f"{where}, tags {name}")
        counts = own.counts(value.astype(np.float32), name, kind=kind)
        return Cells(step, layer, expert, counts)

    for file in _files(path):
        for step, tag, value in _summaries(file):
            # A batch ends with a step, so that each is looked at as a whole.
            if len(rows) >= BATCH and last != step:
                yield batch()
            last = step
            # add_scalars writes each of its scalars to a folder named after it, all with one tag.
            texts = [tag] if path.is_file() or file.parent == path else [f"{tag}/{file.parent.name}", tag]
            text, match = next(((text, found) for text in texts if (found := tags.match(text))), (tag, None))
            if isinstance(value, float) and match:
                rows.append((step, *match, value))
            elif not isinstance(value, float) and (layer := tags.layer(tag)) is not None:
                rows += [(step, layer, expert, float(count)) for expert, count in enumerate(value.tolist())]
            else:
                if len(others) < MOST_TAGS:
                    others[text] = None
                continue
            # What is matched of a scalar of add_scalars is what all its folders have in common.
            kind = one_kind([tag if tag == text else text.removeprefix(f"{tag}/")], seen, where)
    if rows:
        yield batch()
    if not seen:
        raise no_match(list(others), "tag", where)


def _summaries(path: Path) -> Iterator[tuple[int, str, float | NDArray[Any]]]:
    """Step, tag and value of every scalar, or vector, in an event file, in the order of writing."""
    with extra("tensorboard", str(path)):
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        from tensorboard.util.tensor_util import make_ndarray
    refuse_empty(path)
    with library_errors(str(path), "cannot be read", WRITE_AGAIN):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                if kind == "simple_value":
                    yield event.step, value.tag, float(value.simple_value)
                elif kind == "tensor":
                    sizes = [dim.size for dim in value.tensor.tensor_shape.dim]
                    # One number may stand for a tensor of any size.
                    if sum(n != 1 for n in sizes) > 1 or any(not 0 < n <= MOST_EXPERTS for n in sizes):
                        continue
                    array = make_ndarray(value.tensor)
                    if array.dtype.kind in "iuf":
                        yield event.step, value.tag, float(array.item()) if array.size == 1 else array.reshape(-1)
