"""What is computed once of a layer: the same answers as without, and only for the same rows."""

from dataclasses import replace

import numpy as np
import pytest

from moetrace import settling, synthetic_trace
from moetrace.analysis.variogram import block_means, cache_block_means, cached_per_layer, noise_and_drift, since_jump


@pytest.fixture
def load():
    """A layer of 2,000 steps."""
    return synthetic_trace([settling(500, steps=2000)]).layer(0)


@pytest.mark.parametrize(("first", "last"), [(1, 2000), (1, 1950), (1, 1951), (300, 1500), (987, 1000), (1960, 1970)])
def test_cached_blocks_are_those_that_are_computed(load, first, last):
    """Whatever was cut from the layer, and whether or not it ends where a block does."""
    fresh = replace(load).between(first, last)
    cache_block_means(load, 50)

    found = block_means(load.between(first, last), 50)

    assert np.array_equal(block_means(fresh, 50), found)
    assert not len(found) or np.shares_memory(found, load.cache.block_means[50]) == (last % 50 == 0)
    assert 25 not in load.cache.block_means


def test_an_answer_is_cached_for_the_same_rows_and_settings(load):
    """And for no others, however the rows were cut."""
    asked = []

    @cached_per_layer
    def total(part, factor=1):
        asked.append((int(part.steps[0]), int(part.steps[-1]), factor))
        return factor * int(part.counts.sum())

    for part in (load, load.until(500), load.until(500), load.until(700).until(500), load.after(500, 100)):
        total(part)
    total(load.until(500), 2)

    assert [(1, 2000, 1), (1, 500, 1), (501, 600, 1), (1, 500, 2)] == asked
    assert 2 * total(load.until(500)) == total(load.until(500), 2)


def test_what_is_cached_belongs_to_the_counts(load):
    """A load with other counts knows nothing of them."""
    cache_block_means(load, 50)
    other = replace(load, counts=load.counts[::-1])

    assert {} == other.cache.block_means
    assert noise_and_drift(load) != noise_and_drift(other)
    assert since_jump(load) is load
