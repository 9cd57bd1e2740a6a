"""What lies beside the weights: the files that belong to a model, known by kind and size, and all others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from ernie_quant.paths import inside, is_place
from ernie_quant.readers import by_suffix
from ernie_quant.sources.sets import INDEXES

# never carried along: what is written anew, other weights, and what makes a loader look for some
OWN_FILES = {
    "config.json", "ernie-quant.json", "report.json", "report.html", "comparison.html", "eval.json", "SHA256SUMS", *INDEXES,
}  # fmt: skip
OTHER_WEIGHTS = {".pt", ".pth", ".onnx", ".msgpack", ".h5", ".npz", ".pdiparams", ".pdopt"}
ADAPTER = "adapter_config.json"
# what a name of a model's file may be, in small letters
KINDS = (
    "tokenizer*.json", "tokenizer*.model", "spiece.model", "sentencepiece*.model", "*.bpe.model", "*.spm", "*.tiktoken",
    "*.vocab", "*vocab*.json", "*vocab*.txt", "*merges*.txt", "special_tokens_map*.json", "added_tokens*.json",
    "generation_config*.json", "*processor_config.json", "image_config.json", "configuration.json",  # ModelScope's
    "chat_template*.json", "*.jinja",
    "*.ttf", "*.otf",  # a VL processor draws times on frames
    "*.md", "license*", "licence*", "notice*", "copying*",
)  # fmt: skip
STRAYS = (".aria2", ".log", ".tmp", ".part", ".partial", ".crdownload", ".lock", ".zip", ".tar", ".gz", ".7z", ".bak", ".py")
LIMIT = 64 << 20  # bytes; the largest tokenizer.json that is published has 33 MB
# subfolders in which files of these kinds are looked for
FOLDERS = ("additional_chat_templates", "chat_templates", "tokenizer", "processor", "image_processor", "LICENSES")
CONTROL = ".aria2"  # lies beside a file until its download has ended


@dataclass(frozen=True)
class Beside:
    """Files (bytes of each), subfolders that nobody looked into, what is no file and why, and notes."""

    files: Mapping[Path, int]
    folders: tuple[str, ...]
    odd: tuple[str, ...]
    notes: tuple[str, ...]


def is_weights(name: str) -> bool:
    """Weights, whether read or not, or a list of some."""
    suffix = PurePosixPath(name).suffix
    return suffix in by_suffix() or suffix in OTHER_WEIGHTS or name.endswith(".index.json")


def is_unread(name: str) -> bool:
    """Weights in the folder itself: those that are not read, the source's own notes name."""
    return is_weights(name) and "/" not in name


def belongs(name: str) -> bool:
    """Is a file of that name (with slashes, below the folder) carried along unasked, if it is not too large?"""
    *folders, last = PurePosixPath(name).parts
    known = not folders or (len(folders) == 1 and folders[0] in FOLDERS)
    if not known or is_weights(name) or last in OWN_FILES or last.lower().endswith(STRAYS):
        return False
    return any(fnmatchcase(last.lower(), kind) for kind in KINDS) or (folders == ["LICENSES"] and last.endswith(".txt"))


def is_code(name: str) -> bool:
    """A Python file, which is carried along where somebody wants code."""
    return name.endswith(".py") and "/" not in name


def is_plain(name: str) -> bool:
    """Can a manifest name it, on any system?"""
    return name.isprintable() and not set(name) & {":", "\\"}


def look_beside(folder: Path, used: set[Path], *, links: bool = False) -> Beside:
    """All of `folder` but the weight files `used`. Raises CheckpointError for a file of the model that lies elsewhere."""
    files: dict[Path, int] = {}
    folders: list[str] = []
    odd: list[str] = []
    for path in sorted(folder.iterdir()):
        if path in used or path.name in OWN_FILES or path.name.startswith("."):
            continue
        if (why := not_a_file(path)) and not path.is_dir():
            with suppress(FileNotFoundError):  # a log that was rotated meanwhile was not there
                path.lstat()
                odd.append(f"{shown(path.name)} ({why})")
        elif not path.is_dir():
            files |= sizes(folder, [path], links=links)
        elif path.name in FOLDERS and not path.is_symlink():
            files |= sizes(folder, files_below(path), links=links)
        elif not is_place(path.name):
            folders.append(path.name)
    notes = [
        f"{path.name} lies beside {path.stem}: its download may not have ended"
        for path in files
        if path.suffix == CONTROL and path.with_suffix("") in used
    ]
    return Beside(files, tuple(folders), tuple(odd), tuple(notes))


def files_below(folder: Path) -> Iterator[Path]:
    """Files in a subfolder, at any depth; links to folders are not followed, and hidden names left alone."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(names) if not name.startswith("."))


def sizes(folder: Path, paths: Iterable[Path], *, links: bool = False) -> dict[Path, int]:
    """Bytes of each file; one that vanishes meanwhile, as a log that is rotated, was not there. Raises CheckpointError."""
    found = {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if belongs(name) and is_plain(name) and path.is_file():
            inside(folder, name, "the folder", links=links)
        with suppress(FileNotFoundError):
            found[path] = path.stat().st_size if path.is_file() else path.lstat().st_size
    return found


def not_a_file(path: Path) -> str:
    """Why nobody can read it; empty for a file."""
    if not path.exists():
        return "a link that leads nowhere"
    return "" if path.is_file() else "not a regular file"


def shown(name: str) -> str:
    """A name that may not be printable, for people."""
    return repr(name)[1:-1]
