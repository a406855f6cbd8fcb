"""Text, plain or compressed: delimited columns, JSON lines and documents, logs that a pattern takes apart, scrapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.readers.arrays import COUNTS_KEYS, PART, Array, array_reading, dig, keys_in
from moetrace.formats.readers.routing import choice_columns
from moetrace.formats.sources import library_errors, step_in_name
from moetrace.formats.stream import columns, text
from moetrace.formats.stream.cells import Cells, Reading
from moetrace.formats.stream.columns import OF_LAYER, Tags, ValueFormat, Values, doubt_of, simple_name
from moetrace.formats.stream.tables import EXPERT_NAMES, LAYER_NAMES, STEP_NAMES, TableFormat, table_reading
from moetrace.trace import FLOAT64_EXACT

# Keys of lists of windows, each a mapping with its counts.
WINDOWS = ("load_history", "history", "windows")
NEEDS = (
    "it needs one of load_history, logical_count or counts, columns and data of a table, a list of objects with step, "
    "layer and counts, or layers whose values are experts; any other goes with moetrace.from_frame (docs/recipes.md)"
)
LINES_NEED = "each line needs a step, and experts, or layers of experts, by key"
AXES = ("step", "layer", "expert")
# What the key of a level says that it numbers, and where its number stands.
WORDS = {
    "expert": re.compile(r"experts?[._/\[-]?(\d{1,15})$|^e(\d{1,15})$", re.IGNORECASE),
    "layer": OF_LAYER,
    "step": re.compile(r"(?:step|iter|iteration|window|pass)[._/\[-]?(\d{1,15})", re.IGNORECASE),
}
# Lines with keys that are taken at a time.
LINES = 1000
# What lines with the counts of a layer, or of an expert below the name of its layer, mostly have.
USUAL = (
    r"step\D{0,3}(?P<step>\d+).*?layer\D{0,3}(?P<layer>\d+).*?(?P<tokens>\[[\d, ]+\])",
    r"layer\D{0,3}(?P<layer>\d+)|expert\D{0,3}(?P<expert>\d+)\D+(?P<tokens>\d+)",
)
GROUPS = {"step", "layer", "expert", "tokens"}
# Rows handed on at a time, and characters of a line that are looked at.
BATCH, MOST_LINE = 1 << 16, 1 << 20
SAMPLE = re.compile(r"(?P<name>[A-Za-z_:][\w:]*)\{(?P<labels>[^}]*)\} (?P<value>[^ ]+)(?: \d+)?$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# Labels of which one value alone is of a trace; over others, such as engines and ranks, counts are added up.
MODELS = ("model", "model_name", "served_model_name")

Keys = tuple[str | int, ...]
Row = tuple[int, int, int, float]


@dataclass(frozen=True)
class CsvFormat(TableFormat):
    """A header with the columns of the parquet format, long or wide; plain, .gz or .zst; any of , ; | and tabs."""

    name: ClassVar[str] = "csv"

    def claims(self, path: Path) -> bool:
        return path.is_file() and text.ends_with(path, ".csv", ".tsv")

    def read(self, path: Path) -> Reading:
        """Match the header to a layout and stream the rows."""
        where, (names, delimiter) = str(path), text.header_of(path)
        columns.few_columns(len(names), where)
        if len(names) < 2:
            way_out = "begin it with the names of its columns, in UTF-8"
            raise TraceError(where, "has no header with columns", way_out)
        reading = table_reading(where, partial(text.csv_batches, path), self.naming(path))
        assumed = () if delimiter == "," else (f"columns are separated by {delimiter!r}",)
        return replace(reading, assumptions=(*assumed, *reading.assumptions), findings=text.cut_findings(path))


@dataclass(frozen=True)
class JsonLinesFormat(TableFormat):
    """One JSON object a line with the names of the parquet format, or with experts as keys; plain, .gz or .zst.

    *key* is where the counts are in each, such as ``stats.counts``.
    """

    key: str | None = None
    name: ClassVar[str] = "jsonl"

    def claims(self, path: Path) -> bool:
        """A file named .jsonl or .ndjson, compressed or not, or one named .json with objects in its first lines."""
        if not path.is_file() or text.ends_with(path, ".jsonl", ".ndjson"):
            return path.is_file()
        if not text.ends_with(path, ".json"):
            return False
        first, _, rest = text.head_of(path).partition("\n")
        return rest.lstrip().startswith("{") and isinstance(text.json_of(first), dict)

    def read(self, path: Path) -> Reading:
        """Match the keys to a layout and stream the lines."""
        text.refuse_empty(path)
        try:
            if self.key is not None:
                reading = self._keyed_lines(path)
            else:
                reading = table_reading(str(path), partial(text.json_batches, path), self.naming(path))
        except TraceError:
            first = text.json_of(text.head_of(path).partition("\n")[0])
            if self.key or self.column or self.pattern or not isinstance(first, dict):
                raise
            # A mapping, or lists of several layers, is in no column.
            lists = [key for key, part in first.items() if isinstance(part, list)]
            of_layers = len(lists) > 1 and all(map(OF_LAYER.search, lists))
            if not of_layers and not any(isinstance(part, dict) for part in first.values()):
                raise
            reading = self._keyed_lines(path)
        return replace(reading, findings=text.cut_findings(path))

    def _keyed_lines(self, path: Path) -> Reading:
        """Objects with a step whose counts have experts, or layers of experts, as keys or in lists, or are at a key."""
        where, key = str(path), self.key
        first = next(text.json_objects(path), {})
        step = next((name for name in first if simple_name(name) in STEP_NAMES), None)
        layer = next((name for name in first if simple_name(name) in LAYER_NAMES), None)
        inside = [name for name, part in first.items() if isinstance(part, dict | list) and name not in (step, layer)]
        counts = [name for name in inside if simple_name(name) in (*columns.COUNT_NAMES, "layers", "experts")]
        of_layers = all(map(OF_LAYER.search, inside))
        keys = keys_in(first)
        if step is None or step in inside or not (key or counts or len(inside) == 1 or of_layers):
            raise TraceError(where, f"has lines with {shown(list(first))}", f"{LINES_NEED}; {keys}".rstrip("; "))
        # One part holds all counts, or several are a layer each.
        parts = () if key else tuple(counts[:1] or inside)
        outer = (step,) if layer is None else (step, layer)
        alone = len(parts) == 1 and not OF_LAYER.search(parts[0])

        def rows() -> Iterator[tuple[Keys, Any]]:
            for row in text.json_objects(path):
                absent = [name for name in (*outer, *parts) if name not in row]
                if absent:
                    raise TraceError(where, f"has a line without {absent[0]}", "write the same keys in every line")
                held = row[parts[0]] if alone else dig(row, key, where) if key else {part: row[part] for part in parts}
                yield tuple(row[name] for name in outer), held

        needs = LINES_NEED if key else keys or LINES_NEED
        return _keyed(rows, path, self.values(path), needs, f"the counts are in {key or shown(parts)}")


@dataclass(frozen=True)
class JsonFormat(TableFormat):
    """A document, plain or .gz, with one of load_history, logical_count or counts, columns and data of a table, a list
    of objects with step, layer and counts, or layers whose values are experts.

    *axes* says what the axes of nested lists are, such as ``layers,steps,experts``, *key* where the counts are.
    """

    axes: str | None = None
    key: str | None = None
    name: ClassVar[str] = "json"

    def claims(self, path: Path) -> bool:
        return path.is_file() and text.ends_with(path, ".json") and not path.name.startswith(".")

    def read(self, path: Path) -> Reading:
        """Find the counts by the keys of the document."""
        where = str(path)
        document = dig(text.document(path), self.key, where)
        rows = _rows_of(document, where)
        self._refuse(path, *(("column", "pattern") if rows is None else ("axes",)))
        if rows is not None:
            if rows and choice_columns(list(rows[0])):
                raise TraceError(where, "holds choices of tokens", "write them as JSON lines, one object a line")
            with library_errors(where, "holds no table", "give the same columns in every row"):
                every = dict.fromkeys(name for row in rows for name in row)  # not each row need have them all
                table = pa.table({name: [row.get(name) for row in rows] for name in every})
            return table_reading(where, table.to_reader, self.naming(path))
        if not isinstance(document, dict) and not (isinstance(document, list) and document):
            raise TraceError(where, f"is a {type(document).__name__}", NEEDS)
        document = document if isinstance(document, dict) else {"counts": document}
        names = {simple_name(str(key)) for key in document}
        if {"schema", "data"} <= names or (names & set(STEP_NAMES) and names & {*LAYER_NAMES, *EXPERT_NAMES}):
            way_out = f'give it to moetrace.from_frame(pandas.read_json("{path.name}")), as in docs/recipes.md'
            raise TraceError(where, "is a table by columns, as pandas writes it", way_out)
        key, axes = next((key for key in COUNTS_KEYS if key in document), None), None
        history = next((document[key] for key in WINDOWS if isinstance(document.get(key), list)), None)
        if history is not None:
            window = history[0] if history and isinstance(history[0], dict) else {}
            of_window = next((key for key in COUNTS_KEYS if key in window), None)
            if window and of_window is None:
                way_out = "each needs logical_expert_load or expert_load"
                raise TraceError(f"{where}, load_history", f"has windows with {shown(list(window))}", way_out)
            key, axes = "counts", "steps,layers,experts"
            document = {key: dig(history, of_window, where)}
        if key is None or isinstance(document[key], dict):
            self._refuse(path, "axes")
            inside = document if key is None else document[key]
            return _keyed(lambda: iter([((), inside)]), path, self.values(path), keys_in(document) or NEEDS)
        lists = (name for name in (key, "steps", "step", "layers", *PART) if name in document)
        arrays = {name: Array.held(_numbers_in(document[name], where)) for name in lists}
        by_layer = key == "logical_count" or (self.key or "").startswith("layers.")
        if by_layer and len(arrays[key].shape) == 2:  # one window
            axes = "layers,experts"
        assumption = () if key == "counts" else (f"{key} holds the counts",)
        return array_reading(arrays, path, self.axes or axes, self.values(path), assumption)

    def _refuse(self, path: Path, *settings: str) -> None:
        """Raise `SettingError` for a setting that this kind of document has no use for."""
        for name in settings:
            if getattr(self, name) is not None:
                raise SettingError(f"{path.name} is a document that has no use for --{name}")


def _numbers_in(value: Any, where: str) -> NDArray[Any]:
    """Nested lists as an array; raises `TraceError` for what is ragged or no number."""
    with library_errors(where, "holds counts that are no array of numbers", "give lists of one length"):
        array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise TraceError(where, "holds counts that are no numbers", "counts are whole numbers of tokens")
    return array


def _rows_of(document: Any, where: str) -> list[dict[str, Any]] | None:
    """The rows of a table: a list of objects, or columns and data as Weights & Biases writes them; None for others."""
    if isinstance(document, list):
        return document if document and all(isinstance(row, dict) for row in document) else None
    data, header = (document.get(key) for key in ("data", "columns")) if isinstance(document, dict) else (None, None)
    if not isinstance(header, list) or not isinstance(data, list):
        return None
    names = [str(name) for name in header]
    for i, row in enumerate(data):
        if not isinstance(row, list) or len(row) != len(names):
            raise TraceError(f"{where}, row {i}", f"has not {len(names)} values", "give one for each of `columns`")
    return [dict(zip(names, row)) for row in data]


def _keyed(
    rows: Callable[[], Iterator[tuple[Keys, Any]]], path: Path, values: Values, needs: str, assumption: str = ""
) -> Reading:
    """Counts in nested mappings and lists, whose keys and places are the numbers of steps, layers and experts.

    *rows* are parts of them with the keys that lead to them, which begin with a step where there are any. Keys that say
    what they number (``layer_3``, ``expert_7``) are taken at their word; others come in that order. Raises
    `TraceError`, saying what is needed, where they number nothing.
    """
    where, in_name = str(path), step_in_name(path)
    outer, part = next(rows())
    keys = (*outer, *next(_walk(part, (), where, needs), ((), 0))[0])
    if not 2 <= len(keys) <= len(AXES):
        names = shown(list(part)) if isinstance(part, dict) else "nothing"
        raise TraceError(where, f"holds {names}, and none is the counts", needs)
    inner, wanted = keys[bool(outer) :], list(AXES[-len(keys[bool(outer) :]) :])
    named = [next((axis for axis, word in WORDS.items() if word.search(str(key))), None) for key in inner]
    named = ["expert"] if len(inner) == 1 else named
    left = [axis for axis in wanted if axis not in named]
    axes = [*(["step"] if outer else []), *(axis or (left.pop(0) if left else "") for axis in named)]
    if sorted(axes[bool(outer) :]) != sorted(wanted):
        problem = f"has keys such as {' > '.join(map(str, inner))[:80]}, which are not layers of experts"
        raise TraceError(where, problem, needs)

    def cells() -> Iterator[Cells]:
        coming = rows()
        while batch := list(islice(coming, LINES)):
            found = [((*at, *inner), n) for at, part in batch for inner, n in _walk(part, (), where, needs)]
            if {len(at) for at, _ in found} != {len(axes)}:
                raise TraceError(where, "has counts that are nested unlike each other, and none is the counts", needs)
            with library_errors(where, "holds numbers that are not counts", "counts are whole numbers of tokens"):
                raw = np.array([count for _, count in found])
            at = {axis: np.array([_number(keys[i], where, needs) for keys, _ in found]) for i, axis in enumerate(axes)}
            step = at.get("step", np.full(len(raw), 1 if in_name is None else in_name))
            layer = at.get("layer", np.zeros(len(raw), np.int64))
            yield Cells(step, layer, at["expert"], values.counts(raw, "counts"))

    sample = part
    while isinstance(sample, dict) and sample:
        sample = next(iter(sample.values()))
    return values.reading(
        cells,
        assumptions=(assumption or f"keys are {', '.join(axes)}" + ("" if "step" in axes else ": one step"),),
        steps_are_implicit="step" not in axes and in_name is None,
        doubt=doubt_of(sample) if isinstance(sample, list) else "",
    )


def _walk(value: Any, at: Keys, where: str, needs: str) -> Iterator[tuple[Keys, float]]:
    """Every number in *value*, with the keys, or places in lists, that lead to it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield at, value
        return
    if not isinstance(value, list | dict):
        raise TraceError(where, f"holds {value!r:.40} where a count should be", needs)
    if len(at) == len(AXES):
        raise TraceError(where, "is nested more than three deep", needs)
    for key, part in enumerate(value) if isinstance(value, list) else value.items():
        yield from _walk(part, (*at, key), where, needs)


