"""Tables of choices: a list of experts for each token, columns side by side, or a row for each choice."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError, shown
from moetrace.formats.errors import library_errors
from moetrace.formats.readers.parquet import COLUMN_BYTES, longest_list
from moetrace.formats.readers.text import BLOCK_BYTES, WRITE_AGAIN, csv_batches, ends_with, head_of, header_of, opened
from moetrace.formats.stream.choices import Choices, side_by_side
from moetrace.formats.stream.columns import is_text, layers_in, numbers
from moetrace.formats.stream.names import LAYER_IN_NAME, layer_of
from moetrace.formats.stream.roles import EXPERT_NAMES, LAYER_NAMES, STEP_NAMES
from moetrace.formats.stream.texts import are_whole, lists_in
from moetrace.formats.stream.values import VALUE_NAMES, simple_name

CHOICE_NAMES = (
    "topkids", "topkindices", "topindices", "indices", "expertids", "selectedexperts", "chosenexperts",
    "routedexperts", "topkexperts",
)  # fmt: skip
BATCH_NAMES = (*STEP_NAMES, "batchid", "batch", "forwardpassid")
TOKEN_NAMES = ("token", "tokenid", "tokenidx", "tokenindex", "tokenpos", "tokenposition", "position")
# Columns of the first, second, ... choice.
SIDE_BY_SIDE = re.compile(r"(?:topk|top|choice|expert|expertid)_?(\d{1,3})", re.IGNORECASE)
BATCH_ROWS = 1 << 17
MOST_CHOICES = 1 << 20


@dataclass(frozen=True)
class Roles:
    """The columns of step, layer and choices of a table.

    *one_each* is where each row is one choice of a token, *of_layers* where each column of them is a layer.
    """

    step: str | None
    layer: str | None
    choices: tuple[str, ...]
    one_each: bool
    of_layers: bool = False

    @property
    def all(self) -> list[str]:
        """Those that have to be read."""
        return [name for name in (self.step, self.layer, *self.choices) if name]

    @property
    def assumptions(self) -> tuple[str, ...]:
        """The columns taken under another name than ours."""
        found = [
            f"column {name} is the {role}"
            for role, name in (("step", self.step), ("layer", self.layer))
            if name not in (None, role)
        ]
        if self.one_each:
            found.append(f"each row is a choice of the expert in column {self.choices[0]}")
        elif self.of_layers:
            return (*found, f"columns {shown(self.choices)} are the choice of a token in each layer")
        elif len(self.choices) > 1:
            found.append(f"columns {shown(self.choices)} are the choices of a token")
        return (*found, *([] if self.layer else ["no layer column: one layer"]))


def are_choices(names: Sequence[str]) -> bool:
    """Whether columns called *names* hold choices of tokens."""
    return _roles(names) is not None


def is_table(path: Path) -> bool:
    """Whether a file is a table of choices; raises whatever a file that is no table makes its library raise."""
    return _roles(_names(path)) is not None


def _roles(names: Sequence[str], forced: bool = False) -> Roles | None:
    """The roles of columns called *names*, None where they hold no choices; *forced* is whether they are said to."""
    by_simple = {simple_name(name): name for name in reversed(names)}

    def first(wanted: Sequence[str]) -> str | None:
        return next((by_simple[name] for name in wanted if name in by_simple), None)

    token = first(TOKEN_NAMES)
    step, layer = first(BATCH_NAMES), first(LAYER_NAMES)
    counts = [by_simple[name] for name in VALUE_NAMES if name in by_simple and by_simple[name] != token]
    if counts and not (token and set(map(simple_name, counts)) <= {"prob", "share", "fraction"}):
        return None
    if listed := first(CHOICE_NAMES):
        return Roles(step, layer, (listed,), one_each=False)
    beside = [name for name in names if SIDE_BY_SIDE.fullmatch(name)]
    if beside and (token or simple_name(beside[0]).startswith(("top", "choice"))):
        return Roles(step, layer, tuple(beside), one_each=False)
    of_layers = [name for name in names if LAYER_IN_NAME.fullmatch(name)]
    if of_layers and token and layer is None:
        return Roles(step, None, tuple(of_layers), one_each=False, of_layers=True)
    expert = first(EXPERT_NAMES)
    if expert and (forced or token or (step is None and layer)):
        return Roles(step, layer, (expert,), one_each=True)
    return None


def _names(path: Path) -> list[str]:
    """The columns of a Parquet file, of a header, or the keys of the first JSON line."""
    import pyarrow.parquet as pq

    if ends_with(path, ".parquet", ".pq"):
        names: list[str] = pq.read_schema(path).names
        return names
    if ends_with(path, ".csv", ".tsv"):
        return header_of(path)
    return list(json.loads(head_of(path).partition("\n")[0])) if ends_with(path, ".jsonl", ".ndjson") else []


@dataclass(frozen=True)
class Table:
    """A file of choices as a stream of Arrow batches; *step* and *layer* where the file's place names them."""

    path: Path
    step: int | None = None
    layer: int | None = None

    def columns(self) -> Roles:
        """The columns of step, layer and choices; raises `TraceError` when there are no choices."""
        with library_errors(str(self.path), "cannot be read", WRITE_AGAIN):
            names = _names(self.path)
        roles = _roles(names, forced=True)
        if roles is None:
            raise TraceError(
                str(self.path),
                f"has no column of chosen experts among {shown(names) or 'nothing'}",
                "name it topk_ids, a list for each token",
            )
        return roles

    def _batches(self, roles: Roles) -> Iterator[Any]:
        """The Arrow batches of the file; raises `TraceError` where it is damaged."""
        import pyarrow.json as pj
        import pyarrow.parquet as pq

        with library_errors(str(self.path), "cannot be read", WRITE_AGAIN):
            if ends_with(self.path, ".parquet", ".pq"):
                reading = {"pre_buffer": False, "buffer_size": COLUMN_BYTES, "page_checksum_verification": True}
                with pq.ParquetFile(self.path, **reading) as file:
                    rows = max(1, MOST_CHOICES // longest_list(file.metadata, str(self.path)))
                    yield from file.iter_batches(min(BATCH_ROWS, rows), columns=roles.all)
                return
            if ends_with(self.path, ".csv", ".tsv"):
                found = csv_batches(self.path)
            else:
                read = pj.ReadOptions(block_size=4 * BLOCK_BYTES, use_threads=False)
                found = pj.open_json(opened(self.path), read)
            with found as batches:
                for batch in batches:
                    yield batch.select(roles.all)

    def choices(self, roles: Roles) -> Iterator[Choices]:
        """The choices of the tokens, row by row."""
        where = str(self.path)
        of_file = self.layer if self.layer is not None else (layer_of(self.path) or 0)
        row = 0
        for batch in self._batches(roles):
            of_token, chosen = _chosen(batch, roles, row, where)
            layer = np.full(len(of_token), of_file)
            if roles.layer is not None and self.layer is None:
                layer = layers_in(batch, roles.layer, row, where)[of_token]
            step = None if self.step is None else np.full(len(of_token), self.step)
            if roles.step is not None and self.step is None:
                step = numbers(batch, roles.step, row, where)[of_token]
            row += batch.num_rows
            if roles.of_layers:
                layer = np.tile([layer_of(Path(name)) or 0 for name in roles.choices], len(chosen))
                step = None if step is None else step.repeat(chosen.shape[1])
                chosen = chosen.reshape(-1, 1)
            yield Choices(step, layer, chosen)

    def width(self, roles: Roles) -> int | None:
        """Experts chosen by each token, as the first row has it."""
        first = next((batch for batch in self._batches(roles) if batch.num_rows), None)
        if roles.of_layers:
            return 1
        return None if first is None else int(_chosen(first.slice(0, 1), roles, 0, str(self.path))[1].shape[1])

    def highest(self) -> int | None:
        """The largest number that the type of the choices can hold, where it is unsigned."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not ends_with(self.path, ".parquet", ".pq"):
            return None
        with library_errors(str(self.path), "cannot be read", WRITE_AGAIN):
            kind = pq.read_schema(self.path).field(self.columns().choices[0]).type
        while hasattr(kind, "value_type"):
            kind = kind.value_type
        return 2**kind.bit_width - 1 if pa.types.is_unsigned_integer(kind) else None


def _chosen(batch: Any, roles: Roles, row: int, where: str) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """The row of each token and its choices (tokens, k)."""

    if len(roles.choices) > 1 or roles.one_each:
        beside = [numbers(batch, name, row, where) for name in roles.choices]
        return np.arange(batch.num_rows), _checked(np.stack(beside, axis=1), roles.choices[0], where)
    name = roles.choices[0]
    column = batch.column(name)
    if is_text(column.type):
        column = lists_in(column, name, row, where)
    return _flat(column, name, where)


def _flat(lists: Any, name: str, where: str) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
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
    if levels and values.dtype.kind == "f" and are_whole(values):
        values = values.astype(np.int64)
    if not levels or values.dtype.kind not in "iu":
        raise TraceError(
            f"{where}, column {name}", f"holds {lists.type}", "give a list of expert numbers for each token"
        )
    if len(last_sizes) and (last_sizes != last_sizes[0]).any():
        raise TraceError(f"{where}, column {name}", "has tokens with another number of experts", "give k for each")
    return last_row, _checked(side_by_side(values, last_sizes), name, where)


def _checked(chosen: NDArray[np.int64], name: str, where: str) -> NDArray[np.int64]:
    if chosen.size and chosen.min() < -1:
        raise TraceError(f"{where}, column {name}", f"holds expert {chosen.min()}", "number experts from 0")
    return chosen
