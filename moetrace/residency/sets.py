"""Which experts a resident set has: the most loaded ones, as many in every layer or as a layer's load deserves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import SettingError
from moetrace.trace import Shares

# Shares are compared to so many digits, so that a set does not depend on the processor.
DIGITS = 12

# How slots are divided over the layers: as many for each, or where they cover most.
EQUAL, BY_LOAD = "equal", "by_load"

Slots = NDArray[np.int64]
"""Resident experts of each layer."""


@dataclass(frozen=True)
class Budget:
    """How many experts may be resident: *slots* in every layer, *total* over all layers, or as few as *cover* a share.

    At most one of them; none is the knee, up to which every expert has more than the mean load.
    """

    slots: int | None = None
    total: int | None = None
    cover: float | None = None

    def check(self, layers: int, experts: int) -> None:
        """Raise `SettingError` where so many *layers* of so many *experts* do not allow it."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) > 1:
            raise SettingError(f"{' and '.join(given)} exclude each other: give one of them")
        for name, value in given.items():
            most = {"slots": experts, "total": layers * experts, "cover": 1}[name]
            if not 0 < value <= most:
                of = (
                    f"{layers:,} layers of {experts:,} experts"
                    if name == "total"
                    else f"{experts:,} experts in a layer"
                )
                among = "a share of the load" if name == "cover" else of
                raise SettingError(f"{name} must be above 0 and at most {most:,} ({among}), got {value:,}")

    @property
    def allocation(self) -> str:
        """How slots are divided over the layers: `EQUAL` where they were given for each, or not at all."""
        return EQUAL if self.total is None and self.cover is None else BY_LOAD

    def size(self, shares: Shares) -> int:
        """Resident experts over all layers, for forecast *shares* (layers, experts)."""
        layers, experts = shares.shape
        if self.cover is not None:
            gains = np.sort(shares, axis=None)[::-1]
            # The last digits of a sum must not ask for one expert more.
            enough = np.cumsum(gains) / layers >= self.cover - 10.0**-DIGITS
            return int(np.argmax(enough)) + 1 if enough.any() else layers * experts
        if self.total is not None:
            return self.total
        return int(layers * (knee(shares) if self.slots is None else self.slots))


def ranked(shares: Shares) -> NDArray[np.int64]:
    """The experts from the most to the least loaded along the last axis of *shares*; the first of equal ones first."""
    return np.argsort(-shares.round(DIGITS), axis=-1, kind="stable")


def knee(shares: Shares) -> int:
    """Experts of a layer up to which one more covers above the mean load of an expert, for *shares* (layers, experts).

    There the mean curve of coverage is furthest above that of experts taken at random.
    """
    experts = shares.shape[-1]
    curve = np.cumsum(-np.sort(-shares, axis=-1), axis=-1).mean(axis=0)
    above = curve - np.arange(1, experts + 1) / experts
    return int(np.argmax(above.round(DIGITS))) + 1


def divided(shares: Shares, total: int) -> Slots:
    """*total* slots over layers so that resident experts cover most of *shares* (layers, experts): shape (layers,).

    The next slot goes to the expert with the largest share anywhere. Within a layer shares only fall from the first
    expert on, so that no exchange of two slots covers more: for a sum of concave curves this is the optimum
    (Gross 1956, marginal allocation). All layers count the same, as all route the same tokens.
    """
    layers, experts = shares.shape
    best = np.argsort(-shares.round(DIGITS), axis=None, kind="stable")[:total]
    return np.bincount(best // experts, minlength=layers)
