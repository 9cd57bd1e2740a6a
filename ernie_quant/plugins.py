"""A plug-in is a file: its name is its file name, and a folder of them is all the registry there is."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType


@cache
def names(package: ModuleType) -> tuple[str, ...]:
    """The plug-ins of a package; files with a leading underscore are shared parts, not plug-ins."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")))


def load(package: ModuleType, name: str) -> ModuleType:
    """One plug-in, or `NAME.PART` of one that is a folder. The name must come from `names`."""
    return importlib.import_module(f"{package.__name__}.{name}")


def name_of(plugin: object) -> str:
    """The name of the file of a plug-in, which is a module."""
    return str(plugin.__name__).rpartition(".")[2]  # type: ignore[attr-defined]


def modules(package: ModuleType) -> list[ModuleType]:
    """All plug-ins of a package, in order of their names."""
    return [load(package, name) for name in names(package)]
