"""job.toml: which repository becomes which published ones. Read and judged as a whole before anything starts.

[source]
repo = "hf://baidu/ERNIE-4.5-21B-A3B-Paddle"    # or a folder
revision = "main"

[[target]]
repo = "my-org/ERNIE-4.5-21B-A3B-WINT4"
recipe = "wint4"                                # pt, paddle, wint4, wint8, fp8, wint2; or [[target.rule]] tables
experts_only = true

[limits]
disk_budget = "60GB"
max_hours = 8
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ernie_quant import codecs, plugins, publishers, recipe
from ernie_quant.errors import ErnieQuantError, PlanError, ProblemsError
from ernie_quant.plan import SHARD_BYTES
from ernie_quant.recipe import KEEP_ALL, Recipe
from ernie_quant.sizes import parse_size
from ernie_quant.sources import check_address

REPO = re.compile(r"((?P<scheme>[a-z]+)://)?(?P<repo>[\w.-]+/[\w.-]+)")
REVISION = re.compile(r"[\w./-]+")
VLLM, TRANSFORMERS, FASTDEPLOY = "vllm", "transformers", "fastdeploy"
KINDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
Value = TypeVar("Value")


@dataclass(frozen=True)
class JobTarget:
    """One published repository."""

    scheme: str
    repo: str
    revision: str
    private: bool | None
    tag: bool
    recipe: Recipe
    runtime: str
    tp: int
    shard_bytes: int

    @property
    def folder(self) -> str:
        """Name of the folder in which it is made."""
        hub = "" if self.scheme == "hf" else f"{self.scheme}--"
        return f"{hub}{self.repo}@{self.revision}".replace("/", "--")


@dataclass(frozen=True)
class Job:
    """What a job file says; `disk_budget` and `max_hours` None for no limit."""

    source: str
    targets: tuple[JobTarget, ...]
    disk_budget: int | None
    max_hours: float | None


def read_job(path: Path) -> Job:
    """The job in a TOML file. Raises PlanError with every mistake in it."""
    table = recipe.read_toml(path)
    problems: list[str] = []
    source = _source(Table("[source]", table.pop("source", None), problems))
    entries = table.pop("target", [])
    if not isinstance(entries, list) or not entries:
        problems.append("has no [[target]]")
        entries = []
    targets = [_target(Table(f"[[target]] {number}", entry, problems)) for number, entry in enumerate(entries, 1)]
    limits = _limits(Table("[limits]", table.pop("limits", {}), problems))
    problems += [f"{key}: unknown; a job has [source], [[target]] and [limits]" for key in table]
    places = [target.folder for target in targets if target.repo]
    twice = sorted({place for place in places if places.count(place) > 1})
    problems += [f"{place}: is the place of more than one [[target]]" for place in twice]
    if problems:
        raise PlanError(f"{path}: {len(problems)} mistake(s)", problems)
    return Job(source, tuple(targets), *limits)


class Table:
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


def _source(table: Table) -> str:
    repo, revision = table.take("repo", str), table.take("revision", str, "")
    table.end()
    if "://" not in repo:
        if revision:
            table.wrong(f"revision: {repo} is a folder and has none")
        return repo
    if revision and ("@" in repo or not REVISION.fullmatch(revision)):
        table.wrong(f"revision {revision!r} is no name of a branch, tag or commit, or not the only one")
        return repo
    address = f"{repo}@{revision}" if revision else repo
    table.attempt(lambda: check_address(address), None)
    return address


def _limits(table: Table) -> tuple[int | None, float | None]:
    budget, hours = table.pop("disk_budget"), table.take("max_hours", float, float("inf"))
    table.end()
    if not hours > 0:
        table.wrong(f"max_hours is {hours}, not a number above 0")
    nbytes = None if budget is None else table.attempt(lambda: parse_size(budget), 0, "disk_budget")
    return nbytes, None if hours == float("inf") else hours


def _target(table: Table) -> JobTarget:
    repo, revision = table.take("repo", str), table.take("revision", str, "")
    found = REPO.fullmatch(repo)
    scheme, name = (found["scheme"] or "hf", found["repo"]) if found else ("", repo)
    if repo and not found:
        table.wrong(f"repo {repo!r} is not ORG/NAME or SCHEME://ORG/NAME")
    if found and scheme not in (hubs := plugins.names(publishers)):
        table.wrong(f"repo {repo!r}: nothing can be published there; there is {', '.join(f'{hub}://' for hub in hubs)}")
    elif found:
        revision = revision or plugins.load(publishers, scheme).DEFAULT_BRANCH
    if revision and not REVISION.fullmatch(revision):
        table.wrong(f"revision {revision!r} is no name of a branch")
    private = table.pop("private")
    if private is not None and type(private) is not bool:
        table.wrong(f"private is {private!r}, not true or false")
    tag, tp = table.take("tag", bool, False), table.take("tp", int, 1)
    size = table.pop("max_shard_size", SHARD_BYTES)
    shard_bytes = table.attempt(lambda: parse_size(size), SHARD_BYTES, "max_shard_size")
    rules, runtime = _recipe(table)
    table.end()
    if tp not in (1, 2, 4, 8, 16) or (tp > 1 and runtime != FASTDEPLOY):
        table.wrong(f"tp is {tp}, not 1, or 2, 4, 8 or 16 with runtime fastdeploy")
    return JobTarget(scheme, name, revision, private, tag, rules, runtime, tp, shard_bytes)


def _recipe(table: Table) -> tuple[Recipe, str]:
    """Recipe and runtime: a built-in name with its options, or rules."""
    rules = table.pop("rule")
    if rules is not None:
        runtime, keep = _runtime(table, VLLM, TRANSFORMERS), table.take("keep_unfit", bool, False)
        return table.attempt(lambda: recipe.of_rules("rules", rules, keep_unfit=keep), KEEP_ALL), runtime
    name = table.take("recipe", str)
    if name in RECIPES:
        return RECIPES[name](name, table)
    if name:
        table.wrong(f"recipe {name!r} is none of {', '.join(RECIPES)}; for others give [[target.rule]] tables")
    for option in OPTIONS:  # of which recipe cannot be said
        table.pop(option)
    return KEEP_ALL, FASTDEPLOY


def _runtime(table: Table, *known: str) -> str:
    name = table.take("runtime", str, known[0])
    if name not in known:
        table.wrong(f"runtime is {name!r}, not {' or '.join(known)}")
    return name


def _keep(name: str, table: Table) -> tuple[Recipe, str]:
    return KEEP_ALL, FASTDEPLOY if name == "paddle" else VLLM


def _integers(name: str, table: Table) -> tuple[Recipe, str]:
    runtime = _runtime(table, VLLM, TRANSFORMERS, *([FASTDEPLOY] if name == "wint4" else []))
    scale = table.take("scale", str, "mse")
    if runtime == FASTDEPLOY:
        return table.attempt(lambda: recipe.container(name, None, scale=scale), KEEP_ALL), runtime
    settings = {"bits": int(name[-1]), "group_size": table.pop("group_size", 128), "scale": scale}
    which = _which(table)
    return table.attempt(lambda: recipe.built_in(name, codecs.make("rtn", settings), **which), KEEP_ALL), runtime


def _float8(name: str, table: Table) -> tuple[Recipe, str]:
    runtime = _runtime(table, VLLM, TRANSFORMERS)
    return recipe.built_in(name, codecs.make("fp8", {}), **_which(table)), runtime


def _wint2(name: str, table: Table) -> tuple[Recipe, str]:
    runtime, scale = _runtime(table, FASTDEPLOY), table.take("scale", str, "mse")
    layers, effort = table.take("wint4_layers", int, 7), table.take("effort", int, 16)
    if not 0 <= layers <= 1000:
        table.wrong(f"wint4_layers is {layers}, not a number of layers")
        layers = 0
    return table.attempt(lambda: recipe.container(name, layers, scale=scale, effort=effort), KEEP_ALL), runtime


def _which(table: Table) -> dict[str, bool]:
    return {key: table.take(key, bool, False) for key in ("experts_only", "mtp", "keep_unfit")}


RECIPES: Mapping[str, Callable[[str, Table], tuple[Recipe, str]]] = {
    "pt": _keep, "paddle": _keep, "wint4": _integers, "wint8": _integers, "fp8": _float8, "wint2": _wint2
}  # fmt: skip
OPTIONS = ("runtime", "scale", "group_size", "experts_only", "mtp", "keep_unfit", "wint4_layers", "effort")
