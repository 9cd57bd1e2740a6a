"""What of the source is carried along: files of the model by kind and size, others where a pattern asks for them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.errors import CheckpointError, PlanError
from ernie_quant.paths import README, SOURCE_README, inside, is_place
from ernie_quant.planning import code
from ernie_quant.sources.beside import (
    ADAPTER,
    FOLDERS,
    LIMIT,
    belongs,
    files_below,
    is_code,
    is_plain,
    is_unread,
    is_weights,
    not_a_file,
    shown,
    sizes,
)

SHOWN = 50  # names in the note of what is left; a folder may hold a hundred thousand
DOCUMENTS = ("*.md", "license*", "licence*", "notice*", "copying*")
LARGE = 1_000_000  # bytes of a file that are worth saying


@dataclass(frozen=True)
class Carried:
    """Files to copy, and notes on what is left out and what is changed in them."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def carried(
    source: Checkpoint, patterns: Sequence[str] = (), copy_code: bool = False, *, documents_only: bool = False
) -> Carried:  # fmt: skip
    """What a result of `source` takes from it; `documents_only`: unasked nothing that a program reads.

    Raises PlanError for a pattern that takes nothing, or CheckpointError.
    """
    looked_into = _folders_of(source, patterns)
    below = (path for name in looked_into for path in files_below(source.folder / name))
    files = {**source.extra_files, **sizes(source.folder, below)}
    named = {source.name_of(path): path for path in files}
    taken = [name for name, path in named.items() if _is_taken(source, name, path, files[path], patterns, copy_code)]
    if documents_only:
        needless = {name for name in taken if not _is_document(name) and not any(_matches(p, name) for p in patterns)}
        taken = [name for name in taken if name not in needless]
        named = {name: path for name, path in named.items() if name not in needless}
    if README in taken and SOURCE_README in taken:
        # the first is the card of another result of ours, the second that of its source
        taken.remove(README)
        del named[README]
    if unused := [p for p in patterns if not _is_pattern(p) or not any(_matches(p, name) for name in taken)]:
        raise PlanError(f"{source.folder}: not every --copy pattern takes a file", [_refused(p, named) for p in unused])
    kept = set(taken)
    left = {name: files[path] for name, path in named.items() if name not in kept and not is_unread(name)}
    folders = [folder for folder in source.extra_folders if folder not in looked_into]
    copies = tuple(named[name] for name in taken)
    return Carried(copies, (*_left_out(left, folders), *code.notes(source, copies)))


def target_of(name: str) -> str:
    """The name in a result, which has a card of its own."""
    return SOURCE_README if name == README else name


def _folders_of(source: Checkpoint, patterns: Sequence[str]) -> list[str]:
    """Subfolders that a pattern may mean. Of a hub all names are known."""
    first = [(pattern.partition("/")[0], "/" in pattern) for pattern in patterns]
    return [f for f in source.extra_folders if any(f == name or (deep and fnmatchcase(f, name)) for name, deep in first)]


def _is_taken(source: Checkpoint, name: str, path: Path, nbytes: int, patterns: Sequence[str], copy_code: bool) -> bool:
    """Raises CheckpointError for one that lies elsewhere or cannot be read: better now than after the work."""
    if is_code(name):
        taken = copy_code
    else:
        taken = (belongs(name) and nbytes <= LIMIT) or (_may_be_asked_for(name) and any(_matches(p, name) for p in patterns))
    if not taken or not is_plain(name):
        return False
    if source.downloader is not None:
        return True
    if not_a_file(path):  # a pipe, a socket, a link that leads nowhere
        return False
    if not os.access(inside(source.folder, name, "the folder", links=source.links), os.R_OK):
        raise CheckpointError(f"{path}: would be carried along, but may not be read; give it the permission, or move it away")
    return True


def _may_be_asked_for(name: str) -> bool:
    """No weights, which a loader would take for the model's; nothing where ranks or the MTP block are written."""
    return not (is_weights(name) or name == ADAPTER or name.endswith(".py") or is_place(name.partition("/")[0]))


def _is_document(name: str) -> bool:
    """Licence, notice or text."""
    return any(fnmatchcase(PurePosixPath(name).name.lower(), kind) for kind in DOCUMENTS) or name.startswith("LICENSES/")


def _is_pattern(pattern: str) -> bool:
    return bool(pattern.strip("/")) and not pattern.startswith("/") and ".." not in PurePosixPath(pattern).parts


def _matches(pattern: str, name: str) -> bool:
    """One with a slash is for subfolders, the name of one means all that is in it; others are for the folder itself."""
    if "/" not in name:
        return fnmatchcase(name, pattern)
    return ("/" in pattern and fnmatchcase(name, pattern)) or name.startswith(f"{pattern.rstrip('/')}/")


def _refused(pattern: str, named: Mapping[str, Path]) -> str:
    if not _is_pattern(pattern):
        return f"{pattern!r}: is no pattern of names inside the folder"
    found = [name for name in named if _matches(pattern, name)]
    if not found:
        return f"{pattern!r}: no file of the folder is called so"
    if any(map(is_code, found)):
        return f"{pattern!r}: {shown(found[0])} is carried along with --copy-code"
    return f"{pattern!r}: {shown(found[0])} is never carried along, as a program would load it, or for its name"


def _left_out(left: Mapping[str, int], folders: Sequence[str]) -> list[str]:
    """Notes, with the sizes of large files; what lies in a subfolder is named by it."""
    entries = {f"{folder}/": 0 for folder in folders}
    for name, nbytes in left.items():
        first = name.partition("/")[0]
        entry = name if name == first or first in FOLDERS else f"{first}/"
        entries[entry] = entries.get(entry, 0) + nbytes
    python = {name: n for name, n in entries.items() if is_code(name)}
    never = {name: n for name, n in entries.items() if not name.endswith("/") and (name == ADAPTER or not is_plain(name))}
    others = {name: n for name, n in entries.items() if name not in python and name not in never}
    notes = [f"Python files are not carried along: {_listed(python)}; --copy-code does it"] if python else []
    notes += [f"not carried along, with --copy neither: {_listed(never)}"] if never else []
    return notes + ([f"not carried along: {_listed(others)}; --copy PATTERN takes them"] if others else [])


def _listed(entries: Mapping[str, int]) -> str:
    words = [shown(name) + (f" ({_size(n)})" if n >= LARGE else "") for name, n in sorted(entries.items())]
    return ", ".join(words[:SHOWN]) + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
