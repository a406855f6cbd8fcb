"""What keeps a source from being read, as one line: the system, a library, damage, too little memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrace.errors import MoetraceError, TraceError
from moetrace.files import OF_WRITING
from moetrace.formats.stream.cells import Block

# Below this nothing is asked: the answer costs more than the memory.
FREE_TO_TAKE = 64 << 20
CGROUP = Path("/sys/fs/cgroup")


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


@contextmanager
def library_errors(where: str, problem: str | Callable[[], str], way_out: str) -> Iterator[None]:
    """Whatever a library raises in the block becomes a `TraceError` with the first line of what it had to say.

    Readers of Parquet, archives and tensors raise a dozen types on damaged files. *problem* may be a function where it
    is known only when the error comes, such as the row that was reached.
    """
    try:
        yield
    except (MoetraceError, MemoryError):
        raise
    except UnicodeEncodeError as error:  # Arrow wants paths in UTF-8
        raise TraceError(where, "has a name that is no UTF-8", "rename it, or work in a UTF-8 locale") from error
    except Exception as error:
        text = problem if isinstance(problem, str) else problem()
        raise TraceError(where, f"{text}: {one_line(error)}", way_out) from error


def one_line(error: BaseException) -> str:
    """The first line of what a library had to say."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200].rstrip(". ")


def damaged(path: Path, problem: str) -> TraceError:
    """That the canonical file *path* is not as it was written."""
    return TraceError(str(path), f"is damaged: {problem}", "ingest its source again")


@contextmanager
def reporting_damage(path: Path) -> Iterator[None]:
    """Whatever is raised on a damaged or missing canonical file becomes one `TraceError`."""
    try:
        with library_errors(str(path), "is damaged", "ingest its source again"):
            yield
    except TraceError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError):
            raise TraceError(str(path), "does not exist", "see `moetrace list` for the traces there are") from None
        if isinstance(cause, PermissionError):
            raise TraceError(str(path), "may not be read", "check its permissions") from None
        raise


# --- memory: a small file can ask for a lot ----------------------------------------------------


def available() -> int | None:
    """Bytes of memory that this process may still take, as far as the system tells; None where it does not."""
    found = [n for n in (_of_machine(), _of_control_group(), _of_limits()) if n is not None]
    return min(found, default=None)


def require(needed: int, where: str, what: str, way_out: str) -> None:
    """Raise `TraceError` naming both amounts when *what*, which takes *needed* bytes, does not fit."""
    if needed <= FREE_TO_TAKE:
        return
    free = available()
    if free is not None and needed > free:
        raise TraceError(where, f"{what} would take {gib(needed)} of memory, and there are {gib(free)}", way_out)


def gib(n: int) -> str:
    """Bytes for people."""
    return f"{n / 2**30:,.1f} GiB"


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)
    except (OSError, ValueError, IndexError):
        return _of_pages()


def _of_pages() -> int | None:
    """All of the memory, where the system does not tell what is free of it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _of_control_group() -> int | None:
    """What a job's control group leaves; clusters kill what takes more."""
    try:
        name = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        folder = CGROUP / name.lstrip("/")
        limit = (folder / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None


def _of_limits() -> int | None:
    """What ``ulimit -v`` leaves."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (ImportError, OSError, ValueError):
        return None
    return None if limit == resource.RLIM_INFINITY else max(0, limit - taken)
