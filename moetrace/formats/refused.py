"""Dumps that look like counts of experts and are none: refused with the reason, whatever reads them."""

from __future__ import annotations

from pathlib import Path

from moetrace.errors import TraceError
from moetrace.formats.text import head_of

# A mark in the head of the text, what the dump is, and what to do instead.
REASONS = (
    (
        '"window_expert_load"',
        "holds sums over windows that overlap from row to row (window-sums), of physical experts",
        "record the counts of single passes: `expert_load_pass`, added up by physical_to_logical_map",
    ),
    (
        "[expert load statistics",
        "is a log of --print-expert-load: the smoothed load of devices, not of experts",
        "log num_tokens_per_expert of each layer and step instead",
    ),
)


def refuse_lookalikes(path: Path) -> None:
    """Raise `TraceError` for a dump that no format can make counts of."""
    head = head_of(path) if path.is_file() else ""
    for mark, problem, way_out in REASONS:
        if mark in head:
            raise TraceError(str(path), problem, way_out)
