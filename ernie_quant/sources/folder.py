"""A checkpoint in a folder: which files belong to it, and that none of them lies elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from ernie_quant.checkpoint import Checkpoint, Rank, Stamp, TensorRef
from ernie_quant.errors import CheckpointError, MissingFileError
from ernie_quant.jsonio import read_object
from ernie_quant.paths import MTP_FOLDER, RANK_FOLDER, inside
from ernie_quant.readers import by_suffix, read_header
from ernie_quant.sources.beside import INDEXES, look_beside

# in order of preference; a folder that holds more than one kind is read by the first
WEIGHTS = (
    re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors"),
    re.compile(r"model_state\.pdparams"),
    re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin"),
)
RANK_PICKLE = re.compile(r"model_state\.tp(\d+)\.pdparams")
COMMIT = re.compile(r"[0-9a-f]{40}")
DOWNLOADS = ".cache/huggingface/download"
MAX_TENSORS = 500_000  # the 300B in 2 bits has 120,000
OF_COUNT = re.compile(r"-of-(\d{5})\.")


def open_folder(folder: Path) -> Checkpoint:
    """Read all headers in `folder`. Raises CheckpointError or ConfigError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {'is not a folder' if folder.exists() else 'there is no such folder'}")
    config = read_object(inside(folder, "config.json", "the checkpoint"))
    anomalies: list[str] = []
    ranks = tuple(_with_mtp(_read_rank(folder, where, anomalies), folder, where[0], anomalies) for where in _ranks(folder))
    if not any(rank.refs for rank in ranks):
        raise CheckpointError(f"{folder}: holds no weights (model*.safetensors, model_state.pdparams or pytorch_model*.bin)")
    used = {file for rank in ranks for file in rank.files}
    beside = look_beside(folder, used)
    revision = _revision(folder, [*used, folder / "config.json"])
    return Checkpoint(
        folder, config, ranks, tuple(anomalies), beside.notes, beside.files, revision, extra_folders=beside.folders
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


def _with_mtp(rank: Rank, root: Path, folder: Path, anomalies: list[str]) -> Rank:
    """FastDeploy reads the MTP block from a folder of its own, beside the weights or the ranks."""
    place = root / MTP_FOLDER / folder.relative_to(root)
    if not place.is_dir():
        return rank
    mtp = _read_rank(root, (place, None), anomalies)
    refs = {name: ref for name, ref in mtp.refs.items() if ".mtp_" in name and name not in rank.refs}
    return Rank(rank.refs | refs, {**rank.files, **mtp.files})


def _ranks(folder: Path) -> list[tuple[Path, re.Pattern[str] | None]]:
    """(folder, pattern of its weight files or None for the usual ones) for each tensor-parallel rank."""
    found = {int(m[1]): p for p in folder.iterdir() if (m := RANK_FOLDER.fullmatch(p.name)) and p.is_dir()}
    pickles = {int(m[1]): p for p in folder.iterdir() if (m := RANK_PICKLE.fullmatch(p.name))}
    usual = any(w.fullmatch(p.name) for p in folder.iterdir() for w in WEIGHTS) or any(
        os.path.lexists(folder / i) for i in INDEXES
    )
    if usual or not (found or pickles):
        return [(folder, None)]
    table = found or pickles
    if sorted(table) != list(range(len(table))):
        raise CheckpointError(f"{folder}: has the ranks {sorted(table)}, not 0 to {len(table) - 1}")
    if found:
        return [(found[i], None) for i in sorted(found)]
    return [(folder, re.compile(re.escape(pickles[i].name))) for i in sorted(pickles)]


def _read_rank(root: Path, where: tuple[Path, re.Pattern[str] | None], anomalies: list[str]) -> Rank:
    folder, pattern = where
    if folder.resolve() != (root.resolve() / folder.relative_to(root)):
        raise CheckpointError(f"{folder.name}: is a link; open the folder that it points to")
    index = next((folder / i for i in INDEXES if os.path.lexists(folder / i)), None) if pattern is None else None
    weight_map = _weight_map(folder, index) if index else None
    names = sorted(set(weight_map.values())) if weight_map is not None else _weight_files(folder, pattern, anomalies)
    refs: dict[str, TensorRef] = {}
    files: dict[Path, Stamp] = {}
    seen: dict[tuple[int, int], Path] = {}  # links would multiply the work without multiplying the bytes
    for name in names:
        try:
            path = inside(folder, name, index.name if index else "the folder")
        except MissingFileError as error:
            anomalies.append(str(error))
            continue
        files[path] = Stamp.of(path)
        if (twin := seen.setdefault((path.stat().st_dev, path.stat().st_ino), path)) != path:
            raise CheckpointError(f"{name}: is the same file as {twin.name}")
        for ref in read_header(path):
            if ref.name in refs:
                anomalies.append(f"{ref.name}: stands in {refs[ref.name].file.name} and again in {path.name}")
            refs[ref.name] = ref
        if len(refs) > MAX_TENSORS:
            raise CheckpointError(f"{folder.name or folder}: holds more than {MAX_TENSORS} tensors, which no such model has")
    if weight_map is not None:
        anomalies.extend(_index_anomalies(weight_map, refs, {f.name for f in files}))
    return Rank(refs, files)


def _weight_map(folder: Path, index: Path) -> dict[str, str]:
    table = read_object(inside(folder, index.name, "the folder")).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f"{index.name}: has no weight_map of names to file names")
    if len(table) > MAX_TENSORS:
        raise CheckpointError(f"{index.name}: names {len(table)} tensors, more than any such model has")
    for name, file in table.items():
        if not name.isprintable():
            raise CheckpointError(f"{index.name}: names a tensor {name[:200]!r}, which is not printable")
        if PurePosixPath(file).suffix not in by_suffix():
            raise CheckpointError(f"{index.name}: {name} is said to be in {file[:200]!r}, which is no weight file")
    return table


def _weight_files(folder: Path, pattern: re.Pattern[str] | None, anomalies: list[str]) -> list[str]:
    for kind in [pattern] if pattern else WEIGHTS:
        names = sorted(p.name for p in folder.iterdir() if kind.fullmatch(p.name))
        counts = {int(m[1]) for n in names if (m := OF_COUNT.search(n))}
        if counts and (len(counts) > 1 or len(names) != max(counts)):
            anomalies.append(f"{len(names)} shards are there, their names promise {max(counts)}")
        if names:
            return names
    return []


def _index_anomalies(weight_map: dict[str, str], refs: dict[str, TensorRef], files: set[str]) -> Iterable[str]:
    for name, file in weight_map.items():
        if file not in files:
            continue  # the missing file has a line of its own
        if name not in refs:
            yield f"{name}: the index says it is in {file}, which does not hold it"
        elif refs[name].file.name != file:
            yield f"{name}: the index says it is in {file}, it is in {refs[name].file.name}"
    for name, ref in refs.items():
        if name not in weight_map:
            yield f"{name}: is in {ref.file.name}, the index does not name it"
