"""A folder of parts: the blocks of steps a recorder has written of a trace so far.

Each part is a canonical file, numbered in the order of writing. Where a part begins at a step that
was recorded before, training went back to a checkpoint: what earlier parts hold from that step on
belongs to a run that was given up, and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from moetrace.doctor import finding, gap_findings
from moetrace.errors import TraceError
from moetrace.files import sweep
from moetrace.formats.canonical import open_trace
from moetrace.formats.sources import require
from moetrace.formats.stream.cells import Format, Reading, dense_cells
from moetrace.trace import Counts, Finding, LoadTrace
from moetrace.words import Phase

MARKER = "moetrace-parts.txt"
MARKER_TEXT = """\
The blocks of a trace that a moetrace recorder is writing, or was writing when it was stopped.
The folder can be read as it is, with `moetrace ingest` and the path of this folder.
"""


def part_after(folder: Path, part: Path | None) -> Path:
    """Where the part that follows *part* lies in *folder*, the first of all where that is None."""
    return folder / f"part-{int(part.stem.removeprefix('part-')) + 1 if part else 1:08d}.parquet"


def part_paths(folder: Path) -> list[Path]:
    """The parts lying in *folder*, in the order in which they were written."""
    return sorted(path for path in folder.glob("part-*.parquet") if path.stem.removeprefix("part-").isdecimal())


def is_parts(path: Path) -> bool:
    """Whether *path* is a folder that a recorder writes, or wrote, its parts to."""
    return (path / MARKER).is_file()


def open_parts(folder: Path) -> tuple[list[LoadTrace], tuple[Finding, ...]]:
    """The parts of *folder* in the order of their steps, each without those that a later one replaces, and restarts.

    Raises `TraceError` for a folder without blocks, or with a damaged one.
    """
    paths = part_paths(folder)
    written = [open_trace(path) for path in paths]
    if not written:
        raise TraceError(str(folder), "holds no block yet", "let the recorder reach the end of its first block")
    first = written[0]
    for path, part in zip(paths, written):
        if (part.layers, part.experts) != (first.layers, first.experts):
            raise TraceError(str(path), "has other layers or experts than the parts before", "record into a new path")
    starts = [int(part.steps[0]) for part in written]
    pieces: list[LoadTrace] = []
    findings = [found for found in first.info.findings if found.name == "restart"]
    for i, part in enumerate(written):
        end = min(starts[i + 1 :], default=None)
        if end is None or part.steps[-1] < end:
            pieces.append(part)
        elif starts[i] < end:
            pieces.append(part.select(last=end - 1))
        before = int(written[i - 1].steps[-1]) if i else None
        if before is None or starts[i] > before:
            continue
        again = int(part.steps[-1])  # reached by this part and those that go on from it
        for later in written[i + 1 :]:
            if later.steps[0] <= again:
                break
            again = int(later.steps[-1])
        evidence = f"steps {starts[i]} to {min(before, again)} were recorded again after a restart"
        if again < before:
            evidence += f"; steps {again + 1} to {before} of the run that was given up are left out"
        findings.append(finding("restart", f"step {starts[i]}", evidence))
    return pieces, tuple(findings)


def read_parts(folder: str | Path) -> LoadTrace:
    """The trace in a folder of parts, read one layer at a time; raises `TraceError` if it is not one, or damaged."""
    pieces, findings = open_parts(Path(folder))
    steps = np.concatenate([piece.steps for piece in pieces])
    latest = pieces[-1]

    def read_layer(number: int) -> Counts:
        return np.concatenate([piece.read_layer(number) for piece in pieces])

    tokens = {piece.info.tokens_per_step for piece in pieces}
    constant, found = tokens.pop() if len(tokens) == 1 else None, (*findings, *gap_findings(steps))
    info = replace(latest.info, format=PartsFormat.name, tokens_per_step=constant, findings=found)
    return LoadTrace(info, steps, latest.layers, latest.experts, read_layer)


def phase_of(path: Path, phase: str) -> Reading:
    """One *phase* of a recording of passes, a trace or its parts: ``-decode`` beside it has the decode tokens.

    Raises `TraceError` if that is missing, or not a part of the other.
    """
    beside = path.with_name(f"{path.stem}-decode{path.suffix}")
    if not beside.exists():
        problem = "does not distinguish prefill from decode"
        raise TraceError(str(path), problem, f"--phase needs {beside.name} beside it")
    every, decode = (read_parts(place) if is_parts(place) else open_trace(place) for place in (path, beside))
    cells = len(every.steps) * len(every.layers) * every.experts
    require(32 * cells, str(path), "it, with its decode tokens,", "select --steps")
    steps, counts = decode.steps, decode.counts
    if phase == "prefill":
        both = np.isin(steps, every.steps)
        steps, rest = every.steps, every.counts.copy()
        rest[np.searchsorted(steps, decode.steps[both])] -= counts[both]
        if rest.min() < 0:
            raise TraceError(str(path), f"has fewer tokens than {beside.name}", "give the recording that it belongs to")
        some = rest.any(axis=(1, 2))
        steps, counts = steps[some], rest[some]
    info = every.info
    return Reading(
        cells=lambda: iter([dense_cells(steps, every.layers, counts)]),
        rows=counts.size,
        assumptions=(f"{phase} tokens alone, by {beside.name}",),
        known={"model": info.model, "top_k": info.top_k, "notes": info.notes},
        where=str(path),
    )


@dataclass(frozen=True)
class PartsFormat(Format):
    """The folder beside a trace that a moetrace recorder is writing, or was writing when it was stopped.

    *phase* is the one to take of a server's passes.
    """

    name: ClassVar[str] = "parts"
    phase: Phase | None = None

    def claims(self, path: Path) -> bool:
        return is_parts(path)

    def read(self, path: Path) -> Reading:
        """Open the parts and stream their cells in the order of their steps; what a kill left there is removed."""
        sweep(path)
        sweep(path.absolute().parent)
        if self.phase is not None:
            return phase_of(path, self.phase)
        pieces, findings = open_parts(path)
        info = pieces[-1].info
        return Reading(
            cells=lambda: (dense_cells(piece.steps, piece.layers, piece.counts) for piece in pieces),
            rows=sum(len(piece.steps) * len(piece.layers) * piece.experts for piece in pieces),
            assumptions=info.assumptions,
            findings=findings,
            known={"model": info.model, "top_k": info.top_k, "notes": info.notes},
        )
