"""A source that several processes read at once, here or on other machines: each brings the files that its own work needs."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from ernie_quant.checkpoint import Checkpoint, Download, OnDisk, Stamp
from ernie_quant.disk import hold
from ernie_quant.errors import RetryError
from ernie_quant.sources import open_source
from ernie_quant.sources.download import HubDownloader

MOST = 64  # processes that download from one commit to one disk, where nobody says how many
WAIT = 1.0  # seconds


@dataclass(frozen=True)
class SideBySide:
    """A downloader for one of several processes: it takes the first place that is free, and waits where none is."""

    downloader: HubDownloader
    most: int = MOST

    def needed_at_once(self, needs: Sequence[Collection[Path]]) -> int:
        """As of one process."""
        return self.downloader.needed_at_once(needs)

    def check_budget(self, needs: Sequence[Collection[Path]], budget: int) -> None:
        """As of one process. Raises CheckpointError."""
        self.downloader.check_budget(needs, budget)

    def bring(self, path: Path) -> None:
        """One process at a time does. Raises CheckpointError or RetryError."""
        self.downloader.bring(path)

    @contextmanager
    def stream(self, needs: Sequence[Sequence[Path]], budget: int | None) -> Iterator[Download]:
        """With at most `budget` bytes in the place of this process. Raises CheckpointError or RetryError."""
        with self._place() as place, replace(self.downloader, files=place / "files").stream(needs, budget) as download:
            yield download

    @contextmanager
    def _place(self) -> Iterator[Path]:
        root = self.downloader.files.parent
        with ExitStack() as stack:
            while True:
                for number in range(self.most):
                    place = root / f"place-{number}"
                    place.mkdir(parents=True, exist_ok=True)
                    try:
                        stack.enter_context(hold(place / "taken", ""))
                    except RetryError:
                        continue
                    yield place
                    return
                time.sleep(WAIT)


def side_by_side(source: Checkpoint, most: int = MOST) -> Checkpoint:
    """The same for one of at most so many processes at a time; a folder needs nothing for that."""
    if source.downloader is None:
        return source
    assert isinstance(source.downloader, HubDownloader)
    return replace(source, downloader=SideBySide(source.downloader, most))


@dataclass(frozen=True)
class Elsewhere:
    """How another process comes by the files of a source: a value that can be sent to it.

    A folder lies in the same place everywhere; a hub is asked again, by `address` with its commit. `most`: downloads at a
    time on one disk, each of at most `budget` bytes.
    """

    address: str
    folder: Path
    most: int = MOST
    budget: int | None = None

    @staticmethod
    def of(source: Checkpoint, needs: Sequence[Sequence[Path]], budget: int | None) -> Elsewhere:
        """For processes that bring `needs[0]`, `needs[1]`, … each; they share the budget of their disk.

        Raises CheckpointError if it is too small for one of them.
        """
        if source.downloader is None:
            return Elsewhere("", source.folder)
        address = f"{source.address}@{source.revision}"
        if budget is None:
            return Elsewhere(address, source.folder)
        for group in needs:
            source.downloader.check_budget([group], budget)
        largest = max((source.downloader.needed_at_once([group]) for group in needs), default=1)
        most = min(MOST, budget // max(1, largest))
        return Elsewhere(address, source.folder, most, budget // most)

    @contextmanager
    def download(self, needs: Sequence[Path], stamps: Mapping[Path, Stamp]) -> Iterator[Download]:
        """In the other process: what one job needs. Raises CheckpointError or RetryError."""
        if not self.address:
            yield OnDisk(stamps)
            return
        source = _opened(self.address)
        here = [source.folder / path.relative_to(self.folder) for path in needs]
        with side_by_side(source, self.most).download([here], self.budget) as download:
            places = {path: download.path(mine) for path, mine in zip(needs, here, strict=True)}
            yield OnDisk(stamps, places)
            download.done(0)


@lru_cache(maxsize=1)
def _opened(address: str) -> Checkpoint:
    """Once in a process, however many jobs it does."""
    return open_source(address)
