"""How much memory there is, and refusing what would need more: a small file can ask for a lot."""

from __future__ import annotations

import os
from pathlib import Path

from moetrace.errors import TraceError

# Below this nothing is asked: the answer costs more than the memory.
FREE_TO_TAKE = 64 << 20
CGROUP = Path("/sys/fs/cgroup")


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
