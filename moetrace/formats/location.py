"""Where sources lie: paths, URIs and queries; and what shows whether one is still what a trace was read from."""

from __future__ import annotations

import glob
import hashlib
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from moetrace.errors import SettingError, TraceError
from moetrace.formats.errors import library_errors


@dataclass(frozen=True)
class Uri:
    """A source that is not a local path, such as ``s3://bucket/run7``."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def path(self) -> PurePosixPath:
        """The part after the bucket or host."""
        parts = urlsplit(self.text)
        return PurePosixPath(parts.path if parts.path.strip("/") else parts.netloc)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name

    @property
    def stem(self) -> str:
        """The last part of the path without its ending."""
        return self.path.stem

    def opened(self) -> tuple[Any, str]:
        """Its file system and the path on that: pyarrow's own, or else one of fsspec."""
        import pyarrow as pa
        import pyarrow.fs as pf

        try:
            system, path = pf.FileSystem.from_uri(self.text)
            return system, path
        except (pa.ArrowException, OSError, ValueError):
            pass  # a scheme, or a build of pyarrow, without it
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            problem = f"pyarrow opens no {urlsplit(self.text).scheme}://"
            raise TraceError(str(self), problem, 'install fsspec: pip install "moetrace[fsspec]"') from error
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

    @property
    def sources(self) -> list[str]:
        """What stands in quotes in it: the files, unless it is something else."""
        return [found for pair in re.findall(r"'([^']+)'|\"([^\"]+)\"", self.sql) for found in pair if found]

    @property
    def path(self) -> PurePosixPath:
        """The first file in it."""
        named = [text for text in self.sources if "." in PurePosixPath(text).name]
        return PurePosixPath(named[0] if named else "query")

    @property
    def name(self) -> str:
        """What the metadata of a trace call it."""
        return str(self)

    @property
    def stem(self) -> str:
        """The name of its trace: that of the first file without a pattern in it."""
        return re.sub(r"[*?\[\]{}]+", "", self.path.stem).strip("-_.") or "query"


Location = Path | Uri | Query


def location(text: str) -> Location:
    """The path or URI that *text* is."""
    return Uri(text) if "://" in text else Path(text)


def locations(source: str | Location | Sequence[str | Location]) -> list[Location]:
    """Where one source lies, or several; raises `SettingError` for an array or a frame, which lies nowhere."""
    if not isinstance(source, str | Location | Sequence):
        way_out = "moetrace.from_frame makes a trace of a data frame, LoadTrace.from_counts of an array"
        raise SettingError(f"a {type(source).__name__} is not a path to read from: {way_out}")
    given = [source] if isinstance(source, str | Location) else source
    return [location(part) if isinstance(part, str) else part for part in given]


def source_label(paths: Sequence[Location]) -> str:
    """The names of sources, as the metadata of a trace have them."""
    return ", ".join(path.name for path in paths[:3]) + (f", ... ({len(paths)} files)" if len(paths) > 3 else "")


def fingerprint(*paths: Location) -> str:
    """SHA-256 of a file's content, or of the names and contents of several files or a folder's.

    That of a URI is of the names, sizes and times of its files, whose content is not fetched for it; that of a query
    of its text and the local files in it, and anew each time where there are others. Raises `TraceError` for what
    cannot be read.
    """
    if len(paths) > 1:
        return _digest(f"{path.name} {fingerprint(path)}" for path in paths)
    (path,) = paths
    if isinstance(path, Uri):
        import pyarrow.fs as pf

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
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        children = [child for child in sorted(path.rglob("*")) if child.is_file()]
        return _digest(f"{child.relative_to(path)} {fingerprint(child)}" for child in children)
    except OSError as error:
        way_out = "check the file and its permissions"
        raise TraceError(str(error.filename or path), f"cannot be read: {error.strerror}", way_out) from error


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def fingerprinting(paths: Sequence[Location]) -> Iterator[Future[str]]:
    """The fingerprint of *paths* to come: it is taken by another thread while they are being read.

    Where the reading ends in a `TraceError` and the fingerprint does too, the latter counts: it names the file that
    cannot be read, and why.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="moetrace-fingerprint") as aside:
        coming = aside.submit(fingerprint, *paths)
        try:
            yield coming
        except TraceError:
            coming.result()
            raise
