"""Things chosen by a spec, ``name:setting=value:setting=value``: predictors, and formats of dumps.

Installed packages add to them by their entry points, and so does a module at hand; both are loaded when they are used.

A thing is a frozen dataclass with a `name`; its fields are its settings, and their types say what is allowed. A field
that is not compared is no setting: no text can give it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields, replace
from functools import cache
from importlib import import_module
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from moetrace.errors import SettingError, known_names, shown

Thing = TypeVar("Thing")
# Settings that number something, where others count something.
FROM_ZERO = ("seed", "ignore")


def unknown(kind: str, name: str, known: Iterable[str]) -> SettingError:
    """That there is no *kind* of that *name*, with the one that was probably meant and all there are."""
    names = list(known)
    hint, there_are = known_names(name, names), shown(names, 20)
    return SettingError(
        f"there is no {kind} {name!r}; {hint}" + ("" if there_are in hint else f" There are {there_are}")
    )


def with_settings(thing: Thing, given: str | Mapping[str, Any]) -> Thing:
    """*thing* with other settings: values by name, or text, ``setting=value:setting=value``.

    Raises `SettingError` naming the settings that it has, or what a value has to be.
    """
    types = setting_types(thing)
    if isinstance(given, str):
        parts: list[str] = []
        for part in given.split(":") if given else []:
            # Text may hold colons, as regular expressions do.
            free = bool(parts) and types.get(parts[-1].partition("=")[0]) is str
            if free and part.partition("=")[0] not in types:
                parts[-1] += f":{part}"
            else:
                parts.append(part)
        given = dict(_setting(thing, part, types) for part in parts)
    for name in given:
        if name not in types:
            raise _no_setting(thing, name, types)
    return replace(thing, **given)  # type: ignore[type-var]


def _no_setting(thing: Any, name: str, types: Mapping[str, Any]) -> SettingError:
    return SettingError(f"{thing.name} has no setting {name!r}; it has {', '.join(types) or 'none'}")


def setting_types(thing: object) -> dict[str, Any]:
    """The settings of a dataclass and their types; an optional one has the type it has when it is given."""
    hints = get_type_hints(type(thing))
    return {field.name: _given(hints[field.name]) for field in fields(thing) if field.compare}  # type: ignore[arg-type]


def label(thing: Any) -> str:
    """The shortest spec that makes *thing* again: its name and the settings that are not the defaults."""
    default = type(thing)()
    changed = [f.name for f in fields(thing) if f.compare and getattr(thing, f.name) != getattr(default, f.name)]
    return ":".join([thing.name, *(f"{name}={_text(getattr(thing, name))}" for name in changed)])


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return ",".join(str(part) for part in value) if isinstance(value, tuple) else str(value).lower()


def _given(kind: Any) -> Any:
    """The type without the None of an optional setting."""
    if get_origin(kind) in (Union, UnionType):
        return next(part for part in get_args(kind) if part is not type(None))
    return kind


def _setting(thing: Any, text: str, types: dict[str, Any]) -> tuple[str, object]:
    """The name and the value of a setting of *thing*, from ``name=value``; *types* are those of its settings."""
    name, given, value = text.partition("=")
    if not given or name not in types:
        raise _no_setting(thing, name, types)
    kind = types[name]
    default = next(field.default for field in fields(thing) if field.name == name)
    least = int(kind is int and name not in FROM_ZERO and default != 0)
    try:
        return name, _parsed(value, kind, least)
    except (KeyError, ValueError):
        pass
    if kind is bool or get_origin(kind) is Literal:
        what = "true or false" if kind is bool else " or ".join(str(choice) for choice in get_args(kind))
    elif kind is int:
        what = "a whole number above 0" if least else "a whole number, 0 or more"
    else:
        what = "a number, 0 or more" if kind is float else "three whole numbers p,d,q"
    raise SettingError(f"{thing.name}:{name} is {what}, not {value!r}")


def _parsed(value: str, kind: Any, least: int) -> object:
    """The *value* as that *kind*; raises `KeyError` or `ValueError` for any other, and for numbers below *least*."""
    if kind is str:
        return value
    if kind is bool:
        return {"true": True, "false": False}[value.lower()]
    if get_origin(kind) is Literal:
        return {str(choice): choice for choice in get_args(kind)}[value]
    alone = kind is int or kind is float
    numbers = tuple(map(float if kind is float else int, value.split(",")))
    if len(numbers) != (1 if alone else 3) or not all(number >= least for number in numbers):
        raise ValueError(value)
    return numbers[0] if alone else numbers


class Plugin(NamedTuple):
    """*where* something lives, ``package.module:name``, and the *package* that installed it with its version."""

    where: str
    package: str = ""

    def __str__(self) -> str:
        return self.where + (f" of {self.package}" if self.package else "")

    def made(self, kind: str, fits: Callable[[Any], bool], taken: Collection[str] = ()) -> Any:
        """What lives there, or an object of it where it is a class; *kind* is what it has to be to *fit*.

        Raises `SettingError`, naming the package, where it cannot be imported or made, does not fit, or has a name
        that is *taken*.
        """
        module, _, name = self.where.partition(":")
        try:
            loaded = import_module(module)
        except Exception as error:
            raise SettingError(f"{self}: the module cannot be imported: {error}") from error
        if not hasattr(loaded, name):
            raise SettingError(f"{self}: the module has no {name}")
        found = getattr(loaded, name)
        try:
            found = found() if isinstance(found, type) else found
        except Exception as error:
            raise SettingError(f"{self}: cannot be made without settings: {error}") from error
        if not isinstance(getattr(found, "name", None), str) or not fits(found):
            raise SettingError(f"{self}: is no {kind} with a name")
        if found.name in taken:
            raise SettingError(f"{self}: is called {found.name}, like one of moetrace: give it another name")
        return found


def installed(group: str) -> dict[str, Plugin]:
    """What installed packages add to the *group* of entry points, by name."""
    return _installed(group, tuple(sys.path))


@cache
def _installed(group: str, _path: tuple[str, ...]) -> dict[str, Plugin]:
    """The same for one import path: it takes as long as reading a small dump."""
    from importlib.metadata import entry_points  # no help needs it

    return {
        point.name: Plugin(point.value, f"{point.dist.name} {point.dist.version}" if point.dist else "a package")
        for point in entry_points(group=group)
    }
