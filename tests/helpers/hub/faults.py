"""Faults that the loopback hub can be told to have; each counts how often it struck."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Fault:
    kind: str  # fail, drop, corrupt, slow, stale_parent
    path: str = ""  # searched, as a regular expression, in the decoded path (without the query)
    method: str | None = None
    times: int | None = 1  # None: for ever
    status: int | None = None  # fail: the answer; None cuts the connection without one
    headers: dict[str, str] = field(default_factory=dict)
    late: bool = False  # fail: do what was asked, then fail; the answer is lost, the deed is not
    after_bytes: int = 0  # drop: bytes of the body that still pass
    reset: bool = False  # drop: with a TCP reset in place of an end of file
    bytes_per_second: float = 0.0
    files: dict[str, bytes] = field(default_factory=dict)  # stale_parent: what somebody else commits
    struck: int = 0

    def hits(self, kind: str, method: str, path: str) -> bool:
        left = self.times is None or self.struck < self.times
        return left and self.kind == kind and self.method in (None, method) and re.search(self.path, path) is not None


class Faults:
    """The faults that were asked for, oldest first."""

    def __init__(self) -> None:
        self.all: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self.all.append(fault)
        return fault

    def take(self, kind: str, method: str, path: str) -> Fault | None:
        """The first fault of the kind that concerns this request, counted as struck."""
        with self._lock:
            for fault in self.all:
                if fault.hits(kind, method, path):
                    fault.struck += 1
                    return fault
        return None


class FaultMaker:
    """What tests call; `LoopbackHub` is one."""

    def __init__(self) -> None:
        self.faults = Faults()

    def fail(
        self,
        *,
        path: str = "",
        method: str | None = None,
        times: int | None = 1,
        status: int | None = 503,
        headers: Mapping[str, str] | None = None,
        late: bool = False,
    ) -> Fault:
        """Answer `status`, or cut the connection at None; `late`: only after doing what was asked."""
        return self.faults.add(Fault("fail", path, method, times, status, dict(headers or {}), late))

    def drop(
        self, *, path: str = "", method: str | None = None, after_bytes: int, times: int | None = 1, reset: bool = False
    ) -> Fault:
        """Cut the connection after so many bytes of a file's content, or of a request's body."""
        return self.faults.add(Fault("drop", path, method, times, after_bytes=after_bytes, reset=reset))

    def corrupt(self, *, path: str = "", times: int | None = 1) -> Fault:
        """Send a file's content with one wrong byte in its middle; the size and the hash in the headers stay right."""
        return self.faults.add(Fault("corrupt", path, "GET", times))

    def slow(self, *, path: str = "", method: str | None = None, bytes_per_second: float, times: int | None = None) -> Fault:
        """Send a file's content, or read a request's body, no faster than that."""
        return self.faults.add(Fault("slow", path, method, times, bytes_per_second=bytes_per_second))

    def stale_parent(self, times: int | None = 1, *, path: str = "", files: Mapping[str, bytes] | None = None) -> Fault:
        """Somebody else commits `files` to the branch just before a commit arrives there."""
        theirs = dict(files or {"somebody-else.txt": b"first\n"})
        return self.faults.add(Fault("stale_parent", path, "POST", times, files=theirs))
