"""How does a dump become a trace? Readers of every known kind, the stream they feed, the canonical file, and back."""

from moetrace.formats.canonical import open_trace, save_trace
from moetrace.formats.conversion import Progress, convert, named, read_trace, reader_of
from moetrace.formats.fingerprint import fingerprint
from moetrace.formats.readers import FORMATS, sources_in
from moetrace.formats.readers.parquet import Location, location, locations
from moetrace.formats.stream.cells import ReadOptions
from moetrace.formats.stream.names import merge_hint

__all__ = [
    "FORMATS",
    "Location",
    "Progress",
    "ReadOptions",
    "convert",
    "fingerprint",
    "location",
    "locations",
    "merge_hint",
    "named",
    "open_trace",
    "read_trace",
    "reader_of",
    "save_trace",
    "sources_in",
]
