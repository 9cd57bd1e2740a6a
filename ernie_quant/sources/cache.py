"""Where the files of hubs lie while they are used."""

from __future__ import annotations

import fcntl
import os
import shutil
import weakref
from contextlib import suppress
from pathlib import Path

from ernie_quant.disk import hold
from ernie_quant.errors import ErnieQuantError, OutputError

HEADERS_LOCK, IN_USE = "headers.lock", "in-use"


def cache_folder() -> Path:
    """ERNIE_QUANT_CACHE, or a folder in the user's cache. Raises OutputError where there is no user's."""
    if own := os.environ.get("ERNIE_QUANT_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ernie-quant"
    except RuntimeError:
        raise OutputError("this user has no home folder; set ERNIE_QUANT_CACHE to a folder for what comes from a hub") from None


class Use:
    """A shared lock on the folder of a commit: nobody sweeps it while this object lives, or until `release`."""

    def __init__(self, root: Path) -> None:
        fd = _locked(root / IN_USE)
        while not _is_at(root / IN_USE, fd):  # swept between our two steps
            os.close(fd)
            fd = _locked(root / IN_USE)
        self.release = weakref.finalize(self, os.close, fd)


def _locked(place: Path) -> int:
    """A descriptor of the file `place`, made with its folder if there is none, with a shared lock."""
    while True:
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # its folder was swept just now
            fd = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(fd, fcntl.LOCK_SH)
            return fd


def _is_at(place: Path, fd: int) -> bool:
    return place.exists() and os.path.samestat(os.fstat(fd), place.stat())


def sweep_others(commit: Path) -> None:
    """What is left of other revisions, unless a run is at work with one."""
    for other in [p for p in commit.parent.iterdir() if p != commit and p.is_dir()]:
        with suppress(ErnieQuantError, OSError), hold(other / IN_USE, ""):
            shutil.rmtree(other)
