"""Tables, as Arrow batches of any file: which column is what, how rows become cells, and which are of one trace."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moetrace.errors import SettingError, TraceError, shown
from moetrace.formats.sources import WRITE_AGAIN, layer_in_name, library_errors, step_in_name
from moetrace.formats.stream import columns
from moetrace.formats.stream.cells import Cells, Reading, to_numpy
from moetrace.formats.stream.columns import Rows, ValueFormat, Values, kind_of, simple_name, template
from moetrace.words import Phase

# Names are matched in lower case without punctuation; the first that is there is taken.
STEP_NAMES = (
    "step", "iteration", "iter", "globalstep", "trainstep", "steps", "iterations", "trainerglobalstep",
    "trainglobalstep", "batchidx",
)  # fmt: skip
NUMBERED = ("", "id", "idx", "index", "number", "num", "no")
LAYER_NAMES = (
    *(f"{kind}layer{number}" for kind in ("", "moe") for number in NUMBERED), "layername", "module", "modulename",
)  # fmt: skip
EXPERT_NAMES = tuple(f"expert{number}" for number in NUMBERED)
# Of a clock, whose times are numbered where there is no step.
CLOCK_NAMES = ("time", "timestamp", "datetime", "date", "walltime")
ROLES = {"step": STEP_NAMES, "layer": LAYER_NAMES, "expert": EXPERT_NAMES}
# Of tables with the name of a scalar in each row, such as MLflow's: key, value, step.
KEY_NAMES = ("key", "tag", "metric", "metricname", "name")
# Columns of an expert of the layer that each row names: a word and its number, that alone, or as in tokens_expert_3.
OF_EXPERT = re.compile(
    r"^(?:expert|exp|e)_?(?P<expert>\d{1,15})$|^(?P<bare>\d{1,15})$|experts?[_/.\-\[ ]?(?P<also>\d{1,15})(?!\d)",
    re.IGNORECASE,
)
# Columns whose values are not of one trace, unless they are said to be.
PHASE_NAMES = ("phase", "forwardmode", "mode", "stage")
MODEL_NAMES = ("model", "modelname")
APART_NAMES = (
    *PHASE_NAMES, "rank", "eprank", "dprank", "tprank", "pprank", "globalrank", "localrank", "gpu", "gpuid",
    "device", "deviceid", "worker", "workerid", "replica", "engine", "host", "hostname", "node", *MODEL_NAMES,
)  # fmt: skip


@dataclass(frozen=True)
class TableFormat(ValueFormat):
    """The settings of a format with columns: *column* says which is what, ``tokens=routed,step=pass``, or a mapping.

    *pattern* is a regular expression for columns that are each of an expert, with the groups ``layer`` and ``expert``.
    *where* takes rows of one value, ``phase=decode``, *phase* those of that phase; *sum_over* is a column, such as a
    rank, over whose values counts are added up.
    """

    column: str | Mapping[str, str] | None = None
    pattern: str | None = None
    where: str | Mapping[str, str] | None = None
    sum_over: str | None = None
    phase: Phase | None = None

    def naming(self, where: object) -> Naming:
        """What the columns are called; raises `SettingError` for an unknown role."""
        pairs = columns.pairs_of(self.column)
        for role, name in pairs.items():
            if not name or simple_name(role) not in {*ROLES, *columns.VALUE_NAMES, "key", "value"}:
                known = "--column is role=name with step, layer, expert, tokens or share"
                raise SettingError(f"{known}, not {role + '=' * bool(name) + name!r}")
        roles = {simple_name(role): name for role, name in pairs.items()}
        only = columns.pairs_of(self.where)
        return Naming(self.values(where), roles, self.pattern, only, self.sum_over, self.phase)


@dataclass(frozen=True)
class Naming:
    """What is known of the columns of a table: the *roles* that were given.

    *only* is the value that the rows have in some columns, *sum_over* a column that counts are added up over.
    """

    values: Values
    roles: dict[str, str]
    pattern: str | None = None
    only: dict[str, str] = field(default_factory=dict)
    sum_over: str | None = None
    phase: str | None = None


@dataclass(frozen=True)
class Table:
    """What is known of the table *where* with the columns *names*: the columns by their roles, None for others.

    *named* are the columns by their simple names, *kind* is what the values are, *others* are columns that could be the
    step as well, *lists* those that hold lists. *first* are the first rows, None where there are none. *at* are the
    step and the layer in the name of the file.

    Rows become *cells*, *width* of each, by the columns *read* besides step and layer. *text* is assumed, *of_layers*
    whether layers are in the columns; *doubt* is what the numbers may be but counts.
    """

    where: str
    names: list[str]
    named: Mapping[str, str]
    first: pa.RecordBatch | None
    naming: Naming
    values: Values
    step: str | None
    layer: str | None
    expert: str | None
    value: str | None
    kind: str | None
    others: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    percent: bool = False
    clock: bool = False
    at: tuple[int | None, int | None] = (None, None)
    cells: Any = None
    read: Sequence[str] = ()
    width: int = 1
    text: str = ""
    of_layers: bool = False
    doubt: str = ""

    def steps(self, rows: Rows) -> NDArray[np.int64]:
        """The steps of the rows, shape (rows,)."""
        if self.step is not None:
            return rows.times(self.step) if self.clock else rows.numbers(self.step)
        return np.full(rows.batch.num_rows, 1 if self.at[0] is None else self.at[0])

    def layers(self, rows: Rows) -> NDArray[np.int64]:
        """The layers of the rows, shape (rows,)."""
        if self.layer is None:
            return np.full(rows.batch.num_rows, self.at[1] or 0)
        return rows.numbers(self.layer, of_layers=True)

    def by_total(self, total: float) -> Table:
        """The same where the shares of a layer in a step have this *total*: of about 100 they are percentages."""
        if self.values.tokens is None or not 99 <= total <= 101:
            return self
        return replace(self, percent=True, values=replace(self.values, tokens=self.values.tokens / 100))

    def assumptions(self) -> list[str]:
        """What is assumed of the columns, such as those of other names."""
        roles = (("step", self.step), ("layer", self.layer), ("expert", self.expert))
        texts = [f"column {name} is the {role}" for role, name in roles if name and name != role]
        texts += [f"column {self.value} holds the counts"] if self.value else []
        texts += ["shares are percentages"] if self.percent else []
        texts += [f"{self.step} is a clock, so steps are numbered from 1"] if self.clock else []
        texts += [f"column {name} is left out, since {self.step} is the step" for name in self.others]
        step, layer = self.at
        if self.step is None:
            texts.append(
                "no step column: one step" if step is None else "the step is the number in the name of the file"
            )
        if self.layer is None and not self.of_layers:
            none = "no layer column: one layer, number 0"
            texts.append(none if layer is None else f"layer {layer}, by the name of the file")
        return [*texts, self.text] if self.text else texts


def first_named(named: Mapping[str, str], wanted: Sequence[str]) -> str | None:
    """The column whose simple name comes first among *wanted*."""
    return next((named[name] for name in wanted if name in named), None)


def table_of(schema: pa.Schema, first: pa.RecordBatch | None, where: str, naming: Naming) -> Table:
    """The columns by their roles; raises `TraceError` for one that is not there, or there twice, or two of counts."""
    try:
        names = schema.names
    except UnicodeDecodeError as error:
        raise TraceError(where, "has a column whose name is not UTF-8", "save it as UTF-8") from error
    for option, asked in (("column", naming.roles.values()), ("where", naming.only), ("sum-over", [naming.sum_over])):
        absent = [name for name in asked if name is not None and name not in names]
        if absent:
            raise TraceError(where, f"has no column {absent[0]} among {shown(names)}", f"check --{option}")
    named = {simple_name(name): name for name in reversed(names)}
    if naming.phase is not None:
        column = first_named(named, PHASE_NAMES)
        if column is None:
            raise SettingError(f"{where} has no column for the phase among {shown(names)}: leave out --phase")
        naming = replace(naming, only={**naming.only, column: naming.phase})
    step, layer, expert = (naming.roles.get(role) or first_named(named, wanted) for role, wanted in ROLES.items())
    at = step_in_name(Path(where)), layer_in_name(Path(where))
    step = step or (first_named(named, CLOCK_NAMES) if at[0] is None else None)
    # Times are no steps, unless they are numbers and the user says so.
    clock = step is not None and simple_name(step) in CLOCK_NAMES
    clock = clock and not ("step" in naming.roles and kind_of(schema.field(step).type) == "number")
    steps = [named[name] for name in STEP_NAMES if name in named and "step" not in naming.roles]
    lists = []
    for i, (name, type_) in enumerate(zip(names, schema.types)):
        # Text holds lists where the first one is written like one.
        texts = first.column(i).slice(0, 100).to_pylist() if first is not None and kind_of(type_) == "text" else []
        if kind_of(type_) == "list" or next((text for text in texts if text), "").lstrip().startswith("["):
            lists.append(name)
    kind = next((role for role in naming.roles if role in columns.VALUE_NAMES), None)
    value = naming.roles[kind] if kind else first_named(named, columns.VALUE_NAMES)
    if kind is None and (expert or lists):
        taken = {step, layer, expert, *steps}
        candidates = [
            name for name in dict.fromkeys(names) if name not in taken and simple_name(name) in columns.COUNT_NAMES
        ]
        if lists and not (expert and value and value not in lists):
            candidates = [name for name in candidates if name in lists] or lists
        head = None if first is None else Rows(first, 0, where)
        chosen = [name for name in candidates if name in lists and head and head.doubt(name)]
        candidates = chosen[:1] or candidates
        if len(candidates) > 1:
            ways = " or ".join(f"--column tokens={name}" for name in candidates[:2])
            raise TraceError(where, f"columns {' and '.join(candidates)} may be the counts", f"say which with {ways}")
        value = candidates[0] if candidates else value
    twice = [name for name in (step, layer, expert, value) if name and names.count(name) > 1]
    if twice:
        raise TraceError(where, f"has {names.count(twice[0])} columns called {twice[0]}", "give each a name of its own")
    first = first if first is not None and first.num_rows else None
    if kind is None and expert and value and value not in lists and first is not None:
        text = first.column(value)[0].as_py()
        kind = "share" if isinstance(text, str) and text.strip().endswith("%") else None
    found = (step, layer, expert, value, kind, tuple(steps[1:]), tuple(lists))
    return Table(where, names, named, first, naming, naming.values, *found, clock=clock, at=at)


def table_reading(where: str, open_batches: Callable[[], Any], naming: Naming) -> Reading:
    """The reading of a table that *open_batches* opens anew each time, as an Arrow batch reader."""
    with library_errors(where, "cannot be read", WRITE_AGAIN), open_batches() as batches:
        found = table_of(batches.schema, next(iter(batches), None), where, naming)

    def every(*_: Any) -> Iterator[Any]:
        with open_batches() as batches:
            yield from batches

    return reading_of(found, every)


def reading_of(
    found: Table, batches: Callable[[list[str], int], Iterator[pa.RecordBatch]], rows: int | None = None
) -> Reading:
    """The reading of the table *found*, of *rows* in all; *batches* of some columns are opened anew each time.

    They also get the number of cells of a row. Rows are of one phase, rank or model, or of all, as was asked; a
    rank of experts says which experts its rows have. Raises `TraceError` where no layout fits.
    """
    naming, where, ranks = found.naming, found.where, found.named.get("eprank")
    if ranks is not None and naming.sum_over == ranks:
        problem = f"holds other experts in each {ranks}, which are not added up"
        raise TraceError(where, problem, f"leave out --sum-over {ranks}")
    found = _laid_out(found)
    own = list(dict.fromkeys(name for name in (found.step, found.layer, *found.read) if name))
    known = {*naming.only, naming.sum_over, *own}
    apart = [name for name in found.names if simple_name(name) in APART_NAMES and name not in known]
    read, varying = list(dict.fromkeys([*own, *naming.only, *apart])), set[str]()
    width, part = _ranks(found, own, ranks) if ranks is not None and ranks in apart else (0, "")
    texts = [f"rows with {name} {value} alone" for name, value in naming.only.items()]
    texts += [f"experts of ranks lie side by side, {width} of each {ranks}"] if width else []
    texts += [f"counts are added up over {naming.sum_over}"] if naming.sum_over else []
    seen: dict[str, set[str]] = {name: set() for name in apart if not (width and name == ranks)}

    def cells() -> Iterator[Cells]:
        row = 0
        with library_errors(where, lambda: f"cannot be read after row {row}", WRITE_AGAIN):
            for batch in batches(read, found.width):
                rows = Rows(batch.select(read), row, where).of(naming.only)
                row += batch.num_rows
                steps = found.steps(rows) if seen and rows.batch.num_rows else np.empty(0, np.int64)
                for name in list(seen) if len(steps) else ():
                    values, codes = rows.coded(name)
                    # Where it tells rows of one step apart, two rows of one expert are an error of their own.
                    if len(np.unique((steps - steps.min()) * len(values) + codes)) > len(np.unique(steps)):
                        varying.add(name)
                        del seen[name]
                    else:
                        rows.check_one(name, seen[name], f", or add them up with --sum-over {name}")
                inside = found.cells(rows._replace(batch=rows.batch.select(own)))
                if ranks and width and rows.batch.num_rows:
                    rank = np.repeat(rows.numbers(ranks), len(inside.step) // rows.batch.num_rows)
                    inside = inside._replace(expert=inside.expert + rank * width)
                yield inside

    return found.values.reading(
        cells,
        rows=None if rows is None else rows * found.width,
        assumptions=(*found.assumptions(), *texts),
        steps_are_implicit=found.step is None and found.at[0] is None,
        doubt=found.doubt,
        part=part,
        apart=varying,
        adds=naming.sum_over is not None,
        clock=found.clock,
    )


def _laid_out(found: Table) -> Table:
    """The table with the layout whose columns are there; raises `TraceError` when none is."""
    naming, named = found.naming, found.named
    if found.value and (found.expert or found.value in found.lists):
        if naming.pattern:
            raise SettingError(f"{found.where} names experts in rows, and has no use for --pattern")
        return _nested(found, found.value) if found.value in found.lists else _long(found)
    experts, text = _wide_columns(found)
    if experts and (found.step or found.layer):
        return _wide(found, experts, text)
    key = naming.roles.get("key") or first_named(named, KEY_NAMES)
    value = naming.roles.get("value") or first_named(named, ["value"])
    if key and value and found.step:
        return _keyed(found, key, value)
    tagged = [name for name in found.names if len(re.findall(r"\d+", name)) >= 2]
    if found.step and tagged:
        raise columns.no_match(tagged, "column", found.where)
    known = {"step": found.step, "layer": found.layer, "expert": found.expert, "tokens": found.value}
    raise columns.no_layout(found.names, known, found.where)


def _long(found: Table) -> Table:
    """The layout of a row for each step, layer and expert."""
    expert, value = found.expert or "", found.value or ""
    if simple_name(found.kind or value) in columns.SHARE_NAMES and found.first is not None:
        rows = Rows(found.first, 0, found.where)
        steps, layers = found.steps(rows), found.layers(rows)
        found = found.by_total(rows.column(value)[(steps == steps[0]) & (layers == layers[0])].sum())

    def cells(rows: Rows) -> Cells:
        counts = found.values.counts(rows.column(value), value, rows.first, found.kind)
        return Cells(found.steps(rows), found.layers(rows), rows.numbers(expert), counts)

    return replace(found, cells=cells, read=[expert, value])


def _nested(found: Table, value: str) -> Table:
    """The layout of lists of experts, or of layers of experts, in the rows."""
    of_layers, doubt = False, ""
    if found.first is not None:
        there = found.first.filter(found.first.column(value).is_valid()).slice(0, 1)
        inner = Rows(there, 0, found.where).lists(value).type.value_type
        of_layers = found.layer is None and kind_of(inner) == "list"
        if kind_of(inner) == "list" and kind_of(inner.value_type) == "list":
            problem = f"holds lists of lists of lists in the column {value}, as the experts of the tokens of requests"
            raise TraceError(found.where, problem, "count them with --from routing --tokens N")
        doubt = Rows(found.first, 0, found.where).doubt(value)

    def cells(rows: Rows) -> Cells:
        lists, steps, layers = rows.lists(value), found.steps(rows), found.layers(rows)
        flat, levels, _ = columns.flattened(lists)
        of_row = np.arange(len(lists))  # the row of each list, and at last of each value
        for sizes in levels:
            for i in np.flatnonzero(sizes == 0)[:1]:
                raise TraceError(rows.place(value, of_row[i]), "is an empty list", "log a count for each expert")
            of_row = np.repeat(of_row, sizes)
        for i in np.flatnonzero(flat.is_null()) if flat.null_count else ():
            raise TraceError(rows.place(value, of_row[i]), "holds a null", "counts are whole numbers")
        if len(levels) > 1 and found.layer is not None:
            raise TraceError(rows.place(value), "holds lists of lists and a layer", "log one list a layer")
        layers = np.repeat(columns.places(levels[0]), levels[1]) if len(levels) > 1 else layers[of_row]
        numbers = flat.to_numpy(zero_copy_only=False)
        try:
            counts = found.values.counts(numbers, value, rows.first, found.kind)
        except TraceError:
            for i in range(len(lists)):  # once more row by row, only to name the first bad one
                found.values.counts(numbers[of_row == i][None], value, rows.first + i, found.kind)
            raise
        return Cells(steps[of_row], layers, columns.places(levels[-1]), counts)

    text = "lists of lists are layers of experts, numbered from 0" if of_layers else ""
    return replace(found, cells=cells, read=[value], text=text, of_layers=of_layers, doubt=doubt)


def _wide_columns(found: Table) -> tuple[Mapping[str, tuple[int | None, int]], str]:
    """The columns with an expert in their names: its layer, None where rows have them, and its number; and why."""
    names, pattern = [name for name in found.names if not name.endswith(columns.OF_CHARTS)], found.naming.pattern
    tags = columns.tags_by(pattern, found.where)
    tagged = {name: place for name in names if (place := tags.match(name))}
    if pattern is not None:
        return {**tagged}, tags.assumption.replace("tags", "columns")
    matches = {name: match for name in names if name not in tagged and (match := OF_EXPERT.search(name))}
    alone = {name: (None, int(match["expert"])) for name, match in matches.items() if match["expert"]}
    if tagged or alone:
        like = template(next(iter([*tagged, *alone])))
        return {**tagged, **alone}, f"columns like {like} hold the counts of experts"
    others = {name: (None, int(match["also"] or match["bare"])) for name, match in matches.items()}
    if len(others) < 2:
        return {}, ""
    like = next(iter(others))
    return {**others}, f"columns {'with bare numbers' if like.isdecimal() else 'like ' + template(like)} are experts"


def _wide(found: Table, places: Mapping[str, tuple[int | None, int]], text: str) -> Table:
    """The layout of a column for each expert, and for each layer unless the rows have them."""
    kind, doubt = found.kind or columns.one_kind(list(places), set(), found.where), ""
    again = [place for place, n in Counter(places.values()).items() if n > 1]
    if again:
        both = [name for name, place in places.items() if place == again[0]]
        raise TraceError(found.where, f"columns {both[0]} and {both[1]} are of one expert", "choose with --pattern")
    names, of_rows = list(places), any(layer is None for layer, _ in places.values())
    layers, experts = np.array([(layer or 0, expert) for layer, expert in places.values()]).T
    found = replace(found, value=None, layer=found.layer if of_rows else None)
    fractions = kind in (*columns.SHARE_NAMES, *columns.UTILISATION_NAMES)
    if found.first is not None:
        rows = Rows(found.first.slice(0, 1 << 10), 0, found.where)
        own = [name for name, layer in zip(names, layers) if layer == layers[0]]
        head = np.stack([rows.column(name, gaps=True) for name in own], axis=1)  # (rows, experts)
        if head.dtype.kind in "iuf":
            head = head[(head == head).all(axis=1)]
            doubt = columns.doubt_of(head)
            found = found.by_total(head[0].sum()) if kind in columns.SHARE_NAMES and len(head) else found

    def cells(rows: Rows) -> Cells:
        raw = [rows.column(name, gaps=True) for name in names]
        # Rows of other metrics have empty cells here, and so may rows of other layers.
        there = np.stack([values == values for values in raw], axis=1)  # (rows, columns), False for NaN
        for layer in np.unique(layers) if fractions and not there.all() else ():
            own = there[:, layers == layer]
            for row in np.flatnonzero(own.any(axis=1) & ~own.all(axis=1))[:1]:
                problem = f"holds {own[row].sum()} of {own.shape[1]} experts of layer {layer}, and others are not in "
                way_out = "log every expert in every step: what is left out is not zero"
                raise TraceError(f"{rows.where}, row {rows.first + row}", f"{problem}the log", way_out)
        counts = np.zeros(there.shape, np.int64)
        for i, (name, values) in enumerate(zip(names, raw)):
            whole = values if there[:, i].all() else np.where(there[:, i], values, 0)
            counts[:, i] = found.values.counts(whole, name, rows.first, kind)
        if found.step is None or not rows.batch.column(found.step).null_count:
            steps = found.steps(rows)
        else:  # rows without any value need have no step
            with_value = there.any(axis=1)
            steps = np.zeros(len(there), np.int64)
            steps[with_value] = found.steps(rows._replace(batch=rows.batch.filter(pa.array(with_value))))
        at = found.layers(rows)[:, None] if of_rows else layers
        every = slice(None) if there.all() else there.ravel()
        parts = (np.broadcast_to(part, there.shape).ravel() for part in (steps[:, None], at, experts, counts))
        return Cells(*(part[every] for part in parts))

    layout: dict[str, Any] = {"width": len(names), "text": text, "of_layers": not of_rows, "doubt": doubt}
    return replace(found, cells=cells, read=names, **layout)


def _keyed(found: Table, key: str, value: str) -> Table:
    """The layout of a scalar in each row, its name in the column *key*."""
    tags = columns.tags_by(found.naming.pattern, found.where)
    seen: set[str] = set()

    def cells(rows: Rows) -> Cells:
        encoded = rows.batch.column(key).cast(pa.string()).dictionary_encode()
        rows.refuse_nulls(key, encoded)
        texts, indices = encoded.dictionary.to_pylist(), to_numpy(encoded.indices)
        matches = [tags.match(text) for text in texts]
        kind = columns.one_kind([text for text, match in zip(texts, matches) if match], seen, rows.where)
        matched = np.array([match is not None for match in matches], bool)[indices]
        at = np.array([match or (0, 0) for match in matches], np.int64).reshape(-1, 2)[indices][matched]
        inside = rows._replace(batch=rows.batch.filter(pa.array(matched)))
        counts = found.values.counts(inside.column(value), value, rows.first, kind)
        return Cells(found.steps(inside), at[:, 0], at[:, 1], counts)

    return replace(found, cells=cells, read=[key, value])


def _ranks(found: Table, read: list[str], ranks: str) -> tuple[int, str]:
    """The experts of a rank, 0 where all rows are of one; and what says that they are of one of several ranks."""
    first, size = found.first, found.named.get("epsize")
    if first is None:
        return 0, ""
    there = sorted(set(first.column(ranks).drop_null().to_pylist()))
    if len(there) > 1:
        return int(found.cells(Rows(first.select(read), 0, found.where)).expert.max()) + 1, ""
    all_ranks = first.column(size)[0].as_py() if there and size is not None else None
    return 0, "" if all_ranks in (None, 1) else f"{ranks} is {there[0]} of {size} {all_ranks}: a part of the experts"
