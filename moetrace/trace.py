"""The load trace: how many tokens each expert of each layer processed, step by step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetrace.errors import SettingError, TraceError, check_several, shown

Counts = NDArray[np.int64]
Shares = NDArray[np.float64]
Steps = NDArray[np.int64]

# Logged steps that a window of so many steps or more has at least: with fewer, a mean is hardly one.
LEAST_ROWS = 5
# What the counts of a layer may add up to: twice that still fits in 64 bits.
MOST_TOKENS = 2**62
LAST_LAYER = 2**31 - 1
MOST_DISTANCES = 100_000  # between steps, whose median is the stride
# Bytes of the counts of all layers up to which they stay in memory; shares take as much again.
SMALL = 1 << 26

# The largest whole number up to which a float counts every one; from there on neighbours look the same.
FLOAT32_EXACT = 2**24
FLOAT64_EXACT = 2**53


@dataclass(frozen=True)
class Finding:
    """Something noticed about a trace: what, how bad, where, on what evidence, and what to do.

    *severity* is ``"error"``, ``"warning"`` or ``"note"``.
    """

    name: str
    severity: str
    place: str
    evidence: str
    advice: str


@dataclass(frozen=True)
class TraceInfo:
    """What is known about a trace besides its counts.

    *tokens_per_step* is the number of tokens a layer routes in one step, summed over its experts
    (so ``top_k`` times the tokens of the batch), or None when it varies.
    *source* and *fingerprint* name what the trace was read from, *settings* with which options;
    *assumptions* are the guesses the reader made, *findings* what the doctor noticed;
    *notes* hold what the one who recorded the trace wanted to say, as JSON can say it. *first_expert* is the number
    of the first expert in the source, mostly 0: where people and other programs see experts, they have their numbers.
    """

    name: str
    model: str | None = None
    top_k: int | None = None
    tokens_per_step: int | None = None
    format: str = "array"
    source: str | None = None
    fingerprint: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    first_expert: int = 0


@dataclass(frozen=True, eq=False)
class LayerCache:
    """What was computed of a layer (`analysis.variogram`), as seen by a part that begins at its row *first_row*.

    *block_means* are by the rows of a block, *answers* by function, rows and arguments.
    """

    first_row: int = 0
    block_means: dict[int, Shares] = field(default_factory=dict)
    answers: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class LayerLoad:
    """The load of one layer: ``counts[t, e]`` tokens went to the expert in column *e* in step ``steps[t]``.

    *steps* has shape (steps,) and increases strictly; *counts* has shape (steps, experts). Experts are numbered from
    *first_expert* in everything that people read, as in the source.
    Windows, horizons and cutoffs are in training steps, not rows, also where only
    every tenth step was logged.
    """

    trace: str
    layer: int
    steps: Steps
    counts: Counts
    first_expert: int = 0

    @property
    def expert_numbers(self) -> NDArray[np.int64]:
        """The number of the expert in each column, shape (experts,)."""
        return self.first_expert + np.arange(self.experts)

    @property
    def experts(self) -> int:
        """The number of experts of the layer."""
        return int(self.counts.shape[1])

    @cached_property
    def totals(self) -> Counts:
        """Tokens of each step over all experts, shape (steps,)."""
        totals: Counts = self.counts.sum(axis=1)
        return totals

    @cached_property
    def shares(self) -> Shares:
        """Count divided by the layer's total in that step, shape (steps, experts)."""
        return self.counts / self.totals[:, None]

    @cached_property
    def stride(self) -> int:
        """Steps between two logged ones (the median distance; 1 where every step is logged)."""
        return stride_of(self.steps)

    @cached_property
    def cache(self) -> LayerCache:
        """What was computed of the layer, shared with every part that is cut from it."""
        return LayerCache()

    def rows(self, window: int) -> int:
        """How many logged rows make *window* steps, at least one."""
        return rows_of(window, self.stride)

    def between(self, first: int, last: int) -> LayerLoad:
        """The steps from *first* to *last*, both included."""
        a, b = np.searchsorted(self.steps, [first, last + 1])
        part = replace(self, steps=self.steps[a:b], counts=self.counts[a:b])
        # What is known of the whole need not be computed again for every history that is cut from it.
        part.__dict__.update({name: self.__dict__[name][a:b] for name in ("totals", "shares") if name in self.__dict__})
        part.__dict__["cache"] = replace(self.cache, first_row=self.cache.first_row + int(a))
        return part

    def until(self, cutoff: int) -> LayerLoad:
        """The history: everything up to and including the step *cutoff*."""
        return self.between(int(self.steps[0]), cutoff)

    def after(self, cutoff: int, horizon: int) -> LayerLoad:
        """What happened in the *horizon* steps after the step *cutoff*."""
        return self.between(cutoff + 1, cutoff + horizon)

    def last(self, window: int) -> LayerLoad:
        """The last *window* steps; where steps were logged far apart, at least `LEAST_ROWS` logged ones of them.

        A window that holds a handful of rows says nothing, so it is counted in rows instead, as many as
        *window* steps would be if each was logged, but no more than `LEAST_ROWS`.
        """
        by_steps = int(self.steps[-1]) - window + 1
        rows = min(window, LEAST_ROWS, len(self.steps))
        return self.between(min(by_steps, int(self.steps[-rows])), int(self.steps[-1]))

    @cached_property
    def mean_shares(self) -> Shares:
        """Share of the load of each expert over all the steps together, shape (experts,)."""
        shares: Shares = self.counts.sum(axis=0) / self.totals.sum()
        return shares


