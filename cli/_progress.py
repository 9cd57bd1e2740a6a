"""Progress on stderr: a bar where somebody watches, a line every so often in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tqdm import tqdm

    from ernie_quant.run.whole import FileDone

FIRST, EVERY = 20.0, 60.0  # seconds


class Meter:
    """Is told of bytes and of files that are done, and says nothing."""

    def __call__(self, done: int) -> None:
        """Bytes; fewer than none where something is to be done again."""

    def file(self, done: FileDone) -> None:
        """A file is finished."""


class Bar(Meter):
    """For a terminal."""

    def __init__(self, bar: tqdm[None]) -> None:
        self._bar = bar

    def __call__(self, done: int) -> None:
        """Moves it."""
        self._bar.update(done)

    def file(self, done: FileDone) -> None:
        """How many there are."""
        self._bar.set_postfix_str(f"file {done.number} of {done.of}", refresh=False)


class Lines(Meter):
    """For a log: `3 of 12 files, 14.02 of 44.91 GB, 0.31 GB/s, 1 h 40 min left`; nothing for what is over in a moment."""

    def __init__(
        self, total: int, say: Callable[[str], object], clock: Callable[[], float] = time.monotonic, every: float | None = None
    ) -> None:
        self._total, self._say, self._clock = total, say, clock
        self._every = EVERY if every is None else every
        self._done, self._files = 0, ""
        self._begun = clock()
        self._next = self._begun + min(FIRST, self._every)

    def __call__(self, done: int) -> None:
        """A line, if it is time for one."""
        self._done += done
        now = self._clock()
        if now < self._next:
            return
        self._next = now + self._every
        rate = self._done / max(now - self._begun, 1e-9)
        left = f", {duration((self._total - self._done) / rate)} left" if 0 < self._done <= self._total else ""
        self._say(f"{self._files}{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e9:.3f} GB/s{left}")

    def file(self, done: FileDone) -> None:
        """For the next line."""
        self._files = f"{done.number} of {done.of} files, "


def duration(seconds: float) -> str:
    """`2 h 5 min`, `12 min`, `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def progress_bar(total: int, quiet: bool) -> Iterator[Meter]:
    """Of `total` bytes: MB/s and the time left; nothing for who wants it quiet."""
    if quiet:
        yield Meter()
        return
    if not sys.stderr.isatty():
        yield Lines(total, lambda line: click.echo(line, err=True))
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True, leave=False) as bar:
        yield Bar(bar)


@contextmanager
def layers_bar(wanted: bool, quiet: bool) -> Iterator[Callable[[float, str], None]]:
    """Of what is being done and the time left; it appears with the first word."""
    if not wanted or quiet:
        yield lambda *_: None
        return
    if not sys.stderr.isatty():
        yield _of_layers(lambda line: click.echo(line, err=True))
        return
    from tqdm import tqdm

    form = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    with tqdm(total=1.0, bar_format=form, dynamic_ncols=True, leave=False) as bar:

        def moved(part: float, what: str) -> None:
            if not bar.n:
                bar.initial = part  # what an earlier run has done says nothing of this one's speed
            bar.set_description_str(what, refresh=False)
            bar.update(part - bar.n)

        yield moved


def _of_layers(say: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> Callable[[float, str], None]:
    """A line every so often; `part` of an earlier run says nothing of this one's speed."""
    begun, first, then = clock(), -1.0, clock() + FIRST

    def moved(part: float, what: str) -> None:
        nonlocal first, then
        first = part if first < 0 else first
        now = clock()
        if now < then:
            return
        then = now + EVERY
        rate = (part - first) / (now - begun)
        left = f", {duration((1 - part) / rate)} left" if rate > 0 else ""
        say(f"{what}: {100 * part:.1f}%{left}")

    return moved
