"""What the system says about a source that cannot be read, as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moetrace.atomic import OF_WRITING
from moetrace.errors import TraceError
from moetrace.formats.base import Block


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Whatever keeps *where* from being read becomes a `TraceError`; what keeps a file from being written passes."""
    try:
        yield
    except OSError as error:
        if error.errno in OF_WRITING:
            raise
        name = error.filename or where
        raise TraceError(
            str(name), f"cannot be read: {error.strerror or error}", "check the file and its permissions"
        ) from error
    except UnicodeError as error:
        raise TraceError(repr(where), "has a name that is no UTF-8", "rename it") from error


def read_safely(blocks: Iterator[Block], where: str) -> Iterator[Block]:
    """The same blocks, with `readable` around each step of the stream and not around what is done with them."""
    while True:
        with readable(where):
            block = next(blocks, None)
        if block is None:
            return
        yield block
