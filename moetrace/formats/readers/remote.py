"""Parquet by URI: object stores and other file systems, through pyarrow or fsspec."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from moetrace.errors import TraceError
from moetrace.formats.errors import one_line
from moetrace.formats.readers.parquet import files_of
from moetrace.formats.stream.cells import Reading, ReadOptions


@dataclass(frozen=True)
class Uri:
    """A source that is no local path, such as ``s3://bucket/run7``."""

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


Location = Path | Uri


def location(text: str) -> Location:
    """The path or URI that *text* is."""
    return Uri(text) if "://" in text else Path(text)


def read_uri(uri: Uri, options: ReadOptions) -> Reading:
    """Start reading the Parquet file, folder or hive-partitioned data set at *uri*; raises `TraceError`."""
    import pyarrow.dataset as ds
    import pyarrow.fs as pf

    system, path = _opened(uri)
    try:
        folder = system.get_file_info(path).type == pf.FileType.Directory
        data = ds.dataset(path, filesystem=system, format="parquet", partitioning="hive" if folder else None)
        files = files_of(data)
    except Exception as error:  # pyarrow and fsspec raise a dozen types
        raise TraceError(
            str(uri), f"cannot be read as Parquet: {one_line(error)}", "check the URI and access"
        ) from error
    return files.reading(str(uri), options)


def mark_of(uri: Uri) -> str:
    """A fingerprint of the names, sizes and times of the files at *uri*; their content is not fetched for it."""
    import pyarrow.fs as pf

    system, path = _opened(uri)
    try:
        there = system.get_file_info(path)
        files = (
            system.get_file_info(pf.FileSelector(path, recursive=True)) if there.type.name == "Directory" else [there]
        )
    except Exception as error:  # pyarrow and fsspec raise a dozen types
        raise TraceError(str(uri), f"cannot be read: {one_line(error)}", "check the URI and access") from error
    lines = sorted(f"{file.path} {file.size} {file.mtime_ns}" for file in files if file.type == pf.FileType.File)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _opened(uri: Uri) -> tuple[Any, str]:
    """The file system of *uri* and the path on it: pyarrow's own, or else one of fsspec."""
    import pyarrow as pa
    import pyarrow.fs as pf

    try:
        system, path = pf.FileSystem.from_uri(uri.text)
        return system, path
    except (pa.ArrowException, OSError, ValueError):
        pass  # a scheme, or a build of pyarrow, without it
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        scheme = urlsplit(uri.text).scheme
        raise TraceError(
            str(uri), f"pyarrow opens no {scheme}://", 'install fsspec: pip install "moetrace[fsspec]"'
        ) from error
    try:
        system, path = url_to_fs(uri.text)
    except Exception as error:  # fsspec hands on whatever its back ends raise
        raise TraceError(str(uri), f"cannot be opened: {one_line(error)}", "check the URI and its back end") from error
    return pf.PyFileSystem(pf.FSSpecHandler(system)), path
