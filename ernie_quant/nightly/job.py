"""job.toml: which repository becomes which published ones. Read and judged as a whole before anything starts.

[source]
repo = "hf://baidu/ERNIE-4.5-21B-A3B-Paddle"    # or a folder
revision = "main"

[[target]]
repo = "my-org/ERNIE-4.5-21B-A3B-WINT4"
recipe = "wint4"                                # pt, paddle, wint4, wint8, fp8, mxfp4, nvfp4, gguf, wint2, w4a8; a file of
                                                # rules, as seen from here; or [[target.rule]] tables
experts_only = true
name = "ERNIE 4.5 21B in 4 bits"                # of the model, in its card
[target.calibration]                            # as in a recipe file
text = "auto"

[limits]
disk_budget = "60GB"
max_hours = 8
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ernie_quant import codecs, hubs, runtimes, settings
from ernie_quant.errors import PlanError
from ernie_quant.planning import built_in, calibration, recipe
from ernie_quant.planning.recipe import KEEP_ALL, Recipe
from ernie_quant.publish.places import folder_of
from ernie_quant.runtimes import Place
from ernie_quant.settings import Settings, parse_size
from ernie_quant.sources import is_address

REPO = re.compile(r"((?P<scheme>[a-z]+)://)?(?P<repo>[\w.-]+/[\w.-]+)")
REVISION = re.compile(r"[\w./-]+")
MOST_RANKS = 16


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
    copy: tuple[str, ...] = ()
    allow_odd_values: bool = False
    name: str = ""  # of the model, in its card
    base_model: str = ""  # of a source that is a folder

    @property
    def folder(self) -> str:
        """Name of the folder in which it is made."""
        hub = "" if self.scheme == "hf" else f"{self.scheme}--"
        place = f"--{self.place}" if self.place else ""
        return f"{hub}{self.repo}@{self.revision}{place}".replace("/", "--")

    @property
    def place_of_repo(self) -> Place:
        """Where it is published."""
        return Place(self.repo, self.scheme)

    @property
    def place(self) -> str:
        """The folder that it has in a repository which it shares with other types."""
        return folder_of({"recipe": {"name": self.recipe.name}, "runtime": self.runtime})


@dataclass(frozen=True)
class Job:
    """What a job file says; `disk_budget` and `max_hours` None for no limit."""

    source: str
    targets: tuple[JobTarget, ...]
    disk_budget: int | None
    max_hours: float | None
    follow_links: bool = False
    space_check: bool = True


def read_jobs(paths: Sequence[Path]) -> tuple[Job, ...]:
    """The jobs of several files. Raises PlanError with every mistake, also where two make the same repository."""
    jobs = tuple(read_job(path) for path in paths)
    makers: dict[str, list[str]] = {}
    for path, job in zip(paths, jobs, strict=True):
        for target in job.targets:
            makers.setdefault(target.folder, []).append(str(path))
    if twice := [f"{place}: is made by {' and by '.join(files)}" for place, files in makers.items() if len(files) > 1]:
        raise PlanError(f"{len(paths)} jobs: {len(twice)} mistake(s)", twice)
    return jobs


def read_job(path: Path) -> Job:
    """The job in a TOML file. Raises PlanError with every mistake in it."""
    table = settings.read_toml(path)
    problems: list[str] = []
    source, links = _source(Settings("[source]", table.pop("source", None), problems))
    entries = table.pop("target", [])
    if not isinstance(entries, list) or not entries:
        problems.append("has no [[target]]")
        entries = []
    targets = [_target(Settings(f"[[target]] {number}", entry, problems), path.parent) for number, entry in enumerate(entries, 1)]
    budget, hours, space_check = _limits(Settings("[limits]", table.pop("limits", {}), problems), source)
    problems += [f"{key}: unknown; a job has [source], [[target]] and [limits]" for key in table]
    places = [target.folder for target in targets if target.repo]
    twice = sorted({place for place in places if places.count(place) > 1})
    problems += [f"{place}: is the place of more than one [[target]]" for place in twice]
    if problems:
        raise PlanError(f"{path}: {len(problems)} mistake(s)", problems)
    return Job(source, tuple(targets), budget, hours, links, space_check)


def _source(table: Settings) -> tuple[str, bool]:
    """Its address, and whether links in it are followed."""
    repo, revision, links = table.take("repo", str), table.take("revision", str, ""), table.take("follow_links", bool, False)
    table.end()
    if is_address(repo) and links:
        table.wrong(f"follow_links is for a folder; {repo} is on a hub, leave it out")
    return _address(table, repo, revision), links


def _address(table: Settings, repo: str, revision: str) -> str:
    if not is_address(repo):
        if revision:
            table.wrong(f"revision: {repo} is a folder and has none")
        return repo
    if revision and ("@" in repo or not REVISION.fullmatch(revision)):
        table.wrong(f"revision {revision!r} is no name of a branch, tag or commit, or not the only one")
        return repo
    address = f"{repo}@{revision}" if revision else repo
    table.attempt(lambda: hubs.parse(address), None)
    return address


def _limits(table: Settings, source: str) -> tuple[int | None, float | None, bool]:
    """Bytes, hours, and whether the disk is asked for room."""
    budget, hours = table.pop("disk_budget"), table.take("max_hours", float, float("inf"))
    unasked = table.take("no_space_check", bool, False)
    table.end()
    if not hours > 0:
        table.wrong(f"max_hours is {hours}, not a number above 0")
    if budget is not None and source and not is_address(source):
        table.wrong(f"disk_budget is for a source on a hub; {source} is a folder, leave it out")
    nbytes = None if budget is None else table.attempt(lambda: parse_size(budget), 0, "disk_budget")
    return nbytes, None if hours == float("inf") else hours, not unasked


def _target(table: Settings, beside: Path) -> JobTarget:
    repo, revision = table.take("repo", str), table.take("revision", str, "")
    found = REPO.fullmatch(repo)
    scheme, name = (found["scheme"] or "hf", found["repo"]) if found else ("", repo)
    if repo and not found:
        table.wrong(f"repo {repo!r} is not ORG/NAME or SCHEME://ORG/NAME")
    if found and scheme not in hubs.schemes():
        table.wrong(f"repo {repo!r}: nothing can be published there; there is {', '.join(f'{hub}://' for hub in hubs.schemes())}")
    elif found:
        revision = revision or hubs.default_branch(scheme)
    if revision and not REVISION.fullmatch(revision):
        table.wrong(f"revision {revision!r} is no name of a branch")
    private = table.pop("private")
    if private is not None and type(private) is not bool:
        table.wrong(f"private is {private!r}, not true or false")
    tag, tp = table.take("tag", bool, False), table.take("tp", int, 1)
    size = table.pop("max_shard_size")
    copy, odd = _patterns(table), table.take("allow_odd_values", bool, False)
    called, base = table.take("name", str, ""), table.take("base_model", str, "")
    rules, runtime = _recipe(table, beside)
    usual = built_in.GGUF_BYTES if runtime == built_in.LLAMA_CPP else built_in.SHARD_BYTES
    shard_bytes = usual if size is None else table.attempt(lambda: parse_size(size), usual, "max_shard_size")
    if (asked := table.inner("calibration")) is not None:
        rules = replace(rules, calibration=calibration.read(asked, beside))
    elif _by_text(rules):
        table.wrong(f"recipe {rules.name} is made of what a text shows: it wants a [target.calibration]")
    table.end()
    if not 1 <= tp <= MOST_RANKS or (tp > 1 and not runtimes.find(runtime).PER_RANK):
        table.wrong(f"tp is {tp}, not 1, or up to {MOST_RANKS} with runtime fastdeploy")
    return JobTarget(scheme, name, revision, private, tag, rules, runtime, tp, shard_bytes, copy, odd, called, base)


def _by_text(rules: Recipe) -> bool:
    """Can it be made with calibration only?"""
    of_name = rules.name in built_in.KINDS and built_in.wants_text(rules.name)
    return of_name or any(codecs.of_text(rule.codec) for rule in rules.rules)


def _patterns(table: Settings) -> tuple[str, ...]:
    """`copy = ["figures/*"]`."""
    copy = table.pop("copy", [])
    if isinstance(copy, list) and all(isinstance(pattern, str) for pattern in copy):
        return tuple(copy)
    table.wrong(f"copy is {copy!r}, not a list of patterns")
    return ()


def _recipe(table: Settings, beside: Path) -> tuple[Recipe, str]:
    """Recipe and runtime: a built-in name with its options, a file in the folder `beside`, or rules."""
    rules = table.pop("rule")
    if rules is not None:
        runtime, keep = _runtime(table, *built_in.runtimes_of_rules()), table.take("keep_unfit", bool, False)
        return table.attempt(lambda: recipe.of_rules("rules", rules, keep_unfit=keep), KEEP_ALL), runtime
    name = table.take("recipe", str)
    if name.endswith(".toml"):
        keep = table.take("keep_unfit", bool, False)
        read = table.attempt(lambda: recipe.read(beside / name, keep_unfit=keep), KEEP_ALL)
        return read, _runtime(table, *dict.fromkeys(filter(None, (read.runtime, *built_in.runtimes_of_rules()))))
    if name not in built_in.KINDS:
        if name:
            table.wrong(f"recipe {name!r} is none of {', '.join(built_in.KINDS)}; for others name a .toml file of rules")
        for option in (
            "runtime",
            *(o for kind in built_in.KINDS for r in built_in.known_runtimes(kind) for o in built_in.options(kind, r)),
        ):
            table.pop(option)  # of which recipe cannot be said
        return KEEP_ALL, built_in.FASTDEPLOY
    runtime = _runtime(table, *built_in.known_runtimes(name))
    given = {key: _option(table, key, default) for key, default in built_in.options(name, runtime).items()}
    return table.attempt(lambda: built_in.make(name, runtime, **given).recipe, KEEP_ALL), runtime


def _option(table: Settings, key: str, default: Any) -> Any:
    """A group size may be a number or a word, and the codec says which; of all others the type is known."""
    return table.pop(key, default) if key == "group_size" else table.take(key, type(default), default)


def _runtime(table: Settings, *known: str) -> str:
    """One of `known`, the first if none is given."""
    name = table.take("runtime", str, known[0])
    if name in known:
        return name
    table.wrong(f"runtime is {name!r}, not {' or '.join(known)}")
    return known[0]
