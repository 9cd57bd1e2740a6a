"""Open files that are read at offsets."""

from __future__ import annotations

import bisect
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ernie_quant.checkpoint import Extent, Stamp, TensorRef
from ernie_quant.disk import leave_cache
from ernie_quant.errors import CheckpointError
from ernie_quant.views.buffers import Buffers

TEXT_BLOCK = 1 << 16
CONTINUATION = bytes(range(0x80, 0xC0))  # second and later bytes of a UTF-8 character
MOST_OPEN = 64  # systems allow 256 or 1024; a checkpoint may have more files


@dataclass
class _Open:
    """A file, how many threads read it just now, and when the last one began."""

    fd: int
    readers: int = 0
    last: int = 0


class Files:
    """Files that are open while they are read, at offsets: safe for several threads, closed together.

    A file of which there is a stamp must be the one that was stamped, whenever it is opened and when `check` is called.
    `locate` tells where the bytes of a file lie, if not there. `most` files stay open, those that were read last. With `once`
    a file that is closed leaves the page cache.
    """

    def __init__(
        self,
        stamps: Mapping[Path, Stamp] | None = None,
        locate: Callable[[Path], Path] = lambda path: path,
        most: int = MOST_OPEN,
        *,
        once: bool = False,
    ) -> None:
        self._stamps, self._locate, self._most, self._once = stamps or {}, locate, most, once
        self._open: dict[Path, _Open] = {}
        self._clock = 0
        self._read: set[Path] = set()
        self._lock = threading.Lock()
        self._counts: dict[tuple[Path, Extent], list[int]] = {}
        self.buffers = Buffers()  # of what is read

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._open.values():
            self._close(one.fd)
        self._open.clear()

    @contextmanager
    def opened(self, path: Path) -> Iterator[int]:
        """The descriptor of `path`, which stays open for so long. Raises CheckpointError."""
        one = self._take(path)
        try:
            yield one.fd
        finally:
            self._give_back(one)

    def _take(self, path: Path) -> _Open:
        """The open file, for one more reader; a file is waited for and opened without the lock."""
        with self._lock:
            if (one := self._open.get(path)) is not None:
                self._count_reader(one)
                return one
        fd = self._opened(path)
        with self._lock:
            one = self._open.setdefault(path, _Open(fd))
            if one.fd != fd:
                os.close(fd)  # another thread was first
            self._read.add(path)
            self._count_reader(one)
            self._close_oldest()
            return one

    def _count_reader(self, one: _Open) -> None:
        self._clock += 1
        one.readers, one.last = one.readers + 1, self._clock

    def _give_back(self, one: _Open) -> None:
        with self._lock:
            one.readers -= 1

    def _opened(self, path: Path) -> int:
        try:
            fd = os.open(self._locate(path), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(f"{path}: was there when the run began, and now: {error.strerror}") from None
        if path in self._stamps:
            try:
                self._stamps[path].check(path, fd)
            except CheckpointError:
                os.close(fd)
                raise
        return fd

    def _close_oldest(self) -> None:
        if (many := len(self._open) - self._most) > 0:
            idle = sorted((one.last, path) for path, one in self._open.items() if not one.readers)
            for _, path in idle[:many]:
                self._close(self._open.pop(path).fd)

    def _close(self, fd: int) -> None:
        if self._once:
            leave_cache(fd)
        os.close(fd)

    def check(self) -> None:
        """Are the files that were read still the same? Raises CheckpointError."""
        for path in sorted(self._read & self._stamps.keys()):  # the same one first, whenever several have changed
            self._stamps[path].check(path)

    def read_into(self, ref: TensorRef, buffer: memoryview, at: int) -> None:
        """Fill `buffer` from byte `at` of the tensor's payload. Raises CheckpointError."""
        for extent in ref.extents:
            if at < extent.nbytes and len(buffer):
                count = min(len(buffer), extent.nbytes - at)
                self._read_extent(ref, extent, buffer[:count], at)
                buffer, at = buffer[count:], 0
            else:
                at -= min(at, extent.nbytes)

    def _read_extent(self, ref: TensorRef, extent: Extent, buffer: memoryview, at: int) -> None:
        one = self._take(ref.file)
        try:
            if extent.latin1:
                buffer[:] = self._latin1(one.fd, ref, extent, at, at + len(buffer))
            else:
                self._plain(one.fd, ref, extent, buffer, at)
        finally:
            self._give_back(one)

    @staticmethod
    def _plain(fd: int, ref: TensorRef, extent: Extent, buffer: memoryview, at: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(fd, [buffer[done:]], extent.start + at + done)
            except OSError as error:
                raise CheckpointError(f"{ref.file}: {ref.name}: cannot be read: {error.strerror}") from None
            if got == 0:
                raise CheckpointError(f"{ref.file.name}: {ref.name}: the file ended while it was read; it has changed")
            done += got

    def _latin1(self, fd: int, ref: TensorRef, extent: Extent, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a payload that pickle protocol 2 wraps as UTF-8, one or two bytes for each.

        No offset is known there; one pass counts the payload before every block, and the blocks needed are decoded.
        """
        if (ref.file, extent) not in self._counts:
            self._counts[ref.file, extent] = [0, *itertools.accumulate(self._count(fd, extent))]
        before = self._counts[ref.file, extent]
        if before[-1] != extent.nbytes:
            raise CheckpointError(f"{ref.file.name}: {ref.name}: its text holds {before[-1]} bytes, not {extent.nbytes}")
        first, last = bisect.bisect_right(before, start) - 1, bisect.bisect_left(before, stop)
        begin, end = first * TEXT_BLOCK, min(last * TEXT_BLOCK + 1, extent.stored)
        raw = os.pread(fd, end - begin, extent.start + begin)
        if first and raw[:1] and raw[0] in CONTINUATION:  # the second half of a byte of the block before
            raw = raw[1:]
        if end < extent.stored and raw[-1:] and raw[-1] not in CONTINUATION:  # the first byte of the block after
            raw = raw[:-1]
        try:
            data = raw.decode("utf-8").encode("latin-1")[start - before[first] : stop - before[first]]
        except UnicodeError:
            raise CheckpointError(f"{ref.file.name}: {ref.name}: its text is not latin-1 in UTF-8") from None
        if len(data) != stop - start:
            raise CheckpointError(f"{ref.file.name}: {ref.name}: the file ended while it was read; it has changed")
        return data

    @staticmethod
    def _count(fd: int, extent: Extent) -> Iterator[int]:
        """Bytes of payload that begin in each block of the text."""
        for at in range(0, extent.stored, TEXT_BLOCK):
            raw = os.pread(fd, min(TEXT_BLOCK, extent.stored - at), extent.start + at)
            yield len(raw.translate(None, CONTINUATION))