def _number(key: Any, where: str, needs: str) -> int:
    """The number in a key; raises `TraceError` for a key without a number."""
    if isinstance(key, float) and key.is_integer():
        key = int(key)
    if isinstance(key, int) and not isinstance(key, bool) and abs(key) <= FLOAT64_EXACT:
        return key
    if not isinstance(key, str):
        raise TraceError(where, f"has {key!r:.40} where a step, a layer or an expert should be", needs)
    found = columns.BARE.fullmatch(key) or next((match for word in WORDS.values() if (match := word.search(key))), None)
    groups = [text for text in (found[0], *found.groups()) if text and text.isdecimal()] if found else []
    if not groups:
        raise TraceError(where, f"has a key {key[:60]!r} that numbers nothing", needs)
    return int(groups[0])


def _batches(rows: Iterator[Row], values: Values) -> Iterator[Cells]:
    """Rows of step, layer, expert and value as cells, so many at a time."""
    while held := list(islice(rows, BATCH)):
        step, layer, expert, value = (np.array(part) for part in zip(*held))
        yield Cells(step, layer, expert, values.counts(value, "tokens"))


@dataclass(frozen=True)
class LogFormat(ValueFormat):
    """A .log or .txt file, and --pattern with the groups step, layer, expert and tokens, a number or a list.

    What a line does not name is as in the lines before it; without any step there is one.
    """

    pattern: str | None = None
    name: ClassVar[str] = "log"

    def claims(self, path: Path) -> bool:
        return path.is_file() and text.ends_with(path, ".log", ".txt", ".out") and _usual(path) != ""

    def read(self, path: Path) -> Reading:
        """Read the lines; without a pattern, raises `TraceError` that suggests one."""
        where = str(path)
        if self.pattern is None:
            usual = _usual(path)
            way_out = "give a --pattern with the groups step, layer, expert and tokens, a number or a list"
            raise TraceError(where, "is a log of lines", way_out + (f", such as '{usual}'" if usual else ""))
        pattern = columns.compiled(self.pattern, where)
        if "tokens" not in pattern.groupindex or not GROUPS >= set(pattern.groupindex):
            raise TraceError(where, "--pattern has not the groups of a log", "use step, layer, expert and tokens")
        values = self.values(path)
        one = () if "step" in pattern.groupindex else ("no group for the step: one step",)
        assumed = (f"lines are taken apart by {self.pattern}", *one)
        cells = lambda: _batches(_rows(path, pattern), values)  # noqa: E731
        return values.reading(cells, assumptions=assumed)


