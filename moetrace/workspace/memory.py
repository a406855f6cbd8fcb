"""How a process of ours handles the memory of arrays that come and go."""

import ctypes
from contextlib import suppress

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h, in bytes; the latter is the largest that glibc takes.
MALLOC = {-1: 256 << 20, -3: 32 << 20}


def keep_freed_memory() -> None:
    """Let this process keep memory that arrays have given back, for the next ones; elsewhere than on glibc, nothing.

    Asking the system for the same pages again and again was a fifth of the time of `place` on 58 x 256 x 400: 5.7 s of
    system time, of which 1.3 s are left. For commands and their workers, not for a process of somebody else.
    """
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        for option, size in MALLOC.items():
            libc.mallopt(option, size)
