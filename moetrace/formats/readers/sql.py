"""The rows of a DuckDB query as a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from moetrace.errors import TraceError, shown
from moetrace.formats.errors import library_errors
from moetrace.formats.location import Query
from moetrace.formats.stream.cells import Reading
from moetrace.formats.stream.layouts import table_reading
from moetrace.formats.stream.tables import Naming, ValueFormat

if TYPE_CHECKING:
    import pyarrow as pa

ROLES = ("step", "layer", "expert", "tokens")
# Rows handed on at a time.
BATCH_ROWS = 1 << 17


@dataclass(frozen=True)
class SqlFormat(ValueFormat):
    """A query whose columns are called step, layer, expert and tokens."""

    name: ClassVar[str] = "sql"

    def read(self, query: Query) -> Reading:
        """Run the query, and once more each time its rows are read again."""
        with closing(Rows(query)) as rows:
            columns = rows.schema.names
        absent = [role for role in ROLES if role not in columns]
        if absent:
            problem = f"has no column {absent[0]} among {shown(columns)}"
            raise TraceError(str(query), problem, f"name it in the query, as in SELECT NAME AS {absent[0]}, ...")
        naming = Naming({role: role for role in ROLES})
        return table_reading(str(query), lambda: Rows(query), self.values(), naming)


class Rows:
    """The rows of a query as Arrow batches, with a connection of their own; raises `TraceError` for DuckDB's errors."""

    def __init__(self, query: Query) -> None:
        try:
            import duckdb
        except ImportError as error:
            raise TraceError(str(query), "needs DuckDB", 'install it: pip install "moetrace[sql]"') from error
        self._connection = duckdb.connect()
        try:
            with library_errors(str(query), "cannot be run", "check the query, and the files in it"):
                rows = self._connection.sql(query.sql)
                if rows is None:
                    way_out = "write it as SELECT step, layer, expert, tokens FROM ..."
                    raise TraceError(str(query), "gives no rows", way_out)
                # Older versions call it by another name.
                read: Any = getattr(rows, "to_arrow_reader", None) or rows.fetch_arrow_reader
                self._reader: pa.RecordBatchReader = read(BATCH_ROWS)
        except BaseException:
            self._connection.close()
            raise
        self.schema: pa.Schema = self._reader.schema

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return iter(self._reader)

    def close(self) -> None:
        """Let go of the rows and the connection: what DuckDB still runs at the end of a process may not let it end."""
        self._reader.close()
        self._connection.close()
