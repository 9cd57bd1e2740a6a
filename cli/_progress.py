"""Progress on stderr, for people only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar of `total` bytes with MB/s and the time left; nothing where nobody watches."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True, leave=False) as bar:
        yield lambda done: bar.update(done) and None


@contextmanager
def layers_bar(wanted: bool, quiet: bool) -> Iterator[Callable[[float, str], None]]:
    """A bar with what is being done and the time left, that appears with the first word."""
    if not wanted or quiet or not sys.stderr.isatty():
        yield lambda *_: None
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
