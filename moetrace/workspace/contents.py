"""The commands about the traces of a workspace, from Python: what it holds, reading into it, removing, exporting.

Nothing here loads pandas before it has to.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moetrace.doctor.catalogue import KINDS, check_known
from moetrace.errors import SettingError, TraceError
from moetrace.files import output as writing_output
from moetrace.formats import Location, Query, ReadOptions, location, merge_hint, reader_of, source_label, sources_in
from moetrace.formats.export import export_trace
from moetrace.formats.stream.cells import Merge
from moetrace.reporting.screens import ingested_sentence, listed_sentence, traces_screen
from moetrace.trace import LoadTrace
from moetrace.words import EXPORTED
from moetrace.workspace.found import Found, command
from moetrace.workspace.options import Note, Selection, silent, workspace_of
from moetrace.workspace.traces import Ingested, Workspace, described, described_frame, names_apart

if TYPE_CHECKING:
    from moetrace.workspace.options import Traced

# What is read without sources.
DEFAULT_SOURCE = "sample_traces"


class Reading(NamedTuple):
    """What an ingest reads: the sources of each trace by what messages call them, the names of traces, and how."""

    groups: Mapping[str, Sequence[Location]]
    names: Mapping[str, str]
    options: ReadOptions
    format: str | None


def reading(
    sources: Sequence[str | Path] | str | Path = (),
    *,
    name: str | None = None,
    from_: str | None = None,
    sql: str | None = None,
    merge: Merge | None = None,
    column: Iterable[str] | Mapping[str, str] = (),
    where: Iterable[str] | Mapping[str, str] = (),
    accept: Sequence[str] = (),
    note: Note = silent,
    **options: Any,
) -> Reading:
    """What an ingest of *sources* with these options would read; the *options* are those of `ingest`.

    Raises `SettingError` for options that do not go together, or that the format of a source does not take.
    """
    if sql is not None and (sources or merge):
        raise SettingError("--sql goes without sources and without --merge: name all files in the query")
    pairs = {"column": column, "where": where}
    settings = {
        key: options.pop(key, None) for key in ("stages", "phase", "axes", "ignore", "pattern", "key", "sum_over")
    }
    settings |= {key: _pairs(value) or None for key, value in pairs.items()}
    check_known(accept)
    given = {key: value for key, value in settings.items() if value is not None}
    made = ReadOptions(**options, merge=merge, accept=tuple(sorted(set(accept))), settings=given)
    groups = _groups([sources] if isinstance(sources, str | Path) else sources, sql, merge is not None, name)
    every = [source for group in groups.values() for source in group]
    for source in every:  # a setting that a format does not take is an error before anything is written
        try:
            reader_of(source, made, from_)
        except SettingError as error:
            raise SettingError(f"{source}: {error}") from error
        except TraceError:
            continue  # raised again when it is read
    if merge is None and (hint := merge_hint(every)):
        note(hint)
    return Reading(groups, names_apart(groups) if name is None else dict.fromkeys(groups, name), made, from_)


def _pairs(given: Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    """A mapping as it is, or of texts such as ``tokens=routed``."""
    return dict(given) if isinstance(given, Mapping) else dict(part.partition("=")[::2] for part in given)


def _groups(
    given: Sequence[str | Path], sql: str | None, merge: bool, name: str | None
) -> dict[str, builtins.list[Location]]:
    """The sources of each trace by what they are called in messages: every file apart, or all merged."""
    if sql is not None:
        return {str(Query(sql)): [Query(sql)]}
    if not given and not Path(DEFAULT_SOURCE).exists():
        raise SettingError(f"name what to read, such as moetrace ingest log.csv: there is no ./{DEFAULT_SOURCE} here")
    found = [source for text in given or [DEFAULT_SOURCE] for source in sources_in(location(str(text)))]
    if merge and len(found) < 2:
        raise SettingError(f"--merge goes with several files, and {source_label(found)} is one")
    if merge:
        return {source_label(found): found}
    if name is not None and len(found) > 1:
        raise SettingError(f"--name goes with one source, and there are {len(found)}: give --merge to make them one")
    return {str(source): [source] for source in found}


# --- the commands --------------------------------------------------------------------------------------------------


@command(Selection)
def ingest(
    sources: Sequence[str | Path] | str | Path = (),
    *,
    name: str | None = None,
    from_: str | None = None,
    sql: str | None = None,
    merge: Merge | None = None,
    bin_: int | None = None,
    phase: str | None = None,
    tokens_per_step: int | None = None,
    tokens: int | None = None,
    top_k: int | None = None,
    experts: int | None = None,
    stages: int | None = None,
    pattern: str | None = None,
    column: Iterable[str] | Mapping[str, str] = (),
    axes: str | None = None,
    key: str | None = None,
    where: Iterable[str] | Mapping[str, str] = (),
    sum_over: str | None = None,
    idle_experts: bool = False,
    first_expert: int | None = None,
    ignore: int | None = None,
    difference: bool = False,
    accept: Sequence[str] = (),
    force: bool = False,
    selection: Selection,
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
    first, last = selection.steps or (None, None)
    asked = reading(
        sources, name=name, from_=from_, sql=sql, merge=merge, column=column, where=where, accept=accept,
        stages=stages, phase=phase, axes=axes, ignore=ignore, pattern=pattern, key=key, sum_over=sum_over,
        tokens_per_step=tokens_per_step, tokens=tokens, top_k=top_k, bin=bin_, experts=experts,
        first_expert=first_expert, idle_experts=idle_experts, difference=difference,
        layers=tuple(selection.layers or ()), first=first, last=last,
    )  # fmt: skip
    into = workspace_of(selection.workspace)
    done = [
        into.ingest(group, name=asked.names[source], options=asked.options, format=asked.format, force=force)
        for source, group in asked.groups.items()
    ]
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
