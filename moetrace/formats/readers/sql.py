"""The rows of a DuckDB query as a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from moetrace.errors import TraceError, shown
from moetrace.formats.errors import library_errors
from moetrace.formats.location import Query
from moetrace.formats.stream.cells import Reading
from moetrace.formats.stream.tables import Naming, ValueFormat
from moetrace.formats.stream.text import table_reading

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
        columns = _batches(query).schema.names
        absent = [role for role in ROLES if role not in columns]
        if absent:
            problem = f"has no column {absent[0]} among {shown(columns)}"
            way_out = f"name it in the query, as in SELECT {columns[0]} AS {absent[0]}, ..."
            raise TraceError(str(query), problem, way_out)
        naming = Naming({role: role for role in ROLES})
        return table_reading(str(query), lambda: _batches(query), self.values(), naming)


def _batches(query: Query) -> pa.RecordBatchReader:
    """The rows of the query as Arrow batches; raises `TraceError` with the first line of DuckDB's error."""
    try:
        import duckdb
    except ImportError as error:
        raise TraceError(str(query), "needs DuckDB", 'install it: pip install "moetrace[sql]"') from error
    with library_errors(str(query), "cannot be run", "check the query, and the files in it"):
        rows = duckdb.connect().sql(query.sql)
        if rows is None:
            raise TraceError(str(query), "gives no rows", "write it as SELECT step, layer, expert, tokens FROM ...")
        # Older versions call it by another name.
        read: Any = getattr(rows, "to_arrow_reader", None) or rows.fetch_arrow_reader
        reader: pa.RecordBatchReader = read(BATCH_ROWS)
        return reader
