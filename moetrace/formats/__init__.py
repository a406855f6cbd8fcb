"""How does a dump become a trace? Readers of every known kind, the stream they feed, the canonical file, and back."""

from moetrace.formats.canonical import open_trace, save_trace
from moetrace.formats.conversion import Progress, check_format, convert, from_frame, read_trace, reader_of
from moetrace.formats.readers import FORMATS, sources_in
from moetrace.formats.sources import Location, Query, fingerprint, locations, merge_hint, source_label
from moetrace.formats.stream.cells import ReadOptions

__all__ = [
    "FORMATS", "Location", "Progress", "Query", "ReadOptions", "check_format", "convert", "fingerprint",
    "from_frame", "locations", "merge_hint", "open_trace", "read_trace", "reader_of", "save_trace", "source_label",
    "sources_in",
]  # fmt: skip
