"""What installed packages add to moetrace by their entry points, and what a module at hand does: loaded when used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from moetrace.errors import SettingError


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
    return {
        point.name: Plugin(point.value, f"{point.dist.name} {point.dist.version}" if point.dist else "a package")
        for point in entry_points(group=group)
    }
