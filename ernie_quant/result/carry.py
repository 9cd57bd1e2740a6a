"""Small files of the source, copied at the end as they are then; the hashes are those of what was written."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ernie_quant.disk import copy_file, file_sha256, steadily, write_file
from ernie_quant.errors import MissingFileError
from ernie_quant.paths import inside
from ernie_quant.planning import code
from ernie_quant.planning.steps import Plan
from ernie_quant.result.manifest import read_manifest

Entries = dict[str, dict[str, object]]


def carry(plan: Plan, out: Path) -> tuple[Entries, list[str]]:
    """Size and hash of every file that was copied, and notes on those that are gone. Raises OSError or CheckpointError."""
    entries: Entries = {}
    gone = []
    modules = code.modules_of(plan.copies)
    for target, source in plan.copied.items():
        name = plan.origin.name_of(source)
        try:
            inside(plan.origin.folder, name, "the folder", links=plan.origin.links)
            nbytes, digest = _copy(source, name, out / target, modules)
        except (MissingFileError, FileNotFoundError):
            if source.exists():
                raise
            gone.append(name)
            continue
        entries[target] = {"bytes": nbytes, "sha256": digest}
    return entries, [f"not carried along, as gone before the end: {', '.join(gone)}"] if gone else []


def changed_since(plan: Plan, out: Path) -> list[str]:
    """Notes on carried files of a finished result that the source has otherwise today; the result stays as it is."""
    if plan.origin.downloader is not None:  # a commit does not change
        return []
    entries, modules = read_manifest(out)["files"], code.modules_of(plan.copies)
    changed = []
    for target, source in plan.copied.items():
        name = plan.origin.name_of(source)
        if source.is_file() and _hash(source, name, modules) != entries.get(target, {}).get("sha256"):
            changed.append(name)
    what = "of the source changed after the result was finished, which has them as they were; copy them, or use --restart"
    return [f"{', '.join(changed)}: {what}"] if changed else []


def _hash(source: Path, name: str, modules: set[str]) -> str:
    data = _mended(source, name, modules)
    return file_sha256(source) if data is None else hashlib.sha256(data).hexdigest()


def _copy(source: Path, name: str, target: Path, modules: set[str]) -> tuple[int, str]:
    target.parent.mkdir(parents=True, exist_ok=True)
    data = _mended(source, name, modules)
    return copy_file(source, target) if data is None else (len(data), write_file(target, data))


def _mended(source: Path, name: str, modules: set[str]) -> bytes | None:
    """A config file without names of code that is not there; None for what is copied as it is."""
    if not code.may_name_code(name) or source.stat().st_size > code.MOST:
        return None
    return code.mended(steadily(source, lambda file, nbytes: file.read(nbytes)), modules)
