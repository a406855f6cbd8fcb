"""What a log of choices holds, counted before it is read: its layers and experts, and what is odd about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moetrace.doctor.catalogue import finding
from moetrace.errors import shown
from moetrace.trace import Finding

# What -1 is read as in the types that people save choices in.
MAXIMA = (2**8 - 1, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**63 - 1)
# Experts up to which their counts are taken without sorting.
FEW = 1 << 16
# How far the largest number of an unsigned type is from all others where it is no expert, and any other number,
# which is beyond twice as many experts, too.
NEAR, FAR = 8, 64


@dataclass
class OfLayer:
    """What the tokens of one layer chose: rows, rows with an expert twice, those of one expert alone, and all experts.

    *by_all* are the experts that every token chose.
    """

    rows: int = 0
    repeated: int = 0
    alone: Counter[int] = field(default_factory=Counter)
    experts: set[int] = field(default_factory=set)
    by_all: set[int] | None = None
    width: int = 1


@dataclass
class Census:
    """The *counts* of each number that was chosen, -1 left out, and what each layer holds."""

    counts: dict[int, int] = field(default_factory=dict)
    by_layer: dict[int, OfLayer] = field(default_factory=dict)

    def add(self, layer: NDArray[np.int64], expert: NDArray[np.int64]) -> None:
        """Go on with choices *expert* (rows, k) in *layer* (rows,)."""
        for number in np.unique(layer).tolist():
            rows = expert[layer == number]
            self._add_layer(self.by_layer.setdefault(number, OfLayer()), rows)

    def _add_layer(self, known: OfLayer, rows: NDArray[np.int64]) -> None:
        rows = rows[(rows >= 0).any(axis=1)]
        ids, n = _counts_of(rows[rows >= 0])
        for number, times in zip(ids.tolist(), n.tolist()):
            self.counts[number] = self.counts.get(number, 0) + times
        known.rows += len(rows)
        known.experts.update(ids.tolist())
        chosen_by_all = set(ids[n == len(rows)].tolist())
        known.by_all = chosen_by_all if known.by_all is None else known.by_all & chosen_by_all
        if rows.shape[1] > 1 and len(rows):
            known.width = rows.shape[1]
            ordered = np.sort(rows, axis=1)
            same = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
            known.repeated += int(same.any(axis=1).sum())
            known.alone.update(ordered[same.all(axis=1), 0].tolist())

    @property
    def ids(self) -> list[int]:
        """The numbers that were chosen, increasing."""
        return sorted(self.counts)

    @property
    def layers(self) -> list[int]:
        """The layers, increasing."""
        return sorted(self.by_layer)

    def is_padding(self, layer: int, numbers: Collection[int]) -> bool:
        """Whether a layer holds none but these *numbers*."""
        return self.by_layer[layer].experts <= set(numbers)

    def findings(self, layers: Sequence[int]) -> tuple[Finding, ...]:
        """What is odd about what is chosen in *layers*."""
        those = {layer: self.by_layer[layer] for layer in layers if layer in self.by_layer}
        found = [_repeated(those), _one_expert(those), _every_token(those)]
        return tuple(part for part in found if part is not None)


def _counts_of(chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers in *chosen*, increasing, and how often each is there."""
    if chosen.size and chosen.max() < FEW:
        counts = np.bincount(chosen)
        ids = np.flatnonzero(counts)
        return ids, counts[ids]
    return np.unique(chosen, return_counts=True)


def _repeated(layers: dict[int, OfLayer]) -> Finding | None:
    """Tokens that choose one expert twice, which a router does not do."""
    twice = {number: layer for number, layer in layers.items() if layer.repeated}
    if not twice:
        return None
    rows, repeated = (sum(getattr(layer, name) for layer in twice.values()) for name in ("rows", "repeated"))
    alone = sum((layer.alone for layer in twice.values()), Counter())
    evidence = f"in layers {shown(list(twice))} {repeated:,} of {rows:,} tokens choose one expert twice"
    expert, times = alone.most_common(1)[0] if alone else (0, 0)
    if times > repeated // 2:
        evidence += f", {times:,} of them {expert} alone, as rows do that nothing was written to"
    return finding("repeated-choice", f"layer {min(twice)}", evidence)


def _one_expert(layers: dict[int, OfLayer]) -> Finding | None:
    """Layers whose tokens all choose one expert."""
    alone = [number for number, layer in layers.items() if len(layer.experts) == 1 and layer.rows > 1]
    if not alone or len(set().union(*(layer.experts for layer in layers.values()))) == 1:
        return None
    (expert,) = layers[alone[0]].experts
    evidence = f"every choice in layers {shown(alone)} is expert {expert}"
    return finding("one-expert", f"layer {alone[0]}", evidence)


def _every_token(layers: dict[int, OfLayer]) -> Finding | None:
    """The last expert, where every token of every layer chooses it besides others."""
    if not layers:
        return None
    last = max(max(layer.experts, default=-1) for layer in layers.values())
    if any(last not in (layer.by_all or ()) or layer.width < 2 or layer.rows < 32 for layer in layers.values()):
        return None
    if all(len(layer.experts) <= layer.width for layer in layers.values()):
        return None
    evidence = f"every token chooses expert {last}, the last one, in every layer"
    return finding("every-token", "every layer", evidence)


def no_choices(ids: Sequence[int], highest: int | None) -> bool:
    """Whether the last of *ids*, increasing, is what -1 is read as in a type, and no expert."""
    if len(ids) < 2:
        return False
    last, before = ids[-1], ids[-2]
    if last == highest:
        return last - before > NEAR
    return last in MAXIMA and last - before > max(FAR, before + 1)
