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
def names(package: ModuleType) -> tuple[str, ...]:
    """The plug-ins of a package; files with a leading underscore are shared parts, not plug-ins."""
    return tuple(sorted({*_files(package), *_elsewhere(package.__name__)}))


def load(package: ModuleType, name: str) -> ModuleType:
    """One plug-in, or `NAME.PART` of one that is a folder. The name must come from `names`."""
    first, dot, part = name.partition(".")
    known = package.__name__
    if first not in _files(package) and (module := _elsewhere(known).get(first)):
        _NAMES[module] = first
        return importlib.import_module(f"{module}{dot}{part}")
    return importlib.import_module(f"{known}.{name}")


def name_of(plugin: object) -> str:
    """The name of a plug-in, which is a module."""
    return name_of_module(str(plugin.__name__))  # type: ignore[attr-defined]


def name_of_module(module: str) -> str:
    """That of its file, or of its entry point."""
    return _NAMES.get(module) or module.rpartition(".")[2]


def modules(package: ModuleType) -> list[ModuleType]:
    """All plug-ins of a package, in order of their names."""
    return [load(package, name) for name in names(package)]


_NAMES: dict[str, str] = {}  # modules of other packages that were loaded -> their names


@cache
def _files(package: ModuleType) -> frozenset[str]:
    return frozenset(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


@cache
def _elsewhere(group: str) -> dict[str, str]:
    """Name -> module of those that other packages bring."""
    from importlib.metadata import entry_points

    return {point.name: point.module for point in entry_points(group=group)}
