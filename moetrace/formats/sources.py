"""Sources: where they lie, what their names say, what shows whether one is still the same, and why one is not read."""

from __future__ import annotations

import glob
import hashlib
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pf

from moetrace.errors import MoetraceError, SettingError, TraceError, lacks_memory, shown
from moetrace.files import OF_WRITING

# A file for each layer, its number in the name; for each step, or range of steps; for each rank.
LAYER_IN_NAME = re.compile(r"^(?:.*[_.-])?layer[_=.-]?(\d{1,15})$", re.IGNORECASE)
STEP_IN_NAME = re.compile(r"(?:step|iter|iteration)[_=.-]?(\d{1,15})", re.IGNORECASE)
RANK_IN_NAME = re.compile(r"rank[_-]?(\d{1,15})", re.IGNORECASE)
# A step, the number of a window, or a time.
SEGMENT_IN_NAME = re.compile(rf"{STEP_IN_NAME.pattern}|(?<!\d)(\d{{9,15}})(?!\d)|moe_load_(\d{{1,15}})", re.IGNORECASE)
# Below this nothing is asked: the answer costs more than the memory.
FREE_TO_TAKE = 64 << 20
CGROUP = Path("/sys/fs/cgroup")
# What to do about a file that cannot be read.
WRITE_AGAIN = "write the file again"


@dataclass(frozen=True)
class Uri:
    """A source that is not a local path, such as ``s3://bucket/run7``, called like the last part of its *path*."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def path(self) -> PurePosixPath:
        """The part after the bucket or host."""
        parts = urlsplit(self.text)
        return PurePosixPath(parts.path if parts.path.strip("/") else parts.netloc)

    name = property(lambda self: self.path.name)
    stem = property(lambda self: self.path.stem)

    def opened(self) -> tuple[Any, str]:
        """Its file system and the path on that: pyarrow's own, or else one of fsspec."""
        try:
            system, path = pf.FileSystem.from_uri(self.text)
            return system, path
        except (pa.ArrowException, OSError, ValueError):
            pass  # a scheme, or a build of pyarrow, without it
        with extra("fsspec", str(self)):
            from fsspec.core import url_to_fs
        with library_errors(str(self), "cannot be opened", "check the URI and its back end"):
            system, path = url_to_fs(self.text)
        return pf.PyFileSystem(pf.FSSpecHandler(system)), path


@dataclass(frozen=True)
class Query:
    """A source that is a query of DuckDB, whose rows are a step, a layer, an expert and its tokens."""

    sql: str

    def __str__(self) -> str:
        short = " ".join(self.sql.split())
        return f"query {short if len(short) <= 80 else short[:77] + '...'!r}"

    name = property(__str__)

    @property
    def sources(self) -> list[str]:
        """What stands in quotes in it: the files, unless it is something else."""
        return [found for pair in re.findall(r"'([^']+)'|\"([^\"]+)\"", self.sql) for found in pair if found]

    @property
    def path(self) -> PurePosixPath:
        """The first file in it."""
        paths = (PurePosixPath(text) for text in self.sources)
        return next((path for path in paths if path.suffix), PurePosixPath("query"))

    @property
    def stem(self) -> str:
        """The name of that, without a pattern."""
        return re.sub(r"[*?\[\]{}]+", "", self.path.stem).strip("-_.") or "query"


Location = Path | Uri | Query


def locations(source: str | Location | Sequence[str | Location]) -> list[Location]:
    """Where one source lies, or several; raises `SettingError` for an array or a frame, which lies nowhere."""
    if not isinstance(source, str | Location | Sequence):
        way_out = "moetrace.from_frame makes a trace of a data frame, LoadTrace.from_counts of an array"
        raise SettingError(f"a {type(source).__name__} is not a path to read from: {way_out}")
    given = [source] if isinstance(source, str | Location) else source
    return [part if not isinstance(part, str) else Uri(part) if "://" in part else Path(part) for part in given]


def source_label(paths: Sequence[Location]) -> str:
    """The names of sources, as the metadata of a trace have them."""
    return ", ".join(path.name for path in paths[:3]) + (f", ... ({len(paths)} files)" if len(paths) > 3 else "")


