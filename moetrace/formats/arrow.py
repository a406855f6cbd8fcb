"""Numbers between NumPy and Arrow, without a copy and without pandas, which Arrow's own ways load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa


def to_numpy(array: Any) -> NDArray[Any]:
    """An Arrow array of numbers, or a chunked one, without nulls; read-only where it was one chunk."""
    import pyarrow as pa

    whole = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    values: NDArray[Any] = np.from_dlpack(whole)
    return values


def to_arrow(values: NDArray[Any]) -> pa.Array:
    """A one-dimensional array of numbers."""
    import pyarrow as pa

    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def to_lists(values: NDArray[Any], kind: pa.DataType | None = None) -> pa.Array:
    """The rows of *values* (rows, columns) as lists of the Arrow type *kind*, which may forbid nulls."""
    import pyarrow as pa

    rows, columns = values.shape
    kind = kind or pa.list_(pa.from_numpy_dtype(values.dtype))
    offsets = np.arange(rows + 1, dtype=np.int32) * columns
    return pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(offsets)], children=[to_arrow(values.ravel())])
