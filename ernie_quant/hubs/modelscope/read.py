"""ModelScope: `modelscope://org/name@revision`, through the package modelscope-hub.

Token and endpoint are the package's own (modelscope_hub/config.py: MODELSCOPE_API_TOKEN or `ms-hub login`,
MODELSCOPE_ENDPOINT). What is used of it is `HubApi.legacy`, a `LegacyClient` (modelscope_hub/api.py, _legacy_api.py).
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

from ernie_quant.errors import HubError
from ernie_quant.hubs import Listing, RemoteFile
from ernie_quant.hubs._answers import PASSING, asked_for, one_line, range_headers, requests_errors
from ernie_quant.hubs._patience import CHUNK, Transient
from ernie_quant.needs import install_extra

DEFAULT_BRANCH = "master"  # modelscope_hub/api.py, list_repo_files
KIND = "model"
COMMIT = re.compile("[0-9a-f]{40}")
SHA256 = re.compile("[0-9a-f]{64}")

DOWNLOAD = "modelscope download --model {name} --local_dir {local}"


def connect() -> ModelScope:
    """The hub of its client's settings."""
    return ModelScope()


class ModelScope:
    """A hub that speaks ModelScope's protocol.

    Its listing names no commit of its own, but for every file the commit that changed it last (modelscope/hub/utils/caching.py:
    `Revision`, "commit id"). The latest of them pins the revision if the hub gives the same listing for it; that fails only if
    a file was deleted since. Then the revision is the sha256 of the listing, files are read from the branch, and one that
    changed meanwhile is refused for its hash.
    """

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        self.endpoint, self.token = endpoint, token
        self._asked: dict[tuple[str, str], str] = {}  # repository and digest of a listing -> the branch it is of

    @cached_property
    def api(self) -> Any:
        """The package's `HubApi`, with the settings of now. Raises HubError."""
        package = sdk()
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)  # retries are ours to tell
        config = importlib.import_module("modelscope_hub.config")
        return package.HubApi(config.HubConfig(endpoint=self.endpoint, token=self.token))

    def listing(self, repo: str, revision: str) -> Listing:
        """The files of a revision, with sizes and hashes. Raises Transient or HubError."""
        with client_errors(f"{repo}@{revision}" if revision else repo):
            commit, files = self.pinned(repo, revision or DEFAULT_BRANCH)
        if bare := next((name for name, file in files.items() if not file.sha256 and not name.startswith(".")), None):
            raise HubError(f"{repo}: {bare}: the hub reports no sha256 of it, so it cannot be checked")
        return Listing(f"modelscope://{repo}", repo, commit, files)

    def pinned(self, repo: str, revision: str) -> tuple[str, dict[str, RemoteFile]]:
        """The commit, or the digest of the listing, and the files. Raises the package's errors."""
        revision = self._asked.get((repo, revision), revision)
        entries = self._entries(repo, revision)
        files = {file.name: file for file in map(_file, entries)}
        if COMMIT.fullmatch(revision):
            return revision, files
        latest = max(entries, key=_committed, default={})
        commit = str(latest.get("Revision"))
        if COMMIT.fullmatch(commit):
            try:
                if {file.name: file for file in map(_file, self._entries(repo, commit))} == files:
                    return commit, files
            except importlib.import_module("modelscope_hub.errors").NotExistError:
                pass  # a hub that lists branches only
        lines = sorted(f"{file.name} {file.nbytes} {file.sha256}\n" for file in files.values())
        digest = hashlib.sha256("".join(lines).encode()).hexdigest()
        self._asked[repo, digest] = revision
        return digest, files

    def _entries(self, repo: str, revision: str) -> Sequence[Mapping[str, Any]]:
        entries = self.api.legacy.list_repo_files(repo, KIND, revision)
        return [entry for entry in entries if entry.get("Type") != "tree"]

    @contextmanager
    def read(self, listing: Listing, name: str, start: int, stop: int | None) -> Iterator[Iterator[bytes]]:
        """Bytes of a file, from whatever host the hub sends us to; the token does not go there."""
        what = f"{listing.repo}: {name}"
        headers = range_headers(start, stop)
        with ExitStack() as stack:
            with client_errors(what):
                revision = self._asked.get((listing.repo, listing.commit), listing.commit)
                response = self.api.legacy.download_stream(listing.repo, KIND, name, revision, headers=headers)
                stack.callback(response.close)
            chunks = asked_for(response.iter_content(CHUNK), response.status_code, start, stop)
            yield _guarded(chunks, what)


def sdk() -> Any:
    """The package. Raises HubError."""
    try:
        return importlib.import_module("modelscope_hub")
    except ImportError:
        raise HubError(f"modelscope:// needs the package modelscope-hub: {install_extra('modelscope')}") from None


def _file(entry: Mapping[str, Any]) -> RemoteFile:
    """An entry of the listing, with the keys that modelscope_hub/api.py, list_repo_files, reads."""
    name, nbytes, sha256 = entry.get("Path"), entry.get("Size"), entry.get("Sha256") or ""
    if not isinstance(name, str) or not isinstance(nbytes, int):
        raise HubError(f"the hub lists {str(entry)[:200]}, which has no Path or no Size")
    return RemoteFile(name, nbytes, sha256 if SHA256.fullmatch(str(sha256)) else "")


def _committed(entry: Mapping[str, Any]) -> int:
    when = entry.get("CommittedDate")  # seconds
    return when if isinstance(when, int) else 0


def _guarded(chunks: Iterator[bytes], what: str) -> Iterator[bytes]:
    with client_errors(what):
        yield from chunks


@contextmanager
def client_errors(what: str) -> Iterator[None]:
    """The package's errors (modelscope_hub/errors.py) as ours: what passes as Transient, the rest as HubError."""
    sdk()
    theirs = importlib.import_module("modelscope_hub.errors")
    login = "`ms-hub login` or MODELSCOPE_API_TOKEN"
    with requests_errors(what, "MODELSCOPE_API_TOKEN"):
        try:
            yield
        except theirs.NotExistError:
            raise HubError(
                f"{what}: there is no such repository, revision or file, or the token may not see it ({login})"
            ) from None
        except (theirs.AuthenticationError, theirs.PermissionDeniedError) as error:
            raise HubError(f"{what}: the hub refuses the token ({login}): {one_line(error.message)}") from None
        except theirs.HubError as error:
            text = one_line(error.message)
            if error.retryable or getattr(error, "status_code", None) in PASSING:
                raise Transient(text, getattr(error, "retry_after", None)) from None
            raise HubError(f"{what}: {text}") from None
