"""Resident sets as a file for a runtime needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moetrace.errors import SettingError
from moetrace.placement.systems.base import MOST_LAYERS, TOKENS, renumbered


@dataclass(frozen=True)
class ResidentSets:
    """The experts to keep of each layer, by the number of the layer in the model.

    *sets* are the experts, most loaded first, and *shares* the forecast share of every expert of the layer, both
    from expert 0 on; the model has *model_layers* layers, 0 if that is not known.
    """

    sets: Mapping[int, Sequence[int]]
    shares: Mapping[int, Sequence[float]]
    model_layers: int = 0

    def with_first_layer(self, first_layer: int | None) -> ResidentSets:
        """The same with *first_layer* as the number of its first layer, the others as far from it as they were."""
        names = renumbered(sorted(self.sets), first_layer)
        sets = {names[layer]: own for layer, own in self.sets.items()}
        return replace(self, sets=sets, shares={names[layer]: own for layer, own in self.shares.items()})

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return len(next(iter(self.shares.values())))

    @property
    def most(self) -> int:
        """Resident experts of the layer that has most."""
        return max(map(len, self.sets.values()))

    @property
    def total(self) -> int:
        """Resident experts of all layers."""
        return sum(map(len, self.sets.values()))

    @property
    def equal(self) -> bool:
        """Whether every layer has as many."""
        return self.total == self.most * len(self.sets)

    def scores(self, layer: int) -> list[int]:
        """A number for each expert of a layer, by which the resident ones come first, in their order."""
        scores = np.rint(np.array(self.shares[layer]) * TOKENS).astype(int)
        scores[list(self.sets[layer])] = 2 * TOKENS + np.arange(len(self.sets[layer]))[::-1]
        return scores.tolist()

    def every_layer(self) -> range:
        """The numbers of all layers of the model; raises `SettingError` for one that it cannot have."""
        last = max(self.sets)
        if min(self.sets) < 0 or last > MOST_LAYERS or 0 < self.model_layers <= last:
            known = f"one of the {self.model_layers} layers of the model" if self.model_layers else "a layer of a model"
            raise SettingError(f"layer {last} is not {known}: check --model-layers and --first-layer")
        return range(max(last + 1, self.model_layers))


def lists(sets: ResidentSets) -> dict[str, list[Any]]:
    """The experts by layer, as JSON has them."""
    return {str(layer): list(own) for layer, own in sets.sets.items()}
