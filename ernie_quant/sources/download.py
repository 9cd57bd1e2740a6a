"""The weight files of a checkpoint on a hub, brought one ahead of their use and dropped after it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from ernie_quant.checkpoint import Stamp
from ernie_quant.disk import free_bytes, hold, partial_of
from ernie_quant.errors import CheckpointError, RetryError
from ernie_quant.hubs import Hub, Listing
from ernie_quant.sources.cache import HEADERS_LOCK, Use
from ernie_quant.sources.fetch import fetch

STALLED = 5.0  # seconds that the end of a run waits for a connection on which nothing comes


@dataclass(frozen=True)
class HubDownloader:
    """Brings the weight files of a remote checkpoint when they are needed."""

    hub: Hub
    listing: Listing
    headers: Path
    files: Path
    use: Use

    def needed_at_once(self, needs: Sequence[Collection[Path]]) -> int:
        """Bytes that must lie on disk together: a file stays from its first use to its last."""
        first = {path: number for number, group in reversed(list(enumerate(needs))) for path in group}
        last = {path: number for number, group in enumerate(needs) for path in group}
        alive = most = 0
        for number, group in enumerate(needs):
            alive += sum(self._nbytes(p) for p in {*group} if first[p] == number)
            most = max(most, alive)
            alive -= sum(self._nbytes(p) for p in {*group} if last[p] == number)
        return most

    def check_budget(self, needs: Sequence[Collection[Path]], budget: int) -> None:
        """Is it enough for what must lie on disk together? Raises CheckpointError."""
        if budget < (at_once := self.needed_at_once(needs)):
            raise CheckpointError(
                f"{self.listing.address}: {at_once} bytes ({at_once / 1e9:.2f} GB) of it are needed at once, more than the"
                f" disk budget of {budget} bytes; a smaller max-shard-size needs less"
            )

    def bring(self, path: Path) -> None:
        """A file beside the weights that is not fetched unasked. Raises CheckpointError or RetryError."""
        name = path.relative_to(self.headers).as_posix()
        incoming = self.headers.with_name("incoming") / name
        with open(self.headers.with_name(HEADERS_LOCK), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.is_file() and path.stat().st_size == self.listing.files[name].nbytes:
                return
            for place in (path, incoming):
                place.parent.mkdir(parents=True, exist_ok=True)
            fetch(self.hub, self.listing, self.listing.files[name], incoming, time.sleep)
            os.replace(incoming, path)
            shutil.rmtree(self.headers.with_name("incoming"), ignore_errors=True)

    def _nbytes(self, path: Path) -> int:
        return self.listing.files[path.relative_to(self.headers).as_posix()].nbytes

    @contextmanager
    def stream(self, needs: Sequence[Sequence[Path]], budget: int | None) -> Iterator[HubDownload]:
        """Bring `needs[0]`, `needs[1]`, … in this order while they are used. Raises CheckpointError or RetryError."""
        largest = max((self._nbytes(p) for group in needs for p in group), default=0)
        at_once = self.needed_at_once(needs)
        budget = at_once + largest if budget is None else budget
        self.check_budget(needs, budget)
        self.files.mkdir(parents=True, exist_ok=True)
        with hold(self.files.with_name("lock"), f"{self.listing.address}: another run is downloading it to {self.files.parent}"):
            order = list(dict.fromkeys(path for group in needs for path in group))
            ends = accumulate(map(self._nbytes, order))
            whole = {self._place(path) for path, end in zip(order, ends, strict=True) if end <= budget}
            soon = whole | {*map(partial_of, whole)}
            for path in [p for p in self.files.rglob("*") if p.is_file()]:
                if path not in soon:  # of another run, or one that got further
                    path.unlink()
            download = HubDownload(self, needs, budget)
            try:
                download.check_space(at_once)
                download.start()
                yield download
            finally:
                download.stop()
                download.join()
            shutil.rmtree(self.files, ignore_errors=True)

    def _place(self, path: Path) -> Path:
        return self.files / path.relative_to(self.headers)


class Stopped(Exception):
    """The run has ended; nobody waits for the download any more."""


class HubDownload:
    """A thread that fetches files in the order of their use, within the budget; `path` waits for one, `done` drops some."""

    def __init__(self, downloader: HubDownloader, needs: Sequence[Sequence[Path]], budget: int) -> None:
        self._downloader, self._budget = downloader, budget
        self.stamps: Mapping[Path, Stamp] = {}
        self._order = list(dict.fromkeys(path for group in needs for path in group))
        self._last = {path: number for number, group in enumerate(needs) for path in group}
        self._arrived: set[Path] = set()
        self._on_disk = 0
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="download", daemon=True)

    def check_space(self, least: int) -> None:
        """Is there room for what is needed at once? Raises RetryError."""
        there = sum(p.stat().st_size for p in self._downloader.files.rglob("*") if p.is_file())
        free = free_bytes(self._downloader.files)
        if free is not None and free + there < least:
            raise RetryError(
                f"{self._downloader.files}: needs {least / 1e9:.2f} GB for downloads, the disk has {(free + there) / 1e9:.2f} GB"
                " free"
            )

    def start(self) -> None:
        """Fetch the first file."""
        self._thread.start()

    def stop(self) -> None:
        """Nothing more is wanted, not even the rest of a file; what has arrived of it is kept for the next run."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def join(self) -> None:
        """After `stop`, wait for the thread; not for long, if it stalls."""
        if self._thread.is_alive():
            self._thread.join(STALLED)

    def path(self, path: Path) -> Path:
        """Where the bytes of a file lie; waits for one that was ordered. Raises what the download raised."""
        if path not in self._last:
            return path
        with self._changed:
            self._changed.wait_for(lambda: path in self._arrived or self._error is not None or self._stop.is_set())
            if path not in self._arrived:
                raise self._error or Stopped
        return self._downloader._place(path)

    def done(self, number: int) -> None:
        """The files of `needs[number]` have been used; those that nobody needs later are deleted."""
        with self._changed:
            for path in [p for p in self._arrived if self._last[p] <= number]:
                self._arrived.discard(path)
                self._downloader._place(path).unlink()
                self._on_disk -= self._downloader._nbytes(path)
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds) if seconds else self._stop.is_set():
            raise Stopped

    def _work(self) -> None:
        try:
            for path in self._order:
                nbytes = self._downloader._nbytes(path)
                with self._changed:
                    self._changed.wait_for(lambda n=nbytes: self._stop.is_set() or self._on_disk + n <= self._budget)  # type: ignore[misc]
                    self._pause(0)
                    self._on_disk += nbytes
                self._bring(path)
                with self._changed:
                    self._arrived.add(path)
                    self._changed.notify_all()
        except Stopped:
            pass
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _bring(self, path: Path) -> None:
        downloader, place = self._downloader, self._downloader._place(path)
        file = downloader.listing.files[path.relative_to(downloader.headers).as_posix()]
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.is_file():  # a stopped run left it: it is as good as a part of a download
                os.replace(place, partial_of(place))
            fetch(downloader.hub, downloader.listing, file, place, self._pause)
        except OSError as error:  # of our disk; those of the network are Transient
            what = f"{place}: cannot be written: {error.strerror}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise RetryError(f"{what}; the same command goes on where it stopped") from None
            raise CheckpointError(what) from None
        with open(place, "rb") as arrived, open(path, "rb") as planned:
            length = 8 + int.from_bytes(planned.read(8), "little")
            planned.seek(0)
            if arrived.read(length) != planned.read(length):
                path.unlink()  # the next run reads it again
                raise RetryError(
                    f"{downloader.listing.address}: {file.name}: its header is not the one that was planned with; run again"
                )
