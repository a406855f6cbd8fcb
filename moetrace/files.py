"""Files that are there whole or not at all, temporary folders, and names that are safe as paths."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moetrace.errors import WorkspaceError

PREFIX = ".partial-"
# What only writing can meet, whatever was being read at the time, and what to do about it.
OF_WRITING = {
    errno.ENOSPC: "free some space, or choose another folder with --workspace or --output",
    errno.EDQUOT: "free some of your quota, or choose another folder with --workspace or --output",
    errno.EROFS: "choose another folder with --workspace or --output",
    errno.EFBIG: "choose another folder with --workspace or --output",
}
# What is safe in a file name of any system, and readable; a dot too, except at either end.
UNSAFE = re.compile(r"[^A-Za-z0-9_=,+@ .-]|^\.|\.$|^ | $|%")
# File names may have 255 bytes on common file systems, and endings come after these.
LONGEST = 100
DIGITS = 16
# Seconds by which the start of a process may seem to move when somebody sets the clock.
SAME_START = 3600
_being_written: set[Path] = set()


@contextmanager
def replacing(path: Path, named: Callable[[Path], Path] | None = None) -> Iterator[Path]:
    """A temporary path beside *path* that takes its place when the block ends without an error.

    The file is synced, then moved: a reader sees the old file or the new one, never a part.
    *named*, where given, makes the final path from the file itself, by its digest: such a file is not synced, because
    what a power failure leaves of it has another one, and is computed again.
    A *path* that is temporary itself is written as it is.
    Raises `WorkspaceError` naming *path* when the disk is full, or the folder may not be written to.
    """
    if path in _being_written:
        yield path
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_prefix(), suffix=path.suffix, dir=path.parent)
        os.close(handle)
        partial = Path(name)
        _being_written.add(partial)
        try:
            yield partial
            umask = os.umask(0)
            os.umask(umask)
            partial.chmod(0o666 & ~umask)  # mkstemp makes files that nobody else may read
            if named is not None:
                partial.replace(named(partial))
            else:
                _sync(partial)
                partial.replace(path)
                _sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)
            _being_written.discard(partial)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever keeps *path* from being written becomes a `WorkspaceError` with the reason."""
    try:
        yield
    except OSError as error:
        place = path if error.filename is None or PREFIX in str(error.filename) else error.filename
        reason = os.strerror(error.errno) if error.errno else str(error)
        way_out = OF_WRITING.get(error.errno or 0, "check the folder and its permissions")
        raise WorkspaceError(f"{place}: cannot be written: {reason}; {way_out}") from error
    except UnicodeEncodeError as error:  # Arrow wants paths in UTF-8
        raise WorkspaceError(
            f"{os.path.abspath(path)}: cannot be written: its name is not UTF-8; rename it or the folder above, "  # noqa: PTH100 - unresolved
            "or choose another folder with --workspace or --output"
        ) from error


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder inside *folder* that is gone, with all in it, when the block ends."""
    inside = Path(tempfile.mkdtemp(prefix=_prefix(), dir=folder))
    _being_written.add(inside)
    try:
        yield inside
    finally:
        _remove(inside)
        _being_written.discard(inside)


@contextmanager
def temporary() -> Iterator[Path]:
    """The path of a temporary file, for what goes to a device, a pipe or the standard output from there."""
    folder = Path(tempfile.gettempdir())
    with writing(folder), scratch(folder) as inside:
        held = inside / "output"
        _being_written.add(held)
        try:
            yield held
        finally:
            _being_written.discard(held)


def discard() -> None:
    """Remove what this process has half-written; for leaving without unwinding."""
    for partial in tuple(_being_written):  # another thread may be done with one at this moment
        _remove(partial)


def _machine() -> str:
    """Names the place in which process numbers are unique: host, boot and, in a container, its PID namespace.

    Hosts and containers may share a name, as pods on the network of their host do.
    """
    import hashlib  # and OpenSSL with it, which no help needs

    facts = [platform.node()]
    with suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    with suppress(OSError):
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256(" ".join(facts).encode("utf-8", "surrogateescape")).hexdigest()[:DIGITS]


def _prefix() -> str:
    """How the names of temporary files begin: by machine, process and its start, so that a sweep knows the owner."""
    import psutil

    return f"{PREFIX}{_machine()}-{os.getpid()}-{int(psutil.Process().create_time())}-"


def sweep(folder: Path, *, everyone: bool = False) -> None:
    """Remove what processes of this machine that no longer live left half-written in *folder*.

    *everyone* removes all that is half-written: for callers who know that nobody is writing there. What may not be
    removed stays.
    """
    import psutil

    mine = re.compile(rf"{re.escape(PREFIX)}{_machine()}-(\d+)-(\d+)-")
    for partial in folder.glob(f"{PREFIX}*"):
        dead = everyone
        if owner := mine.match(partial.name):
            try:
                began = psutil.Process(int(owner[1])).create_time()
                dead |= abs(began - int(owner[2])) > SAME_START  # another process with its number
            except psutil.NoSuchProcess:
                dead = True
            except psutil.AccessDenied:
                pass
        if dead:
            with suppress(OSError):
                _remove(partial)


def _remove(partial: Path) -> None:
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, path: Path) -> None:
    """Move the finished file *source* to *path*, atomically, replacing what was there.

    Raises `WorkspaceError` naming *path* when the disk is full, or the folder may not be written to.
    """
    with writing(path):
        try:
            source.replace(path)
            _sync(path.parent)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            with replacing(path) as partial:  # another file system
                shutil.copyfile(source, partial)
            source.unlink()


@contextmanager
def output(path: Path, *, force: bool) -> Iterator[Path]:
    """A temporary file whose content goes to *path*, which a user gave, when the block ends without an error.

    A regular file is replaced atomically, if *force*; a symbolic link is followed; a device or a pipe is written
    into as it is. Raises `WorkspaceError` when the file exists and not *force*, or cannot be written.
    """
    if check_output(path, force=force):
        with replacing(Path(os.path.realpath(path))) as partial:
            yield partial
        return
    with temporary() as held:
        yield held
        with writing(path), held.open("rb") as content, path.open("wb") as into:
            shutil.copyfileobj(content, into)


def check_output(path: Path, *, force: bool) -> bool:
    """Whether *path*, which a user gave, is a regular file or free, and not a device or a pipe.

    Raises `WorkspaceError` for a folder, for a socket, and for an existing file without *force*.
    """
    with writing(path):
        try:
            kind = path.stat().st_mode
        except FileNotFoundError:
            return True
    if stat.S_ISDIR(kind) or stat.S_ISSOCK(kind):
        what = "folder" if stat.S_ISDIR(kind) else "socket"
        raise WorkspaceError(f"{path} is a {what}: give the path of a file")
    # What lies in /dev is a device, also a regular file such as /dev/stdout that is redirected.
    if not stat.S_ISREG(kind) or Path(os.path.abspath(path)).parts[:2] == ("/", "dev"):  # noqa: PTH100 - unresolved
        return False
    if not force:
        raise WorkspaceError(f"{path} exists: replace it with --force")
    return True


def write_text(path: Path, text: str, *, force: bool) -> None:
    """Write *text* to a path that a user gave, as `output` does."""
    with output(path, force=force) as held:
        held.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> Path:
    """Write *content* to *path*, atomically, replacing what was there; returns the path."""
    with replacing(path) as partial:
        partial.write_bytes(content)
    return path


def file_name(name: str) -> str:
    """*name* as a file name of any system; two names never become one.

    What is not safe is written as ``%`` and its bytes in hexadecimal digits; a name that is too long ends in a
    digest of the whole.

    >>> file_name("gpt-moe-8e-a"), file_name("../x"), file_name("arima:order=5,1,5")
    ('gpt-moe-8e-a', '%2E.%2Fx', 'arima%3Aorder=5,1,5')
    """

    def in_bytes(text: str) -> bytes:
        return text.encode("utf-8", "surrogatepass")  # names of files need not be UTF-8

    safe = UNSAFE.sub(lambda unsafe: "".join(f"%{byte:02X}" for byte in in_bytes(unsafe[0])), name) or "%"
    if len(safe) <= LONGEST:
        return safe
    import hashlib

    return f"{safe[: LONGEST - DIGITS - 1].rstrip('. ')}%{hashlib.sha256(in_bytes(name)).hexdigest()[:DIGITS]}"
