"""Tables whose columns, or whose rows, are each named after a layer and an expert."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError
from moetrace.formats.arrow import to_numpy
from moetrace.formats.stream.cells import Cells
from moetrace.formats.stream.columns import column, null, with_gaps
from moetrace.formats.stream.roles import Found, Layout, Naming
from moetrace.formats.stream.tags import EXPERT_ONLY, kind_of, tags_by, template
from moetrace.formats.stream.values import Values

if TYPE_CHECKING:
    import pyarrow as pa

WIDE = re.compile(r"^(?:layer_?(?P<layer>\d{1,15})_)?(?:expert|e)_?(?P<expert>\d{1,15})$", re.IGNORECASE)
BARE = re.compile(r"\d{1,15}")
# What an export of a chart adds to each of its columns.
OF_CHARTS = ("__MIN", "__MAX")


@dataclass(frozen=True)
class Wide:
    """Columns that are each of an expert: their *names*, layers (columns,), None where rows have them, and experts."""

    names: list[str]
    layers: NDArray[np.int64] | None
    experts: NDArray[np.int64]
    said: tuple[str, ...] = ()
    kind: str | None = None


def wide_columns(names: Sequence[str], naming: Naming, found: Found) -> Wide | None:
    """The columns with a layer and an expert, or an expert alone, in their names; None where there are none.

    Raises `TraceError` where two are of one expert, or not all of one kind.
    """
    names = [name for name in names if not name.endswith(OF_CHARTS)]
    matches = {name: match for name in names if (match := WIDE.match(name))} if naming.pattern is None else {}
    bare = [name for name in names if BARE.fullmatch(name)]
    if matches:
        in_name = [match["layer"] for match in matches.values()]
        layers = None if any(number is None for number in in_name) else np.array([int(n) for n in in_name])
        said = f"columns like {template(next(iter(matches)))} hold the counts of experts"
        return Wide(list(matches), layers, np.array([int(match["expert"]) for match in matches.values()]), (said,))
    if naming.pattern is None and len(bare) > 1:
        return Wide(bare, None, np.array([int(name) for name in bare]), ("columns with bare numbers are experts",))
    tags = tags_by(naming.pattern, found.where)
    tagged = {name: place for name in names if (place := tags.match(name, found.where))}
    if not tagged and naming.pattern is None:
        return _of_experts(names, found)
    if not tagged:
        return None
    kind = one_kind(list(tagged), set(), found.where)
    again = [place for place, n in Counter(tagged.values()).items() if n > 1]
    if again:
        both = [name for name, place in tagged.items() if place == again[0]]
        raise TraceError(found.where, f"columns {both[0]} and {both[1]} are of one expert", "choose with --pattern")
    places = np.array(list(tagged.values()), np.int64)  # (columns, 2)
    return Wide(list(tagged), places[:, 0], places[:, 1], (tags.assumption.replace("tags", "columns"),), kind)


def _of_experts(names: Sequence[str], found: Found) -> Wide | None:
    """Columns with an expert in their names, such as ``tokens_expert_3``, of the layer that each row has."""
    experts = {name: int(match[1]) for name in names if (match := EXPERT_ONLY.search(name))}
    if len(experts) < 2 or len(set(experts.values())) < len(experts):
        return None
    kind = one_kind(list(experts), set(), found.where)
    said = f"columns like {template(next(iter(experts)))} are experts"
    return Wide(list(experts), None, np.array(list(experts.values()), np.int64), (said,), kind)


def wide_layout(found: Found, wide: Wide, reader: Values) -> Layout:
    found = replace(found, value=None, layer=found.layer if wide.layers is None else None)

    def cells(batch: pa.RecordBatch, row: int, where: str) -> Cells:
        raw = [with_gaps(batch, name, row, where) for name in wide.names]
        there = np.stack([~_is_gap(values) for values in raw], axis=1)  # (rows, columns)
        counts = np.zeros(there.shape, np.int64)
        for i, (name, values) in enumerate(zip(wide.names, raw)):
            whole = values if there[:, i].all() else np.where(there[:, i], values, 0)
            counts[:, i] = reader.counts(whole, name, row, where, found.kind or wide.kind)
        at = found.layers(batch, row, where)[:, None] if wide.layers is None else wide.layers
        # Rows of other metrics have empty cells here, and so may rows of other layers.
        every = slice(None) if there.all() else there.ravel()
        return Cells(
            np.repeat(_steps_where(found, batch, np.asarray(there.any(axis=1)), row, where), len(wide.names))[every],
            np.broadcast_to(at, there.shape).ravel()[every],
            np.broadcast_to(wide.experts, there.shape).ravel()[every],
            counts.ravel()[every],
        )

    layout = found.layout(wide.names, len(wide.names), cells, reader)
    said = tuple(text for text in layout.assumptions if wide.layers is None or "layer" not in text)
    return replace(layout, assumptions=(*said, *wide.said))


def _is_gap(values: NDArray[Any]) -> NDArray[np.bool_]:
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), bool)


def _steps_where(
    found: Found, batch: pa.RecordBatch, there: NDArray[np.bool_], row: int, where: str
) -> NDArray[np.int64]:
    """The steps of the rows (rows,), 0 for those without any value, which need have none."""
    import pyarrow as pa

    if found.step is None or not batch.column(found.step).null_count:
        return found.steps(batch, row, where)
    steps = np.zeros(len(there), np.int64)
    steps[there] = found.steps(batch.filter(pa.array(there)), row, where)
    return steps


def keyed_layout(found: Found, key: str, value: str, reader: Values) -> Layout:
    """A scalar in each row, its name in the column *key*."""
    tags = tags_by(found.naming.pattern, found.where)
    seen: set[str] = set()

    def cells(batch: pa.RecordBatch, row: int, where: str) -> Cells:
        import pyarrow as pa

        encoded = batch.column(key).cast(pa.string()).dictionary_encode()
        if encoded.null_count:
            raise null(encoded, key, row, where)
        texts = encoded.dictionary.to_pylist()
        matches = [tags.match(text, where) for text in texts]
        kinds = one_kind([text for text, match in zip(texts, matches) if match], seen, where)
        which = np.array([match is not None for match in matches], bool)[to_numpy(encoded.indices)]
        at = np.array([match or (0, 0) for match in matches], np.int64).reshape(-1, 2)[to_numpy(encoded.indices)][which]
        inside = batch.filter(pa.array(which))
        values = column(inside, value, row, where)
        return Cells(
            found.steps(inside, row, where), at[:, 0], at[:, 1], reader.counts(values, value, row, where, kinds)
        )

    return found.layout([key, value], 1, cells, reader)


def one_kind(tags: Sequence[str], seen: set[str], where: str) -> str:
    """What the values of *tags* are; *seen* holds what all so far have in common, and gets what these have.

    Raises `TraceError` where that is not one thing.
    """
    seen.update(map(template, tags))
    if len(seen) > 1:
        first, second = sorted(seen)[:2]
        raise TraceError(where, f"has tags like {first} and like {second}", "choose one kind with --pattern")
    return kind_of(next(iter(seen), ""))