class OpenedLayers(dict[int, LayerLoad]):
    """Layers of a trace that were read, and with each what was computed of it; copies for workers begin without."""

    def __reduce__(self) -> tuple[type[OpenedLayers], tuple[()]]:
        return OpenedLayers, ()


@dataclass(frozen=True, eq=False)
class LoadTrace:
    """Counts of shape (steps, layers, experts), read one layer at a time.

    *steps* has shape (steps,) and increases strictly; *layers* holds the layers' numbers in the
    model, increasing; *read_layer* returns the counts of one layer, shape (steps, experts), and
    raises `TraceError` where they are not what was once written. *digests* are those of the layers'
    counts, where a file keeps them.
    Build one with `LoadTrace.from_counts`, or open one with `moetrace.open_trace`.
    """

    info: TraceInfo
    steps: Steps
    layers: tuple[int, ...]
    experts: int
    read_layer: Callable[[int], Counts] = field(repr=False)
    digests: Mapping[int, str] = field(default_factory=dict, repr=False)
    _opened: OpenedLayers = field(default_factory=lambda: OpenedLayers(), init=False, repr=False)

    @classmethod
    def from_counts(
        cls,
        counts: ArrayLike,
        *,
        name: str = "trace",
        steps: ArrayLike | None = None,
        layers: Sequence[int] | None = None,
        info: TraceInfo | None = None,
    ) -> LoadTrace:
        """A trace of *counts* (steps, layers, experts), checked.

        *steps* are numbered from 1 and *layers* from 0 unless given.
        Raises `TraceError` for anything that is not a trace.
        """
        raw = np.array(counts)
        if raw.ndim != 3 or 0 in raw.shape:
            raise TraceError(
                name,
                f"counts have the shape {raw.shape}",
                "give an array of shape (steps, layers, experts), none of them 0",
            )
        numbers = tuple(int(n) for n in (range(raw.shape[1]) if layers is None else layers))
        at = np.arange(1, raw.shape[0] + 1) if steps is None else np.asarray(steps)
        whole = whole_counts(raw, name, "counts")
        check_steps(at, raw.shape[0], name)
        if len(numbers) != raw.shape[1] or any(a >= b for a, b in pairwise(numbers)):
            raise TraceError(
                name, f"{numbers} do not number {raw.shape[1]} layers", "give increasing numbers, one for each layer"
            )
        check_layers(numbers, name)
        check_sums(whole, at, numbers, name)
        check_totals(whole, at, numbers, name)
        by_number = dict(zip(numbers, np.moveaxis(whole, 1, 0)))
        totals = whole.sum(axis=2)
        constant = int(totals.flat[0]) if (totals == totals.flat[0]).all() else None
        known = info or TraceInfo(name=name, tokens_per_step=constant)
        return cls(known, at.astype(np.int64), numbers, raw.shape[2], by_number.__getitem__)

    @property
    def name(self) -> str:
        """The name of the trace in tables and files."""
        return self.info.name

    @property
    def stride(self) -> int:
        """Steps between two logged ones; 1 where every step is logged."""
        return stride_of(self.steps)

    def layer(self, number: int) -> LayerLoad:
        """The load of the layer with that *number* in the model, the same one each time where the trace is small."""
        if number in self._opened:
            return self._opened[number]
        if number not in self.layers:
            raise SettingError(f"{self.name} has no layer {number}; it has {shown(self.layers, 12)}")
        counts = self.read_layer(number)
        check_sums(counts[:, None], self.steps, [number], self.name)
        load = LayerLoad(self.name, number, self.steps, counts, self.info.first_expert)
        if counts.nbytes * len(self.layers) <= SMALL:
            self._opened[number] = load
        return load

    def digest(self, number: int) -> str:
        """What tells the counts of one layer from any other, as hexadecimal digits."""
        known = self.digests.get(number)
        return known or hashlib.sha256(np.ascontiguousarray(self.read_layer(number), "<i8").data).hexdigest()

    def by_layer(self) -> Iterator[LayerLoad]:
        """The layers one after the other, each read when it is its turn."""
        return (self.layer(number) for number in self.layers)

    @property
    def counts(self) -> Counts:
        """All counts at once, shape (steps, layers, experts); for small traces."""
        return np.stack([load.counts for load in self.by_layer()], axis=1)

    def select(
        self, layers: Sequence[int] | None = None, first: int | None = None, last: int | None = None
    ) -> LoadTrace:
        """The same trace with only these *layers* and the steps from *first* to *last*.

        Raises `SettingError` when nothing would be left.
        """
        check_several(self.layers if layers is None else layers, "layers", "[0, 1]")
        wanted = self.layers if layers is None else tuple(sorted(set(layers)))
        unknown = [number for number in wanted if number not in self.layers]
        if unknown:
            raise SettingError(f"{self.name} has no layer {unknown[0]}; it has {shown(self.layers, 12)}")
        a = 0 if first is None else int(np.searchsorted(self.steps, first, "left"))
        b = len(self.steps) if last is None else int(np.searchsorted(self.steps, last, "right"))
        if a >= b:
            raise SettingError(f"{self.name} has no step in {first}:{last}; it has {self.steps[0]} to {self.steps[-1]}")
        return replace(
            self, layers=wanted, steps=self.steps[a:b], read_layer=lambda number: self.read_layer(number)[a:b]
        )


