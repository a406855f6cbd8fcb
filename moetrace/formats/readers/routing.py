"""Routing logs: which experts each token was sent to, as tables or arrays, counted into steps."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import SettingError, TraceError
from moetrace.formats.errors import library_errors, require
from moetrace.formats.readers.tokens import CHOICE_NAMES, Table, is_table
from moetrace.formats.stream.arrays import COUNTS_KEYS
from moetrace.formats.stream.cells import Reading
from moetrace.formats.stream.choices import Choices, Counting, reading_of
from moetrace.formats.stream.names import LAYER_IN_NAME
from moetrace.formats.stream.values import simple_name

# Choices of an array counted at a time, and numbers of one looked at to tell choices from counts.
BATCH_CHOICES = 1 << 18
LOOKED_AT = 1 << 16
# Rows of an array that it takes to tell, and experts that a layer may have.
LEAST_ROWS = 100
MOST_EXPERTS = 1024
# Totals of steps may differ by so much of their mean: dropped tokens and ragged batches move them by a few percent,
# numbers of experts that are added up by far more.
TOTALS_VARY = 0.1
IN_STEP_FOLDER = re.compile(r"(?:iter|step|iteration)[_=-]?(\d{1,15})", re.IGNORECASE)


@dataclass(frozen=True)
class RoutingFormat:
    """Token-level routing: the chosen experts of each token, as Parquet, CSV, JSON lines or .npy.

    *tokens* of a layer are a step where the log names none; *experts* is how many a layer has, *top_k* how many a
    token chooses, *ignore* a number that stands for no routed expert.
    """

    tokens: int | None = None
    experts: int | None = None
    top_k: int | None = None
    ignore: int | None = None

    name: ClassVar[str] = "routing"
    needs: ClassVar[str] = (
        "chosen experts per token: Parquet, CSV or JSON lines with topk_ids, indices, ..., or a row for each token and "
        "expert; .npy (tokens, layers, k) named so or with --from routing, (tokens, layers) with --top-k 1; folders "
        "iter_<N>/layer_<N>.parquet; --tokens N where there is no step"
    )

    def claims(self, path: Path) -> bool:
        """A table with a column of chosen experts and none of counts, such an array, or a folder of tables by step."""
        if path.is_dir():
            return bool(_by_step(path))
        try:
            if path.suffix.lower() == ".npz":
                return _choices_in(path) is not None
            if path.suffix.lower() == ".npy":
                return _is_named_so(path.name) or may_be_choices(_array(path))
            return is_table(path)
        except Exception:  # noqa: BLE001 - whatever cannot be read is no log of choices
            return False

    def read(self, path: Path) -> Reading:
        """Count the choices into the steps that the log names, or into steps of so many tokens."""
        if path.is_dir():
            return self._read_folder(path)
        if path.suffix.lower() in (".npy", ".npz"):
            return self._read_array(path)
        table = Table(path)
        columns = table.columns()
        one_each = columns.one_each and columns.step is None
        if one_each and self.top_k is None and self.tokens is not None:
            raise TraceError(str(path), "has a row for each choice", "say how many a token has with --top-k K")
        assumptions = columns.assumptions
        if columns.step is None:
            assumptions = (*assumptions, _by_tokens(str(path), self.tokens))
        elif self.tokens is not None and self.top_k is None:
            raise SettingError(f"{path.name} names its steps: --tokens checks them, together with --top-k")
        # Where each choice is a row, so many rows are a token.
        tokens = (self.tokens or 1) * (self.top_k or 1) if one_each else self.tokens
        counting = self._counting(None if columns.step else tokens, table.highest())
        pieces = partial(table.choices, columns)
        top_k = self.top_k or (None if columns.one_each else table.width(columns))
        return reading_of(pieces, str(path), counting, top_k=top_k, assumptions=assumptions)

    def _counting(self, tokens: int | None, highest: int | None) -> Counting:
        return Counting(tokens, self.experts, self.ignore, highest)

    def _read_folder(self, folder: Path) -> Reading:
        tables = [Table(path, step, layer) for step, steps in _by_step(folder) for layer, path in _by_layer(steps)]
        if not tables:
            raise TraceError(
                str(folder), "holds no folders iter_<N> with files layer_<N>.parquet", "give the folder above"
            )

        def pieces() -> Iterator[Choices]:
            for table in tables:
                yield from table.choices(table.columns())

        assumption = "the step is the number in the name of the folder, the layer that in the name of the file"
        counting = self._counting(None, tables[0].highest())
        top_k = tables[0].width(tables[0].columns())
        return reading_of(pieces, str(folder), counting, top_k=top_k, assumptions=(assumption,))

    def _read_array(self, path: Path) -> Reading:
        where = str(path)
        with library_errors(where, "cannot be read as NumPy data", "save plain numbers again"):
            array = _array(path)
        if array.ndim not in (2, 3) or array.dtype.kind not in "iu" or 0 in array.shape:
            problem = f"is {array.dtype} of shape {array.shape}"
            raise TraceError(where, problem, "give expert numbers (tokens, [layers,] k)")
        named = path.suffix.lower() == ".npz" or _is_named_so(path.name)
        axes, top_k = self._axes(array, where, named)
        sizes = " x ".join(map(str, array.shape))
        assumptions = (f"axes are {axes}: {sizes}", _by_tokens(where, self.tokens), "layers are numbered from 0")
        cube = array if array.ndim == 3 else array[:, None] if top_k != 1 else array[:, :, None]
        highest = int(np.iinfo(array.dtype).max) if array.dtype.kind == "u" else None
        counting = self._counting(self.tokens, highest)
        return reading_of(partial(_of_array, cube), where, counting, top_k=top_k, assumptions=assumptions)

    def _axes(self, array: NDArray[Any], where: str, named: bool) -> tuple[str, int]:
        """What the axes of an array are, and k; raises `TraceError` where two of them may be two things."""
        last = int(array.shape[-1])
        if array.ndim == 3:
            if self.top_k not in (None, last):
                raise TraceError(where, f"has {last} experts for each token and layer", "check --top-k")
            if self.tokens is None and not named and may_be_choices(array):
                problem = "holds numbers that may be experts that were chosen, as their sums differ from layer to layer"
                way = "say --tokens N for choices (tokens, layers, k), or --from numpy for counts"
                raise TraceError(where, problem, way)
            return "tokens, layers, choices", last
        if self.top_k == 1 and last > 1:
            return "tokens, layers", 1
        if self.top_k == last or (self.top_k is None and (named or not may_be_choices(array))):
            return "tokens, choices", last
        raise TraceError(
            where,
            f"is of shape {array.shape}, and its numbers may be experts that were chosen, as their sums vary too much "
            "for counts",
            f"say --top-k 1 for one expert of (tokens, layers), --top-k {last} for {last} experts of each token, both "
            "with --tokens N, or --from numpy for counts (steps, experts)",
        )


def _is_named_so(text: str) -> bool:
    simple = simple_name(text)
    return any(name in simple for name in CHOICE_NAMES if name != "indices")


def _choices_in(path: Path) -> str | None:
    """The array of choices in an archive without counts, by its name."""
    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    return None if set(names) & set(COUNTS_KEYS) else next((name for name in names if _is_named_so(name)), None)


def _array(path: Path) -> NDArray[Any]:
    """The choices in a file, not held in memory, or in an archive, held whole."""
    if path.suffix.lower() != ".npz":
        with np.errstate(over="ignore"):  # a shape beyond 64 bits is refused in a line of its own
            array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return array
    name = _choices_in(path)
    if name is None:
        raise ValueError("no array in it is named routed_experts or topk_ids")
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo(f"{name}.npy").file_size
    require(2 * size, str(path), "the array, which has to be held whole,", "save it as .npy")
    with np.load(path, allow_pickle=False) as arrays:
        held: NDArray[Any] = arrays[name]
    return held


def may_be_choices(array: NDArray[Any]) -> bool:
    """Whether the numbers of an array of two or three dimensions are more likely experts than counts of them.

    By its beginning: tokens of steps add up to about the same, and to the same in all layers of one; numbers of
    experts do not.
    """
    if array.ndim not in (2, 3) or array.dtype.kind not in "iu" or len(array) < LEAST_ROWS or 0 in array.shape:
        return False
    head = np.asarray(array[: max(LEAST_ROWS, LOOKED_AT // array[0].size)]).astype(np.int64)
    highest = int(head.max())
    few = highest < MOST_EXPERTS and head.min() >= -1 and len(np.unique(head)) > highest // 2
    totals = head.sum(axis=-1)
    spread = totals.std() if array.ndim == 2 else totals.std(axis=1).mean()
    return bool(few and array.shape[-1] < MOST_EXPERTS and spread > TOTALS_VARY * totals.mean())


def _by_tokens(where: str, tokens: int | None) -> str:
    if tokens is None:
        raise TraceError(where, "names no step", "say how many tokens one step has with --tokens N")
    return f"every {tokens:,} tokens of a layer are one step"


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    """The folders of *folder*, or of ``actives`` in it, that are named after a step and hold layers."""
    inside = folder / "actives" if (folder / "actives").is_dir() else folder
    found = [(IN_STEP_FOLDER.fullmatch(child.name), child) for child in inside.iterdir() if child.is_dir()]
    steps = [(int(match[1]), child) for match, child in found if match and _by_layer(child)]
    return sorted(steps)


def _by_layer(folder: Path) -> list[tuple[int, Path]]:
    found = [(LAYER_IN_NAME.fullmatch(child.stem), child) for child in folder.glob("*.parquet")]
    return sorted((int(match[1]), child) for match, child in found if match)


def _of_array(cube: NDArray[Any]) -> Iterator[Choices]:
    """The choices of an array (tokens, layers, k)."""
    _, layers, k = cube.shape
    rows = max(1, BATCH_CHOICES // (layers * k))
    for start in range(0, len(cube), rows):
        part = np.asarray(cube[start : start + rows])
        if part.dtype == np.uint64:
            part = np.minimum(part, np.iinfo(np.int64).max)
        yield Choices(None, np.tile(np.arange(layers), len(part)), part.astype(np.int64).reshape(-1, k))
