"""Defaults of options, from `moetrace.toml` or `[tool.moetrace]` of `pyproject.toml` in the working directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moetrace.errors import SettingError

FILES = (("moetrace.toml", ()), ("pyproject.toml", ("tool", "moetrace")))


def defaults(commands: Callable[[], dict[str, set[str]]]) -> dict[str, dict[str, Any]]:
    """The defaults of each command, from the first of `FILES` that has any; *commands* gives the options of each.

    A name such as ``gpus = 8`` is for every command that has the option, a table ``[place]`` for one.
    Raises `SettingError` for invalid TOML, and for an unknown option.
    """
    for name, tables in FILES:
        try:
            text = Path(name).read_text("utf-8")
            if tables and tables[-1] not in text:
                continue
            import tomllib  # not needed in most folders

            found: Any = tomllib.loads(text)
        except OSError:
            continue
        except ValueError as error:
            if not tables:
                raise SettingError(f"{name}: is no TOML: {error}") from None
            continue  # another tool's file, which is that tool's to complain about
        for table in tables:
            found = found.get(table, {}) if isinstance(found, dict) else {}
        if found and isinstance(found, dict):
            return _by_command(name, found, commands())
    return {}


def _by_command(name: str, found: dict[str, Any], commands: dict[str, set[str]]) -> dict[str, dict[str, Any]]:
    given: dict[str, dict[str, Any]] = {command: {} for command in commands}
    for key, value in found.items():
        own = {key: {}} if isinstance(value, dict) and key in commands else dict.fromkeys(commands)
        options = value if isinstance(value, dict) and key in commands else {key: value}
        for option, setting in options.items():
            able = [command for command in own if option.replace("-", "_") in commands[command]]
            if not able:
                raise SettingError(f"{name}: there is no option {option!r}; moetrace COMMAND --help lists them")
            for command in able:
                given[command][option.replace("-", "_")] = setting
    return {command: own for command, own in given.items() if own}
