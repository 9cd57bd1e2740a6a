"""Hubs that a result can be published to, one file each, named after the scheme of their addresses (`hf://org/name`).

The file has `connect() -> Publisher` and `DEFAULT_BRANCH`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ernie_quant import plugins
from ernie_quant.errors import HubError
from ernie_quant.sources._remote import RemoteFile


class Conflict(Exception):
    """Somebody else has committed in the meantime."""


@dataclass(frozen=True)
class LocalFile:
    """A file of a result; `path` is None where it was uploaded, and deleted, before."""

    name: str
    nbytes: int
    sha256: str
    path: Path | None


@dataclass(frozen=True)
class Head:
    """A branch as the hub reports it."""

    commit: str
    files: Mapping[str, RemoteFile]


class Publisher(Protocol):
    """What a hub must offer. All raise HubError, or RetryError once patience has ended."""

    default_branch: str
    pull_requests: bool  # can it open them?

    def is_private(self, repo: str) -> bool | None:
        """None if there is no such repository."""
        ...

    def create(self, repo: str, *, private: bool) -> None:
        """Make it; nothing if it is there."""
        ...

    def head(self, repo: str, revision: str) -> Head | None:
        """None if there is no such branch."""
        ...

    def branch(self, repo: str, revision: str) -> None:
        """Make a branch; nothing if it is there."""
        ...

    def fetch(self, repo: str, commit: str, name: str) -> bytes:
        """A small file."""
        ...

    def upload(self, repo: str, revision: str, file: LocalFile) -> bool:
        """Bring the bytes of a file to the hub, for a commit that follows. False: they travel with the commit itself."""
        ...

    def commit(
        self, repo: str, revision: str, parent: str, files: Sequence[LocalFile], drop: Sequence[str], message: str, pr: bool
    ) -> str:
        """One atomic commit of uploaded files; where to find it. Raises Conflict if `parent` is not the head any more."""
        ...

    def tag(self, repo: str, name: str, commit: str) -> None:
        """Name a commit; nothing if it is named so already."""
        ...


def connect(scheme: str) -> Publisher:
    """The hub of a scheme. Raises HubError."""
    package = sys.modules[__name__]
    if scheme not in plugins.names(package):
        raise HubError(f"{scheme}://: nothing can be published there; there is {', '.join(plugins.names(package))}")
    found: Callable[[], Publisher] = plugins.load(package, scheme).connect
    return found()
