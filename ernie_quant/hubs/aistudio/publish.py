"""AI Studio, through the package aistudio-sdk: large files to its storage one by one, then one commit of everything.

The package's own uploads (aistudio_sdk/hub.py, upload_folder) leave files out with no more than a printed line, and raise
nothing when a commit fails. So only their parts are used here: `request_aistudio_git_upload_access`, `_upload_lfs_file` and
`request_aistudio_verify_lfs_file`; the commit is one request to the address of `commit_files` (aistudio_sdk/requests/hub.py),
which is Gitea's repoChangeFiles.
"""

from __future__ import annotations

import base64
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
from ernie_quant.hubs import Conflict, Head, Listing, LocalFile
from ernie_quant.hubs._answers import PASSING, one_line, requests_errors
from ernie_quant.hubs._patience import Transient, patiently, small_file
from ernie_quant.hubs.aistudio.read import DEFAULT_BRANCH, TOKEN, AiStudio, Refused, refusals, sdk

Result = TypeVar("Result")
CARD = "README.md"
EMPTY = 409  # Gitea's answer when a repository has no commit yet; and to a commit that conflicts
STALE = (409, 422)  # Gitea's answers to a commit whose files are not as they were


def connect(host: str | None = None, token: str | None = None) -> AiStudioPublisher:
    """The hub of aistudio_sdk's settings (AISTUDIO_ACCESS_TOKEN, STUDIO_GIT_HOST). Raises HubError."""
    sdk("config")  # tell at once that the package is missing
    return AiStudioPublisher(AiStudio(host, token))


