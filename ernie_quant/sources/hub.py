"""A checkpoint on a hub: headers by range now, whole files later, a few at a time, and no byte unchecked.

What lies on disk is `CACHE/SCHEME--ORG--NAME/COMMIT/`: in `headers/` every small file, and every weight file as a sparse
one that holds its header only, so that it is opened like any folder; in `files/` the weight files that are needed now.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.errors import CheckpointError
from ernie_quant.hubs import Hub, Listing, RemoteFile
from ernie_quant.hubs._patience import AT_ONCE, Pause, Transient, patiently
from ernie_quant.paths import is_place, plain
from ernie_quant.sources.beside import LIMIT, OWN_FILES, belongs, is_code
from ernie_quant.sources.cache import HEADERS_LOCK, Use, cache_folder, sweep_others
from ernie_quant.sources.download import HubDownloader
from ernie_quant.sources.fetch import fetch
from ernie_quant.sources.folder import open_folder
from ernie_quant.sources.parts import GGUF

HEAD = 1 << 18  # bytes of a weight file that are asked for first; a header is rarely longer
SMALL_BYTES = 256 << 20  # of a file that is no weight file
PICKLES = (".bin", ".pt", ".pdparams")


def open_remote(hub: Hub, address: str, repo: str, revision: str, cache: Path | None = None) -> Checkpoint:
    """A repository as a checkpoint whose files come when they are needed. Raises CheckpointError, ConfigError or RetryError."""
    listing, headers, use = place_headers(hub, address, repo, revision, time.sleep, cache)
    sweep_others(headers.parent)
    downloader = HubDownloader(hub, listing, headers, headers.with_name("files"), use)
    left = left_behind(listing)
    try:
        found = open_folder(headers, beside=left)
    except CheckpointError:  # headers come without a hash: what was damaged on its way must not be refused for ever
        for path in headers.rglob("*.safetensors"):
            path.unlink()
        raise
    extra = {headers / name: nbytes for name, nbytes in _extra_files(listing).items()}
    return replace(
        found, address=address, revision=listing.commit, downloader=downloader, extra_files=extra, extra_folders=()
    )  # fmt: skip


def place_headers(
    hub: Hub, address: str, repo: str, revision: str, pause: Pause, cache: Path | None = None
) -> tuple[Listing, Path, Use]:
    """All headers and small files of a repository, in a folder. Raises CheckpointError or RetryError."""
    found = patiently(lambda: hub.listing(repo, revision), f"{address}@{revision}", pause)
    listing = replace(found, address=address)
    root = (cache or cache_folder()) / address.replace("://", "--").replace("/", "--") / listing.commit
    headers, incoming = root / "headers", root / "incoming"
    files, use = _wanted(listing), Use(root)
    wanted = [file for file in files if not _is_placed(headers / file.name, file)]
    if wanted:
        headers.mkdir(parents=True, exist_ok=True)
        # one process at a time; what a killed one left is not taken for a file of the checkpoint, as it lies elsewhere
        with open(root / HEADERS_LOCK, "w") as lock, ThreadPoolExecutor(AT_ONCE) as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for _ in pool.map(lambda file: _place(hub, listing, file, headers, incoming, pause), wanted):
                pass
            shutil.rmtree(incoming, ignore_errors=True)
    return listing, headers, use


def _wanted(listing: Listing) -> list[RemoteFile]:
    """Config, index, tokenizer and the like, and the safetensors files. Raises CheckpointError."""
    names = list(listing.files)
    if odd := next((name for name in names if plain(name, listing.address).as_posix() != name), None):
        raise CheckpointError(f"{listing.address} names the file {odd[:200]!r}, which is not a plain name")
    places = [n for n in names if all(is_place(part) for part in PurePosixPath(n).parts[:-1])]
    weights = [n for n in places if n.endswith(".safetensors")]
    if not weights:
        kinds = sorted({PurePosixPath(n).suffix for n in names} & {*PICKLES, GGUF})
        how = "download the file, and open that" if kinds == [GGUF] else "download it and open the folder"
        has = f"only {', '.join(kinds)}, which cannot be read by range; {how}" if kinds else "no weights"
        raise CheckpointError(f"{listing.address}: holds {has}")
    own = [n for n in places if PurePosixPath(n).name in OWN_FILES]
    if big := next((n for n in own if listing.files[n].nbytes > SMALL_BYTES), None):
        raise CheckpointError(
            f"{listing.address}: {big}: {listing.files[big].nbytes} bytes are too many for what is no weight file"
        )
    small = [n for n, nbytes in _extra_files(listing).items() if (belongs(n) or is_code(n)) and nbytes <= LIMIT]
    return [listing.files[n] for n in (*own, *small, *weights)]


def left_behind(listing: Listing) -> list[str]:
    """Files and folders that nobody fetches, beside those that are read."""
    wanted = {file.name for file in _wanted(listing)}
    first = [PurePosixPath(name).parts for name in listing.files if name not in wanted and not name.startswith(".")]
    return sorted({parts[0] + "/" * (len(parts) > 1) for parts in first if len(parts) == 1 or not is_place(parts[0])})


def _extra_files(listing: Listing) -> dict[str, int]:
    """Files beside the weights, and their bytes, as `look_beside` finds them in a folder."""
    places = {n: PurePosixPath(n).parts for n in listing.files if not any(p.startswith(".") for p in PurePosixPath(n).parts)}
    beside = [n for n, (first, *more) in places.items() if not (is_place(first) if more else first in OWN_FILES)]
    return {n: listing.files[n].nbytes for n in sorted(beside) if "/" in n or not n.endswith(".safetensors")}


def _is_placed(target: Path, file: RemoteFile) -> bool:
    return target.is_file() and target.stat().st_size == file.nbytes


def _place(hub: Hub, listing: Listing, file: RemoteFile, headers: Path, incoming: Path, pause: Pause) -> None:
    target, own = headers / file.name, incoming / file.name
    if _is_placed(target, file):  # by another process, while this one waited
        return
    for folder in (target.parent, own.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if file.name.endswith(".safetensors"):
        _place_header(hub, listing, file, own, pause)
    else:
        fetch(hub, listing, file, own, pause)
    os.replace(own, target)


def _place_header(hub: Hub, listing: Listing, file: RemoteFile, own: Path, pause: Pause) -> None:
    """A sparse file of the right size, with the first bytes only; `HubDownloader` compares them with what arrives later."""
    head = _range(hub, listing, file, min(HEAD, file.nbytes), pause)
    length = 8 + int.from_bytes(head[:8], "little")
    if len(head) < length <= min(file.nbytes, 8 + (100 << 20)):  # a longer one is refused when it is read
        head = _range(hub, listing, file, length, pause)
    with open(own, "wb") as out:
        out.write(head)
        out.truncate(file.nbytes)


def _range(hub: Hub, listing: Listing, file: RemoteFile, stop: int, pause: Pause) -> bytes:
    found = bytearray()

    def work() -> None:
        with hub.read(listing, file.name, len(found), stop) as chunks:
            for chunk in chunks:
                found.extend(chunk)
        if len(found) < stop:
            raise Transient(f"sent {len(found)} of {stop} bytes")

    if stop:
        patiently(work, f"{listing.address}: {file.name}", pause)
    return bytes(found[:stop])