def _usual(path: Path) -> str:
    """The usual pattern that fits a line at the beginning of a file, empty for none."""
    return next((usual for usual in USUAL if re.search(usual, text.head_of(path), re.IGNORECASE)), "")


def _lines(path: Path) -> Iterator[str]:
    """The lines of *path* as text, of each the first `MOST_LINE` bytes."""
    return (line[:MOST_LINE].decode("utf-8", "replace").rstrip() for line in text.lines(path))


def _rows(path: Path, pattern: re.Pattern[str]) -> Iterator[Row]:
    """Step, layer, expert and value of what the *pattern* finds in lines."""
    at = {"step": 1, "layer": 0, "expert": 0}
    for number, line in enumerate(_lines(path), 1):
        found = pattern.search(line)
        held = {name: part for name, part in found.groupdict().items() if part is not None} if found else {}
        tokens = re.findall(r"-?\d+(?:\.\d+)?", held.pop("tokens", ""))
        try:
            at |= {name: int(part) for name, part in held.items()}
        except ValueError:
            raise TraceError(f"{path}, line {number}", f"has {held} for numbers", "check --pattern") from None
        for i, count in enumerate(tokens):
            yield at["step"], at["layer"], at["expert"] + i, float(count)


@dataclass(frozen=True)
class PrometheusFormat(ValueFormat):
    """Text of /metrics, one or several scrapes, with labels layer and expert; --difference, and --merge steps.

    *key* is the name of the metric, *pattern* what finds the groups layer and expert in its labels, *where* a label and
    its value, ``model_name=m``.
    """

    key: str | None = None
    pattern: str | None = None
    where: str | dict[str, str] | None = None
    name: ClassVar[str] = "prometheus"

    def claims(self, path: Path) -> bool:
        return path.is_file() and (path.suffix == ".prom" or text.head_of(path).startswith(("# HELP ", "# TYPE ")))

    def read(self, path: Path) -> Reading:
        """Each scrape is a step; counts are added up over other labels."""
        values, tags = self.values(path), columns.tags_by(self.pattern, str(path))
        only, head = columns.pairs_of(self.where), text.head_of(path)
        names = [found["name"] for line in head.split("\n") if (found := SAMPLE.match(line)) and tags.match(line)]
        name = self.key or next(iter(names), "")
        return values.reading(
            lambda: _batches(_samples(path, tags, self.key, only), values),
            assumptions=("each scrape is a step; counts are added up over all labels but layer and expert",),
            steps_are_implicit=True,
            adds=True,
            counters=name.endswith("_total") or f"# TYPE {name} counter" in head,
        )


