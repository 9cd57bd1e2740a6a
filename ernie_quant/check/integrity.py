"""Are the files of a result still those that were written? By hash, and where one is not, by the names of the weights."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ernie_quant.disk import file_sha256
from ernie_quant.dtypes import as_bytes
from ernie_quant.errors import CheckpointError
from ernie_quant.paths import MANIFEST, SUMS, inside, weight_folders
from ernie_quant.readers import by_suffix
from ernie_quant.reporting.rows import TensorReport
from ernie_quant.result.manifest import sums
from ernie_quant.threads import default_workers, ordered
from ernie_quant.views import build, kinds, read
from ernie_quant.views.files import Files
from ernie_quant.views.kinds import View
from ernie_quant.weights.stored import Stored
from ernie_quant.writers import joint_crc32

Progress = Callable[[int], None]


def damaged_files(out: Path, manifest: Mapping[str, Any], progress: Progress) -> dict[str, str]:
    """File -> what is wrong with it; every byte of every file is read once, of several files at a time."""
    lock = threading.Lock()

    def told(nbytes: int) -> None:
        with lock:
            progress(nbytes)

    files = manifest["files"]
    found = ordered(lambda name: _damage(out, name, files[name], told), files, default_workers(), tick=lambda: told(0))
    damaged = {name: problem for name, problem in zip(files, found, strict=True) if problem}
    for path in sorted(p for folder in weight_folders(out) for p in folder.iterdir()):
        name = path.relative_to(out).as_posix()
        if path.suffix in by_suffix() and name not in manifest["files"]:
            damaged[name] = f"{name}: is not in the manifest"
    return damaged | _sums_problem(out, manifest)


def _damage(out: Path, name: str, entry: Mapping[str, Any], progress: Progress) -> str:
    """What is wrong with a file; empty if nothing is."""
    try:
        path = inside(out, name, MANIFEST)
    except CheckpointError as error:
        return str(error)
    if (nbytes := path.stat().st_size) != entry.get("bytes"):
        return f"{name}: has {nbytes} bytes, the manifest says {entry.get('bytes')}"
    if (digest := file_sha256(path, progress)) != entry["sha256"]:
        return f"{name}: its sha256 is {digest[:16]}…, the manifest says {entry['sha256'][:16]}…"
    return ""


def _sums_problem(out: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """SHA256SUMS must say what the manifest says, and of which manifest."""
    promised = sums(manifest["files"], (out / MANIFEST).read_bytes()).splitlines()
    try:
        lines = inside(out, SUMS, "the result").read_text(encoding="utf-8", errors="replace").splitlines()
    except CheckpointError as error:
        return {SUMS: str(error)}
    odd = sorted({line.partition("  ")[2] for line in set(promised) ^ set(lines)})
    return {SUMS: f"{SUMS}: disagrees with the manifest about {', '.join(odd[:5])}"} if odd else {}


def damaged_weights(
    stored: list[Stored], reports: Mapping[str, TensorReport], files: Files, suspects: set[Path]
) -> Iterator[str]:
    """The weights in `suspects` that do not have the checksum of the report."""
    for entry in stored:
        row = reports.get(entry.name)
        if row is None or not suspects & {ref.file for view in entry.parts.values() for ref in build.refs(view)}:
            continue
        try:
            yield from altered(entry, row, files)
        except CheckpointError as error:
            yield str(error)


def altered(entry: Stored, row: TensorReport, files: Files) -> Iterator[str]:
    """That a weight does not have the checksum of the report. Raises CheckpointError."""
    found = joint_crc32(_crc32(view, files) for _, view in sorted(entry.parts.items()))
    if found != row.crc32:
        yield f"{entry.name}: its stored bytes are not those that were written (crc32 {found}, the report says {row.crc32})"


def _crc32(view: View, files: Files) -> int:
    """Of the bytes of a stored tensor, row-major; a slab in memory."""
    checksum = 0
    for rows in read.slabs(kinds.spec_of(view)):
        checksum = zlib.crc32(as_bytes(read.read(view, files, rows)), checksum)
    return checksum
