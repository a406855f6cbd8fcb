"""Text in lines: logs whose lines a pattern takes apart, and scrapes of Prometheus metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np

from moetrace.errors import TraceError, shown
from moetrace.formats.stream.cells import Cells, Reading
from moetrace.formats.stream.columns import Tags, ValueFormat, Values, compiled, pairs_of, tags_by
from moetrace.formats.stream.text import ends_with, head_of, lines

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

Row = tuple[int, int, int, float]


def _text(line: bytes) -> str:
    return line[:MOST_LINE].decode("utf-8", "replace").rstrip()


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
        return path.is_file() and ends_with(path, ".log", ".txt", ".out") and _usual(path) != ""

    def read(self, path: Path) -> Reading:
        """Read the lines; without a pattern, raises `TraceError` that suggests one."""
        where = str(path)
        if self.pattern is None:
            usual = _usual(path)
            way_out = "give a --pattern with the groups step, layer, expert and tokens, a number or a list"
            raise TraceError(where, "is a log of lines", way_out + (f", such as '{usual}'" if usual else ""))
        pattern = compiled(self.pattern, where)
        if "tokens" not in pattern.groupindex or not GROUPS >= set(pattern.groupindex):
            raise TraceError(where, "--pattern has not the groups of a log", "use step, layer, expert and tokens")
        values = self.values(path)
        one = () if "step" in pattern.groupindex else ("no group for the step: one step",)
        assumed = (f"lines are taken apart by {self.pattern}", *one)
        cells = lambda: _batches(_rows(path, pattern), values)  # noqa: E731
        return values.reading(cells, assumptions=assumed)


def _usual(path: Path) -> str:
    """The usual pattern that fits a line at the beginning of a file, empty for none."""
    return next((usual for usual in USUAL if re.search(usual, head_of(path), re.IGNORECASE)), "")


def _rows(path: Path, pattern: re.Pattern[str]) -> Iterator[Row]:
    """Step, layer, expert and value of what the *pattern* finds in lines."""
    at = {"step": 1, "layer": 0, "expert": 0}
    for number, line in enumerate(lines(path), 1):
        found = pattern.search(_text(line))
        texts = {name: text for name, text in found.groupdict().items() if text is not None} if found else {}
        tokens = re.findall(r"-?\d+(?:\.\d+)?", texts.pop("tokens", ""))
        try:
            at |= {name: int(text) for name, text in texts.items()}
        except ValueError:
            raise TraceError(f"{path}, line {number}", f"has {texts} for numbers", "check --pattern") from None
        for i, text in enumerate(tokens):
            yield at["step"], at["layer"], at["expert"] + i, float(text)


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
        return path.is_file() and (path.suffix == ".prom" or head_of(path).startswith(("# HELP ", "# TYPE ")))

    def read(self, path: Path) -> Reading:
        """Each scrape is a step; counts are added up over other labels."""
        values, tags = self.values(path), tags_by(self.pattern, str(path))
        only, head = pairs_of(self.where), head_of(path)
        names = [found["name"] for line in head.split("\n") if (found := SAMPLE.match(line)) and tags.match(line, "")]
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
    for line in lines(path):
        sample = SAMPLE.match(_text(line))
        place = tags.match(sample["labels"], where) if sample else None
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
