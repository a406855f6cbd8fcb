"""A stream whose next item is made by another thread."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """The same items and the same errors, each item made by another thread while the one before is in use.

    Decoding, NumPy and compression release the interpreter, so reading and writing share two cores.
    One item more is in memory than without.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="moetrace-reader") as reader:
        coming = reader.submit(next, items, None)
        try:
            while (item := coming.result()) is not None:
                coming = reader.submit(next, items, None)
                yield item
        finally:
            del coming  # it keeps an error, the error keeps the stream, and the stream its files
