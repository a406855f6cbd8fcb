"""Tables as loggers write them: a long, wide or nested layout, told from the names of the columns.

Works on Arrow record batches, whatever file they came from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.collector import Collector
from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.stream.cells import Cells
from moetrace.formats.stream.columns import column, null, numbered
from moetrace.formats.stream.names import Named, layer_of, step_in
from moetrace.formats.stream.roles import Found, Layout, Naming, found_in, key_and_value, may_be_counts, roles_in
from moetrace.formats.stream.tags import no_match
from moetrace.formats.stream.texts import is_list_text, texts_in
from moetrace.formats.stream.values import Values
from moetrace.formats.stream.wide import keyed_layout, wide_columns, wide_layout
from moetrace.trace import Counts

if TYPE_CHECKING:
    import pyarrow as pa

# 256 layers of 512 experts side by side.
MOST_COLUMNS = 1 << 17


@dataclass(frozen=True)
class ValueFormat:
    """The settings of a format whose values may be shares or utilisation.

    *tokens_per_step* turns shares into counts, and with the *experts* of a layer utilisation as well.
    """

    tokens_per_step: int | None = None
    experts: int | None = None

    def values(self) -> Values:
        """How the values of one dump become counts."""
        return Values(Collector(), self.tokens_per_step, self.experts)


@dataclass(frozen=True)
class TableFormat(ValueFormat):
    """The settings of a format with columns: *column* says which is what, ``tokens=routed,step=pass``.

    *pattern* is a regular expression for columns that are each of an expert, with the groups ``layer`` and ``expert``.
    """

    column: str | None = None
    pattern: str | None = None

    def naming(self, path: Named) -> Naming:
        """What the columns of the file at *path* are called; raises `SettingError` for a role that there is not."""
        return Naming(roles_in(self.column), self.pattern, step_in(path), layer_of(path))


def match_layout(
    schema: pa.Schema, where: str, reader: Values, naming: Naming = Naming(), first: pa.RecordBatch | None = None
) -> Layout:
    """The layout whose columns are there, their values taken by *reader*; raises `TraceError` when none is.

    *first* is a batch of rows, to look at text in.
    """
    try:
        names = schema.names
    except UnicodeDecodeError as error:
        raise TraceError(where, "has a column whose name is no UTF-8", "save it as UTF-8") from error
    found = found_in(names, where, naming)
    lists = [name for i, name in enumerate(names) if is_list(schema.types[i]) or _is_list_text(first, i)]
    found = _with_counts(found, names, lists)
    twice = [name for name in (found.step, found.layer, found.expert, found.value) if name and names.count(name) > 1]
    if twice:
        raise TraceError(where, f"has {names.count(twice[0])} columns called {twice[0]}", "give each a name of its own")
    key, value = key_and_value(names, naming)
    if found.value and (found.value in lists or found.expert):
        if naming.pattern:
            raise SettingError(f"{where} names experts in rows, and has no use for --pattern")
        return _nested(found, reader, first) if found.value in lists else _long(_with_percents(found, first), reader)
    wide = wide_columns(names, naming, found)
    if wide and (found.step or found.layer):
        return wide_layout(found, wide, reader)
    if key and value and found.step:
        return keyed_layout(found, key, value, reader)
    raise _no_layout(names, found)


def _with_counts(found: Found, names: Sequence[str], lists: Sequence[str]) -> Found:
    """The same with the column of the counts; raises `TraceError` naming those that may be where there are two."""
    if found.kind is not None or not (found.expert or lists):
        return found
    candidates = may_be_counts(names, found)
    if lists and not (found.expert and found.value and found.value not in lists):
        candidates = [name for name in candidates if name in lists] or list(lists)
    candidates = list(dict.fromkeys(candidates))
    if len(candidates) > 1:
        ways = " or ".join(f"--column tokens={name}" for name in candidates[:2])
        raise TraceError(found.where, f"columns {' and '.join(candidates)} may be the counts", f"say which with {ways}")
    return replace(found, value=candidates[0]) if candidates else found


def _with_percents(found: Found, first: pa.RecordBatch | None) -> Found:
    """The same, its values shares where the first of them is a percentage."""
    if first is None or found.kind is not None or not first.num_rows:
        return found
    value = first.column(found.value)[0].as_py()
    return replace(found, kind="share") if isinstance(value, str) and value.strip().endswith("%") else found


def _no_layout(names: Sequence[str], found: Found) -> TraceError:
    """That the columns make no table of counts, and what there would have to be."""
    where, names = found.where, [name or "(unnamed)" for name in names]
    if found.step is None:
        problem = f"has no column for the step among {shown(names)}"
        return TraceError(where, problem, "name one `step`, or say --column step=NAME")
    tagged = [name for name in names if len(re.findall(r"\d+", name)) >= 2]
    if tagged:
        return no_match(tagged, "column", where)
    return TraceError(
        where,
        f"no layout fits its columns {shown(names)}",
        "long needs step, layer, expert, tokens; wide step, layer, expert_0 ...; nested step, layer, counts; "
        "--column tokens=NAME says which is which; choices of tokens go with --from routing",
    )


def _is_list_text(first: pa.RecordBatch | None, i: int) -> bool:
    return first is not None and is_list_text(first.column(i))


def few_columns(n: int, where: str) -> None:
    """Raise `TraceError` for a table of more than `MOST_COLUMNS` columns, before each of them costs time and memory."""
    if n > MOST_COLUMNS:
        raise TraceError(
            where, f"has {n:,} columns, and at most {MOST_COLUMNS:,} are read", "log one row for each step and layer"
        )


def is_list(kind: Any) -> bool:
    """Whether an Arrow type is one of lists."""
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _long(found: Found, reader: Values) -> Layout:
    expert, value = found.expert or "", found.value or ""

    def cells(batch: pa.RecordBatch, row: int, where: str) -> Cells:
        return Cells(
            found.steps(batch, row, where),
            found.layers(batch, row, where),
            numbered(batch, expert, row, where),
            reader.counts(column(batch, value, row, where), value, row, where, found.kind),
        )

    return found.layout([expert, value], 1, cells, reader)


def _nested(found: Found, reader: Values, first: pa.RecordBatch | None) -> Layout:
    value = found.value or ""
    layers_inside = found.layer is None and first is not None and _holds_layers(first.column(value), value, found.where)

    def cells(batch: pa.RecordBatch, row: int, where: str) -> Cells:
        lists = batch.column(value)
        if not is_list(lists.type):
            return _of_texts(found, batch, row, where, reader)
        flat, sizes = _flattened(lists, value, row, where)
        layers = found.layers(batch, row, where)
        steps = found.steps(batch, row, where)
        row_of = np.arange(len(lists))
        if is_list(flat.type):  # layers by experts
            if found.layer is not None:
                raise TraceError(f"{where}, column {value}", "holds lists of lists and a layer", "log one list a layer")
            layers, row_of = np.arange(len(flat)) - np.repeat(np.cumsum(sizes) - sizes, sizes), np.repeat(row_of, sizes)
            steps = steps[row_of]
            flat, sizes = _flattened(flat, value, row, where)
        of_list = np.repeat(np.arange(len(sizes)), sizes)
        values = flat.to_numpy(zero_copy_only=False)
        return Cells(
            steps[of_list],
            layers[of_list],
            np.arange(len(flat)) - np.repeat(np.cumsum(sizes) - sizes, sizes),
            _rows_named(values, row_of[of_list], value, row, where, reader, found.kind),
        )

    layout = found.layout([value], 1, cells, reader)
    if not layers_inside:
        return layout
    said = [text for text in layout.assumptions if "layer" not in text]
    return replace(layout, assumptions=(*said, "lists of lists are layers of experts, numbered from 0"))


def _holds_layers(values: Any, name: str, where: str) -> bool:
    """Whether the lists in a column hold lists of experts."""
    if is_list(values.type):
        return is_list(values.type.value_type)
    return texts_in(values.drop_null().slice(0, 1), name, 0, where).nested


def _of_texts(found: Found, batch: pa.RecordBatch, row: int, where: str, reader: Values) -> Cells:
    """The cells of lists, or mappings, that were written as text."""
    value = found.value or ""
    texts = texts_in(batch.column(value), value, row, where)
    if texts.nested and found.layer is not None:
        raise TraceError(f"{where}, column {value}", "holds lists of lists and a layer", "log one list a layer")
    counts = _rows_named(texts.value, texts.row, value, row, where, reader, found.kind)
    layer = texts.layer if texts.nested else found.layers(batch, row, where)[texts.row]
    return Cells(found.steps(batch, row, where)[texts.row], layer, texts.expert, counts)


def _flattened(lists: Any, name: str, row: int, where: str) -> tuple[Any, NDArray[np.int64]]:
    """The values of *lists*, one after the other, and how many each holds; raises `TraceError` where one is none."""
    import pyarrow.compute as pc

    if lists.null_count:
        raise null(lists, name, row, where)
    flat = lists.flatten()
    sizes = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    if (sizes == 0).any():
        empty = row + int(np.argmax(sizes == 0))
        raise TraceError(f"{where}, column {name}, row {empty}", "is an empty list", "log a count for each expert")
    if flat.null_count:
        bad = int(np.searchsorted(np.cumsum(sizes), flat.is_null().to_numpy(zero_copy_only=False).argmax(), "right"))
        raise TraceError(f"{where}, column {name}, row {row + bad}", "holds a null", "counts are whole numbers")
    return flat, sizes


def _rows_named(
    values: NDArray[Any],
    row_of: NDArray[np.intp],
    name: str,
    row: int,
    where: str,
    reader: Values,
    kind: str | None,
) -> Counts:
    """Counts of flattened lists; an error names the row, not the place in the flat array."""
    try:
        return reader.counts(values, name, row, where, kind)
    except TraceError:
        # Once more row by row, only to name the first bad one.
        for i in np.unique(row_of):
            reader.counts(values[row_of == i][None], name, row + int(i), where, kind)
        raise
