"""The rows of a DuckDB query as a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from moetrace.errors import TraceError, shown
from moetrace.formats.errors import extra, library_errors
from moetrace.formats.location import Query
from moetrace.formats.stream.cells import Reading
from moetrace.formats.stream.columns import ValueFormat
from moetrace.formats.stream.tables import Naming, table_reading

ROLES = ("step", "layer", "expert", "tokens")
# Rows handed on at a time.
BATCH_ROWS = 1 << 17


@dataclass(frozen=True)
class SqlFormat(ValueFormat):
    """A query whose columns are called step, layer, expert and tokens."""

    name: ClassVar[str] = "sql"

    def claims(self, path: object) -> bool:
        return isinstance(path, Query)

    def read(self, path: Query) -> Reading:
        """Run the query, and once more each time its rows are read again."""
        with _rows(path) as rows:
            columns = rows.schema.names
        absent = [role for role in ROLES if role not in columns]
        if absent:
            problem = f"has no column {absent[0]} among {shown(columns)}"
            raise TraceError(str(path), problem, f"name it in the query, as in SELECT NAME AS {absent[0]}, ...")
        naming = Naming(self.values(path), {role: role for role in ROLES})
        return table_reading(str(path), lambda: _rows(path), naming)


@contextmanager
def _rows(query: Query) -> Iterator[pa.RecordBatchReader]:
    """The rows of a query as Arrow batches, with a connection of their own; raises `TraceError` for DuckDB's errors.

    It is closed afterwards: what DuckDB still runs at the end of a process may not let it end.
    """
    with extra("sql", str(query)):
        import duckdb
    with closing(duckdb.connect()) as connection:
        with library_errors(str(query), "cannot be run", "check the query, and the files in it"):
            rows = connection.sql(query.sql)
            if rows is None:
                raise TraceError(str(query), "gives no rows", "write it as SELECT step, layer, expert, tokens FROM ...")
            # Older versions call it by another name.
            read: Any = getattr(rows, "to_arrow_reader", None) or rows.fetch_arrow_reader
            reader = read(BATCH_ROWS)
        with closing(reader):
            yield reader
