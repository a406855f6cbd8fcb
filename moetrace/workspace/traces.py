"""The workspace: a plain folder with the traces and their results. No hidden state."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrace.analysis.about import facts_frame, facts_of
from moetrace.errors import SettingError, TraceError, WorkspaceError, known_names, printable
from moetrace.files import file_name, sweep, writing
from moetrace.formats import Location, Progress, ReadOptions, convert, fingerprint, locations, open_trace
from moetrace.trace import LoadTrace

if TYPE_CHECKING:
    import pandas as pd

    from moetrace.workspace.results import ResultFolder

# Cached results, and the commands that write results of their own.
KEPT = "parts"
COMMANDS = ("predict", "place", "hot")
# What is safe as a file name on every system and readable in a table.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ +=@-]{0,119}")
# Some steps of a trace: name:FIRST-LAST, of which either may be left out.
PART = re.compile(r"(.+):(\d*)[-:](\d*)")


@dataclass(frozen=True)
class Ingested:
    """A trace after `Workspace.ingest`; *unchanged* if it was there already."""

    trace: LoadTrace
    path: Path
    unchanged: bool


@dataclass(frozen=True)
class Workspace:
    """``traces/<name>.parquet`` under *root*, results beside it."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))  # a text will do

    def trace_path(self, name: str) -> Path:
        """Where the trace *name* lies; raises `WorkspaceError` for a name that is no file name."""
        if not NAME.fullmatch(name):
            raise WorkspaceError(
                f"{name!r} cannot be the name of a trace: give one with --name, of at most 120 characters, which "
                "begins with a letter or a digit, and has beside a-z, A-Z, 0-9 and spaces only . _ - + = @"
            )
        return self.root / "traces" / f"{name}.parquet"

    def results(self, report: Callable[[str], None] | None = None) -> ResultFolder:
        """The cached results of all traces; *report* is called with a line for each damaged one."""
        from moetrace.workspace.results import ResultFolder  # imports all predictors: ingest needs none of it

        return ResultFolder(self.root / KEPT, report)

    def result_path(self, command: str, trace: str | Path, name: str = "") -> Path:
        """Where the results of a *command* about a trace lie, in a folder of their own, or the one called *name*.

        *trace* is a name or a path as `path_of` takes it. Traces that lie elsewhere are told apart by their paths.
        """
        path = self._place_of(str(trace))
        folder = file_name(path.stem)
        if path.parent != (self.root / "traces").resolve():
            folder += f"%40{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"  # no name becomes one with %40
        return self.root / command / folder / name

    def names(self) -> list[str]:
        """The names of the traces, sorted; raises `WorkspaceError` where their folder cannot be listed."""
        folder = self.root / "traces"
        try:
            paths = [path for path in folder.iterdir() if path.suffix == ".parquet" and not path.name.startswith(".")]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise WorkspaceError(f"{folder}: cannot be listed: {error.strerror}; check its permissions") from error
        return sorted(path.stem for path in paths)

    def path_of(self, trace: str) -> Path:
        """The file of a trace given by name or by path.

        Raises `SettingError` naming what there is when it is neither.
        """
        if NAME.fullmatch(trace) and self.trace_path(trace).exists():
            return self.trace_path(trace)
        if Path(trace).is_file():
            return Path(trace)
        raise SettingError(
            f"there is no trace {trace!r} in {self.root} and no such file; "
            + (known_names(trace, self.names()) if self.names() else "none is there yet: run `moetrace ingest`")
        )

    def _place_of(self, trace: str) -> Path:
        """The absolute path of a trace given by name or by path; a link has its own name, not that of its target."""
        path = self.path_of(trace)
        return path.parent.resolve() / path.name

    def chosen(self, traces: Iterable[str]) -> list[str]:
        """*traces*, or the names of all if none is given; raises `WorkspaceError` if there are none."""
        given = list(dict.fromkeys(traces)) or self.names()
        if not given:
            raise WorkspaceError(f"{self.root} holds no traces: run `moetrace ingest` first")
        return given

    def unique_names(self, traces: Iterable[str]) -> dict[str, str]:
        """A name for each of *traces*: that of its file, with folders above it where two would have one name."""
        paths = {trace: self._place_of(trace) for trace in traces}
        names, depth = {trace: path.stem for trace, path in paths.items()}, 0
        while len(set(names.values())) < len(set(paths.values())) and depth < max(len(p.parts) for p in paths.values()):
            depth += 1
            given = list(names.values())
            for trace, path in paths.items():
                if given.count(names[trace]) > 1:
                    names[trace] = "/".join([*path.parts[-1 - depth : -1], path.stem])
        return {trace: printable(name) for trace, name in names.items()}

    def open(self, trace: str, name: str | None = None) -> LoadTrace:
        """The trace of that name or path, called *name*, or else like its file."""
        path = self._place_of(trace)
        opened = open_trace(path)
        return replace(opened, info=replace(opened.info, name=name or printable(path.stem)))

    def parts(self, traces: Sequence[str]) -> list[LoadTrace]:
        """Each of *traces*, by name or path; ``name:FIRST-LAST`` has these steps alone, and is called so.

        Raises `SettingError` if the trace does not exist or lacks the step.
        """
        split = [None if Path(text).is_file() else PART.fullmatch(text) for text in traces]
        names = [text if match is None else match[1] for text, match in zip(traces, split)]
        unique, found = self.unique_names(names), []
        for name, match in zip(names, split):
            trace = self.open(name, unique[name])
            if match is not None:
                first, last = (int(step) if step else None for step in match.groups()[1:])
                part = trace.select(first=first, last=last)
                trace = replace(part, info=replace(part.info, name=f"{trace.name}:{part.steps[0]}-{part.steps[-1]}"))
            found.append(trace)
        return found

    def ingest(
        self,
        source: str | Location | Sequence[str | Location],
        *,
        name: str | None = None,
        options: ReadOptions = ReadOptions(),
        format: str | None = None,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Ingested:
        """Read *source* into the trace *name* (its stem, unless given), as *format* with its settings if given.

        Several sources become one trace, as ``options.merge`` says, named by their folder.
        The same unchanged source again does nothing. Another source under a taken name raises
        `WorkspaceError`, unless *force*.
        """
        sources = locations(source)
        path = self.trace_path(name_of(sources) if name is None else name)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
        if not path.exists() or force:
            convert(sources, path, name=path.stem, options=options, format=format, progress=progress)
            return Ingested(open_trace(path), path, unchanged=False)
        try:
            trace = open_trace(path)
        except TraceError as error:
            raise WorkspaceError(f"{error} (with --force)") from error
        same_options = trace.info.settings == options.as_settings(format)
        if trace.info.fingerprint == fingerprint(*sources) and same_options:
            return Ingested(trace, path, unchanged=True)
        raise WorkspaceError(
            f"the name {path.stem!r} is taken by a trace of {trace.info.source}"
            f"{'' if same_options else ', read with other options'}: "
            f"choose another with --name, or replace it with --force"
        )

    def remove(self, name: str) -> Path:
        """Delete the trace *name* and what was computed of it; raises `SettingError` when there is neither.

        Of a symbolic link the target stays. Results whose trace was moved or renamed by hand are deleted by the name
        they were computed under.
        """
        path = self.trace_path(name)
        results = [self.root / command / file_name(name) for command in (*COMMANDS, KEPT)]
        if not os.path.lexists(path) and not any(folder.exists() for folder in results):
            raise SettingError(f"there is no trace {name!r} in {self.root}; {known_names(name, self.names())}")
        path.unlink(missing_ok=True)
        for folder in results:
            shutil.rmtree(folder, ignore_errors=True)
        return path


def name_of(sources: Sequence[Location]) -> str:
    """The name of a trace of *sources*: the stem of one, the folder of several."""
    if len(sources) > 1:
        return _folder_of(sources)
    return re.sub(r"\.(csv|tsv|jsonl|ndjson|json)$", "", sources[0].stem, flags=re.IGNORECASE)


def names_apart(sources: Mapping[str, Sequence[Location]]) -> dict[str, str]:
    """The name of the trace of each of *sources*, with the folder above if that makes the names unique."""
    own = {key: name_of(parts) for key, parts in sources.items()}
    given = list(own.values())
    longer = {key: f"{_folder_of(parts)}-{own[key]}" for key, parts in sources.items() if given.count(own[key]) > 1}
    unique = own | longer
    return unique if len({*unique.values()}) == len(own) else own


def _folder_of(sources: Sequence[Location]) -> str:
    first = sources[0]
    return (first.resolve() if isinstance(first, Path) else first.path).parent.name


def described(trace: LoadTrace, path: Path) -> dict[str, Any]:
    """The entry of a JSON document about a trace that lies at *path*."""
    return {
        "trace": trace.name,
        "name": trace.name,
        "path": str(path),
        **facts_of(trace),
        "settings": trace.info.settings,
        "findings": [asdict(finding) for finding in trace.info.findings],
        "assumptions": list(trace.info.assumptions),
    }


def described_frame(entries: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The `traces_frame` of what is `described`, so that no trace is read again."""
    keep = ("trace", "name", "path", "settings", "findings", "assumptions", "unchanged")
    return facts_frame(
        (own["trace"], {key: own[key] for key in own if key not in keep}, [found["name"] for found in own["findings"]])
        for own in entries
    )
