"""Files that are whole or not there: written through a partial one, made durable, hashed, locked."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

from ernie_quant.errors import OutputError, RetryError

Read = TypeVar("Read")
FULL = (errno.ENOSPC, errno.EDQUOT)
# of file systems without fsync, of anything or of folders: CIFS, gocryptfs and other FUSE, folders that we may not list
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
NO_FOLDER_FSYNC = (*NO_FSYNC, errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR)
PARTIAL = ".partial"
CHUNK = 8 << 20
NAME_BYTES = 255  # of a name, on the usual file systems
TRIES = 3  # to copy a file that changes meanwhile


@contextmanager
def hold(place: Path, busy: str, *, shared: bool = False, wait: bool = False) -> Iterator[IO[str]]:
    """The file `place`, locked for this process alone, or with others that share it; `wait` until it can be.

    Raises RetryError(busy), OutputError where no lock can be had.
    """
    with open(place, "a+") as file:  # NFS locks for sharing what can be read, and for one alone what can be written
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RetryError(busy) from None
        except OSError as error:
            raise OutputError(f"{place}: cannot be locked ({error.strerror}); choose a folder on another disk") from None
        yield file


def existing(path: Path) -> Path:
    """The folder that `path` is, or the nearest around it that is there."""
    return next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())


def free_bytes(there: Path) -> int | None:
    """Free space of a disk; None where it reports nothing at all, as some FUSE, overlay and quota file systems do.

    A disk that is really full says so at the first file of a run.
    """
    return shutil.disk_usage(there).free or None


def free_names(there: Path) -> int | None:
    """Files that can still be made on a disk; None where it does not count them."""
    found = os.statvfs(there)
    return (found.f_favail or None) if found.f_files else None


def file_sha256(path: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """The hash of a file on disk."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
            progress(len(data))
    return digest.hexdigest()


@contextmanager
def _passing(codes: tuple[int, ...]) -> Iterator[None]:
    """Errors with these codes are none."""
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise


def fsync(fd: int) -> None:
    """Make a file durable, where its file system can do that."""
    with _passing(NO_FSYNC):
        os.fsync(fd)


def crowds(nbytes: int) -> bool:
    """Would files of that size push out what this machine has in its page cache? Half of its memory is what they may take."""
    try:
        return nbytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError):  # a system that does not tell
        return False


def leave_cache(fd: int) -> None:
    """A file's pages are not needed any more; those that are not on disk yet stay. Only advice, where the system takes it."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where its file system can do that."""
    with _passing(NO_FOLDER_FSYNC):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of a descriptor says the name of its file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def partial_of(path: Path) -> Path:
    """Where a file is written to before it gets its name; that of a long name is its hash."""
    name = os.fsencode(path.name)
    room = len(name) + len(PARTIAL) <= NAME_BYTES
    return path.with_name((path.name if room else hashlib.sha256(name).hexdigest()) + PARTIAL)


def own_partial_of(path: Path) -> Path:
    """The same for a file that another process may write at the same time, which has a name of its own:
    `model.1f2e3d4c.safetensors.partial`."""
    return path.with_name(f"{_stem(path)}.{secrets.token_hex(4)}{path.suffix}{PARTIAL}")


def _stem(path: Path) -> str:
    name = os.fsencode(path.name)
    return path.stem if len(name) + len(".1f2e3d4c") + len(PARTIAL) <= NAME_BYTES else hashlib.sha256(name).hexdigest()


def drop_partials(paths: Iterable[Path]) -> None:
    """What processes that were killed have left of these files."""
    wanted = {(path.parent, _stem(path), path.suffix) for path in paths}
    for folder in sorted({folder for folder, _, _ in wanted if folder.is_dir()}):
        for partial in folder.glob(f"*{PARTIAL}"):
            whole = Path(partial.name.removesuffix(PARTIAL))
            if wanted & {(folder, stem, whole.suffix) for stem in (whole.stem, Path(whole.stem).stem)}:
                partial.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> str:
    """Write a small file through a partial one; its sha256."""
    partial = partial_of(path)
    with naming(path), open(partial, "wb") as file:
        file.write(data)
        _name(file, partial, path)
    return hashlib.sha256(data).hexdigest()


def copy_file(source: Path, target: Path) -> tuple[int, str]:
    """Copy through a partial file; size and sha256 of what was written. One that changes meanwhile is copied again."""
    partial = partial_of(target)
    with naming(target), open(partial, "wb") as file:

        def work(found: IO[bytes], left: int) -> tuple[int, str]:
            file.seek(0)
            file.truncate()
            digest = hashlib.sha256()
            while data := found.read(min(CHUNK, left)):  # no more than there was: a log may grow as fast as we read
                with naming(target):
                    file.write(data)
                digest.update(data)
                left -= len(data)
            return file.tell(), digest.hexdigest()

        done = steadily(source, work)
        _name(file, partial, target)
    return done


def steadily(path: Path, work: Callable[[IO[bytes], int], Read]) -> Read:
    """What `work` makes of an open file and its size; again where the file was written to meanwhile, a few times."""
    for _ in range(TRIES):
        with naming(path), open(path, "rb") as file:
            before = os.fstat(file.fileno())
            done = work(file, before.st_size)
            after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
            break
    return done


def _name(file: IO[bytes], partial: Path, path: Path) -> None:
    file.flush()
    fsync(file.fileno())
    os.replace(partial, path)
    fsync_folder(path.parent)
