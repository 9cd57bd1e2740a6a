"""What functions of the library that write a folder have in common: their options, and the run itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, cast

from ernie_quant.devices import CPU
from ernie_quant.planning.calibration import AUTO, Asked
from ernie_quant.planning.recipe import Recipe
from ernie_quant.planning.reshard import check_size
from ernie_quant.planning.steps import Plan
from ernie_quant.run.memory import suit
from ernie_quant.run.outcome import Result, planned, result_of
from ernie_quant.run.shared import run_shared
from ernie_quant.run.whole import FileDone, run_plan
from ernie_quant.runners import Runner, local
from ernie_quant.settings import parse_size

Path_ = str | os.PathLike[str]
Size = int | str  # bytes, or `5GB`, `2GiB`
PLANNING = ("vl_config", "fixes", "unsupported")


class Writing(TypedDict, total=False):
    """What every function that writes a folder takes beside its own arguments.

    `dry_run`: plan and check everything, write nothing. `restart`: drop what an earlier run left there. `workers`: threads
    (one per processor, at most 8). `max_shard_size`, `disk_budget`: bytes, or text such as `5GB`. `copy`: patterns of more
    files of the source to carry along; `copy_code`: its Python files too. `progress` is called with bytes that are done,
    `each` after every file. `follow_links`: read files that links in the source lead to. `runner`: where files are written;
    on a Ray cluster it is `ernie_quant.runners.ray.Cluster("auto")`.
    """

    dry_run: bool
    restart: bool
    workers: int
    max_shard_size: Size
    disk_budget: Size
    space_check: bool
    copy: Sequence[str]
    copy_code: bool
    follow_links: bool
    progress: Callable[[int], None]
    each: Callable[[FileDone], None]
    runner: Runner


def split(options: Mapping[str, Any]) -> tuple[Writing, dict[str, Any], dict[str, Any]]:
    """How to write, what a plan wants to know, and the rest: options of a recipe."""
    how = {key: value for key, value in options.items() if key in Writing.__annotations__}
    planning: dict[str, Any] = {key: options[key] for key in PLANNING if key in options}
    if "max_shard_size" in how:
        planning["shard_bytes"] = parse_size(how["max_shard_size"])
    if "copy" in how:
        planning["copy"] = tuple(how["copy"])
    if "copy_code" in how:
        planning["copy_code"] = how["copy_code"]
    if "fixes" in planning:
        planning["fixes"] = frozenset(planning["fixes"])
    rest = {key: value for key, value in options.items() if key not in how and key not in PLANNING}
    return cast(Writing, how), planning, rest


def asked_of(rules: Recipe, text: Path_ | Sequence[Path_] | None, given: Mapping[str, Any]) -> Asked | None:
    """The [calibration] of a recipe, with what is said instead of it."""
    said = {key: value for key, value in given.items() if value is not None}
    if text is not None:
        files = (text,) if isinstance(text, str | os.PathLike) else tuple(text)
        said["text"] = AUTO if files == (AUTO,) else tuple(map(Path, files))
    elif rules.calibration is None:
        if said:
            raise ValueError(f"{', '.join(said)}: of a calibration; name its text: calibration='{AUTO}' or files")
        return None
    return Asked(**said) if rules.calibration is None else replace(rules.calibration, **said)


def run(plan: Plan, out: Path_, how: Writing, tp: int = 1, device: str = CPU) -> Result:
    """Do it, or say what would be done."""
    if tp > 1:
        check_size(plan, tp)
    if how.get("dry_run"):
        return planned(plan, Path(out))
    suit(plan)
    budget = how.get("disk_budget")
    options: dict[str, Any] = {
        "workers": how.get("workers", 0), "restart": how.get("restart", False), "space_check": how.get("space_check", True),
        "disk_budget": None if budget is None else parse_size(budget), "progress": how.get("progress", lambda _: None),
        "each": how.get("each", lambda _: None), "runner": how.get("runner", local), "device": device,
    }  # fmt: skip
    done = run_shared(plan, Path(out), tp, **options) if tp > 1 else run_plan(plan, Path(out), **options)
    return result_of(done, Path(out))
