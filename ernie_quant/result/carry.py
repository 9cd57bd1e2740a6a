"""Small files of the source, copied at the end as they are then; the hashes are those of what was written."""

from __future__ import annotations

from pathlib import Path

from ernie_quant.disk import copy_file, steadily, write_file
from ernie_quant.errors import MissingFileError
from ernie_quant.paths import inside
from ernie_quant.plan import code
from ernie_quant.plan.steps import Plan

Entries = dict[str, dict[str, object]]


def carry(plan: Plan, out: Path) -> tuple[Entries, list[str]]:
    """Size and hash of every file that was copied, and notes on those that are gone. Raises OSError or CheckpointError."""
    entries: Entries = {}
    gone = []
    modules = code.modules_of(plan.copies)
    for target, source in plan.copied.items():
        name = plan.origin.name_of(source)
        try:
            inside(plan.origin.folder, name, "the folder")
            (out / target).parent.mkdir(parents=True, exist_ok=True)
            nbytes, digest = _copy(source, out / target, modules) if code.may_name_code(name) else copy_file(source, out / target)
        except (MissingFileError, FileNotFoundError):
            if source.exists():
                raise
            gone.append(name)
            continue
        entries[target] = {"bytes": nbytes, "sha256": digest}
    return entries, [f"not carried along, as gone before the end: {', '.join(gone)}"] if gone else []


def _copy(source: Path, target: Path, modules: set[str]) -> tuple[int, str]:
    """A config file, without names of code that is not there."""
    if source.stat().st_size > code.MOST:
        return copy_file(source, target)
    data = code.mended(steadily(source, lambda file, nbytes: file.read(nbytes)), modules)
    return len(data), write_file(target, data)
