"""A checkpoint in a folder: which files belong to it, and that none of them lies elsewhere."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from ernie_quant.checkpoint import Checkpoint, Rank
from ernie_quant.errors import CheckpointError, MissingFileError
from ernie_quant.paths import inside
from ernie_quant.sources import gguf
from ernie_quant.sources.beside import belongs, is_unread, is_weights, look_beside, shown
from ernie_quant.sources.config import read_config
from ernie_quant.sources.headers import Headers
from ernie_quant.sources.hints import elsewhere, no_folder
from ernie_quant.sources.parts import Model
from ernie_quant.sources.pointers import is_pointer, words
from ernie_quant.sources.sets import PATTERNS

COMMIT = re.compile(r"[0-9a-f]{40}")
DOWNLOADS = ".cache/huggingface/download"


def open_folder(folder: Path, *, links: bool = False, beside: Collection[str] = ()) -> Checkpoint:
    """Read all headers in `folder`. Raises CheckpointError or ConfigError.

    `links`: those that lead out of it are followed. `beside`: names of files that belong to it, but are not here.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {no_folder(folder)}")
    if model := gguf.only_model(folder, links=links):
        return _open_model(folder, model, links=links)
    try:
        config, notes = read_config(folder, links=links)
    except MissingFileError as error:
        raise MissingFileError(f"{error}{elsewhere(folder)}") from None
    headers = Headers(folder, links)
    ranks = headers.ranks(beside)
    if not any(rank.refs for rank in ranks):
        raise CheckpointError(f"{folder}: holds no weights ({PATTERNS}){elsewhere(folder)}")
    return _checkpoint(headers, config, ranks, notes, beside)


def open_file(path: Path, *, links: bool = False) -> Checkpoint:
    """Read the headers of a GGUF file, and of those that are parts of the same model. Raises CheckpointError or ConfigError."""
    return _open_model(path.parent, gguf.model_at(path, links=links), links=links)


def _open_model(folder: Path, model: Model, *, links: bool) -> Checkpoint:
    headers = Headers(folder, links)
    rank, config, notes = gguf.read(headers, model)
    return _checkpoint(headers, config, (rank,), notes)


def _checkpoint(
    headers: Headers, config: dict[str, Any], ranks: tuple[Rank, ...], notes: Sequence[str], beside: Collection[str] = ()
) -> Checkpoint:
    """With what lies beside the weights."""
    folder, links = headers.root, headers.links
    used = {file for rank in ranks for file in rank.files}
    found = look_beside(folder, used, links=links)
    theirs = [shown(path.name) for path in found.files if is_weights(path.name)]
    unread = sorted({*theirs, *filter(is_unread, beside), *found.odd})
    left = [f"not read and not carried along: {', '.join(unread)}"] if unread else []
    model = {path.relative_to(folder).as_posix(): path for path in found.files}
    pointers = [name for name, path in model.items() if belongs(name) and is_pointer(path)]
    revision = _revision(folder, [*used, folder / "config.json"])
    return Checkpoint(
        folder, config, ranks, (*headers.anomalies, *([words(pointers)] if pointers else [])),
        (*notes, *headers.others, *headers.notes, *left, *found.notes), found.files, revision, extra_folders=found.folders,
        links=links, slips=tuple(headers.slips), others=tuple(headers.others),
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
