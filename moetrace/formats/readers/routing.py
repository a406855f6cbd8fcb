"""Routing logs: which experts each token was sent to, as tables or arrays, counted into steps."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.readers.arrays import COUNTS_KEYS, Array, arrays_in, dig, keys_in
from moetrace.formats.readers.arrow import COLUMN_BYTES, longest_list
from moetrace.formats.readers.tensors import is_torch, keys_of
from moetrace.formats.sources import LAYER_IN_NAME, STEP_IN_NAME, WRITE_AGAIN, layer_in_name, library_errors
from moetrace.formats.stream import columns, tables, text
from moetrace.formats.stream.cells import Format, Reading
from moetrace.formats.stream.choices import Choices, choices_reading, side_by_side
from moetrace.formats.stream.columns import Rows, doubt_of, simple_name
from moetrace.trace import FLOAT64_EXACT
from moetrace.words import Phase

# What people call choices, the batch and the token that they are of.
CHOICE_NAMES = (
    "topkids", "topkindices", "topindices", "indices", "expertids", "selectedexperts", "chosenexperts",
    "routedexperts", "topkexperts",
)  # fmt: skip
BATCH_NAMES = (*tables.STEP_NAMES, "batchid", "batch", "forwardpassid")
TOKEN_NAMES = ("token", "tok", "tokenid", "tokenidx", "tokenindex", "tokenpos", "tokenposition", "position")
# Where answers of servers have the experts of their tokens.
ANSWER_KEY = "routed_experts"
# How a request begins: a list of passes, each an object with the choices of layers by number.
REQUEST = re.compile(r'\s*\[\s*\{\s*(?:"\d+"\s*:\s*null\s*,\s*)*"\d+"\s*:\s*\[\s*\[')
# Columns of the first, second, ... choice.
SIDE_BY_SIDE = re.compile(r"(?:topk|top|choice|expert|expertid)_?(\d{1,3})", re.IGNORECASE)
# Rows, and choices, that are counted at a time.
BATCH_ROWS = 1 << 17
MOST_CHOICES, BATCH_CHOICES = 1 << 20, 1 << 18


@dataclass(frozen=True)
class RoutingFormat(Format):
    """Chosen experts per token: Parquet, CSV or JSON lines with topk_ids, indices, ..., or a row for each token and
    expert; arrays (tokens, layers, k) named so or with --from routing, (tokens, layers) with --top-k 1; answers of
    servers with routed_experts; JSON of a request, a list of passes; folders iter_<N>/layer_<N>.parquet; --tokens N
    where there is no step.

    *tokens* of a layer are a step where the log names none; *experts* is how many a layer has, *top_k* how many a
    token chooses, *ignore* a number that is not a routed expert, *key* where the choices are in a document,
    *where* takes rows with one value in a column alone, *phase* the first pass of a request or the others.
    """

    tokens: int | None = None
    experts: int | None = None
    phase: Phase | None = None
    top_k: int | None = None
    ignore: int | None = None
    key: str | None = None
    where: str | Mapping[str, str] | None = None
    name: ClassVar[str] = "routing"

    def claims(self, path: Path) -> bool:
        """A table with a column of chosen experts and none of counts, such an array, or a folder of tables by step."""
        if path.is_dir():
            return bool(_layer_files(path))
        try:
            if is_torch(path):
                return _names_choices(path.name) or _names_choices(keys_of(path).decode("ascii", "ignore"))
            if path.suffix.lower() in (".npy", ".npz"):
                arrays = arrays_in(path)
                if path.suffix.lower() == ".npy" and not _names_choices(path.name):
                    return doubt_of(arrays["counts"].head(), by_token=True) == "choices"
                named = any(map(_names_choices, arrays)) and not {*arrays} & {*COUNTS_KEYS}
                return named or path.suffix.lower() == ".npy"
            return _is_answers(path) or _is_request(path) or choice_columns(*_columns_of(path)) is not None
        except Exception:  # noqa: BLE001 - whatever cannot be read is no log of choices
            return False

    def read(self, path: Path) -> Reading:
        """Count the choices into the steps that the log names, or into steps of so many tokens."""
        where = str(path)
        asked: dict[str, Any] = {"experts": self.experts, "ignore": self.ignore}
        if not path.is_dir() and _is_request(path):
            assumption = "each object is a forward pass, and a step; keys are layers, of which null are no MoE layers"
            passes = partial(_passes, path, self.phase)
            reading = choices_reading(passes, where, (assumption,), top_k=self.top_k, **asked)
            return replace(reading, steps_are_implicit=True)
        if self.phase is not None:
            raise SettingError(f"{path.name} does not tell phases apart, and has no use for --phase")
        if path.is_dir():
            files = [partial(_choices, file, ChoiceColumns.of(file), {}, *at) for *at, file in _layer_files(path)]
            if not files:
                problem = "holds no folders iter_<N> with files layer_<N>.parquet"
                raise TraceError(where, problem, "give the folder above")
            assumption = "the step is the number in the name of the folder, the layer that in the name of the file"
            pieces = lambda: chain.from_iterable(file() for file in files)  # noqa: E731
            return choices_reading(pieces, where, (assumption,), **asked)
        if path.suffix.lower() in (".npy", ".npz") or is_torch(path) or text.ends_with(path, ".json"):
            return self._read_array(path, asked)
        if text.ends_with(path, ".jsonl", ".ndjson") and (self.key or _is_answers(path)):
            assumption = "each line is an answer, and a step; layers are numbered from 0"
            answers = partial(_answers, path, self.key, self.top_k)
            return choices_reading(answers, where, (assumption,), top_k=self.top_k, **asked)
        table, tokens, top_k = ChoiceColumns.of(path), self.tokens, self.top_k
        assumed = tuple(
            f"column {name} is the {role}" for role, name in table.roles.items() if name not in (None, role)
        )
        if table.one_each:
            assumed += (f"each row is a choice of the expert in column {table.columns[0]}",)
        elif len(table.columns) > 1:
            assumed += (f"columns {shown(table.columns)} are the choices of a token",)
        assumed += () if table.roles["layer"] else ("no layer column: one layer",)
        if table.roles["step"] is None:
            if table.one_each and top_k is None and tokens is not None:
                raise TraceError(where, "has a row for each choice", "give the choices of a token with --top-k K")
            assumed = (*assumed, self._by_tokens(where))
            # Where each choice is a row, so many rows are a token.
            tokens = (tokens or 1) * (top_k or 1) if table.one_each else tokens
        elif tokens is not None and top_k is None:
            raise SettingError(f"{path.name} names its steps: --tokens checks them, together with --top-k")
        else:
            tokens = None
        top_k = top_k or (0 if table.one_each else None)
        rows = partial(_choices, path, table, columns.pairs_of(self.where))
        return choices_reading(rows, where, assumed, tokens=tokens, top_k=top_k, **asked)

    def _by_tokens(self, where: str) -> str:
        if self.tokens is None:
            raise TraceError(where, "names no step", "give the tokens of one step with --tokens N")
        return f"every {self.tokens:,} tokens of a layer are one step"

    def _read_array(self, path: Path, asked: Mapping[str, Any]) -> Reading:
        where, arrays = str(path), arrays_in(path, self.key)
        if all(map(columns.OF_LAYER.search, arrays)) or all(map(str.isdecimal, arrays)):
            with library_errors(where, "holds choices of layers of unlike shapes", "save as many tokens of each layer"):
                beside = np.stack([array.whole() for array in arrays.values()], axis=1)  # (tokens, layers, k)
            arrays = {"routed_experts": Array.held(beside)}
        named = None if {*arrays} & {*COUNTS_KEYS} else next(filter(_names_choices, arrays), None)
        name = named or ("counts" if self.key or len(arrays) == 1 else None)
        if name is None:
            problem = f"holds {shown(arrays)}, and none is called like choices"
            raise TraceError(where, problem, keys_in(arrays) or "name it routed_experts or topk_ids")
        array, last = arrays[name], arrays[name].shape[-1] if arrays[name].shape else 0
        shape = array.shape
        if len(shape) not in (2, 3) or array.dtype.kind not in "iu" or 0 in shape:
            problem = f"is {array.dtype} of shape {shape}"
            raise TraceError(where, problem, "give expert numbers (tokens, [layers,] k)")
        unsure = not self.key and not _names_choices(path.name) and named is None
        unsure = unsure and doubt_of(array.head(), by_token=True) == "choices"
        axes, top_k = "tokens, layers, choices", last
        if len(shape) == 3:
            if self.top_k not in (None, last):
                raise TraceError(where, f"has {last} experts for each token and layer", "check --top-k")
            if self.tokens is None and unsure:
                problem = "holds numbers that may be experts that were chosen, as their sums differ from layer to layer"
                way_out = "say --tokens N for choices (tokens, layers, k), or --from numpy for counts"
                raise TraceError(where, problem, way_out)
        elif self.top_k == 1 and last > 1:
            axes, top_k = "tokens, layers", 1
        elif self.top_k == last or (self.top_k is None and not unsure):
            axes = "tokens, choices"
        else:
            problem = f"is of shape {shape}, and its numbers may be experts that were chosen, as their sums vary too "
            way_out = f"say --top-k 1 for one expert of (tokens, layers), --top-k {last} for {last} experts of each "
            way_out += "token, both with --tokens N, or --from numpy for counts (steps, experts)"
            raise TraceError(where, problem + "much for counts", way_out)
        sizes = " x ".join(map(str, shape))
        assumed = (f"axes are {axes}: {sizes}", self._by_tokens(where), "layers are numbered from 0")
        pieces = partial(_array_choices, array, "layers" in axes)
        return choices_reading(pieces, where, assumed, tokens=self.tokens, top_k=top_k, **asked)


def _names_choices(name: str) -> bool:
    return any(known in simple_name(name) for known in CHOICE_NAMES if known != "indices")


def _array_choices(array: Array, by_layer: bool) -> Iterator[Choices]:
    """The choices of an array (tokens, layers, k), or (tokens, layers) if it is *by_layer*, else (tokens, k)."""
    layers, k = (array.shape[1], math.prod(array.shape[2:])) if by_layer else (1, array.shape[1])
    for part in array.rows(max(1, BATCH_CHOICES // (layers * k))):
        if part.dtype == np.uint64:
            part = np.minimum(part, np.iinfo(np.int64).max)
        yield Choices(None, np.tile(np.arange(layers), len(part)), part.astype(np.int64).reshape(-1, k))


def _is_answers(path: Path) -> bool:
    """Whether the lines of a file are answers of a server with the experts of their tokens."""
    line = text.head_of(path).partition("\n")[0] if text.ends_with(path, ".jsonl", ".ndjson") else ""
    first = text.json_of(line) if f'"{ANSWER_KEY}"' in line else None
    return isinstance(first, dict) and ANSWER_KEY not in first


def _answers(path: Path, key: str | None, top_k: int | None) -> Iterator[Choices]:
    """The choices of the tokens of answers, one a line: nested lists, or base64 of a .npy, or of int32 for so many."""
    for line, row in enumerate(text.json_objects(path), 1):
        where = f"{path}, line {line}"
        found = dig(row, key, where) if key else _answer_in(row)
        for value in found if isinstance(found, list) and found and isinstance(found[0], str) else [found]:
            with library_errors(where, "holds no choices (tokens, layers, k)", "write them as nested lists"):
                data = base64.b64decode(value) if isinstance(value, str) else b""
                array = np.load(io.BytesIO(data)) if data.startswith(b"\x93NUMPY") else np.asarray(value)
                if data and array.dtype.kind not in "iu":
                    flat, usage = np.frombuffer(data, "<i4"), row.get("meta_info") or row.get("usage") or {}
                    # All tokens but the last, which no pass was made for.
                    tokens = int(usage.get("prompt_tokens", 0)) + int(usage.get("completion_tokens", 1)) - 1
                    if top_k is None or not tokens or len(flat) % (tokens * top_k):
                        way_out = "give the experts that each token is sent to with --top-k K"
                        raise TraceError(where, f"holds {len(flat)} numbers for {tokens} tokens", way_out)
                    array = flat.reshape(tokens, -1, top_k)
            array = _nested(array, where, "tokens, layers, k")
            rows = array.reshape(-1, array.shape[-1])
            yield Choices(np.full(len(rows), line), np.tile(np.arange(array.shape[1]), len(array)), rows)


def _nested(value: Any, where: str, axes: str) -> NDArray[np.int64]:
    """Choices with these *axes*, from nested lists or an array; raises `TraceError` for anything else."""
    with library_errors(where, f"holds no choices ({axes})", "write them as nested lists"):
        array = np.asarray(value)
        if array.ndim != len(axes.split(",")) or array.dtype.kind not in "iu":
            raise ValueError(f"an array {array.dtype} of shape {array.shape}")
        return array.astype(np.int64)


def _is_request(path: Path) -> bool:
    """Whether a document is one request of MoE_expert_selection_trace, published with arXiv 2510.05497."""
    return text.ends_with(path, ".json") and bool(REQUEST.match(text.head_of(path)))


def _passes(path: Path, phase: Phase | None) -> Iterator[Choices]:
    """The choices of a request: objects with the choices (tokens, k) of each layer, the first of its prefill."""
    found: list[Choices] = []
    first, last = {"prefill": (0, 1), "decode": (1, None)}.get(phase or "", (0, None))
    for step, layers in enumerate(text.document(path)[first:last], 1):
        where = f"{path}, pass {first + step}"
        if not isinstance(layers, dict) or not all(map(str.isdecimal, layers)):
            raise TraceError(where, "is no object with layers", "give each layer by its number")
        for layer, tokens in layers.items():
            if tokens is None:
                continue
            rows = _nested(tokens, f"{where}, layer {layer}", "tokens, k")
            found.append(Choices(np.full(len(rows), step), np.full(len(rows), int(layer)), rows))
    if not found:
        which = f"{phase} pass" if phase else "layer with choices"
        raise TraceError(str(path), f"has no {which}", "leave this file out, or --phase" if phase else "is it whole?")
    with library_errors(str(path), "holds tokens with unlike numbers of experts", "give k for each"):
        yield Choices(*map(np.concatenate, zip(*found)))


def _answer_in(value: Any) -> Any:
    """What lies under the key of choices, at any depth; a list where it is there several times."""
    if isinstance(value, dict):
        if ANSWER_KEY in value:
            return value[ANSWER_KEY]
        value = list(value.values())
    found = [part for part in map(_answer_in, value) if part is not None] if isinstance(value, list) else []
    return found[0] if len(found) == 1 else found or None


def _layer_files(folder: Path) -> list[tuple[int, int, Path]]:
    """Step, layer and path of the files in the folders of *folder*, or of ``actives`` in it, named after a step."""
    inside = folder / "actives" if (folder / "actives").is_dir() else folder
    steps = [(STEP_IN_NAME.fullmatch(child.name), child) for child in inside.iterdir() if child.is_dir()]
    files = [(step, file) for step, child in steps if step for file in child.glob("*.parquet")]
    layers = [(int(step[1]), LAYER_IN_NAME.fullmatch(file.stem), file) for step, file in files]
    return sorted((step, int(layer[1]), file) for step, layer, file in layers if layer)


def _columns_of(path: Path) -> tuple[list[str], list[str]]:
    """The columns of a Parquet file, of a header, or the keys of the first JSON line; and those that hold lists."""
    if text.ends_with(path, ".parquet", ".pq"):
        schema = pq.read_schema(path)
        return schema.names, [field.name for field in schema if columns.kind_of(field.type) == "list"]
    if text.ends_with(path, ".csv", ".tsv"):
        return text.header_of(path)[0], []
    first = json.loads(text.head_of(path).partition("\n")[0]) if text.ends_with(path, ".jsonl", ".ndjson") else {}
    return list(first), [key for key, value in first.items() if isinstance(value, list)]


class ChoiceColumns(NamedTuple):
    """Which *columns* of a table hold the choices of tokens, and which, by their *roles*, their step and layer.

    *one_each* is where each row is one choice of a token; *apart* are columns whose values are not of one trace.
    """

    columns: tuple[str, ...]
    roles: Mapping[str, str | None]
    apart: tuple[str, ...]
    one_each: bool

    @classmethod
    def of(cls, path: Path) -> ChoiceColumns:
        """By the names of the columns of a file; raises `TraceError` when none are choices."""
        with library_errors(str(path), "cannot be read", WRITE_AGAIN):
            names, lists = _columns_of(path)
        found = choice_columns(names, lists, forced=True)
        if found is None:
            problem = f"has no column of chosen experts among {shown(names) or 'nothing'}"
            raise TraceError(str(path), problem, "name it topk_ids, a list for each token")
        return found


def choice_columns(names: Sequence[str], lists: Sequence[str] = (), forced: bool = False) -> ChoiceColumns | None:
    """Those among *names*, None where there are no choices; *forced* is whether there should be.

    *lists* are columns that hold lists, which choices are where each row is a token.
    """
    named = {simple_name(name): name for name in reversed(names)}
    token, layer = tables.first_named(named, TOKEN_NAMES), tables.first_named(named, tables.LAYER_NAMES)
    roles = {"step": tables.first_named(named, BATCH_NAMES), "layer": layer}
    counts = [named[name] for name in columns.VALUE_NAMES if name in named and named[name] != token]
    if counts and not (token and set(map(simple_name, counts)) <= {"prob", "share", "fraction"}):
        return None
    chosen = [name for name in lists if simple_name(name).startswith("expert")] or lists
    listed = tables.first_named(named, CHOICE_NAMES) or next(iter(chosen if token or forced else ()), None)
    beside = [name for name in names if SIDE_BY_SIDE.fullmatch(name)]
    beside = beside if beside and (token or forced or simple_name(beside[0]).startswith(("top", "choice"))) else []
    expert = tables.first_named(named, tables.EXPERT_NAMES)
    expert = expert if forced or token or (roles["step"] is None and layer) else None
    found = tuple([listed] if listed else beside or ([expert] if expert else []))
    apart = tuple(name for name in names if simple_name(name) in (*tables.PHASE_NAMES, *tables.MODEL_NAMES))
    return ChoiceColumns(found, roles, apart, not listed and not beside) if found else None


def _choices(
    path: Path, table: ChoiceColumns, only: Mapping[str, str], at_step: int | None = None, at_layer: int | None = None
) -> Iterator[Choices]:
    """The choices of the tokens, row by row, of rows with these values alone, by column.

    The step and the layer are those of the columns, unless the place of the file names them.
    """
    step_column = None if at_step is not None else table.roles["step"]
    layer_column = None if at_layer is not None else table.roles["layer"]
    seen: dict[str, set[str]] = {name: set() for name in table.apart if name not in only}
    every = (*table.roles.values(), *table.columns, *table.apart, *only)
    row = 0
    for batch in _batches(path, [*dict.fromkeys(name for name in every if name)]):
        rows = Rows(batch, row, str(path)).of(only)
        row += batch.num_rows
        for name, values in seen.items():
            rows.check_one(name, values)
        of_token, chosen, layer = _chosen(rows, table)
        if layer_column is not None:
            layer = rows.numbers(layer_column, of_layers=True)[of_token]
        elif layer is None:
            layer = np.full(len(of_token), at_layer if at_layer is not None else layer_in_name(path) or 0)
        step = None if at_step is None else np.full(len(of_token), at_step)
        yield Choices(step if step_column is None else rows.numbers(step_column)[of_token], layer, chosen)


def _batches(path: Path, names: list[str]) -> Iterator[Any]:
    """The Arrow batches of the columns *names* of the file; raises `TraceError` where it is damaged."""
    with library_errors(str(path), "cannot be read", WRITE_AGAIN):
        if text.ends_with(path, ".parquet", ".pq"):
            reading = {"pre_buffer": False, "buffer_size": COLUMN_BYTES, "page_checksum_verification": True}
            with pq.ParquetFile(path, **reading) as file:
                rows = max(1, MOST_CHOICES // longest_list(file.metadata, str(path)))
                yield from file.iter_batches(min(BATCH_ROWS, rows), columns=names)
            return
        is_csv = text.ends_with(path, ".csv", ".tsv")
        json_lines = partial(text.json_batches, block=4 * text.BLOCK_BYTES)
        with (text.csv_batches if is_csv else json_lines)(path) as batches:
            yield from (batch.select(names) for batch in batches)


def _chosen(rows: Rows, table: ChoiceColumns) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64] | None]:
    """The row of each token and its choices (tokens, k); and its layer, where cells are lists of three levels."""
    of_token, layers, at = np.arange(rows.batch.num_rows), None, rows.place(table.columns[0])
    if len(table.columns) > 1 or table.one_each:
        chosen = np.stack([rows.numbers(column) for column in table.columns], axis=1)
    else:
        flat, (*outer, sizes), nulls = columns.flattened(rows.lists(table.columns[0]))
        if nulls:
            raise TraceError(at, "holds a null", "every token needs its choices")
        for level in outer:
            of_token = np.repeat(of_token, level)
        if len(outer) > 1 and table.roles["layer"] is None:
            layers = columns.places(outer[1])
        values = flat.to_numpy(zero_copy_only=False)
        if values.dtype.kind == "f" and ((np.abs(values) <= FLOAT64_EXACT) & (values == np.floor(values))).all():
            values = values.astype(np.int64)
        if values.dtype.kind not in "iu":
            raise TraceError(at, f"holds {flat.type}", "give a list of expert numbers for each token")
        if len(sizes) and (sizes != sizes[0]).any():
            raise TraceError(at, "has tokens with another number of experts", "give k for each")
        chosen = side_by_side(values, sizes)
    if chosen.size and chosen.min() < -1:
        raise TraceError(at, f"holds expert {chosen.min()}", "number experts from 0")
    return of_token, chosen, layers
