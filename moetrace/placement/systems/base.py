"""What a serving system is to moetrace: its policies, how it is started, and the plan files it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from moetrace.errors import SettingError
from moetrace.placement.dispatch import EVEN
from moetrace.placement.planning import Planning
from moetrace.placement.policies import Policy

T = TypeVar("T")

# Layers of a model; larger numbers are something else.
MOST_LAYERS = 10_000
# Loads are written as whole numbers that add up to about so many tokens a layer.
TOKENS = 1_000_000

Slots = Mapping[int, Sequence[Sequence[int]]]
"""For each layer, by its number in the model, the experts in the slots of each GPU."""


@dataclass(frozen=True)
class Deployment:
    """A plan to deploy for a model.

    *slots* are the experts of each GPU, *loads* the predicted share of each expert, both by the number of the layer
    in the model; the model has *model_layers* layers, 0 if that is not known. *dispatch* is how the tokens of an expert
    are split among its replicas, see `Dispatch`; *groups* of experts stay on one of so many *nodes*.
    """

    slots: Slots
    loads: Mapping[int, Sequence[float]] = field(default_factory=dict)
    model_layers: int = 0
    dispatch: str = EVEN
    groups: int = 1
    nodes: int = 1

    def with_first_layer(self, first_layer: int | None) -> Deployment:
        """The same with *first_layer* as the number of its first layer, the others as far from it as they were."""
        names = renumbered(sorted(self.slots), first_layer)
        slots = {names[layer]: own for layer, own in self.slots.items()}
        return replace(self, slots=slots, loads={names[layer]: own for layer, own in self.loads.items()})

    @property
    def gpus(self) -> int:
        """How many share a layer."""
        return len(next(iter(self.slots.values())))

    @property
    def number_of_slots(self) -> int:
        """Of all GPUs together, in one layer."""
        return sum(map(len, next(iter(self.slots.values()))))

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return len({expert for own in next(iter(self.slots.values())) for expert in own})

    @property
    def redundant(self) -> int:
        """Slots beyond one for each expert."""
        return self.number_of_slots - self.experts

    @property
    def flat(self) -> dict[int, list[int]]:
        """The experts in all slots of each layer, GPU after GPU."""
        return {layer: [expert for own in gpus for expert in own] for layer, gpus in self.slots.items()}

    def every_layer(self, first: int) -> range:
        """The numbers of all layers from *first* to the last of the model.

        Raises `SettingError` for numbers of layers that no model, or not this one, has.
        """
        last = max(self.slots)
        if last > MOST_LAYERS:
            raise SettingError(f"a row for every layer up to {last:,} is needed: number layers as the model does")
        if 0 < self.model_layers <= last:
            raise SettingError(
                f"layer {last} is none of the {self.model_layers} layers of the model, 0 to {self.model_layers - 1}: "
                "check --model-layers, and give --first-layer where the trace does not count from 0 as the model does"
            )
        return range(first, max(last + 1, self.model_layers))

    def every_row(self, first: int) -> dict[int, list[int]]:
        """The slots of every layer from *first* to the last of the model; the default placement without a plan."""
        flat, default = self.flat, (np.arange(self.number_of_slots) % self.experts).tolist()
        return {layer: flat.get(layer, default) for layer in self.every_layer(first)}


def renumbered(layers: Sequence[int], first_layer: int | None) -> dict[int, int]:
    """The number in the model of each of *layers*, increasing, of which the first is *first_layer*; None for its own.

    >>> renumbered([1, 2, 4], 0)
    {1: 0, 2: 1, 4: 3}
    """
    apart = 0 if first_layer is None or not layers else first_layer - layers[0]
    return {layer: layer + apart for layer in layers}


@dataclass(frozen=True)
class File(Generic[T]):
    """A file that a program reads: its *name*, *ending* and *content*, and the *flags* for its path."""

    name: str
    ending: str
    content: Callable[[T], bytes]
    flags: Callable[[T, str], str]


@dataclass(frozen=True)
class System:
    """One serving system, or a way to plan.

    *sentence* is its policy as the subject of a sentence, filled from the fields of the verdict. *policies* are those
    for a model of so many layers, its defaults first; *launch* starts the system with one of them, for so many
    experts, and is None where the plan comes from a file. A system that is *planned* has to take plans while it runs,
    from `rebalance_experts`: no system does so unchanged. *read* gets the slots of the MoE layers from a document of
    the system's plan file, by their numbers or in order, for so many GPUs; it raises `KeyError` for another document.
    """

    name: str
    sentence: str = "{system}'s policy, a plan every {interval:,} steps from the last {window:,} steps,"
    policies: Callable[[int], list[Policy]] = lambda _: []
    launch: Callable[[Policy, Planning, int], str] | None = None
    planned: bool = False
    files: tuple[File[Deployment], ...] = ()
    read: Callable[[Any, int], Mapping[int, Any] | Sequence[Any]] | None = None
