"""A checkpoint on a hub: headers by range now, whole files later, a few at a time, and no byte unchecked.

What lies on disk is `CACHE/SCHEME--ORG--NAME/COMMIT/`: in `headers/` every small file, and every weight file as a sparse
one that holds its header only, so that it is opened like any folder; in `files/` the weight files that are needed now.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

from ernie_quant.errors import CheckpointError, RetryError
from ernie_quant.sources.folder import MTP_FOLDER, OTHER_WEIGHTS, RANK_FOLDER, plain

CHUNK = 1 << 17  # small enough that a slow download can be stopped between two
HEAD = 1 << 18  # bytes of a weight file that are asked for first; a header is rarely longer
SMALL_BYTES = 256 << 20  # of a file that is no weight file
AT_ONCE = 8  # headers and small files
TRIES, HASH_TRIES = 8, 3
LONGEST_WAIT = 300.0  # seconds
PARTIAL, HEADERS_LOCK, IN_USE = ".partial", "headers.lock", "in-use"
PICKLES = (".bin", ".pt", ".pdparams")


class Transient(Exception):
    """The hub or the network failed in a way that passes; `wait`: for how many seconds the hub asks."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: what the hub says about it. Large files have a sha256, small ones git's sha1."""

    name: str
    nbytes: int
    sha256: str = ""
    git_oid: str = ""

    def hasher(self) -> hashlib._Hash:
        """For its bytes, from the first on."""
        return hashlib.sha256() if self.sha256 else hashlib.sha1(f"blob {self.nbytes}\0".encode())

    @property
    def digest(self) -> str:
        """What `hasher` must say in the end."""
        return self.sha256 or self.git_oid


@dataclass(frozen=True)
class Listing:
    """A revision of a repository, pinned to its commit."""

    address: str  # as a user writes it, without the revision: hf://org/name
    repo: str
    commit: str
    files: Mapping[str, RemoteFile]


class Hub(Protocol):
    """What a hub must offer; one file of this folder each."""

    def listing(self, repo: str, revision: str) -> Listing:
        """Raises Transient, or CheckpointError."""
        ...

    def read(self, listing: Listing, name: str, start: int, stop: int | None) -> AbstractContextManager[Iterator[bytes]]:
        """Bytes `start` to `stop` (None: the end) of a file. Raises Transient, or CheckpointError."""
        ...


