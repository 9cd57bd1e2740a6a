"""AI Studio's storage of large files, through the parts of the package aistudio-sdk that bring one file there.

The package's own uploads (aistudio_sdk/hub.py, upload_folder) leave files out with no more than a printed line. So only
their parts are used here: `request_aistudio_git_upload_access`, `_upload_lfs_file` and `request_aistudio_verify_lfs_file`.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from json import JSONDecodeError
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote

from ernie_quant.errors import HubError
from ernie_quant.hubs import LocalFile
from ernie_quant.hubs._answers import PASSING, one_line, requests_errors
from ernie_quant.hubs._patience import Transient, patiently
from ernie_quant.hubs.aistudio.read import DEFAULT_BRANCH, TOKEN, AiStudio, refusals, sdk

Result = TypeVar("Result")
CARD = "README.md"


class Storage:
    """Where the bytes of large files lie, beside the git that has their pointers."""

    def __init__(self, hub: AiStudio) -> None:
        self.hub = hub
        self._forbidden: dict[str, Sequence[str]] = {}  # repository -> suffixes

    def upload(self, repo: str, revision: str, file: LocalFile) -> bool:
        """Bring a file to the storage and see that it is there. False: the hub keeps it in git, so it travels with the commit."""
        what = f"{repo}: {file.name}"
        if file.path is not None:
            with open(file.path, "rb") as data:
                check(file, hashlib.file_digest(data, "sha256").hexdigest())
            self._permit(repo, revision, file, file.path)
        # aistudio_sdk/requests/hub.py, request_aistudio_git_files_type
        body = {"files": [{"path": file.name}]}
        answer = call(what, lambda: self.hub.ask("POST", f"{repo}/preupload/{quote(revision, safe='')}", body))
        large = [entry.get("lfs") for entry in answer.get("files") or [] if entry.get("path") == file.name]
        if large not in ([True], [False]):
            raise HubError(f"{what}: the hub does not say where it belongs")
        if large == [False] and file.nbytes > sdk("config").COMMON_FILE_SIZE_LIMIT:
            raise HubError(f"{what}: the hub takes no more than 5 MB of a file that it keeps in git")
        if large == [False] and file.path is None:
            raise HubError(f"{what}: was deleted here, and the hub does not have it")
        if large == [True]:
            call(what, lambda: self._store(repo, revision, file))
        return large == [True]

    def _store(self, repo: str, revision: str, file: LocalFile) -> None:
        """Upload what the hub does not have yet, and see that it has it then."""
        access = self._access(repo, revision, file)
        if not access["upload"]:
            return
        if file.path is None:
            raise HubError(f"{file.name}: was deleted here, and the hub does not have it")
        with redirect_stdout(sys.stderr):  # where its clock belongs
            stored = sdk("hub").Hub()._upload_lfs_file(access, str(file.path), file.nbytes)
        if not stored:
            raise Transient("the package could not upload it; it says why in its log")
        if access["verify_href"]:
            with suppress(JSONDecodeError):  # the package reads an answer that git-lfs lets be empty
                verify = sdk("requests.hub").request_aistudio_verify_lfs_file
                answered(file.name, verify(access["verify_href"], file.sha256, file.nbytes, self.hub.token))
        if self._access(repo, revision, file)["upload"]:
            raise Transient("was uploaded, but the hub does not have it")

    def _access(self, repo: str, revision: str, file: LocalFile) -> Mapping[str, Any]:
        """Where to upload a file to, and where to have it verified; no address for one that the hub has."""
        owner, name = repo.split("/")
        self.hub.headers()  # reads the token's file
        try:
            access = sdk("requests.hub").request_aistudio_git_upload_access(
                self.hub.host, owner, name, revision, file.nbytes, file.sha256, self.hub.token
            )
        except (KeyError, TypeError) as error:
            raise HubError(f"{file.name}: the hub's answer is not what the package expects: {error}") from None
        return answered(file.name, access)

    def _permit(self, repo: str, revision: str, file: LocalFile, path: Path) -> None:
        """Raises HubError for what the package would leave out (aistudio_sdk/hub.py, upload_folder, _upload_items)."""
        config, util = sdk("config"), sdk("utils.util")
        site = os.environ.get("STUDIO_MODEL_API_URL_PREFIX", config.STUDIO_MODEL_API_URL_PREFIX_DEFAULT)
        if repo not in self._forbidden:
            answer = call(repo, lambda: self.hub.ask("GET", f"{site}{config.BLACK_LIST_URL}?repoId={repo}"))
            self._forbidden[repo] = answer.get("result") or []
        if PurePosixPath(file.name).suffix.lower() in self._forbidden[repo]:
            raise HubError(f"{file.name}: AI Studio takes no files of this type")
        if file.name == CARD and revision == DEFAULT_BRANCH:
            try:
                body = {"yaml": util.extract_yaml_block(str(path)), "repoId": repo}
            except ValueError:
                raise HubError(f"{path}: has no front matter, and AI Studio takes no card without") from None
            answer = call(repo, lambda: self.hub.ask("POST", f"{site}{config.README_CHECK_URL}", body))
            if answer.get("errorCode") != 0:
                raise HubError(f"{path}: AI Studio does not take the card: {one_line(str(answer.get('errorMsg')))}")


def call(what: str, work: Callable[[], Result]) -> Result:
    """What `work` returns, with patience. Raises HubError, or RetryError once patience has ended."""

    def once() -> Result:
        with refusals(what), requests_errors(what, TOKEN):
            return work()

    return patiently(once, what, time.sleep)


def answered(what: str, answer: Any) -> Mapping[str, Any]:
    """An answer of the package, whose errors are answers too (aistudio_sdk/utils/util.py, err_resp)."""
    if not isinstance(answer, Mapping):
        raise HubError(f"{what}: the hub answers {one_line(str(answer))}")
    status = answer.get("biz_code")
    why = one_line(str(answer.get("error_msg") or answer.get("errorMsg") or ""))
    if answer.get("error_code") and status in PASSING:
        raise Transient(f"the hub answers {status}: {why}")
    if "repo already created" in why:  # by an answer that was lost
        return answer
    if answer.get("error_code") or answer.get("errorCode"):
        raise HubError(f"{what}: the hub refuses: {why}")
    return answer


def check(file: LocalFile, sha256: str) -> None:
    """Raises HubError if what was read of a file is not what its manifest says."""
    if sha256 != file.sha256:
        raise HubError(f"{file.path}: is not the file of the manifest any more; nothing was published")
