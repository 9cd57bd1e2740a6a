"""Are the files of a result still those that were written? By hash, and where one is not, by the names of the weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ernie_quant import views
from ernie_quant.errors import CheckpointError, OutputError
from ernie_quant.jsonio import read_object
from ernie_quant.lazy import View
from ernie_quant.manifest import MANIFEST, SUMS, sums
from ernie_quant.output import STATE, weight_folders
from ernie_quant.readers import by_suffix
from ernie_quant.report import TensorReport
from ernie_quant.sources.folder import inside
from ernie_quant.stored import Stored
from ernie_quant.tensors import as_bytes
from ernie_quant.views import Files
from ernie_quant.writer import file_sha256, joint_crc32

Progress = Callable[[int], None]


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a finished result. Raises OutputError for a folder that has none."""
    if not (out / MANIFEST).is_file():
        begun = (out / STATE).is_dir()
        raise OutputError(
            f"{out}: is not finished; run the same command again"
            if begun
            else f"{out}: has no {MANIFEST}; it was not made by ernie-quant"
        )
    manifest = read_object(out / MANIFEST)
    files, recipe = manifest.get("files"), manifest.get("recipe")
    if not isinstance(files, dict) or not isinstance(recipe, dict) or not isinstance(manifest.get("runtime"), str):
        raise OutputError(f"{out / MANIFEST}: lacks files, recipe or runtime")
    if odd := next((name for name, e in files.items() if not isinstance(e, dict) or not isinstance(e.get("sha256"), str)), None):
        raise OutputError(f"{out / MANIFEST}: says no sha256 of {odd[:200]}")
    return manifest


def damaged_files(out: Path, manifest: Mapping[str, Any], progress: Progress) -> dict[str, str]:
    """File -> what is wrong with it; every byte of every file is read once."""
    found: dict[str, str] = {}
    for name, entry in manifest["files"].items():
        try:
            path = inside(out, name, MANIFEST)
        except CheckpointError as error:
            found[name] = str(error)
            continue
        if (nbytes := path.stat().st_size) != entry.get("bytes"):
            found[name] = f"{name}: has {nbytes} bytes, the manifest says {entry.get('bytes')}"
        elif (digest := file_sha256(path, progress)) != entry["sha256"]:
            found[name] = f"{name}: its sha256 is {digest[:16]}…, the manifest says {entry['sha256'][:16]}…"
    for path in sorted(p for folder in weight_folders(out) for p in folder.iterdir()):
        name = path.relative_to(out).as_posix()
        if path.suffix in by_suffix() and name not in manifest["files"]:
            found[name] = f"{name}: is not in the manifest"
    return found | _sums_problem(out, manifest)


def _sums_problem(out: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """SHA256SUMS must say what the manifest says, and of which manifest."""
    promised = sums(manifest["files"], (out / MANIFEST).read_bytes()).splitlines()
    try:
        found = inside(out, SUMS, "the result").read_text(encoding="utf-8", errors="replace").splitlines()
    except CheckpointError as error:
        return {SUMS: str(error)}
    odd = sorted({line.partition("  ")[2] for line in set(promised) ^ set(found)})
    return {SUMS: f"{SUMS}: disagrees with the manifest about {', '.join(odd[:5])}"} if odd else {}


def damaged_weights(stored: list[Stored], rows: Mapping[str, TensorReport], files: Files, suspects: set[Path]) -> Iterator[str]:
    """The weights in `suspects` that do not have the checksum of the report."""
    for entry in stored:
        row = rows.get(entry.name)
        if row is None or not suspects & {ref.file for view in entry.parts.values() for ref in views.refs(view)}:
            continue
        try:
            found = joint_crc32(_crc32(view, files) for _, view in sorted(entry.parts.items()))
        except CheckpointError as error:
            yield str(error)
            continue
        if found != row.crc32:
            yield f"{entry.name}: its stored bytes are not those that were written (crc32 {found}, the report says {row.crc32})"


def _crc32(view: View, files: Files) -> int:
    """Of the bytes of a stored tensor, row-major; a slab in memory."""
    found = 0
    for rows in views.slabs(views.spec_of(view)):
        found = zlib.crc32(as_bytes(views.read(view, files, rows)), found)
    return found
