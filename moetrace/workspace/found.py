"""What a command found, as Python has it: an answer that shows itself, the tables behind it, and its pictures."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from moetrace.errors import MoetraceError
from moetrace.reporting.screens import Screen
from moetrace.reporting.style import Look, styled
from moetrace.settings import unknown

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from moetrace.reporting.style import Axes, Figure

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class Found(Generic[T]):
    """The result of a command on *trace*.

    *frames* are its tables by the names that ``--show`` has, the main one first; *value* is what they are made from,
    whose attributes are its own, too, and so are *facts*. *files* were written, *deploy* says which system reads them
    with which flags, and *notes* what else there is to know. In a notebook it shows its answer and a table. *shown* is
    what a terminal shows, or gives it with *every* row if asked for, and *spoken* puts it in words of Python.
    """

    command: str
    trace: str
    shown: Screen | Callable[..., Screen]
    frames: Mapping[str, pd.DataFrame]
    value: T
    drawings: Mapping[str, Callable[..., Figure]] = field(default_factory=dict)
    files: Sequence[str] = ()
    deploy: Sequence[Mapping[str, str]] = ()
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    spoken: Callable[[str], str] = str

    def screen(self, *, every: bool = False) -> Screen:
        """The answer, a table, with *every* row if asked for, and notes below it."""
        own = self.shown if isinstance(self.shown, Screen) else self.shown(every=every)
        return replace(own, sentence=self.spoken(own.sentence), notes=[self.spoken(note) for note in own.notes])

    @property
    def sentence(self) -> str:
        """The answer in a sentence or two."""
        return self.screen().sentence

    def frame(self, name: str | None = None) -> pd.DataFrame:
        """Return the table *name*, by default the main one; raises `SettingError` for an unknown name."""
        return _one_of(self.frames, "table", name)

    def figure(self, name: str | None = None, ax: Axes | None = None, style: str | Path | None = None) -> Figure:
        """Draw the figure *name*, by default the first, into *ax* if given, in a *style* of matplotlib or its file.

        Raises `SettingError` for an unknown name or style.
        """
        with styled(Look.of(None, style)):
            return _one_of(self.drawings, "figure", name)(ax)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("value", "facts"):
            raise AttributeError(name)
        if name in self.facts:
            return self.facts[name]
        try:
            return getattr(self.value, name)
        except AttributeError:
            raise AttributeError(f"the result of {self.command} has no attribute {name!r}") from None

    def __repr__(self) -> str:
        return f"<moetrace.{self.command}: {self.sentence}>"

    def _repr_html_(self) -> str:
        """The answer, its table and its notes."""
        screen = self.screen()
        head = "".join(f"<th>{escape(heading)}</th>" for heading, _ in screen.columns)
        rows = zip(*(cells for _, cells in screen.columns))
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if head else ""
        notes = "".join(f"<p>{escape(note)}</p>" for note in screen.notes)
        return f"<p><strong>{escape(screen.sentence)}</strong></p>{table}{notes}"


def _one_of(known: Mapping[str, T], what: str, name: str | None) -> T:
    if name is None and known:
        return next(iter(known.values()))
    if name is None or name not in known:
        raise unknown(what, name or "", known)
    return known[name]


def command(*groups: type[Any]) -> Callable[[Callable[P, T]], Callable[..., T]]:
    """A function with the fields of *groups* as keywords, where it takes one of each by the name of its class.

    Errors and sentences name arguments where the command line has flags. The function itself is ``__wrapped__``.
    """

    def spread(function: Callable[P, T]) -> Callable[..., T]:
        own = inspect.signature(function)
        names = {group.__name__.lower(): inspect.signature(group).parameters.values() for group in groups}
        keywords: dict[str, inspect.Parameter] = {p.name: p for group in names.values() for p in group}
        mine = [p for p in own.parameters.values() if p.name not in names]
        shared = [p.replace(kind=p.KEYWORD_ONLY) for name, p in keywords.items() if name not in own.parameters]

        @functools.wraps(function)
        def called(*args: Any, **given: Any) -> T:
            for name in given:
                if name not in keywords and name not in own.parameters:
                    raise unknown(f"argument of {function.__name__}", name, [p.name for p in (*mine, *shared)])
            made = {
                name: group(**{p.name: given[p.name] for p in names[name] if p.name in given})
                for name, group in zip(names, groups)
            }
            rest = {name: value for name, value in given.items() if name in own.parameters}
            try:
                found: Any = function(*args, **rest, **made)
            except MoetraceError as error:
                raise type(error)(*(_in_python(str(text)) for text in error.args)) from None
            return replace(found, spoken=_in_python) if isinstance(found, Found) else found  # type: ignore[return-value]

        called.__signature__ = own.replace(parameters=[*mine, *shared])  # type: ignore[attr-defined]
        return called

    return spread


def _in_python(text: str) -> str:
    """*text* with the arguments of functions for the flags of the command line: ``--top-k 2`` is ``top_k=2``."""
    return re.sub(
        r"--([a-z]+(?:-[a-z]+)*)(?: (\d+))?", lambda at: at[1].replace("-", "_") + (f"={at[2]}" if at[2] else ""), text
    )
