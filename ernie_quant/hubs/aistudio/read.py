"""AI Studio: `aistudio://org/name@revision`, through the package aistudio-sdk.

The hub is a Gitea with large files in Baidu's storage. Token and host are the package's own (aistudio_sdk/file_download.py,
`init`: AISTUDIO_ACCESS_TOKEN or its token file; STUDIO_GIT_HOST, aistudio_sdk/config.py). The package only downloads into a
cache of its own, so its requests are made here: `git/trees` as in aistudio_sdk/snapshot_download.py, `contents` and `media`
as in aistudio_sdk/requests/hub.py and file_download.py.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any
from urllib.parse import quote, urlsplit

from ernie_quant.errors import HubError
from ernie_quant.hubs import Listing, RemoteFile
from ernie_quant.hubs._answers import PASSING, TIMEOUT, asked_for, one_line, range_headers, requests_errors, retry_after
from ernie_quant.hubs._patience import AT_ONCE, CHUNK, Transient
from ernie_quant.hubs.modelscope.read import COMMIT
from ernie_quant.needs import install_extra

DEFAULT_BRANCH = "master"  # aistudio_sdk/config.py, DEFAULT_MODEL_REVISION
TOKEN = "AISTUDIO_ACCESS_TOKEN"
PAGE = 1000  # entries
POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize ([0-9]{1,18})\n?")

DOWNLOAD = "aistudio download --model {name} --local_dir {local}"


class Refused(Exception):
    """The hub answers with a status that stays."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(f"the hub answers {status}: {why}" if why else f"the hub answers {status}")
        self.status = status


def connect() -> AiStudio:
    """The hub of its client's settings."""
    return AiStudio()


