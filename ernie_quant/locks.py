"""Locks that vanish with the process that holds them."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ernie_quant.errors import OutputError, RetryError


@contextmanager
def hold(place: Path, busy: str) -> Iterator[IO[str]]:
    """The file `place`, locked for this process alone. Raises RetryError(busy), OutputError where no lock can be had."""
    with open(place, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RetryError(busy) from None
        except OSError as error:
            raise OutputError(f"{place}: cannot be locked ({error.strerror}); choose a folder on another disk") from None
        yield file
