"""Patience with hubs: what passes is tried again, and not for ever."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from typing import TypeVar

from ernie_quant.errors import RetryError
from ernie_quant.hubs import Hub, Listing

Result = TypeVar("Result")

CHUNK = 1 << 17  # small enough that a slow download can be stopped between two
AT_ONCE = 8  # headers and small files
TRIES, HASH_TRIES = 8, 3
LONGEST_WAIT = 300.0  # seconds


class Transient(Exception):
    """The hub or the network failed in a way that passes; `wait`: for how many seconds the hub asks."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


Pause = Callable[[float], object]


def patiently(work: Callable[[], Result], what: str, pause: Pause) -> Result:
    """What `work` returns, tried again and again while it fails in ways that pass. Raises RetryError."""
    for attempt in itertools.count(1):
        try:
            return work()
        except Transient as error:
            if attempt == TRIES:
                raise RetryError(f"{what}: {error}; tried {attempt} times") from None
            wait = error.wait if error.wait is not None else min(30.0, 2.0 ** (attempt - 1)) * random.uniform(0.5, 1)
            pause(min(wait, LONGEST_WAIT))
    raise AssertionError("unreachable")


def small_file(hub: Hub, listing: Listing, name: str) -> bytes:
    """All of a file that is no weight file. Raises HubError or RetryError."""

    def once() -> bytes:
        with hub.read(listing, name, 0, None) as chunks:
            return b"".join(chunks)

    return patiently(once, f"{listing.repo}: {name}", time.sleep)
