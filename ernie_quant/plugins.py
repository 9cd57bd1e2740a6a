"""A plug-in is a file: its name is its file name, and a folder of them is all the registry there is.

Another package brings its own by an entry point in the group of the folder's name, whose object is a module:

    [project.entry-points."ernie_quant.codecs"]
    mine = "my_package.my_codec"

A name that a folder has already stays the folder's.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType


@cache
def known(package: ModuleType) -> dict[str, str]:
    """Name -> module of the plug-ins of a package; files with a leading underscore are shared parts, not plug-ins."""
    from importlib.metadata import entry_points

    group = package.__name__
    files = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    return {point.name: point.module for point in entry_points(group=group)} | {name: f"{group}.{name}" for name in files}


def names(package: ModuleType) -> tuple[str, ...]:
    """Those of them all."""
    return tuple(sorted(known(package)))


def load(package: ModuleType, name: str) -> ModuleType:
    """One plug-in, or `NAME.PART` of one that is a folder. The name must come from `names`."""
    first, dot, part = name.partition(".")
    return importlib.import_module(f"{known(package)[first]}{dot}{part}")


def name_of(plugin: object, package: ModuleType) -> str:
    """The name of a plug-in of the package, which is a module."""
    return name_of_module(str(plugin.__name__), package)  # type: ignore[attr-defined]


def name_of_module(module: str, package: ModuleType) -> str:
    """By which it was found; of a shared part that of its file."""
    return next((name for name, place in known(package).items() if place == module), module.rpartition(".")[2])


def modules(package: ModuleType) -> list[ModuleType]:
    """All plug-ins of a package, in order of their names."""
    return [load(package, name) for name in names(package)]
