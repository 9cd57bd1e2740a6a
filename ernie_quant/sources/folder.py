"""A checkpoint in a folder: which files belong to it, and that none of them lies elsewhere."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from ernie_quant.checkpoint import Checkpoint, Stamp
from ernie_quant.errors import CheckpointError, MissingFileError
from ernie_quant.paths import MTP_FOLDER, RANK_FOLDER, inside
from ernie_quant.readers import by_suffix
from ernie_quant.sources.config import read_config
from ernie_quant.sources.headers import Headers
from ernie_quant.sources.hints import elsewhere, no_folder
from ernie_quant.sources.pointers import is_pointer, words
from ernie_quant.sources.sets import INDEXES, PATTERNS

COMMIT = re.compile(r"[0-9a-f]{40}")
DOWNLOADS = ".cache/huggingface/download"
# never carried along: what is written anew, other weights, and what a version control or download client left
OWN_FILES = {"config.json", "ernie-quant.json", "report.json", "report.html", "SHA256SUMS", *INDEXES}
PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".pdf", ".mp4"}  # of a card; nothing needs them
OTHER_WEIGHTS = {".gguf", ".pt", ".pth", ".onnx", ".msgpack", ".h5", ".npz", ".pdiparams", ".pdopt"}


def open_folder(folder: Path, *, links: bool = False, beside: Collection[str] = ()) -> Checkpoint:
    """Read all headers in `folder`. Raises CheckpointError or ConfigError.

    `links`: those that lead out of it are followed. `beside`: names of files that belong to it, but are not here.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {no_folder(folder)}")
    try:
        config, notes = read_config(folder, links=links)
    except MissingFileError as error:
        raise MissingFileError(f"{error}{elsewhere(folder)}") from None
    headers = Headers(folder, links)
    ranks = headers.ranks(beside)
    if not any(rank.refs for rank in ranks):
        raise CheckpointError(f"{folder}: holds no weights ({PATTERNS}){elsewhere(folder)}")
    used = {file for rank in ranks for file in rank.files}
    extra, left, pointers = _extra_files(folder, used, beside, links=links)
    revision = _revision(folder, [*used, folder / "config.json"])
    return Checkpoint(
        folder, config, ranks, (*headers.anomalies, *pointers), (*notes, *headers.others, *headers.notes, *left), extra,
        revision, slips=tuple(headers.slips), others=tuple(headers.others),
    )  # fmt: skip


def _revision(folder: Path, files: Iterable[Path]) -> str:
    """The commit that a download client says all of `files` come from; empty where it says nothing or several.

    huggingface_hub keeps it in the name of a snapshot folder, or (`--local-dir`) in the first line of a .metadata file.
    """
    if folder.resolve().parent.name == "snapshots" and COMMIT.fullmatch(folder.resolve().name):
        return folder.resolve().name
    found = set()
    for file in files:
        try:
            note = inside(folder, f"{DOWNLOADS}/{file.relative_to(folder).as_posix()}.metadata", "the folder")
            with open(note, "rb") as opened:
                found.add(opened.readline(80).decode("ascii").strip())
        except (CheckpointError, OSError, ValueError):
            return ""
    commit = found.pop() if len(found) == 1 else ""
    return commit if COMMIT.fullmatch(commit) else ""


def _extra_files(
    folder: Path, used: set[Path], beside: Collection[str], *, links: bool
) -> tuple[dict[Path, Stamp], list[str], list[str]]:
    """Files to carry along, a note on what is left, and a problem where one is no more than a pointer."""
    carried, left, pointers = [], [*beside], []
    for path in sorted(folder.iterdir()):
        if path in used or path.name in OWN_FILES or path.name.startswith(".") or RANK_FOLDER.fullmatch(path.name):
            continue
        if path.name == MTP_FOLDER and path.is_dir():
            continue
        weights = path.suffix in by_suffix() or path.suffix in OTHER_WEIGHTS or path.name.endswith(".index.json")
        if path.is_dir() or weights or not path.name.isprintable() or set(path.name) & set(":\\"):
            left.append(repr(path.name)[1:-1] + ("/" if path.is_dir() else ""))
        elif why := _not_a_file(path):
            left.append(f"{path.name} ({why})")
        elif is_pointer(path) and path.suffix in PICTURES:
            left.append(f"{path.name} (a Git LFS pointer)")
        elif is_pointer(path):
            pointers.append(path.name)
        else:
            carried.append(inside(folder, path.name, "the folder", links=links))
    notes = [f"not read and not carried along: {', '.join(sorted(left))}"] if left else []
    return {file: Stamp.of(file) for file in carried}, notes, [words(pointers)] if pointers else []


def _not_a_file(path: Path) -> str:
    """Why nobody can read it; empty for a file."""
    if not path.exists():
        return "a link that leads nowhere"
    return "" if path.is_file() else "not a regular file"
