"""Will everything that is written at the end find its place? Asked before the first weight is read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ernie_quant.disk import existing, free_bytes, free_names, partial_of
from ernie_quant.errors import OutputError, RetryError
from ernie_quant.paths import CONFIG, MANIFEST, README, SOURCE_README, SUMS
from ernie_quant.planning.steps import Plan
from ernie_quant.reporting.rows import FILENAME

BYTES_PER_TENSOR = 1000  # what index, report and manifest say of one
ANYWAY = "--no-space-check begins all the same"


def models(plan: Plan) -> list[str]:
    """Subfolders with a config.json of their own, "" for the root; none where weight files say it themselves."""
    if plan.format.SELF_CONTAINED:
        return []
    return sorted({"", *(re.sub(r"(^|/)rank\d+$", "", place) for place in plan.folders)})


def names(plan: Plan) -> Iterator[str]:
    """Every file of the result."""
    yield from (shard.filename for shard in plan.shards)
    yield from (SOURCE_README if path.name == README else path.name for path in plan.copies)
    yield from (f"{place}/{plan.format.INDEX}".lstrip("/") for place in plan.folders if plan.format.INDEX)
    yield from (f"{model}/{CONFIG}".lstrip("/") for model in models(plan))
    yield from (FILENAME, README, SUMS, MANIFEST)


def check_names(plan: Plan, out: Path) -> None:
    """Can every file be written, and may the names of what is carried along be as long as they are? Raises OutputError."""
    most = os.pathconf(existing(out), "PC_NAME_MAX")
    if long := next((n for n in plan.copied if max(map(len, map(os.fsencode, n.split("/")))) > most), None):
        raise OutputError(f"{out}: its disk takes names of {most} bytes, which {long} has not; rename it in the source")
    for name in names(plan):
        path = out / name
        for folder in (out, *(out / parent for parent in Path(name).parents)):
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"{folder}: is a file, and the result has a folder there; move it away")
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise OutputError(f"{folder}: cannot be written: Permission denied")
        for place in (path, partial_of(path)):
            if place.is_dir():
                raise OutputError(f"{place}: is a folder, and the result has a file there; move it away")


def unknown_space(out: Path) -> str:
    """What there is to say of a disk that does not tell how much is free; empty where it does."""
    there = existing(out)
    if free_bytes(there) is None:
        return f"{there}: the disk reports no free space; whether the result fits is not known"
    return ""


def check_space(plan: Plan, out: Path, given_back: int, copies: int) -> None:
    """Room for `copies` of the result, counting bytes that its files take already or will give back. Raises RetryError."""
    free, left = free_bytes(existing(out)), free_names(existing(out))
    needed = copies * (plan.disk_bytes + BYTES_PER_TENSOR * len(plan.steps))
    if free is not None and free + given_back < needed:
        missing = (needed - free - given_back) / 1e9
        raise RetryError(f"{out}: needs {needed / 1e9:.2f} GB, {missing:.2f} GB more than the disk has free; {ANYWAY}")
    files = sum(not (out / name).exists() for name in names(plan))
    if left is not None and left < files:
        raise RetryError(f"{out}: needs {files} files, the disk has room for the names of {left} (inodes); {ANYWAY}")
