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
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_quant import codecs, recipe
from ernie_quant.errors import ErnieQuantError, PlanError
from ernie_quant.plan import SHARD_BYTES
from ernie_quant.recipe import KEEP_ALL, Recipe
from ernie_quant.sizes import parse_size

REPO = re.compile(r"((?P<scheme>[a-z]+)://)?(?P<repo>[\w.-]+/[\w.-]+)")
REVISION = re.compile(r"[\w./-]+")
VLLM, FASTDEPLOY = "vllm", "fastdeploy"


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
        return f"{self.repo}@{self.revision}".replace("/", "--")


@dataclass(frozen=True)
class Job:
    """What a job file says; `disk_budget` and `max_hours` None for no limit."""

    source: str
    targets: tuple[JobTarget, ...]
    disk_budget: int | None
    max_hours: float | None


def read_job(path: Path) -> Job:
    """The job in a TOML file. Raises PlanError with every mistake in it."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}", []) from None
    except ValueError as error:
        raise PlanError(f"{path}: is not valid TOML: {error}", []) from None
    problems: list[str] = []

    def part(where: str, make: Callable[[dict[str, Any]], Any], value: Any) -> Any:
        try:
            if not isinstance(value, dict):
                raise ValueError("is not a table")
            value = dict(value)
            found = make(value)
            problems.extend(f"{where}: {key}: unknown" for key in value)
            return found
        except PlanError as error:
            problems.extend([f"{where}: {error.headline}", *(f"{where}: {p}" for p in error.problems)])
        except (ValueError, ErnieQuantError) as error:
            problems.append(f"{where}: {error}")
        return None

    source = part("[source]", _source, table.pop("source", None))
    entries = table.pop("target", [])
    if not isinstance(entries, list) or not entries:
        problems.append("has no [[target]]")
        entries = []
    targets = [part(f"[[target]] {number}", _target, entry) for number, entry in enumerate(entries, 1)]
    limits = part("[limits]", _limits, table.pop("limits", {}))
    problems += [f"{key}: unknown; a job has [source], [[target]] and [limits]" for key in table]
    places = [t.folder for t in targets if t]
    twice = sorted({place for place in places if places.count(place) > 1})
    problems += [f"{place}: is the place of more than one [[target]]" for place in twice]
    if problems:
        raise PlanError(f"{path}: {len(problems)} mistake(s)", problems)
    return Job(source, tuple(targets), *limits)


def _take(table: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """A value of the right type; it is taken out, so that what is left is unknown."""
    value = table.pop(key, default)
    good = value is default or type(value) is kind or (kind is float and type(value) is int)
    if not good or (value is None and default is None):
        wanted = "a text" if kind is str else f"a {kind.__name__}"
        raise ValueError(f"{key} is {'missing' if value is None else repr(value)}, not {wanted}")
    return value


def _source(table: dict[str, Any]) -> str:
    repo, revision = _take(table, "repo", str), _take(table, "revision", str, "")
    if "://" not in repo:
        if revision:
            raise ValueError(f"revision: {repo} is a folder and has none")
        return str(repo)
    if revision and not REVISION.fullmatch(revision):
        raise ValueError(f"revision {revision!r} is no name of a branch, tag or commit")
    return f"{repo}@{revision}" if revision else str(repo)


def _limits(table: dict[str, Any]) -> tuple[int | None, float | None]:
    budget, hours = table.pop("disk_budget", None), _take(table, "max_hours", float, 0.0)
    if hours < 0:
        raise ValueError(f"max_hours is {hours}, not a number above 0")
    return (None if budget is None else parse_size(budget), hours or None)


def _target(table: dict[str, Any]) -> JobTarget:
    repo = _take(table, "repo", str)
    found = REPO.fullmatch(repo)
    if not found:
        raise ValueError(f"repo {repo!r} is not ORG/NAME or SCHEME://ORG/NAME")
    revision = _take(table, "revision", str, "main")
    private = table.pop("private", None)
    if private is not None and type(private) is not bool:
        raise ValueError(f"private is {private!r}, not true or false")
    tag, tp = _take(table, "tag", bool, False), _take(table, "tp", int, 1)
    shard_bytes = parse_size(table.pop("max_shard_size", SHARD_BYTES))
    rules, runtime = _recipe(table)
    if tp not in (1, 2, 4, 8, 16) or (tp > 1 and runtime != FASTDEPLOY):
        raise ValueError(f"tp is {tp}, not 1, 2, 4, 8 or 16 with runtime fastdeploy")
    return JobTarget(found["scheme"] or "hf", found["repo"], revision, private, tag, rules, runtime, tp, shard_bytes)


def _recipe(table: dict[str, Any]) -> tuple[Recipe, str]:
    """Recipe and runtime: a built-in name with its options, or rules."""
    if "rule" in table:
        runtime, keep = _take(table, "runtime", str, VLLM), _take(table, "keep_unfit", bool, False)
        return recipe.of_rules("rules", table.pop("rule"), keep_unfit=keep), _runtime(runtime, (VLLM, "transformers"))
    name = _take(table, "recipe", str)
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is none of {', '.join(RECIPES)}; for others give [[target.rule]] tables")
    return RECIPES[name](name, table)


def _runtime(name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise ValueError(f"runtime is {name!r}, not {' or '.join(known)}")
    return name


def _keep(name: str, table: dict[str, Any]) -> tuple[Recipe, str]:
    return KEEP_ALL, FASTDEPLOY if name == "paddle" else VLLM


def _integers(name: str, table: dict[str, Any]) -> tuple[Recipe, str]:
    known = (VLLM, "transformers", FASTDEPLOY) if name == "wint4" else (VLLM, "transformers")
    runtime, scale = _runtime(_take(table, "runtime", str, VLLM), known), _take(table, "scale", str, "mse")
    if runtime == FASTDEPLOY:
        return recipe.container(name, None, scale=scale), runtime
    codec = codecs.make("rtn", {"bits": int(name[-1]), "group_size": table.pop("group_size", 128), "scale": scale})
    return recipe.built_in(name, codec, **_which(table)), runtime


def _float8(name: str, table: dict[str, Any]) -> tuple[Recipe, str]:
    runtime = _runtime(_take(table, "runtime", str, VLLM), (VLLM, "transformers"))
    return recipe.built_in(name, codecs.make("fp8", {}), **_which(table)), runtime


def _wint2(name: str, table: dict[str, Any]) -> tuple[Recipe, str]:
    _runtime(_take(table, "runtime", str, FASTDEPLOY), (FASTDEPLOY,))
    layers, effort = _take(table, "wint4_layers", int, 7), _take(table, "effort", int, 16)
    if not 0 <= layers <= 1000:
        raise ValueError(f"wint4_layers is {layers}, not a number of layers")
    return recipe.container(name, layers, scale=_take(table, "scale", str, "mse"), effort=effort), FASTDEPLOY


def _which(table: dict[str, Any]) -> dict[str, bool]:
    return {key: _take(table, key, bool, False) for key in ("experts_only", "mtp", "keep_unfit")}


RECIPES: Mapping[str, Callable[[str, dict[str, Any]], tuple[Recipe, str]]] = {
    "pt": _keep, "paddle": _keep, "wint4": _integers, "wint8": _integers, "fp8": _float8, "wint2": _wint2
}  # fmt: skip
