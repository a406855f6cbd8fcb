"""A trace of a data frame: the way in for whatever a program can take apart by itself."""

from __future__ import annotations

from typing import Any

from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.conversion import Dump, trace_of
from moetrace.formats.errors import library_errors
from moetrace.formats.stream.cells import ReadOptions
from moetrace.formats.stream.tables import Naming, ValueFormat
from moetrace.formats.stream.text import table_reading
from moetrace.trace import LoadTrace

# Rows looked at at a time.
BATCH_ROWS = 1 << 18


def from_frame(
    frame: Any,
    *,
    step: str = "step",
    layer: str | None = "layer",
    expert: str = "expert",
    tokens: str = "tokens",
    name: str = "trace",
    top_k: int | None = None,
    tokens_per_step: int | None = None,
    idle_experts: bool = False,
) -> LoadTrace:
    """The trace in a data frame of pandas, Polars or Arrow with a row for each step, layer and expert.

    *step*, *layer*, *expert* and *tokens* name its columns; without a *layer* there is one, number 0. Rows may come
    in any order. *tokens_per_step*, what a layer routes in a step, turns shares into counts, and counts are checked
    against it; *top_k* is how many experts a token is sent to. With *idle_experts*, an expert without a row had no
    tokens. Raises `TraceError` naming the column and the first bad row, and `SettingError` for what is not a frame.

    >>> import moetrace as mt
    >>> import pandas as pd
    >>> frame = pd.DataFrame({"it": [1, 1, 2, 2], "expert": [0, 1, 0, 1], "n": [5, 3, 4, 4]})
    >>> mt.from_frame(frame, step="it", layer=None, tokens="n").counts.tolist()
    [[[5, 3]], [[4, 4]]]
    """
    import pyarrow as pa

    where = "data frame"
    if not hasattr(frame, "__arrow_c_stream__"):
        way_out = "give one of pandas, Polars or Arrow; LoadTrace.from_counts makes a trace of an array"
        raise SettingError(f"a {type(frame).__name__} is not a data frame: {way_out}")
    roles = {"step": step, "layer": layer, "expert": expert, "tokens": tokens}
    wanted = {role: column for role, column in roles.items() if column is not None}
    is_pandas = hasattr(frame, "iloc")
    if not is_pandas:
        frame = pa.table(frame)
    names = list(frame.columns if is_pandas else frame.column_names)
    for role, column in wanted.items():
        if names.count(column) != 1:
            problem = (
                f"has {names.count(column)} columns called {column}"
                if column in names
                else (f"has no column {column} among {shown(names)}")
            )
            way_out = f"name it, as in from_frame(frame, {role}='NAME')"
            way_out += ", or layer=None where there is one layer" if role == "layer" else ""
            raise TraceError(where, problem, way_out)
    columns = list(dict.fromkeys(wanted.values()))
    with library_errors(where, "holds columns that are not numbers", "give whole numbers"):
        table = pa.Table.from_pandas(frame[columns], preserve_index=False) if is_pandas else frame.select(columns)
    batches = table.to_batches(BATCH_ROWS)
    reading = table_reading(
        where,
        lambda: pa.RecordBatchReader.from_batches(table.schema, batches),
        ValueFormat(tokens_per_step).values(),
        Naming(wanted),
    )
    options = ReadOptions(tokens_per_step=tokens_per_step, top_k=top_k, idle_experts=idle_experts)
    return trace_of(Dump.of(reading, "frame", options), options, name, None)
