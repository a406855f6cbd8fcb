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


def cached_per_layer(ask: Callable[Concatenate[LayerLoad, P], T]) -> Callable[Concatenate[LayerLoad, P], T]:
    """*ask*, whose answer is cached for the same rows of a layer. It must hold no load, and nobody changes it."""

    @wraps(ask)
    def cached(load: LayerLoad, /, *args: P.args, **settings: P.kwargs) -> T:
        answers = load.cache.answers
        key = (ask, load.cache.first_row, len(load.steps), args, tuple(settings.items()))
        if key not in answers:
            answers[key] = ask(load, *args, **settings)
        answer: T = answers[key]
        return answer

    return cached


def cache_block_means(load: LayerLoad, rows: int) -> None:
    """Cache the means of the shares over all blocks of *rows* rows, from the first row of *load* on."""
    blocks = len(load.steps) // rows
    if rows not in load.cache.block_means:
        means = load.shares[: blocks * rows].reshape(blocks, rows, load.experts).mean(axis=1)
        load.cache.block_means[rows] = means


def cached_block_means(load: LayerLoad, rows: int) -> Shares | None:
    """The means of the whole blocks of *load* up to its last row, where they are cached: shape (blocks, experts)."""
    means = load.cache.block_means.get(rows)
    end, left = divmod(load.cache.first_row + len(load.steps), rows)
    return None if means is None or left else means[end - len(load.steps) // rows : end]