class AiStudio:
    """A hub that speaks AI Studio's dialect of Gitea.

    Its tree names the commit, and git's sha1 of every file; of a large file it is that of a pointer with sha256 and size
    (git-lfs, docs/spec.md). Pointers are read one by one, and one that does not have the sha1 of the tree is not believed.
    """

    def __init__(self, host: str | None = None, token: str | None = None) -> None:
        self.given_host, self.token = host, token
        self._known: dict[str, RemoteFile] = {}  # git's sha1 -> what lies behind it

    @cached_property
    def _session(self) -> Any:
        return importlib.import_module("requests").Session()

    @property
    def host(self) -> str:
        """Of the Gitea."""
        config = sdk("config")
        return str(self.given_host or os.environ.get("STUDIO_GIT_HOST", config.STUDIO_GIT_HOST_DEFAULT)).rstrip("/")

    def headers(self) -> dict[str, str]:
        """With the token, if there is one."""
        sdk("file_download").init()
        found: dict[str, str] = sdk("utils.util").header_fill(token=self.token or "")
        return found

    def ask(self, method: str, url: str, body: Any = None) -> dict[str, Any]:
        """JSON from an address, or from a path of the Gitea's API. Raises Refused, Transient or HubError."""
        url = url if "://" in url else f"{self.host}/api/v1/repos/{url}"
        with requests_errors(urlsplit(url).path, TOKEN):
            response = self._session.request(method, url, headers=self.headers(), json=body, timeout=TIMEOUT)
            _check(response)
            answer = response.json()
        if not isinstance(answer, dict):
            raise HubError(f"{urlsplit(url).path}: the hub answers {one_line(str(answer))}")
        return answer

    def listing(self, repo: str, revision: str) -> Listing:
        """The files of a revision, with sizes and hashes. Raises Transient or HubError."""
        with refusals(f"{repo}@{revision}" if revision else repo):
            commit, files = self.files(repo, revision or DEFAULT_BRANCH)
        return Listing(f"aistudio://{repo}", repo, commit, files)

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, RemoteFile]]:
        """The commit, and its files. Raises Refused, Transient or HubError."""
        commit, tree = self.tree(repo, revision)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            files = list(pool.map(lambda item: self._file(repo, commit, *item), tree.items()))
        return commit, {file.name: file for file in files}

    def tree(self, repo: str, revision: str) -> tuple[str, dict[str, str]]:
        """The commit, and git's sha1 of every file; as aistudio_sdk/snapshot_download.py, get_model_files, but at one commit."""
        if not COMMIT.fullmatch(revision):
            revision = self.tagged(repo, revision) or revision
        commit, page, more = "", 1, True
        found: dict[str, str] = {}
        while more:
            where = quote(commit or revision, safe="")
            answer = self.ask("GET", f"{repo}/git/trees/{where}?recursive=true&page={page}&per_page={PAGE}")
            commit = commit or str(answer.get("url", "")).rpartition("/")[2]
            entries = answer.get("tree") or []
            found |= {str(e["path"]): str(e["sha"]) for e in entries if e.get("type") == "blob"}
            page, more = page + 1, bool(answer.get("truncated") and entries)
        if not COMMIT.fullmatch(commit):
            raise HubError(f"{repo}: the hub names no commit of {revision}")
        return commit, found

    def tagged(self, repo: str, name: str) -> str | None:
        """The commit of a tag, None if there is no such tag."""
        try:
            return str(self.ask("GET", f"{repo}/tags/{quote(name, safe='')}")["commit"]["sha"])
        except Refused as error:
            if error.status in (404, 409):  # 409: the repository has no commit
                return None
            raise

    def _file(self, repo: str, commit: str, path: str, oid: str) -> RemoteFile:
        if oid not in self._known:
            for where in (f"contents/{quote(path, safe='')}?ref={commit}", f"git/blobs/{oid}"):
                blob = _content(self.ask("GET", f"{repo}/{where}"))
                if hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest() == oid:
                    break
            else:
                raise HubError(f"{repo}: {path}: the hub shows neither the file nor its pointer, so it cannot be checked")
            pointer = POINTER.fullmatch(blob)
            self._known[oid] = (
                RemoteFile("", int(pointer[2]), pointer[1].decode()) if pointer else RemoteFile("", len(blob), git_oid=oid)
            )
        return replace(self._known[oid], name=path)

    @contextmanager
    def read(self, listing: Listing, name: str, start: int, stop: int | None) -> Iterator[Iterator[bytes]]:
        """Bytes of a file, from whatever host the hub sends us to; the token does not go there."""
        what = f"{listing.repo}: {name}"
        headers = range_headers(start, stop)
        with ExitStack() as stack:
            with refusals(what), requests_errors(what, TOKEN):
                url = f"{self.host}/api/v1/repos/{listing.repo}/media/{quote(name, safe='')}?ref={listing.commit}"
                response = self._session.get(url, headers=self.headers() | headers, stream=True, timeout=TIMEOUT)
                stack.callback(response.close)
                _check(response)
            chunks = asked_for(response.iter_content(CHUNK), response.status_code, start, stop)
            yield _guarded(chunks, what)


def sdk(module: str) -> Any:
    """A module of the package. Raises HubError."""
    try:
        return importlib.import_module(f"aistudio_sdk.{module}")
    except ImportError:
        raise HubError(f"aistudio:// needs the package aistudio-sdk: {install_extra('aistudio')}") from None


def _content(answer: Mapping[str, Any]) -> bytes:
    """What lies in git, of the answer of `contents` or `git/blobs`; nothing if it is not there."""
    text = answer.get("content")
    try:
        return base64.b64decode(text) if isinstance(text, str) else b""
    except binascii.Error:
        return b""


def _check(response: Any) -> None:
    if response.status_code in PASSING:
        raise Transient(f"the hub answers {response.status_code}", retry_after(response))
    if response.status_code not in (200, 201, 206):
        try:
            why = str(response.json()["message"])
        except (ValueError, KeyError, TypeError):
            why = ""
        raise Refused(response.status_code, one_line(why))


def _guarded(chunks: Iterator[bytes], what: str) -> Iterator[bytes]:
    with requests_errors(what, TOKEN):
        yield from chunks


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Refused as HubError."""
    try:
        yield
    except Refused as error:
        if error.status in (401, 403, 404):
            raise HubError(
                f"{what}: there is no such repository, revision or file, or the token may not see it ({TOKEN}); {error}"
            ) from None
        raise HubError(f"{what}: {error}") from None
