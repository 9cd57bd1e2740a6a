"""Hubs, one folder each, named after the scheme of their addresses (`hf://org/name@revision`).

`read.py` has `connect() -> Hub`: what a checkpoint on the hub needs, and may have `DOWNLOAD`: the command that people have
for it. `publish.py` has `connect() -> Publisher` and
`DEFAULT_BRANCH`: what publishing needs.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ernie_quant import plugins
from ernie_quant.errors import CheckpointError, HubError

ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9]*)://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# what people have instead: ORG/NAME, or the address of a page in a browser
HOSTS = {"huggingface.co": "hf", "hf.co": "hf", "hf-mirror.com": "hf", "modelscope.cn": "modelscope"}
PAGE = re.compile(
    r"((https?://)?(?P<host>(www\.)?(huggingface\.co|hf\.co|hf-mirror\.com|modelscope\.cn))/(models/)?)?"
    r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+)|/(tree|resolve|blob)/(?P<tree>[\w.-]+)(/.*)?)?/?"
)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: what the hub says about it. Large files have a sha256, small ones git's sha1."""

    name: str
    nbytes: int
    sha256: str = ""
    git_oid: str = ""

    def hasher(self) -> hashlib._Hash:
        """For its bytes, from the first on."""
        return hashlib.sha256() if self.sha256 else hashlib.sha1(f"blob {self.nbytes}\0".encode())

    @property
    def digest(self) -> str:
        """What `hasher` must say in the end."""
        return self.sha256 or self.git_oid


@dataclass(frozen=True)
class Listing:
    """A revision of a repository, pinned to its commit."""

    address: str  # as a user writes it, without the revision: hf://org/name
    repo: str
    commit: str
    files: Mapping[str, RemoteFile]


class Hub(Protocol):
    """What reading from a hub needs."""

    def listing(self, repo: str, revision: str) -> Listing:
        """Raises Transient, or CheckpointError."""
        ...

    def read(self, listing: Listing, name: str, start: int, stop: int | None) -> AbstractContextManager[Iterator[bytes]]:
        """Bytes `start` to `stop` (None: the end) of a file. Raises Transient, or CheckpointError."""
        ...


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
    """What publishing to a hub needs. All raise HubError, or RetryError once patience has ended."""

    default_branch: str
    pull_requests: bool  # can it open them?

    def account(self) -> str:
        """Whose token it is; empty where the hub does not say. Raises HubError where there is none, or a wrong one."""
        ...

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


def parse(address: str) -> tuple[str, str, str]:
    """`hf://org/name@revision` -> scheme, `org/name`, revision ("" if none is given). Raises CheckpointError."""
    found = ADDRESS.fullmatch(address)
    if not found or ".." in address:
        meant = suggestion(address)
        raise CheckpointError(
            f"{address[:200]}: is not SCHEME://ORG/NAME or SCHEME://ORG/NAME@REVISION{f'; it is {meant}' if meant else ''}"
        )
    if found["scheme"] not in schemes():
        there = ", ".join(f"{scheme}://" for scheme in schemes())
        raise CheckpointError(f"{address}: there is no {found['scheme']}://; there is {there}")
    return found["scheme"], found["repo"], found["revision"] or ""


def suggestion(text: str) -> str:
    """The address that somebody may mean by `ORG/NAME` or by that of a web page; empty if none."""
    found = PAGE.fullmatch(text)
    if not found or ".." in text or text.startswith("."):
        return ""
    scheme = next((s for host, s in HOSTS.items() if found["host"] and found["host"].endswith(host)), "hf")
    revision = found["tree"] or found["revision"]
    return f"{scheme}://{found['repo']}{f'@{revision}' if revision else ''}"


def schemes() -> tuple[str, ...]:
    """The hubs that there are."""
    return plugins.names(sys.modules[__name__])


def reader(scheme: str) -> Hub:
    """Reads from the hub of a scheme, one of `schemes`. Raises HubError where its package is missing."""
    found: Callable[[], Hub] = plugins.load(sys.modules[__name__], f"{scheme}.read").connect
    return found()


def publisher(scheme: str) -> Publisher:
    """Publishes to the hub of a scheme. Raises HubError."""
    found: Callable[[], Publisher] = _publish(scheme).connect
    return found()


def default_branch(scheme: str) -> str:
    """The branch that a hub publishes to where nobody names one. Raises HubError."""
    return str(_publish(scheme).DEFAULT_BRANCH)


def download_command(scheme: str) -> str:
    """What people type to have a repository `{name}` in the folder `{local}`; empty for a hub that does not say."""
    return str(getattr(plugins.load(sys.modules[__name__], f"{scheme}.read"), "DOWNLOAD", ""))


def _publish(scheme: str) -> Any:
    if scheme not in schemes():
        raise HubError(f"{scheme}://: nothing can be published there; there is {', '.join(schemes())}")
    return plugins.load(sys.modules[__name__], f"{scheme}.publish")
