"""How the rows of a table become cells: the long, nested, wide and keyed layouts, and rows that are not of one trace.

Works on Arrow record batches, whatever file they came from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.arrow import to_numpy
from moetrace.formats.errors import WRITE_AGAIN, library_errors
from moetrace.formats.stream.cells import Cells, Reading
from moetrace.formats.stream.columns import (
    BARE,
    SHARE_NAMES,
    UTILISATION_NAMES,
    Rows,
    Values,
    doubt_of,
    is_list,
    simple_name,
)
from moetrace.formats.stream.tables import (
    MODEL_NAMES,
    PHASE_NAMES,
    ColumnRoles,
    Layout,
    Naming,
    doubt_in,
    first_named,
    match_columns,
    no_layout,
)
from moetrace.formats.stream.tags import OF_CHARTS, no_match, one_kind, tags_by, template
from moetrace.trace import Finding

if TYPE_CHECKING:
    import pyarrow as pa

# Of tables with the name of a scalar in each row, such as MLflow's: key, value, step.
KEY_NAMES = ("key", "tag", "metric", "metricname", "name")
# Columns of an expert, and of a layer where rows have none; and of an expert of the layer that each row names.
WIDE = re.compile(r"^(?:layer_?(?P<layer>\d{1,15})_)?(?:expert|exp|e)_?(?P<expert>\d{1,15})$", re.IGNORECASE)
EXPERT_ONLY = re.compile(r"experts?[_/.\-\[ ]?(\d{1,15})(?!\d)", re.IGNORECASE)
# Rows looked at to see what numbers side by side are.
HEAD_ROWS = 1 << 10
# Columns that set rows apart which are not of one trace, unless they are said to be.
APART_NAMES = (
    *PHASE_NAMES, "rank", "eprank", "dprank", "tprank", "pprank", "globalrank", "localrank", "gpu", "gpuid", "device",
    "deviceid", "worker", "workerid", "replica", "engine", "host", "hostname", "node", *MODEL_NAMES,
)  # fmt: skip


def table_reading(
    where: str,
    open_batches: Callable[[], Any],
    values: Values,
    naming: Naming,
    assumed: tuple[str, ...] = (),
    findings: tuple[Finding, ...] = (),
) -> Reading:
    """The reading of a table that *open_batches* opens anew each time, as an Arrow batch reader."""
    with library_errors(where, "cannot be read", WRITE_AGAIN), closing(open_batches()) as batches:
        schema, first = batches.schema, next(iter(batches), None)
    layout = match_layout(schema, where, values, naming, first)

    def every() -> Iterator[Any]:
        with closing(open_batches()) as batches:
            yield from batches

    reading = layout.reading(where, every)
    return replace(reading, assumptions=(*assumed, *reading.assumptions), findings=findings)


def match_layout(schema: pa.Schema, where: str, values: Values, naming: Naming, first: pa.RecordBatch | None) -> Layout:
    """The layout whose columns are there, text looked at in the rows of *first*; raises `TraceError` when none is."""
    found = match_columns(schema, where, values, naming, first)
    return set_apart(_layout_of(schema.names, where, found, naming, first), schema.names, found, first)


def _layout_of(
    names: list[str], where: str, found: ColumnRoles, naming: Naming, first: pa.RecordBatch | None
) -> Layout:
    if found.value and (found.expert or found.value in found.lists):
        if naming.pattern:
            raise SettingError(f"{where} names experts in rows, and has no use for --pattern")
        return nested_layout(found, first) if found.value in found.lists else long_layout(found, first)
    columns, text = wide_columns(names, found)
    if columns and (found.step or found.layer):
        return wide_layout(found, columns, text, first)
    named = {simple_name(name): name for name in reversed(names)}
    key = naming.roles.get("key") or first_named(named, KEY_NAMES)
    value = naming.roles.get("value") or first_named(named, ["value"])
    if key and value and found.step:
        return keyed_layout(found, key, value)
    tagged = [name for name in names if len(re.findall(r"\d+", name)) >= 2]
    raise no_match(tagged, "column", where) if found.step and tagged else no_layout(names, found)


def long_layout(found: ColumnRoles, first: pa.RecordBatch | None) -> Layout:
    """The layout of a row for each step, layer and expert."""
    expert, value = found.expert or "", found.value or ""
    if simple_name(found.kind or value) in SHARE_NAMES and first is not None and first.num_rows:
        rows = Rows(first, 0, found.where)
        steps, layers = found.steps(rows), found.layers(rows)
        found = found.by_total(rows.column(value)[(steps == steps[0]) & (layers == layers[0])].sum())

    def cells(rows: Rows) -> Cells:
        counts = found.values.counts(rows.column(value), value, rows.first, rows.where, found.kind)
        return Cells(found.steps(rows), found.layers(rows), rows.numbers(expert), counts)

    return found.layout([expert, value], cells)


def nested_layout(found: ColumnRoles, first: pa.RecordBatch | None) -> Layout:
    """The layout of lists of experts, or of layers of experts, in the rows."""
    value = found.value or ""
    of_layers, doubt = False, ""
    if first is not None and first.num_rows:
        there = first.filter(first.column(value).is_valid()).slice(0, 1)
        inner = Rows(there, 0, found.where).lists(value).type.value_type
        of_layers = found.layer is None and is_list(inner)
        if is_list(inner) and is_list(inner.value_type):
            problem = f"holds lists of lists of lists in the column {value}, as the experts of the tokens of requests"
            raise TraceError(found.where, problem, "count them with --from routing --tokens N")
        doubt = doubt_in(first, value, found.where)

    def flattened(rows: Rows, lists: Any) -> tuple[Any, NDArray[np.int64], NDArray[np.int64]]:
        """The values one after the other, how many each list holds, and the place of each value in its list."""
        import pyarrow.compute as pc

        if lists.null_count:
            raise rows.null(value, lists)
        flat = lists.flatten()
        sizes = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        if (sizes == 0).any():
            at = rows.place(value, int(np.argmax(sizes == 0)))
            raise TraceError(at, "is an empty list", "log a count for each expert")
        if flat.null_count:
            null = flat.is_null().to_numpy(zero_copy_only=False).argmax()
            at = rows.place(value, int(np.searchsorted(np.cumsum(sizes), null, "right")))
            raise TraceError(at, "holds a null", "counts are whole numbers")
        return flat, sizes, np.arange(len(flat)) - np.repeat(np.cumsum(sizes) - sizes, sizes)

    def cells(rows: Rows) -> Cells:
        lists, steps, layers = rows.lists(value), found.steps(rows), found.layers(rows)
        row_of = np.arange(len(lists))
        flat, sizes, place = flattened(rows, lists)
        if is_list(flat.type):  # layers by experts
            if found.layer is not None:
                raise TraceError(rows.place(value), "holds lists of lists and a layer", "log one list a layer")
            row_of = np.repeat(row_of, sizes)
            steps, layers = steps[row_of], place
            flat, sizes, place = flattened(rows, flat)
        of_list = np.repeat(np.arange(len(sizes)), sizes)
        numbers = flat.to_numpy(zero_copy_only=False)
        try:
            counts = found.values.counts(numbers, value, rows.first, rows.where, found.kind)
        except TraceError:
            for i in range(len(lists)):  # once more row by row, only to name the first bad one
                one = numbers[row_of[of_list] == i][None]
                found.values.counts(one, value, rows.first + i, rows.where, found.kind)
            raise
        return Cells(steps[of_list], layers[of_list], place, counts)

    text = "lists of lists are layers of experts, numbered from 0" if of_layers else ""
    return found.layout([value], cells, layer=text, doubt=doubt)


def wide_columns(names: Sequence[str], found: ColumnRoles) -> tuple[dict[str, tuple[int | None, int]], str]:
    """The columns with an expert in their names: its layer, None where rows have them, and its number; and why."""
    names = [name for name in names if not name.endswith(OF_CHARTS)]
    pattern = found.naming.pattern
    if pattern is None:
        matches = {name: match for name in names if (match := WIDE.match(name))}
        if matches:
            layered = all(match["layer"] for match in matches.values())
            places = {name: (int(m["layer"]) if layered else None, int(m["expert"])) for name, m in matches.items()}
            return places, f"columns like {template(next(iter(matches)))} hold the counts of experts"
        bare = [name for name in names if BARE.fullmatch(name)]
        if len(bare) > 1:
            return {name: (None, int(name)) for name in bare}, "columns with bare numbers are experts"
    tags = tags_by(pattern, found.where)
    tagged = {name: place for name in names if (place := tags.match(name, found.where))}
    if tagged:
        return {**tagged}, tags.assumption.replace("tags", "columns")
    alone = {name: int(match[1]) for name in names if (match := EXPERT_ONLY.search(name))}
    if pattern is not None or len(alone) < 2 or len(set(alone.values())) < len(alone):
        return {}, ""
    # Such as tokens_expert_3.
    text = f"columns like {template(next(iter(alone)))} are experts"
    return {name: (None, expert) for name, expert in alone.items()}, text


def wide_layout(
    found: ColumnRoles, columns: Mapping[str, tuple[int | None, int]], text: str, first: pa.RecordBatch | None
) -> Layout:
    """The layout of a column for each expert, and for each layer unless the rows have them."""
    kind, doubt = found.kind or one_kind(list(columns), set(), found.where), ""
    again = [place for place, n in Counter(columns.values()).items() if n > 1]
    if again:
        both = [name for name, place in columns.items() if place == again[0]]
        raise TraceError(found.where, f"columns {both[0]} and {both[1]} are of one expert", "choose with --pattern")
    names, of_rows = list(columns), any(layer is None for layer, _ in columns.values())
    layers = np.array([layer or 0 for layer, _ in columns.values()])
    experts = np.array([expert for _, expert in columns.values()])
    found = replace(found, value=None, layer=found.layer if of_rows else None)
    fractions = kind in (*SHARE_NAMES, *UTILISATION_NAMES)
    if first is not None and first.num_rows:
        rows = Rows(first.slice(0, HEAD_ROWS), 0, found.where)
        own = [name for name, layer in zip(names, layers) if layer == layers[0]]
        head = np.stack([rows.column(name, gaps=True) for name in own], axis=1)  # (rows, experts)
        if head.dtype.kind in "iuf":
            head = head[(head == head).all(axis=1)]
            doubt = doubt_of(head)
            found = found.by_total(head[0].sum()) if kind in SHARE_NAMES and len(head) else found

    def cells(rows: Rows) -> Cells:
        import pyarrow as pa

        raw = [rows.column(name, gaps=True) for name in names]
        # Rows of other metrics have empty cells here, and so may rows of other layers.
        there = np.stack([values == values for values in raw], axis=1)  # (rows, columns), False for NaN
        for layer in np.unique(layers) if fractions and not there.all() else ():
            own = there[:, layers == layer]
            for row in np.flatnonzero(own.any(axis=1) & ~own.all(axis=1))[:1]:
                problem = f"holds {own[row].sum()} of {own.shape[1]} experts of layer {layer}, and others are not in "
                way_out = "log every expert in every step: what is left out is not zero"
                raise TraceError(f"{rows.where}, row {rows.first + row}", f"{problem}the log", way_out)
        counts = np.zeros(there.shape, np.int64)
        for i, (name, values) in enumerate(zip(names, raw)):
            whole = values if there[:, i].all() else np.where(there[:, i], values, 0)
            counts[:, i] = found.values.counts(whole, name, rows.first, rows.where, kind)
        if found.step is None or not rows.batch.column(found.step).null_count:
            steps = found.steps(rows)
        else:  # rows without any value need have no step
            with_value = there.any(axis=1)
            steps = np.zeros(len(there), np.int64)
            steps[with_value] = found.steps(rows._replace(batch=rows.batch.filter(pa.array(with_value))))
        at = found.layers(rows)[:, None] if of_rows else layers
        every = slice(None) if there.all() else there.ravel()
        return Cells(
            np.repeat(steps, len(names))[every],
            np.broadcast_to(at, there.shape).ravel()[every],
            np.broadcast_to(experts, there.shape).ravel()[every],
            counts.ravel()[every],
        )

    texts = {"text": text} if of_rows else {"layer": text}
    return found.layout(names, cells, len(names), doubt=doubt, **texts)


def keyed_layout(found: ColumnRoles, key: str, value: str) -> Layout:
    """The layout of a scalar in each row, its name in the column *key*."""
    tags = tags_by(found.naming.pattern, found.where)
    seen: set[str] = set()

    def cells(rows: Rows) -> Cells:
        import pyarrow as pa

        encoded = rows.batch.column(key).cast(pa.string()).dictionary_encode()
        if encoded.null_count:
            raise rows.null(key, encoded)
        texts, indices = encoded.dictionary.to_pylist(), to_numpy(encoded.indices)
        matches = [tags.match(text, rows.where) for text in texts]
        kind = one_kind([text for text, match in zip(texts, matches) if match], seen, rows.where)
        matched = np.array([match is not None for match in matches], bool)[indices]
        at = np.array([match or (0, 0) for match in matches], np.int64).reshape(-1, 2)[indices][matched]
        inside = rows._replace(batch=rows.batch.filter(pa.array(matched)))
        counts = found.values.counts(inside.column(value), value, rows.first, rows.where, kind)
        return Cells(found.steps(inside), at[:, 0], at[:, 1], counts)

    return found.layout([key, value], cells)


def set_apart(layout: Layout, names: Sequence[str], found: ColumnRoles, first: pa.RecordBatch | None) -> Layout:
    """The layout with rows of one phase, rank or model alone, or of all, as was asked; those not asked for stay one.

    A rank of experts says which experts its rows have. Raises `TraceError` for a phase that no column has.
    """
    naming, named = found.naming, {simple_name(name): name for name in reversed(names)}
    only = dict(naming.only)
    if naming.phase is not None:
        column = first_named(named, PHASE_NAMES)
        if column is None:
            raise SettingError(f"{found.where} has no column for the phase among {shown(names)}: leave out --phase")
        only[column] = naming.phase
    ranks, size = named.get("eprank"), named.get("epsize")
    if ranks is not None and naming.sum_over == ranks:
        problem = f"holds other experts in each {ranks}, which are not added up"
        raise TraceError(found.where, problem, f"leave out --sum-over {ranks}")
    apart = [name for name in names if simple_name(name) in APART_NAMES and name not in (*only, naming.sum_over)]
    apart = [name for name in apart if name not in layout.columns]
    part, width, texts = "", 0, [f"rows with {name} {value} alone" for name, value in only.items()]
    if ranks in apart and first is not None and first.num_rows:
        there = sorted(set(first.column(ranks).drop_null().to_pylist()))
        if len(there) > 1:
            width = int(layout.cells(Rows(first.select(layout.columns), 0, found.where)).expert.max()) + 1
            texts.append(f"experts of ranks lie side by side, {width} of each {ranks}")
            apart.remove(ranks)
        elif size is not None and there and first.column(size)[0].as_py() not in (None, 1):
            part = f"{ranks} is {there[0]} of {size} {first.column(size)[0].as_py()}: a part of the experts"
    texts += [f"counts are added up over {naming.sum_over}"] if naming.sum_over else []
    seen: dict[str, set[str]] = {name: set() for name in apart}
    varying: set[str] = set()

    def cells(rows: Rows) -> Cells:
        rows = rows.of(only)
        for name in list(seen) if rows.batch.num_rows else ():
            texts, codes = rows.coded(name)
            steps = found.steps(rows)
            if len(np.unique((steps - steps.min()) * len(texts) + codes)) > len(np.unique(steps)):
                varying.add(name)
                del seen[name]  # it tells rows of one step apart, and two of one expert are an error of their own
                continue
            seen[name].update(texts)
            if len(seen[name]) > 1:
                one, other = sorted(seen[name])[:2]
                way_out = f"take one with --where {name}={one}, or add them up with --sum-over {name}"
                raise TraceError(rows.where, f"has {one} and {other} in the column {name}", way_out)
        found_cells = layout.cells(rows._replace(batch=rows.batch.select(layout.columns)))
        if not width:
            return found_cells
        rank = np.repeat(rows.numbers(ranks or ""), len(found_cells.step) // max(1, rows.batch.num_rows))
        return found_cells._replace(expert=found_cells.expert + rank * width)

    if not (only or apart or width or naming.sum_over):
        return layout
    read = list(dict.fromkeys([*layout.columns, *only, *apart, *([ranks] if width and ranks else [])]))
    texts, adds = [*layout.about.assumptions, *texts], naming.sum_over is not None
    about = replace(layout.about, assumptions=tuple(texts), part=part, apart=varying, adds=adds)
    return replace(layout, columns=read, cells=cells, about=about)
