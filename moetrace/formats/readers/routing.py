"""Routing logs: which experts each token was sent to, as tables or arrays, counted into steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError, shown
from moetrace.formats.errors import library_errors
from moetrace.formats.readers.parquet import COLUMN_BYTES, longest_list
from moetrace.formats.readers.text import BLOCK_BYTES, WRITE_AGAIN, ends_with, head_of, opened
from moetrace.formats.stream.cells import LAYER_IN_NAME, Reading
from moetrace.formats.stream.choices import Choices, reading_of
from moetrace.formats.stream.tables import COUNT_NAMES, LAYER_NAMES, STEP_NAMES, numbers, simple_name

CHOICE_NAMES = (
    "topkids", "topkindices", "topindices", "indices", "expertids", "selectedexperts", "chosenexperts",
    "routedexperts", "topkexperts",
)  # fmt: skip
BATCH_NAMES = (*STEP_NAMES, "batchid", "batch", "forwardpassid")
# Rows of choices counted at a time.
BATCH_ROWS = 1 << 17
MOST_CHOICES = 1 << 20
IN_STEP_FOLDER = re.compile(r"(?:iter|step|iteration)[_=-]?(\d{1,15})", re.IGNORECASE)


@dataclass(frozen=True)
class RoutingFormat:
    """Token-level routing: a list of chosen experts for each token, as Parquet, JSON lines or .npy.

    *tokens* of a layer are a step where the log names none; *experts* is how many a layer has.
    """

    tokens: int | None = None
    experts: int | None = None

    name: ClassVar[str] = "routing"
    needs: ClassVar[str] = (
        "chosen experts per token: Parquet or JSON lines with topk_ids, indices, ...; .npy (tokens, layers, k) named "
        "so or with --from routing; folders iter_<N>/layer_<N>.parquet; --tokens N where there is no step"
    )

    def claims(self, path: Path) -> bool:
        """A table with a column of chosen experts and none of counts, or a folder of such tables by step."""
        if path.is_dir():
            return bool(_by_step(path))
        simple = simple_name(path.name)
        if path.suffix.lower() == ".npy":
            return any(name in simple for name in CHOICE_NAMES if name != "indices")
        try:
            return _choice_column(_names(path)) is not None
        except Exception:  # noqa: BLE001 - whatever cannot be read is no table of choices
            return False

    def read(self, path: Path) -> Reading:
        """Count the choices into the steps that the log names, or into steps of so many tokens."""
        if path.is_dir():
            return self._read_folder(path)
        if path.suffix.lower() == ".npy":
            return self._read_array(path)
        table = Table(path)
        step, layer, _ = table.roles
        assumptions = [
            f"column {name} is the {role}"
            for role, name in (("step", step), ("layer", layer))
            if name not in (None, role)
        ]
        if layer is None:
            assumptions.append("no layer column: one layer, number 0")
        if step is None:
            assumptions.append(_by_tokens(str(path), self.tokens))
        return reading_of(
            lambda: _pieces(table, self.tokens),
            str(path),
            self.experts,
            top_k=table.width(),
            assumptions=tuple(assumptions),
        )

    def _read_folder(self, folder: Path) -> Reading:
        tables = [Table(path, step, layer) for step, steps in _by_step(folder) for layer, path in _by_layer(steps)]
        if not tables:
            raise TraceError(
                str(folder), "holds no folders iter_<N> with files layer_<N>.parquet", "give the folder above"
            )

        def pieces() -> Iterator[Choices]:
            for table in tables:
                yield from _pieces(table, None)

        assumption = "the step is the number in the name of the folder, the layer that in the name of the file"
        return reading_of(pieces, str(folder), self.experts, top_k=tables[0].width(), assumptions=(assumption,))

    def _read_array(self, path: Path) -> Reading:
        where = str(path)
        with library_errors(where, "cannot be read as NumPy data", "save plain numbers again"):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim not in (2, 3) or array.dtype.kind not in "iu" or 0 in array.shape:
            problem = f"is {array.dtype} of shape {array.shape}"
            raise TraceError(where, problem, "give expert numbers (tokens, [layers,] k)")
        assumptions = (_by_tokens(where, self.tokens), "layers are numbered from 0")
        pieces: Callable[[], Iterator[Choices]] = lambda: _of_array(array, self.tokens or 1)  # noqa: E731
        return reading_of(pieces, where, self.experts, top_k=array.shape[-1], assumptions=assumptions)


def _names(path: Path) -> list[str]:
    """The columns of a Parquet file or the keys of the first JSON line."""
    import json

    import pyarrow.parquet as pq

    if ends_with(path, ".parquet", ".pq"):
        names: list[str] = pq.read_schema(path).names
        return names
    return list(json.loads(head_of(path).partition("\n")[0])) if ends_with(path, ".jsonl", ".ndjson") else []


def _choice_column(names: list[str]) -> str | None:
    """The column of chosen experts, where no column holds counts."""
    by_simple = {simple_name(name): name for name in names}
    if any(name in by_simple for name in COUNT_NAMES):
        return None
    return next((by_simple[name] for name in CHOICE_NAMES if name in by_simple), None)


def _by_tokens(where: str, tokens: int | None) -> str:
    if tokens is None:
        raise TraceError(where, "names no step", "say how many tokens one step has with --tokens N")
    return f"every {tokens:,} tokens of a layer are one step"


@dataclass(frozen=True)
class Table:
    """A file of choices as a stream of Arrow batches; *step* and *layer* where the file's place names them."""

    path: Path
    step: int | None = None
    layer: int | None = None
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def roles(self) -> tuple[str | None, str | None, str]:
        """The columns of step, layer and choices; raises `TraceError` when there are no choices."""
        with library_errors(str(self.path), "cannot be read", WRITE_AGAIN):
            names = _names(self.path)
        by_simple = {simple_name(name): name for name in reversed(names)}
        step, layer = (
            next((by_simple[n] for n in wanted if n in by_simple), None) for wanted in (BATCH_NAMES, LAYER_NAMES)
        )
        choices = _choice_column(names)
        if choices is None:
            raise TraceError(
                str(self.path),
                f"has no column of chosen experts among {shown(names) or 'nothing'}",
                "name it topk_ids, a list for each token",
            )
        return step, layer, choices

    def batches(self) -> Iterator[Any]:
        """The Arrow batches of the file; raises `TraceError` where it is damaged."""
        import pyarrow.json as pj
        import pyarrow.parquet as pq

        step, layer, choices = self.roles
        columns = [name for name in (step, layer, choices) if name]
        with library_errors(str(self.path), "cannot be read", WRITE_AGAIN):
            if ends_with(self.path, ".parquet", ".pq"):
                reading = {"pre_buffer": False, "buffer_size": COLUMN_BYTES, "page_checksum_verification": True}
                with pq.ParquetFile(self.path, **reading) as file:
                    rows = max(1, MOST_CHOICES // longest_list(file.metadata, str(self.path)))
                    yield from file.iter_batches(min(BATCH_ROWS, rows), columns=columns)
                return
            read = pj.ReadOptions(block_size=4 * BLOCK_BYTES, use_threads=False)
            with pj.open_json(opened(self.path), read) as batches:
                for batch in batches:
                    yield batch.select(columns)

    def width(self) -> int | None:
        """Experts chosen by each token, as the first row has it."""
        choices = self.roles[2]
        first = next((batch for batch in self.batches() if batch.num_rows), None)
        return None if first is None else len(_flat(first.column(choices), choices, str(self.path))[1][0])


def _flat(lists: Any, name: str, where: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The row of each token and its choices (tokens, k), of lists or of lists of lists."""
    import pyarrow as pa

    row = np.arange(len(lists))
    levels = 0
    while pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type) or pa.types.is_fixed_size_list(lists.type):
        sizes = np.asarray(lists.value_lengths().to_numpy(zero_copy_only=False))
        if lists.null_count:
            raise TraceError(f"{where}, column {name}", "holds a null", "every token needs its choices")
        last_row, last_sizes = row, sizes
        row, lists, levels = np.repeat(row, sizes), lists.flatten(), levels + 1
    values = lists.to_numpy(zero_copy_only=False)
    if not levels or values.dtype.kind not in "iu":
        raise TraceError(
            f"{where}, column {name}", f"holds {lists.type}", "give a list of expert numbers for each token"
        )
    if len(last_sizes) and (last_sizes != last_sizes[0]).any():
        raise TraceError(f"{where}, column {name}", "has tokens with another number of experts", "give k for each")
    if values.size and values.min() < -1:
        raise TraceError(f"{where}, column {name}", f"holds expert {values.min()}", "number experts from 0")
    return last_row, values.reshape(len(last_row), -1).astype(np.int64)


def _pieces(table: Table, tokens: int | None) -> Iterator[Choices]:
    step_name, layer_name, name = table.roles
    where = str(table.path)
    row = 0
    counted: dict[int, int] = {}
    for batch in table.batches():
        of_token, chosen = _flat(batch.column(name), name, where)
        layer = np.zeros(len(of_token), np.int64) if table.layer is None else np.full(len(of_token), table.layer)
        if layer_name is not None:
            layer = numbers(batch, layer_name, row, where)[of_token]
        if step_name is not None:
            step = numbers(batch, step_name, row, where)[of_token]
        elif table.step is not None:
            step = np.full(len(of_token), table.step)
        else:
            step = _places(layer, counted) // (tokens or 1) + 1
            order = np.argsort(step, kind="stable")
            step, layer, chosen = step[order], layer[order], chosen[order]
        row += batch.num_rows
        k = chosen.shape[1]
        yield Choices(np.repeat(step, k), np.repeat(layer, k), chosen.ravel())


def _places(layer: NDArray[np.int64], counted: dict[int, int]) -> NDArray[np.int64]:
    """The number of each token within its layer, after the tokens *counted* before, which are updated."""
    places = np.empty(len(layer), np.int64)
    for number in np.unique(layer).tolist():
        rows = np.flatnonzero(layer == number)
        places[rows] = counted.get(number, 0) + np.arange(len(rows))
        counted[number] = counted.get(number, 0) + len(rows)
    return places


# --- folders and arrays ------------------------------------------------------------------------


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    """The folders of *folder*, or of ``actives`` in it, that are named after a step and hold layers."""
    inside = folder / "actives" if (folder / "actives").is_dir() else folder
    found = [(IN_STEP_FOLDER.fullmatch(child.name), child) for child in inside.iterdir() if child.is_dir()]
    steps = [(int(match[1]), child) for match, child in found if match and _by_layer(child)]
    return sorted(steps)


def _by_layer(folder: Path) -> list[tuple[int, Path]]:
    found = [(LAYER_IN_NAME.fullmatch(child.stem), child) for child in folder.glob("*.parquet")]
    return sorted((int(match[1]), child) for match, child in found if match)


def _of_array(array: NDArray[Any], tokens: int) -> Iterator[Choices]:
    cube = array[:, None] if array.ndim == 2 else array  # (tokens, layers, k)
    rows = max(1, BATCH_ROWS // cube.shape[1])
    for start in range(0, len(cube), rows):
        part = np.asarray(cube[start : start + rows]).astype(np.int64)
        step = (start + np.arange(len(part))) // tokens + 1
        layer = np.tile(np.repeat(np.arange(part.shape[1]), part.shape[2]), len(part))
        yield Choices(np.repeat(step, part[0].size), layer, part.ravel())
