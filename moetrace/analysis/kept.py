"""What is computed once of a layer, for the many histories that are cut from it.

A forecast at a cutoff looks back at a hundred earlier cutoffs, and the next one at nearly the same. Each history has
its own rows, but most are asked the same questions several times, and nearly all end where a block ends.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from moetrace.trace import LayerLoad, Shares

P = ParamSpec("P")
T = TypeVar("T")


def once(ask: Callable[Concatenate[LayerLoad, P], T]) -> Callable[Concatenate[LayerLoad, P], T]:
    """*ask*, whose answer is kept for the same rows of the same layer. It must hold no load, and nobody changes it."""

    @wraps(ask)
    def kept(load: LayerLoad, /, *args: P.args, **settings: P.kwargs) -> T:
        first, known = load.known
        key = (ask, first, len(load.steps), args, tuple(settings.items()))
        if key not in known:
            known[key] = ask(load, *args, **settings)
        answer: T = known[key]
        return answer

    return kept


def keep_blocks(load: LayerLoad, rows: int) -> None:
    """Keep the means of the shares over all blocks of *rows* rows, from the first row of *load* on."""
    blocks, known = len(load.steps) // rows, load.known[1]
    if ("means", rows) not in known:
        known["means", rows] = load.shares[: blocks * rows].reshape(blocks, rows, load.experts).mean(axis=1)


def kept_means(load: LayerLoad, rows: int) -> Shares | None:
    """The means of the whole blocks of *load* up to its last row, where they are kept: shape (blocks, experts)."""
    first, known = load.known
    means: Shares | None = known.get(("means", rows))
    end, left = divmod(first + len(load.steps), rows)
    return None if means is None or left else means[end - len(load.steps) // rows : end]
