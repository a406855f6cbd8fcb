"""What a format has to keep, as a check for the tests of a plug-in, and of ours."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from moetrace.formats.conversion import Dump
from moetrace.formats.plugins import source_of
from moetrace.formats.stream.cells import Format, ReadOptions, joined, readings_of
from moetrace.settings import label, with_settings
from moetrace.trace import LoadTrace


def check_format(format: Format, path: str | Path, options: ReadOptions = ReadOptions()) -> LoadTrace:
    """The trace that *format* reads of the dump at *path*; raises `AssertionError` where it breaks what reading needs.

    It has a line on what it needs, and its text makes it again; it claims the dump, and nothing that is empty or not
    there; its cells come out the same each time. Raises `TraceError` if the dump is not a trace.

    >>> import moetrace as mt
    >>> from moetrace.formats import FORMATS
    >>> from pathlib import Path
    >>> _ = Path("log.csv").write_text("step,layer,expert,tokens\\n1,0,0,7\\n1,0,1,5\\n2,0,0,6\\n2,0,1,6\\n")
    >>> mt.check_format(FORMATS["csv"], "log.csv").experts
    2
    """
    path = Path(path)
    assert format.needs, "needs says nothing: a line on what it reads"
    assert "\n" not in format.needs, "needs is more than a line"
    assert format == with_settings(type(format)(), label(format).partition(":")[2]), f"{label(format)} makes another"
    assert format.claims(path), f"{path} is not claimed"
    with tempfile.TemporaryDirectory() as name:
        empty = Path(name, "empty")
        empty.touch()
        for other in (empty, Path(name), Path(name, "missing")):
            assert not format.claims(other), f"what is empty or missing is claimed: {other.name}"
    source = source_of(format, path)
    for reading in readings_of(source):
        first, again = ([*reading.cells()] for _ in range(2))
        assert first, "there is no cell"
        same = again and all(np.array_equal(*columns) for columns in zip(joined(first), joined(again)))
        assert same, "the cells are others the second time"
    return Dump.of(source, format.name, options).trace(path.stem, str(path))