def _samples(path: Path, tags: Tags, key: str | None, only: dict[str, str]) -> Iterator[Row]:
    """Step, layer, expert and value of the samples of one metric."""
    where, step, names, models = str(path), 1, set[str](), set[str]()
    seen: set[str] = set()
    for line in _lines(path):
        sample = SAMPLE.match(line)
        place = tags.match(sample["labels"]) if sample else None
        if sample is None or place is None or key not in (None, sample["name"]):
            continue
        labels = dict(LABEL.findall(sample["labels"]))
        if any(labels.get(name) != value for name, value in only.items()):
            continue
        names.add(sample["name"])
        models |= {f"{name}={labels[name]}" for name in MODELS if name in labels and name not in only}
        if len(names) > 1:
            raise TraceError(where, f"has the metrics {shown(sorted(names))}", f"choose one with --key {min(names)}")
        if len(models) > len({model.partition("=")[0] for model in models}):
            raise TraceError(where, "is of several models", f"choose one with --where {min(models)}")
        if sample["labels"] in seen:  # a scrape begins anew
            step, seen = step + 1, set()
        seen.add(sample["labels"])
        yield step, *place, float(sample["value"])
    if not names:
        raise TraceError(where, "has no metric with labels of a layer and an expert", "export one, or say --pattern")
