"""The commands about the traces of a workspace, from Python: what it holds, reading into it, removing, exporting.

Nothing here loads pandas before it has to.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moetrace.doctor import KINDS, check_known
from moetrace.errors import SettingError, TraceError
from moetrace.files import output as writing_output
from moetrace.formats import (
    Location,
    Progress,
    Query,
    ReadOptions,
    locations,
    merge_hint,
    reader_of,
    source_label,
    sources_in,
)  # fmt: skip
from moetrace.formats.conversion import export_trace
from moetrace.reporting.screens import ingested_sentence, listed_sentence, traces_screen
from moetrace.trace import LoadTrace
from moetrace.words import EXPORTED, Merge, Phase
from moetrace.workspace.found import Found, command
from moetrace.workspace.options import Note, Selection, silent, workspace_of
from moetrace.workspace.traces import Ingested, Workspace, described, described_frame, names_apart

if TYPE_CHECKING:
    from moetrace.workspace.options import Traced

# What is read without sources.
DEFAULT_SOURCE = "sample_traces"
# Options of some formats alone.
SETTINGS = ("stages", "phase", "axes", "ignore", "pattern", "key", "sum_over", "column", "where")


@dataclass(frozen=True)
class Dumps:
    """What the dumps of an ingest hold, and how they become traces: its options, which travel as one.

    *column* and *where* are mappings, or texts such as ``tokens=routed``.
    """

    name: str | None = None
    from_: str | None = None
    sql: str | None = None
    merge: Merge | None = None
    bin_: int | None = None
    phase: Phase | None = None
    tokens_per_step: int | None = None
    tokens: int | None = None
    top_k: int | None = None
    experts: int | None = None
    stages: int | None = None
    pattern: str | None = None
    column: Iterable[str] | Mapping[str, str] | None = None
    axes: str | None = None
    key: str | None = None
    where: Iterable[str] | Mapping[str, str] | None = None
    sum_over: str | None = None
    idle_experts: bool = False
    first_expert: int | None = None
    ignore: int | None = None
    difference: bool = False
    accept: Sequence[str] | None = None

    def options(self, selection: Selection) -> ReadOptions:
        """What readers get: what is of any format, and the settings of some; raises `SettingError` for a finding."""
        accept = tuple(sorted({*(self.accept or ())}))
        check_known(accept)
        given = {**vars(self), "column": _pairs(self.column), "where": _pairs(self.where)}
        given |= {"bin": self.bin_, "accept": accept}
        own = {field.name: given[field.name] for field in fields(ReadOptions) if field.name in given}
        settings = {name: given[name] for name in SETTINGS if given[name] is not None}
        first, last = selection.steps or (None, None)
        return ReadOptions(**own, layers=tuple(selection.layers or ()), first=first, last=last, settings=settings)

    def reading(self, sources: Sequence[str | Path] | str | Path, selection: Selection, note: Note = silent) -> Reading:
        """What an ingest of *sources* would read; a *note* says of what traces the files may be parts.

        Raises `SettingError` for options that do not go together, or that the format of a source does not take.
        """
        if self.sql is not None and (sources or self.merge):
            raise SettingError("--sql goes without sources and without --merge: name all files in the query")
        options = self.options(selection)
        groups = self._groups([sources] if isinstance(sources, str | Path) else sources)
        every = [source for group in groups.values() for source in group]
        for source in every:  # a setting that a format does not take is an error before anything is written
            try:
                reader_of(source, options, self.from_)
            except SettingError as error:
                raise SettingError(f"{source}: {error}") from error
            except TraceError:
                continue  # raised again when it is read
        if self.merge is None and (hint := merge_hint(every)):
            note(hint)
        names = names_apart(groups) if self.name is None else dict.fromkeys(groups, self.name)
        return Reading(groups, names, options, self.from_)

    def _groups(self, given: Sequence[str | Path]) -> dict[str, builtins.list[Location]]:
        """The sources of each trace by what they are called in messages: every file apart, or all merged."""
        if self.sql is not None:
            return {str(Query(self.sql)): [Query(self.sql)]}
        if not given and not Path(DEFAULT_SOURCE).exists():
            why = f"there is no ./{DEFAULT_SOURCE} here"
            raise SettingError(f"name what to read, such as moetrace ingest log.csv: {why}")
        found = [own for place in locations([*map(str, given or [DEFAULT_SOURCE])]) for own in sources_in(place)]
        if self.merge and len(found) < 2:
            raise SettingError(f"--merge goes with several files, and {source_label(found)} is one")
        if self.merge:
            return {source_label(found): found}
        if self.name is not None and len(found) > 1:
            raise SettingError(
                f"--name goes with one source, and there are {len(found)}: give --merge to make them one"
            )
        return {str(source): [source] for source in found}


class Reading(NamedTuple):
    """What an ingest reads: the sources of each trace by what messages call them, the names of traces, and how."""

    groups: Mapping[str, Sequence[Location]]
    names: Mapping[str, str]
    options: ReadOptions
    format: str | None

    def into(
        self, workspace: Workspace, source: str, *, force: bool = False, progress: Progress | None = None
    ) -> Ingested:
        """Read one of the sources into the *workspace*."""
        how: dict[str, Any] = {"name": self.names[source], "options": self.options, "format": self.format}
        return workspace.ingest(self.groups[source], **how, force=force, progress=progress)


def _pairs(given: Iterable[str] | Mapping[str, str] | None) -> dict[str, str] | None:
    """A mapping as it is, or of texts such as ``tokens=routed``; None for nothing."""
    return dict(given if isinstance(given, Mapping) else (part.partition("=")[::2] for part in given or ())) or None


# --- the commands --------------------------------------------------------------------------------------------------


@command(Dumps, Selection)
def ingest(
    sources: Sequence[str | Path] | str | Path = (), *, force: bool = False, dumps: Dumps, selection: Selection
) -> Found[builtins.list[Ingested]]:
    """Read dumps and logs into traces of the workspace: ``moetrace ingest``.

    *column* and *where* are mappings, or texts such as ``tokens=routed``.

    >>> from pathlib import Path
    >>> import moetrace as mt
    >>> rows = "step,layer,expert,tokens\\n" + "".join(f"{t},0,{e},{5 + e}\\n" for t in range(9) for e in range(4))
    >>> written = Path("log.csv").write_text(rows)
    >>> mt.ingest("log.csv").frame()["trace"].tolist()
    ['log']
    """
    into, asked = workspace_of(selection.workspace), dumps.reading(sources, selection)
    done = [asked.into(into, source, force=force) for source in asked.groups]
    frame = described_frame(described(item.trace, item.path) for item in done)
    sentence = ingested_sentence(frame, sum(item.unchanged for item in done))
    names = ", ".join(frame["trace"])
    files = [str(item.path) for item in done]
    return Found("ingest", names, partial(traces_screen, frame, sentence), {"traces": frame}, done, files=files)


@command()
def list(*, workspace: Workspace | str | Path | None = None) -> Found[builtins.list[LoadTrace]]:
    """The traces of the workspace: ``moetrace list``.

    >>> import moetrace as mt
    >>> mt.list()
    <moetrace.list: No trace in moetrace-out.>
    """
    into = workspace_of(workspace)
    opened = [into.open(name) for name in into.names()]
    frame = described_frame(described(trace, into.trace_path(trace.name)) for trace in opened)
    screen = partial(traces_screen, frame, listed_sentence(frame, str(into.root)))
    return Found("list", ", ".join(into.names()), screen, {"traces": frame}, opened)


@command()
def remove(
    names: Sequence[str] | str, *, dry_run: bool = False, workspace: Workspace | str | Path | None = None
) -> builtins.list[Path]:
    """Remove traces and their results from the workspace: ``moetrace remove``; the files, which stay with *dry_run*.

    >>> import moetrace as mt
    >>> trace = mt.synthetic_trace([mt.settling(500, steps=2000)])
    >>> path = mt.Workspace("moetrace-out").trace_path("run")
    >>> path.parent.mkdir(parents=True)
    >>> mt.save_trace(trace, path)
    >>> mt.remove("run") == [path]
    True
    """
    into, given = workspace_of(workspace), [names] if isinstance(names, str) else names
    return [into.path_of(name) if dry_run else into.remove(name) for name in dict.fromkeys(given)]


@command(Selection)
def export(
    trace: Traced, output: str | Path, to: str | None = None, *, force: bool = False, selection: Selection
) -> Path:
    """Write a trace as a file for other programs: ``moetrace export``; the file.

    *to* is ``long``, ``wide``, ``nested``, ``csv``, ``npz`` or ``forecasting``; as the ending of *output* says, else
    long.

    >>> import moetrace as mt
    >>> mt.export(mt.synthetic_trace([mt.settling(500, steps=600)]), "run.csv").name
    'run.csv'
    """
    path = Path(output)
    with writing_output(path, force=force) as held:
        export_trace(selection.open(trace), held, to or EXPORTED.get(path.suffix.lower(), "long"))
    return path


def explain(finding: str | None = None) -> dict[str, str]:
    """What a finding means and what to do about it, or every one: ``moetrace explain``.

    >>> import moetrace as mt
    >>> list(mt.explain("imbalance"))
    ['imbalance']
    """
    check_known([] if finding is None else [finding])
    return {name: kind.advice for name, kind in KINDS.items() if finding in (None, name)}
