"""What tells whether a source is still the one that a trace was read from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from moetrace.errors import TraceError
from moetrace.formats.readers.parquet import Location, Uri, mark_of


def fingerprint(*paths: Location) -> str:
    """SHA-256 of a file's content, or of the names and contents of several files or a folder's.

    Raises `TraceError` for what cannot be read.
    """
    if len(paths) > 1:
        return _digest(f"{path.name} {fingerprint(path)}" for path in paths)
    (path,) = paths
    if isinstance(path, Uri):
        return mark_of(path)
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        children = [child for child in sorted(path.rglob("*")) if child.is_file()]
        return _digest(f"{child.relative_to(path)} {fingerprint(child)}" for child in children)
    except OSError as error:
        raise TraceError(
            str(error.filename), f"cannot be read: {error.strerror}", "check the file and its permissions"
        ) from error


def _digest(lines: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def fingerprinting(paths: Sequence[Location]) -> Iterator[Future[str]]:
    """The fingerprint of *paths* to come: it is taken by another thread while they are being read.

    Where the reading ends in a `TraceError` and the fingerprint does too, the latter counts: it says of any
    file that cannot be read which one it is and why.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="moetrace-fingerprint") as aside:
        coming = aside.submit(fingerprint, *paths)
        try:
            yield coming
        except TraceError:
            coming.result()
            raise
