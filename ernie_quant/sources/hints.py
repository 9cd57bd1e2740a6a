"""Where the checkpoint may be that somebody meant, for the end of an error."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from ernie_quant import hubs
from ernie_quant.paths import CONFIG
from ernie_quant.sources.pointers import is_pointer

MOST = 1000  # entries of a folder that are looked at


def no_folder(path: Path) -> str:
    """What is there instead, and what may be meant."""
    if path.exists():
        beside = f"; open {path.parent}" if (path.parent / CONFIG).is_file() else ""
        return f"is not a folder{beside}"
    address = "" if path.is_absolute() else hubs.suggestion(path.as_posix())
    return f"there is no such folder{f'; on a hub it is {address}' if address else ''}"


def elsewhere(folder: Path) -> str:
    """`; open THAT`, where a folder is not the model but has it, or has weights that are no model."""
    if snapshot := _snapshot(folder):
        return f"; it is the cache of a download: open {snapshot}"
    entries = sorted(islice(folder.iterdir(), MOST))
    if adapter := next((p for p in entries if p.name.startswith("adapter_model.")), None):
        return f"; {adapter.name} is an adapter: merge it into its model first"
    if model := next((p for p in entries if _is_model(p)), None):
        return f"; {model.name}/ is one: open {model}"
    if other := next((p for p in entries if p.suffix in (".safetensors", ".gguf") and not is_pointer(p)), None):
        return f"; {other.name} has another name or format than those that are read"
    return ""


def _is_model(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not path.name.startswith(".") and _is_open(path)


def _is_open(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or next(folder.glob("*.gguf"), None) is not None


def _snapshot(folder: Path) -> Path | None:
    """The snapshot that `main` is, or the latest, of huggingface_hub's cache of a repository (`models--ORG--NAME`)."""
    if not (folder / "snapshots").is_dir():
        return None
    there = sorted((p for p in (folder / "snapshots").iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime_ns)
    main = folder / "refs" / "main"
    name = main.read_bytes()[:80].decode("ascii", "replace").strip() if main.is_file() and not main.is_symlink() else ""
    return next((p for p in there if p.name == name), there[-1] if there else None)
