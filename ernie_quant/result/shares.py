"""An output folder that several processes write to at the same time, each its share of the files.

All of them hold the lock of the folder together, which a whole run wants for itself, and each the lock of its share.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ernie_quant.disk import drop_partials, hold, partial_of, write_file
from ernie_quant.errors import OutputError, RetryError
from ernie_quant.jsonio import dumps, read_object
from ernie_quant.paths import STATE
from ernie_quant.planning.share import Share
from ernie_quant.planning.steps import Plan
from ernie_quant.result.folder import PREPARING, SHARE, OutputFolder

REQUEST = "shares.json"  # in the private state: the command, for whoever completes the folder
LOCK_OF = re.compile(rf"{SHARE}(\d+)-of-(\d+)")


class SharedFolder(OutputFolder):
    """The folder as one share sees it. `request`: what `merge` must know, which is kept in the folder."""

    SHARED = True

    def __init__(self, path: Path, share: Share, request: Mapping[str, Any]) -> None:
        super().__init__(path)
        self.share, self.request = share, {**request, "num_shards": share.of}
        self._held = ExitStack()

    @contextmanager
    def begin(self, plan: Plan, *, restart: bool, copies: int = 1, space_check: bool = True) -> Iterator[bool]:
        """Hold the share. Raises RetryError where it is at work already, or others of another number are."""
        with self._held, super().begin(plan, restart=restart, copies=copies, space_check=space_check) as complete:
            yield complete

    def _prepare(self, plan: Plan, restart: bool) -> None:
        with hold(self.state / PREPARING, "", wait=True):  # one share after the other begins
            self._refuse_other_numbers()
            own = self.state / f"{SHARE}{self.share.index}-of-{self.share.of}"
            self._held.enter_context(hold(own, f"{self.path}: {self.share} is at work already"))
            super()._prepare(plan, restart)
            write_file(self.state / REQUEST, dumps(self.request).encode())

    def _refuse_other_numbers(self) -> None:
        others = {path: share for path, share in _locks(self.path).items() if share.of != self.share.of}
        for path, other in others.items():
            busy = f"{self.path}: {other} is at work; wait for it, or say --num-shards {other.of}"
            with hold(path, busy):
                path.unlink()

    def _drop_partials(self, plan: Plan) -> None:
        mine = self.share.files(plan)
        drop_partials(self.path / shard.filename for shard in mine)
        for shard in mine:
            partial_of(self._record_of(shard.filename)).unlink(missing_ok=True)

    def drop_state(self) -> None:
        """Others may hold it too; whoever is alone in the folder does that."""


def _locks(out: Path) -> dict[Path, Share]:
    """Files that shares lock."""
    found = {path: LOCK_OF.fullmatch(path.name) for path in sorted((out / STATE).glob(f"{SHARE}*"))}
    return {path: Share(int(match[1]), int(match[2])) for path, match in found.items() if match}


def request_of(out: Path) -> dict[str, Any]:
    """What the shares of a folder were asked for. Raises OutputError where none has begun, RetryError where one is at work."""
    place = out / STATE / REQUEST
    if not place.is_file():
        begun = (out / STATE).is_dir()
        what = "was begun by one run, not by shares; run the same command again" if begun else "holds no shares of a result"
        raise OutputError(f"{out}: {what}")
    busy = []
    for path, share in _locks(out).items():
        with suppress(FileNotFoundError):
            try:
                with hold(path, ""):
                    pass
            except RetryError:
                busy.append(share)
    if busy:
        names = ", ".join(str(share.index) for share in busy)
        raise RetryError(f"{out}: share {names} of {busy[0].of} is still at work; merge when it is done")
    request = read_object(place)
    number = request.get("num_shards")
    if not isinstance(number, int) or number < 1:
        raise OutputError(f"{place}: says of how many shares the result is: {number!r}")
    return request
