"""The errors a user or a file can cause; each reads as one line and names the way out."""

from __future__ import annotations

import errno
import re
from collections.abc import Collection, Iterable
from itertools import islice

# How loaders, threads and native libraries report a lack of memory.
NO_MEMORY = r"failed to map segment|cannot allocate memory|can't start new thread|out of memory|bad_alloc"


def printable(text: str) -> str:
    """*text* with every character that a terminal would act on, or cannot show, as its escape.

    Text from files may hold escape sequences, line ends, marks that change the direction of writing, halves
    of surrogate pairs.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class MoetraceError(Exception):
    """An error that a user or a file caused; the command line prints it as one line."""


class TraceError(MoetraceError):
    """A source or a trace that is not what it should be.

    The message has three parts: where (file, column, first bad row or step), what is wrong, and the way out.
    """

    def __init__(self, where: str, problem: str, way_out: str) -> None:
        # All three as arguments: an error is rebuilt from them where it comes from another process.
        super().__init__(where, problem, way_out)

    def __str__(self) -> str:
        where, problem, way_out = self.args
        return f"{where}: {problem}; {way_out}"


def lacks_memory(error: BaseException) -> bool:
    """Whether *error*, or what it was raised from, means that there was not enough memory.

    Systems and libraries say so in many ways: also files cannot be mapped, libraries loaded or threads started.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return True
        if isinstance(cause, ImportError | RuntimeError | SystemError) and re.search(
            NO_MEMORY, str(cause), re.IGNORECASE
        ):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


class WorkspaceError(MoetraceError):
    """A name, a folder or an output that cannot be used as asked."""


class SettingError(MoetraceError):
    """A setting, a layer, a step, a name or a horizon that is invalid or does not exist.

    On the command line it is a usage error: exit code 2.
    """


class TooShortError(MoetraceError):
    """A trace with too few steps to fit anything."""


def known_names(name: str, names: Iterable[str]) -> str:
    """For a *name* that is not among *names*: the most similar of them, or all."""
    from difflib import get_close_matches

    known = list(names)
    near = get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"there are {shown(known, 20) or 'none'}"


def shown(items: Collection[object], most: int = 8) -> str:
    """The first *most* of *items* with commas between them, and how many there are where that is not all."""
    texts = ", ".join(str(item) for item in islice(items, most))
    return texts + (f", ... ({len(items)})" if len(items) > most else "")


def check_several(given: object, what: str, example: str) -> None:
    """Raise `SettingError` if a single value was given for a list, as in ``horizons=1000``."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise SettingError(f"{what} are several, such as {example}, not {given!r}")