def cache_folder() -> Path:
    """ERNIE_QUANT_CACHE, or a folder in the user's cache."""
    if own := os.environ.get("ERNIE_QUANT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ernie-quant"


Pause = Callable[[float], object]


def patiently(work: Callable[[], object], what: str, pause: Pause) -> None:
    """Do it, again and again while it fails in ways that pass. Raises RetryError."""
    for attempt in range(1, TRIES + 1):
        try:
            work()
            return
        except Transient as error:
            if attempt == TRIES:
                raise RetryError(f"{what}: {error}; tried {attempt} times") from None
            wait = error.wait if error.wait is not None else min(30.0, 2.0 ** (attempt - 1)) * random.uniform(0.5, 1)
            pause(min(wait, LONGEST_WAIT))


class Use:
    """A shared lock on the folder of a commit: nobody sweeps it while this object lives."""

    def __init__(self, root: Path) -> None:
        self._fd = -1
        while self._fd < 0 or not self._is_there(root):  # swept between our two steps
            self.__del__()
            root.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                self._fd = os.open(root / IN_USE, os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(self._fd, fcntl.LOCK_SH)

    def _is_there(self, root: Path) -> bool:
        place = root / IN_USE
        return place.exists() and os.path.samestat(os.fstat(self._fd), place.stat())

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def place_headers(
    hub: Hub, address: str, repo: str, revision: str, pause: Pause, cache: Path | None = None
) -> tuple[Listing, Path, Use]:
    """All headers and small files of a repository, in a folder. Raises CheckpointError or RetryError."""
    found: list[Listing] = []
    patiently(lambda: found.append(hub.listing(repo, revision)), f"{address}@{revision}", pause)
    listing = replace(found[0], address=address)
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
    places = [n for n in names if all(_is_place(part) for part in PurePosixPath(n).parts[:-1])]
    weights = [n for n in places if n.endswith(".safetensors")]
    if not weights:
        kinds = sorted({PurePosixPath(n).suffix for n in names} & {*PICKLES})
        has = (
            f"only {', '.join(kinds)}, which cannot be read by range; download it and open the folder" if kinds else "no weights"
        )
        raise CheckpointError(f"{listing.address}: holds {has}")
    others = [n for n in places if not n.endswith((".safetensors", *PICKLES, *OTHER_WEIGHTS)) and not n.startswith(".")]
    if big := next((n for n in others if listing.files[n].nbytes > SMALL_BYTES), None):
        raise CheckpointError(
            f"{listing.address}: {big}: {listing.files[big].nbytes} bytes are too many for what is no weight file"
        )
    return [listing.files[n] for n in (*others, *weights)]


def left_behind(listing: Listing) -> list[str]:
    """Files and folders that nobody fetches, as `open_folder` would name those that it does not read."""
    wanted = {file.name for file in _wanted(listing)}
    first = [PurePosixPath(name).parts for name in listing.files if name not in wanted and not name.startswith(".")]
    return sorted({parts[0] + "/" * (len(parts) > 1) for parts in first if len(parts) == 1 or not _is_place(parts[0])})


def _is_place(folder: str) -> bool:
    return folder == MTP_FOLDER or RANK_FOLDER.fullmatch(folder) is not None


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
    """A sparse file of the right size, with the first bytes only; `Supply` compares them with what arrives later."""
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


def fetch(hub: Hub, listing: Listing, file: RemoteFile, target: Path, pause: Pause) -> None:
    """The whole file, which gets its name only with the hub's hash; goes on with a part of it. Raises RetryError."""
    partial = target.with_name(target.name + PARTIAL)
    for _ in range(HASH_TRIES):
        digest, at = _resumed(partial, file)
        with open(partial, "ab") as out:

            def work(out=out, digest=digest) -> None:  # type: ignore[no-untyped-def]
                nonlocal at
                with hub.read(listing, file.name, at, None) as chunks:
                    for chunk in chunks:
                        chunk = chunk[: file.nbytes + 1 - at]  # one byte too many is wrong enough, and fills no disk
                        out.write(chunk)
                        digest.update(chunk)
                        at += len(chunk)
                        pause(0)
                        if at > file.nbytes:
                            return
                if at < file.nbytes:
                    raise Transient(f"the connection ended after {at} of {file.nbytes} bytes")

            if at < file.nbytes:
                patiently(work, f"{listing.address}: {file.name}", pause)
        if at == file.nbytes and digest.hexdigest() == file.digest:
            os.replace(partial, target)
            return
        partial.unlink()
    raise RetryError(f"{listing.address}: {file.name}: arrived {HASH_TRIES} times with another hash than the hub's {file.digest}")


def _resumed(partial: Path, file: RemoteFile) -> tuple[hashlib._Hash, int]:
    """The hash and the length of what is there already; nothing of it counts if it is too long."""
    digest, at = file.hasher(), 0
    if partial.is_file() and partial.stat().st_size <= file.nbytes:
        with open(partial, "rb") as part:
            while chunk := part.read(CHUNK):
                digest.update(chunk)
                at += len(chunk)
    else:
        partial.unlink(missing_ok=True)
    return digest, at


ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9]*)://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def parse(address: str) -> tuple[str, str, str]:
    """`hf://org/name@revision` -> scheme, `org/name`, revision ("" if none is given). Raises CheckpointError."""
    found = ADDRESS.fullmatch(address)
    if not found or ".." in address:
        raise CheckpointError(f"{address[:200]}: is not SCHEME://ORG/NAME or SCHEME://ORG/NAME@REVISION")
    return found["scheme"], found["repo"], found["revision"] or ""
