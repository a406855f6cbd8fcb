"""Options as dataclasses that commands share, and how help shows them: in groups, on lines that fit."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

from typer.core import TyperCommand

SELECTION = "Selection"
OUTPUT = "Output"
PROTOCOL = "Protocol"
# What a value is called in help where an option does not say.
METAVARS = {"<int>": "N", "<int range>": "N", "<float>": "X", "<float range>": "X", "<path>": "PATH", "<str>": "TEXT"}
RANGES = re.compile(r"(; |\[)x>=?[\d.]+(\]?)$")


class Command(TyperCommand):
    """A command whose help has its options in groups: first its own, then those of `Shared`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            own = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record is not None:
                group = getattr(parameter, "rich_help_panel", None) or own
                groups.setdefault(group, []).append((_plainly(record[0]), _without_range(record[1])))
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _plainly(usage: str) -> str:
    for typed, metavar in METAVARS.items():
        usage = usage.replace(typed, metavar)
    return usage


def _without_range(text: str) -> str:
    """Help without the lowest value that is taken: an error names it."""
    return RANGES.sub(lambda found: "]" if found[1] == "; " else "", text).rstrip()


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with the options of `Shared` and of every other dataclass that it takes instead of those."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    groups = {p.name: p.annotation for p in own if isinstance(p.annotation, type) and is_dataclass(p.annotation)}
    spread = {name: inspect.signature(group, eval_str=True).parameters for name, group in groups.items()}
    options = [*(p for p in own if p.name not in groups), *(p for group in spread.values() for p in group.values())]
    options = [p.replace(kind=p.KEYWORD_ONLY) for p in options]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        made = {name: groups[name](**{key: values.pop(key) for key in spread[name]}) for name in groups}
        command(**made, **values)

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in options}
    return run