def fingerprint(*paths: Location) -> str:
    """SHA-256 of a file's content, or of the names and contents of several files or a folder's.

    Of a URI the names, sizes and times of its files count; of a query its text and the local files in it, and with
    others it is new each time. Raises `TraceError` if it cannot be read.
    """
    if len(paths) > 1:
        return _digest(f"{path.name} {fingerprint(path)}" for path in paths)
    (path,) = paths
    if isinstance(path, Uri):
        system, inside = path.opened()
        with library_errors(str(path), "cannot be read", "check the URI and access"):
            there = system.get_file_info(inside)
            folder = there.type == pf.FileType.Directory
            files = system.get_file_info(pf.FileSelector(inside, recursive=True)) if folder else [there]
        marks = [f"{file.path} {file.size} {file.mtime_ns}" for file in files if file.type == pf.FileType.File]
        return _digest(sorted(marks))
    if isinstance(path, Query):
        named = [sorted(glob.glob(text, recursive=True)) for text in path.sources]  # noqa: PTH207 - absolute, too
        local = [Path(name) for names in named for name in names]
        elsewhere = any("://" in text for text in path.sources) or not local
        marks = [f"{file} {fingerprint(file)}" for file in local if file.is_file()]
        return _digest([path.sql, *marks, *([uuid.uuid4().hex] if elsewhere else [])])
    with readable(str(path)):
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        children = [child for child in sorted(path.rglob("*")) if child.is_file()]
        return _digest(f"{child.relative_to(path)} {fingerprint(child)}" for child in children)


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def fingerprinting(paths: Sequence[Location]) -> Iterator[Future[str]]:
    """The fingerprint of *paths* to come: it is taken by another thread while they are being read.

    Where both end in a `TraceError`, that of the fingerprint counts: it names the file that cannot be read, and why.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="moetrace-fingerprint") as aside:
        coming = aside.submit(fingerprint, *paths)
        try:
            yield coming
        except TraceError:
            coming.result()
            raise


def by_rank(paths: Iterable[Any]) -> list[Any]:
    """Paths in the order of the numbers in their names; a number of seconds may have a part of one after a dot."""

    def parts(path: Location) -> list[str | Decimal]:
        split = re.split(r"((?<!\d)\d{9,}\.\d+|\d+)", str(path))
        return [Decimal(part) if i % 2 else part for i, part in enumerate(split)]

    return sorted(paths, key=parts)


def rank_files(path: Path, name: re.Pattern[str]) -> list[Path]:
    """The files of such a *name* that *path* is or holds, in the order of their ranks."""
    inside = path.iterdir() if path.is_dir() else [path]
    return by_rank(child for child in inside if name.fullmatch(child.name) and child.is_file())


def _number_in(pattern: re.Pattern[str], path: Location) -> int | None:
    found = pattern.search(path.stem)
    return int(next(group for group in found.groups() if group)) if found else None


rank_in_name = partial(_number_in, RANK_IN_NAME)
step_in_name = partial(_number_in, STEP_IN_NAME)
layer_in_name = partial(_number_in, LAYER_IN_NAME)


def rank_or_last_number(path: Location) -> int | None:
    """The rank in a file's name: the number after ``rank``, or else the last one, unless that is a layer."""
    found = rank_in_name(path)
    if found is not None or layer_in_name(path) is not None:
        return found
    last = re.search(r"(\d+)(?!.*\d)", path.stem)
    return int(last[1]) if last else None


def check_ranks(paths: Sequence[Location]) -> None:
    """Raise `TraceError` when a rank is missing between the first and the last, or there twice."""
    numbers = [rank_or_last_number(path) for path in paths]
    if None in numbers:
        return
    ranks = sorted((number or 0, path) for number, path in zip(numbers, paths))
    for (a, first), (b, second) in pairwise(ranks):
        if a == b:
            raise TraceError(str(first), f"is rank {a}, and so is {second}", "merge each rank once")
        if b > a + 1:
            missing = f"is rank {b}, but rank {shown(range(a + 1, b))} is missing before it"
            raise TraceError(str(second), missing, "merge all ranks of the run")


def merge_hint(paths: Sequence[Location]) -> str | None:
    """What files that are read one by one may be parts of, by the numbers in all their names; None for nothing.

    >>> from pathlib import Path
    >>> merge_hint([Path("rank0.jsonl"), Path("rank1.jsonl")])[:45]
    '2 files of ranks are 2 traces; one of all has'
    """
    of_ranks = "--merge sum where ranks are replicas, or --merge experts where they hold other experts"
    ways = (
        ([rank_in_name(path) for path in paths], "ranks", of_ranks),
        ([layer_in_name(path) for path in paths], "layers", "--merge layers"),
        ([_number_in(SEGMENT_IN_NAME, path) for path in paths], "steps", "--merge steps"),
    )
    for numbers, what, way in ways:
        if len(paths) > 1 and None not in numbers and len(set(numbers)) > 1:
            return f"{len(paths)} files of {what} are {len(paths)} traces; one of all has {way}"
    return None


# --- why a source is not read: the system, a library, damage, too little memory --------------------


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
