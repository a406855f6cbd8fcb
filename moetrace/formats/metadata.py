"""What the metadata of a canonical file hold: a JSON document, and the digest that guards it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetrace.errors import TraceError, printable
from moetrace.formats.errors import damaged
from moetrace.trace import Finding, TraceInfo

if TYPE_CHECKING:
    from pyarrow.parquet import FileMetaData

SCHEMA_VERSION = 1
DOCUMENT_KEY = "moetrace.trace"
DIGEST_KEY = "moetrace.digest"
# Characters of a trace's name; longer ones are those of the file instead.
LONGEST_NAME = 120


def is_trace_name(name: str) -> bool:
    """Whether a trace may be called so: it is the name of its file as well."""
    return 0 < len(name) <= LONGEST_NAME and not set("/\\") & set(name) and not name.startswith(".")


def digest_of(data: bytes | NDArray[np.int64]) -> str:
    """SHA-256 of bytes, or of whole numbers as 64-bit little-endian ones."""
    raw = data if isinstance(data, bytes) else np.ascontiguousarray(data, "<i8").tobytes()
    return hashlib.sha256(raw).hexdigest()


def read_document(path: Path, footer: FileMetaData) -> dict[str, Any]:
    """The document in the *footer* of the file at *path*; raises `TraceError` for none, damage, or a later version."""
    keys = footer.metadata or {}
    text, digest = keys.get(DOCUMENT_KEY.encode()), keys.get(DIGEST_KEY.encode())
    if text is None and digest is None:
        raise TraceError(str(path), "is not a trace that moetrace wrote", f"run `moetrace ingest {path}` first")
    if text is None or digest is None or digest_of(text) != digest.decode("ascii", "replace"):
        raise damaged(path, "its metadata are not those it was written with")
    document: dict[str, Any] = json.loads(text)
    if document["schema_version"] > SCHEMA_VERSION:
        raise TraceError(
            str(path),
            f"was written with schema {document['schema_version']}",
            "upgrade moetrace, or ingest the source again",
        )
    return document


def _printable(value: Any) -> Any:
    """The same texts, lists and mappings with nothing in them that a terminal would act on."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_printable(part) for part in value]
    if isinstance(value, dict):
        return {printable(key): _printable(part) for key, part in value.items()}
    return value


def info_of(path: Path, stored: dict[str, Any]) -> TraceInfo:
    """What is known of the trace; the file may be anybody's, so texts are made printable and the name a name."""
    raw = _printable(stored)
    if not is_trace_name(raw["name"]):
        raw["name"] = printable(path.stem)
    findings = tuple(Finding(**finding) for finding in raw["findings"])
    return TraceInfo(**{**raw, "findings": findings, "assumptions": tuple(raw["assumptions"])})
