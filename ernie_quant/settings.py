"""What a user wrote into a TOML file: sizes as people write them, tables read key by key."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ernie_quant.errors import ErnieQuantError, PlanError, ProblemsError

KINDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
Value = TypeVar("Value")


class Settings:
    """A table of the file that is read key by key: mistakes are collected, and what nobody has taken is unknown."""

    def __init__(self, where: str, value: object, problems: list[str]) -> None:
        self._where, self._problems = where, problems
        self._left: dict[str, Any] = dict(value) if isinstance(value, dict) else {}
        self._broken = not isinstance(value, dict)
        if self._broken:
            self.wrong("is missing" if value is None else "is not a table")

    def wrong(self, text: str) -> None:
        """Note a mistake."""
        self._problems.append(f"{self._where}: {text}")

    def take(self, key: str, kind: type[Value], default: Value | None = None) -> Value:
        """A value of the right type, the default if there is none; without a default there must be one."""
        if key not in self._left:
            if default is None and not self._broken:
                self.wrong(f"{key} is missing")
            return kind() if default is None else default
        value = self._left.pop(key)
        if kind is float and type(value) is int:
            value = float(value)
        if isinstance(value, kind) and type(value) is kind:  # True is an int, but no number here
            return value
        self.wrong(f"{key} is {value!r}, not {KINDS[kind]}")
        return kind() if default is None else default

    def pop(self, key: str, default: Any = None) -> Any:
        """A value of whatever type."""
        return self._left.pop(key, default)

    def inner(self, key: str) -> Settings | None:
        """A table in the table, if there is one."""
        return Settings(f"{self._where} [{key}]", self._left.pop(key), self._problems) if key in self._left else None

    def attempt(self, make: Callable[[], Value], otherwise: Value, key: str = "") -> Value:
        """What `make` returns; what it refuses is a mistake (in `key`)."""
        try:
            return make()
        except ProblemsError as error:
            for problem in error.problems or [error.headline]:
                self.wrong(problem)
        except (ValueError, ErnieQuantError) as error:
            self.wrong(f"{key}: {error}" if key else str(error))
        return otherwise

    def end(self) -> None:
        """All that is known has been taken."""
        for key in self._left:
            self.wrong(f"{key}: unknown")


def read_toml(path: Path) -> dict[str, Any]:
    """A file that a user wrote. Raises PlanError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}", []) from None
    except ValueError as error:
        raise PlanError(f"{path}: is not valid TOML: {error}", []) from None


UNITS = {"GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}


def parse_size(value: object) -> int:
    """Bytes: `5GB`, `500MB`, `2GiB` or a plain number. Raises ValueError."""
    if type(value) is int and value > 0:
        return value
    text = str(value).strip().upper()
    unit = next(u for u in UNITS if text.endswith(u))
    try:
        size = int(float(text.removesuffix(unit)) * UNITS[unit])
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"{value!r} is not a size such as 5GB or 500MB")
    return size
