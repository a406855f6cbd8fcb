"""One piece is made while the last one is used."""

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrace.formats.canonical import prefetch


@given(st.lists(st.integers(), max_size=8))
def test_items_come_unchanged_and_in_order(items: list[int]) -> None:
    """What goes in comes out."""
    assert list(prefetch(iter(items))) == items


def test_the_next_item_is_made_while_one_is_used() -> None:
    """While an item is in use the one after it is made, and not the one after that."""
    made = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for i, event in enumerate(made):
            event.set()
            yield i

    stream: Any = prefetch(items())
    assert next(stream) == 0
    assert made[1].wait(10)
    assert not made[2].is_set()
    stream.close()


def test_an_error_comes_where_it_belongs_and_holds_nothing_open() -> None:
    """Items before an error arrive, the error is the same, and the stream behind it is let go."""
    closed = []

    def behind() -> Iterator[int]:
        try:
            yield from (1, 2, 0)
        finally:
            closed.append(True)

    stream = prefetch(1 // n for n in behind())
    assert [next(stream), next(stream)] == [1, 0]
    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError):
            next(stream)
        assert closed == [True]
    finally:
        gc.enable()