def rows_of(window: int, stride: int) -> int:
    """How many logged rows, *stride* steps apart, make *window* steps, at least one."""
    return max(1, round(window / stride))


def stride_of(steps: Steps) -> int:
    """The median of the last distances between two logged steps, at least 1."""
    recent = steps[-MOST_DISTANCES - 1 :]
    whole = len(recent) < 2 or recent[-1] - recent[0] == len(recent) - 1  # as nearly always, and quick to see
    return 1 if whole else max(1, int(np.median(np.diff(recent))))


def whole_counts(values: NDArray[Any], where: str, column: str, first_row: int = 0) -> Counts:
    """*values* as int64 of the same shape, or a `TraceError` naming the first that is no count.

    They are not copied where they are 64-bit integers.
    *first_row* is the number in the file of the first of *values*, along their first axis.
    """
    if values.dtype.kind == "u" and values.size and values.max() > np.iinfo(np.int64).max:
        bad, reason = values > np.iinfo(np.int64).max, "is beyond 64 bits"
    elif values.dtype.kind in "iu" and values.min(initial=0) >= 0:
        return values.astype(np.int64, copy=False)
    elif values.dtype.kind == "i":
        bad, reason = values < 0, "is negative"
    elif values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            # A float of 2^53 may have been 2^53 + 1, which a column of floats cannot hold.
            bad = ~((values >= 0) & (values < FLOAT64_EXACT) & (np.floor(values) == values))
        reason = "is not a whole, non-negative number"
    else:
        raise TraceError(f"{where}, column {column}", f"holds {values.dtype}, not numbers", "give counts of tokens")
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        if values.dtype.kind == "f" and values[at] >= FLOAT64_EXACT:
            reason = "is beyond the whole numbers that a column of floats holds"
        raise TraceError(
            f"{where}, column {column}, row {first_row + at[0]}",
            f"{values[at]} {reason}",
            "counts are whole numbers of tokens (for shares give --tokens-per-step)",
        )
    return values.astype(np.int64, copy=False)


def check_steps(steps: NDArray[Any], rows: int, where: str) -> None:
    """Raise `TraceError` unless *steps* are *rows* strictly increasing whole numbers."""
    if steps.shape != (rows,) or steps.dtype.kind not in "iu":
        raise TraceError(where, f"steps are {steps.dtype} of shape {steps.shape}", f"give {rows} whole numbers")
    back = np.flatnonzero(np.diff(steps) <= 0)
    if back.size:
        a, b = steps[back[0]], steps[back[0] + 1]
        raise TraceError(where, f"step {b} comes after step {a}", "steps must increase strictly")


def check_layers(layers: Sequence[int], where: str) -> None:
    """Raise `TraceError` for a number of a layer that no trace file can hold."""
    for number in layers:
        if not 0 <= number <= LAST_LAYER:
            raise TraceError(where, f"has a layer {number}", f"number layers from 0, up to {LAST_LAYER:,}")


def check_sums(
    counts: Counts, steps: NDArray[Any], layers: Sequence[int], where: str, before: ArrayLike = 0.0, largest: int = -1
) -> None:
    """Raise `TraceError` naming the first step up to which a layer has more tokens than 64-bit sums can hold.

    *counts* (steps, layers, experts), none above *largest* if given, follow *before*, the tokens (layers,) so far.
    """
    most = float(counts.max(initial=0) if largest < 0 else largest) * (counts.shape[0] * counts.shape[2])
    if most + np.max(before) <= MOST_TOKENS:  # nearly always, and known from the largest count alone
        return
    totals = np.asarray(before) + counts.astype(np.float64).sum(axis=2).cumsum(axis=0)  # (steps, layers)
    beyond = np.argwhere(totals > MOST_TOKENS)
    for step, layer in beyond[:1]:
        raise TraceError(
            f"{where}, step {steps[step]}, layer {layers[layer]}",
            f"the counts up to here add up to {totals[step, layer]:.3g} tokens, more than can be added up exactly",
            "check the counts, or choose fewer steps with --steps",
        )


def check_totals(counts: Counts, steps: Steps, layers: Sequence[int], where: str) -> None:
    """Raise `TraceError` at the first step in which a layer of *counts* (steps, layers, experts) has no tokens."""
    empty = np.argwhere(counts.sum(axis=2) == 0)
    if empty.size:
        step, layer = empty[0]
        raise TraceError(
            f"{where}, step {steps[step]}, layer {layers[layer]}",
            "the layer has no tokens at all",
            "leave the step out of the log, or log what was routed",
        )
