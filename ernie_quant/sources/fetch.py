"""One file of a hub, whole or going on with a part of it, and no byte unchecked."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ernie_quant.disk import partial_of
from ernie_quant.errors import RetryError
from ernie_quant.hubs import Hub, Listing, RemoteFile
from ernie_quant.hubs._patience import CHUNK, HASH_TRIES, Pause, Transient, patiently


def fetch(hub: Hub, listing: Listing, file: RemoteFile, target: Path, pause: Pause) -> None:
    """The whole file, which gets its name only with the hub's hash; goes on with a part of it. Raises RetryError."""
    partial = partial_of(target)
    for _ in range(HASH_TRIES):
        digest, at = _resumed(partial, file, pause)
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


def _resumed(partial: Path, file: RemoteFile, pause: Pause) -> tuple[hashlib._Hash, int]:
    """The hash and the length of what is there already; nothing of it counts if it is too long."""
    digest, at = file.hasher(), 0
    if partial.is_file() and partial.stat().st_size <= file.nbytes:
        with open(partial, "rb") as part:
            while chunk := part.read(CHUNK):
                digest.update(chunk)
                at += len(chunk)
                pause(0)
    else:
        partial.unlink(missing_ok=True)
    return digest, at
