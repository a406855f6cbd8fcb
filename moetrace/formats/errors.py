"""What keeps a source from being read, as one line: the system, a library, damage, too little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moetrace.errors import MoetraceError, TraceError, lacks_memory
from moetrace.files import OF_WRITING

# Below this nothing is asked: the answer costs more than the memory.
FREE_TO_TAKE = 64 << 20
CGROUP = Path("/sys/fs/cgroup")
# What to do about a file that cannot be read.
WRITE_AGAIN = "write the file again"


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Whatever keeps *where* from being read becomes a `TraceError`; what keeps a file from being written passes."""
    try:
        yield
    except OSError as error:
        if error.errno in OF_WRITING or lacks_memory(error):
            raise
        problem = f"cannot be read: {error.strerror or error}"
        raise TraceError(str(error.filename or where), problem, "check the file and its permissions") from error
    except UnicodeError as error:
        raise TraceError(repr(where), "has a name that is not UTF-8", "rename it") from error


@contextmanager
def library_errors(where: str, problem: str | Callable[[], str], way_out: str) -> Iterator[None]:
    """Whatever a library raises in the block becomes a `TraceError` with the first line of what it had to say.

    A lack of memory is raised as it is: the file may be sound. *problem* may be a function where it is known only when
    the error comes, such as the row that was reached.
    """
    try:
        yield
    except MoetraceError:
        raise
    except UnicodeEncodeError as error:  # Arrow wants paths in UTF-8
        raise TraceError(where, "has a name that is not UTF-8", "rename it, or work in a UTF-8 locale") from error
    except Exception as error:
        if lacks_memory(error):
            raise
        text = problem if isinstance(problem, str) else problem()
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TraceError(where, f"{text}: {said[:200].rstrip('. ')}", way_out) from error


@contextmanager
def extra(name: str, where: str) -> Iterator[None]:
    """An import of the block that fails becomes a `TraceError` with the extra *name* that has to be installed."""
    try:
        yield
    except ImportError as error:
        raise TraceError(where, f"needs {name}", f'install it: pip install "moetrace[{name}]"') from error


def available() -> int | None:
    """Bytes that this process may still take, of the machine, its control group and `ulimit -v`; None if not known."""
    import psutil

    found: list[int] = []
    with suppress(OSError, ValueError, NotImplementedError):
        found.append(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):
        name = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        folder = CGROUP / name.lstrip("/")
        limit = (folder / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((folder / "memory.current").read_text()))
    with suppress(ImportError, OSError, ValueError, AttributeError):
        import resource

        limit_of_process, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit_of_process != resource.RLIM_INFINITY:
            found.append(max(0, limit_of_process - psutil.Process().memory_info().vms))
    return min(found, default=None)


def require(needed: int, where: str, what: str, way_out: str) -> None:
    """Raise `TraceError` naming both amounts when *what*, which takes *needed* bytes, does not fit."""
    if needed <= FREE_TO_TAKE:
        return
    free = available()
    if free is not None and needed > free:
        amounts = f"{needed / 2**30:,.1f} GiB of memory, and there are {free / 2**30:,.1f} GiB"
        raise TraceError(where, f"{what} would take {amounts}", way_out)