class AiStudioPublisher:
    """A `Publisher`.

    A commit names git's sha1 of every file that it changes, but no parent: the head is compared just before it as well, and
    the files after it. Branches and tags are Gitea's (repoCreateBranch, repoCreateTag), which the package does not use:
    they are looked for afterwards. There are no pull requests. The sha256 that the hub reports of a large file is that of its
    pointer in git; of the bytes behind it, it says no more than that it has an object of that name and size.
    """

    default_branch = DEFAULT_BRANCH
    pull_requests = False

    def __init__(self, hub: AiStudio) -> None:
        self.hub = hub
        self._large: dict[str, bool] = {}  # files of the commit that follows
        self._begun: set[tuple[str, str]] = set()  # repositories without a commit, and branches that will be there
        self._forbidden: dict[str, Sequence[str]] = {}  # repository -> suffixes

    def _call(self, what: str, work: Callable[[], Result]) -> Result:
        def once() -> Result:
            with refusals(what), requests_errors(what, TOKEN):
                return work()

        return patiently(once, what, time.sleep)

    def is_private(self, repo: str) -> bool | None:
        """As Gitea's repoGet says; None if there is no such repository, or none that the token may see."""

        def work() -> bool | None:
            try:
                private = self.hub.ask("GET", repo).get("private")
            except Refused as error:
                if error.status == 404:
                    return None
                raise
            if not isinstance(private, bool):
                raise HubError(f"{repo}: the hub does not say whether it is private")
            return private

        return self._call(repo, work)

    def create(self, repo: str, *, private: bool) -> None:
        """A model repository. The hub makes it in the token's namespace, whatever is asked for; so it is looked for after."""
        requests = sdk("requests.hub")
        name = repo.rpartition("/")[2]
        self.hub.headers()  # reads the token's file

        def work() -> Mapping[str, Any]:
            # as aistudio_sdk/hub.py, create_repo, which drops the organization too
            asked = {"repoType": 0 if private else 1, "repoName": name, "modelName": name, "desc": ""}
            answer = requests.request_aistudio_hub(**asked, license="Apache License 2.0", token=self.hub.token or "")
            return _answered(repo, answer)

        answer = self._call(repo, work)
        is_ = self.is_private(repo)
        if is_ is None:
            made = (answer.get("result") or {}).get("repoName", name)
            raise HubError(
                f"{repo}: AI Studio made {made} in the namespace of the token's owner instead; name that, and delete it"
            )
        if is_ is not private:
            raise HubError(f"{repo}: was made, but the hub says that it is {'private' if is_ else 'public'}")

    def head(self, repo: str, revision: str) -> Head | None:
        """Names, sizes and hashes at the end of a branch; one that `branch` began has the commit "" until then."""

        def work() -> Head | None:
            try:
                return Head(*self.hub.files(repo, revision))
            except Refused as error:
                if error.status == EMPTY and (repo, revision) in self._begun:
                    return Head("", {})
                if error.status in (404, EMPTY):
                    return None
                raise

        return self._call(f"{repo}@{revision}", work)

    def branch(self, repo: str, revision: str) -> None:
        """From the head of master; in a repository without a commit, the first one makes it."""
        if not self._call(repo, lambda: self._tree(repo, DEFAULT_BRANCH))[0]:
            self._begun.add((repo, revision))
            return
        body = {"new_branch_name": revision, "old_branch_name": DEFAULT_BRANCH}
        self._call(f"{repo}@{revision}", lambda: self.hub.ask("POST", f"{repo}/branches", body))

    def fetch(self, repo: str, commit: str, name: str) -> bytes:
        """A small file."""
        return small_file(self.hub, Listing(f"aistudio://{repo}", repo, commit, {}), name)

    def upload(self, repo: str, revision: str, file: LocalFile) -> bool:
        """To the hub's storage, which is asked afterwards whether it has it; a small file travels with the commit."""
        what = f"{repo}: {file.name}"
        if file.path is not None:
            with open(file.path, "rb") as data:
                _check(file, hashlib.file_digest(data, "sha256").hexdigest())
            self._permit(repo, revision, file, file.path)
        # aistudio_sdk/requests/hub.py, request_aistudio_git_files_type
        body = {"files": [{"path": file.name}]}
        answer = self._call(what, lambda: self.hub.ask("POST", f"{repo}/preupload/{quote(revision, safe='')}", body))
        large = [entry.get("lfs") for entry in answer.get("files") or [] if entry.get("path") == file.name]
        if large not in ([True], [False]):
            raise HubError(f"{what}: the hub does not say where it belongs")
        if large == [False] and file.nbytes > sdk("config").COMMON_FILE_SIZE_LIMIT:
            raise HubError(f"{what}: the hub takes no more than 5 MB of a file that it keeps in git")
        if large == [False] and file.path is None:
            raise HubError(f"{what}: was deleted here, and the hub does not have it")
        if large == [True]:
            self._call(what, lambda: self._store(repo, revision, file))
        self._large[file.name] = large == [True]
        return large == [True]

    def _store(self, repo: str, revision: str, file: LocalFile) -> None:
        """An address to upload to comes only for what the hub does not have yet."""
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
                _answered(file.name, verify(access["verify_href"], file.sha256, file.nbytes, self.hub.token))
        if self._access(repo, revision, file)["upload"]:
            raise Transient("was uploaded, but the hub does not have it")

    def _access(self, repo: str, revision: str, file: LocalFile) -> Mapping[str, Any]:
        owner, name = repo.split("/")
        self.hub.headers()  # reads the token's file
        try:
            access = sdk("requests.hub").request_aistudio_git_upload_access(
                self.hub.host, owner, name, revision, file.nbytes, file.sha256, self.hub.token
            )
        except (KeyError, TypeError) as error:
            raise HubError(f"{file.name}: the hub's answer is not what the package expects: {error}") from None
        return _answered(file.name, access)

    def _permit(self, repo: str, revision: str, file: LocalFile, path: Path) -> None:
        """Raises HubError for what the package would leave out (aistudio_sdk/hub.py, upload_folder, _upload_items)."""
        config, util = sdk("config"), sdk("utils.util")
        site = os.environ.get("STUDIO_MODEL_API_URL_PREFIX", config.STUDIO_MODEL_API_URL_PREFIX_DEFAULT)
        if repo not in self._forbidden:
            answer = self._call(repo, lambda: self.hub.ask("GET", f"{site}{config.BLACK_LIST_URL}?repoId={repo}"))
            self._forbidden[repo] = answer.get("result") or []
        if PurePosixPath(file.name).suffix.lower() in self._forbidden[repo]:
            raise HubError(f"{file.name}: AI Studio takes no files of this type")
        if file.name == CARD and revision == DEFAULT_BRANCH:
            try:
                body = {"yaml": util.extract_yaml_block(str(path)), "repoId": repo}
            except ValueError:
                raise HubError(f"{path}: has no front matter, and AI Studio takes no card without") from None
            answer = self._call(repo, lambda: self.hub.ask("POST", f"{site}{config.README_CHECK_URL}", body))
            if answer.get("errorCode") != 0:
                raise HubError(f"{path}: AI Studio does not take the card: {one_line(str(answer.get('errorMsg')))}")

    def commit(
        self, repo: str, revision: str, parent: str, files: Sequence[LocalFile], drop: Sequence[str], message: str, pr: bool
    ) -> str:
        """All of it at once, or nothing; the hub refuses it if one of these files has changed since."""
        if pr:
            raise HubError(f"{repo}: AI Studio has no pull requests; publish without --pr")

        def work() -> None:
            commit, before = self._tree(repo, revision)
            if commit != parent:  # or the answer to our own commit was lost
                raise Conflict
            changes = [_change(file, self._large[file.name], before.get(file.name)) for file in files]
            changes += [{"operation": "delete", "path": name, "sha": before[name], "lfsPointer": False} for name in drop]
            try:
                self.hub.ask("POST", f"{repo}/contents", {"branch": revision, "message": message, "files": changes})
            except Refused as error:
                if error.status in STALE and self._tree(repo, revision)[0] != parent:
                    raise Conflict from None
                raise

        self._call(repo, work)
        return self._call(repo, lambda: self._tree(repo, revision))[0]

    def _tree(self, repo: str, revision: str) -> tuple[str, dict[str, str]]:
        try:
            return self.hub.tree(repo, revision)
        except Refused as error:
            if error.status == EMPTY:
                return "", {}
            raise

    def tag(self, repo: str, name: str, commit: str) -> None:
        """Name a commit, and see that the name leads to it."""

        def work() -> None:
            if self.hub.tagged(repo, name) is None:
                self.hub.ask("POST", f"{repo}/tags", {"tag_name": name, "target": commit})

        self._call(f"{repo}: is published as {commit[:12]}, but the tag {name}", work)
        if self._call(repo, lambda: self.hub.tagged(repo, name)) != commit:
            raise HubError(f"{repo}: is published as {commit[:12]}, but the tag {name} does not lead there")


def _change(file: LocalFile, large: bool, before: str | None) -> dict[str, Any]:
    """As aistudio_sdk/requests/hub.py, prepare_entry."""
    if large:
        data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{file.sha256}\nsize {file.nbytes}\n".encode()
    else:
        data = file.path.read_bytes() if file.path else b""
        _check(file, hashlib.sha256(data).hexdigest())
    change = {"operation": "update" if before else "create", "path": file.name, "lfsPointer": large}
    return change | {"content": base64.b64encode(data).decode()} | ({"sha": before} if before else {})


def _answered(what: str, answer: Any) -> Mapping[str, Any]:
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


def _check(file: LocalFile, sha256: str) -> None:
    if sha256 != file.sha256:
        raise HubError(f"{file.path}: is not the file of the manifest any more; nothing was published")
