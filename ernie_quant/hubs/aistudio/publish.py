"""AI Studio, through the package aistudio-sdk: large files to its storage one by one, then one commit of everything.

The package raises nothing when a commit fails, so that is one request to the address of its `commit_files`
(aistudio_sdk/requests/hub.py), which is Gitea's repoChangeFiles.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ernie_quant.errors import HubError
from ernie_quant.hubs import Conflict, Head, Listing, LocalFile
from ernie_quant.hubs._patience import small_file
from ernie_quant.hubs.aistudio.read import DEFAULT_BRANCH, AiStudio, Refused, sdk
from ernie_quant.hubs.aistudio.storage import Storage, answered, call, check

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
        self.hub, self._storage = hub, Storage(hub)
        self._large: dict[str, bool] = {}  # files of the commit that follows
        self._begun: set[tuple[str, str]] = set()  # repositories without a commit, and branches that will be there

    def account(self) -> str:
        """Nobody's name, for the package asks for none; but there is a token."""
        if not self.hub.headers().get("Authorization", "").removeprefix("token").strip():
            raise HubError("AI Studio: there is no token: AISTUDIO_ACCESS_TOKEN")
        return ""

    def is_private(self, repo: str) -> bool | None:
        """As Gitea's repoGet says of a repository; None if there is none, or none that the token may see."""

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

        return call(repo, work)

    def create(self, repo: str, *, private: bool) -> None:
        """A model repository. The hub makes it in the token's namespace, whatever is asked for; so it is looked for after."""
        requests = sdk("requests.hub")
        name = repo.rpartition("/")[2]
        self.hub.headers()  # reads the token's file

        def work() -> Mapping[str, Any]:
            # as aistudio_sdk/hub.py, create_repo, which drops the organization too
            asked = {"repoType": 0 if private else 1, "repoName": name, "modelName": name, "desc": ""}
            answer = requests.request_aistudio_hub(**asked, license="Apache License 2.0", token=self.hub.token or "")
            return answered(repo, answer)

        answer = call(repo, work)
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

        return call(f"{repo}@{revision}", work)

    def branch(self, repo: str, revision: str) -> None:
        """Make a branch from the head of master; in a repository without a commit, the first one makes it."""
        if not call(repo, lambda: self._tree(repo, DEFAULT_BRANCH))[0]:
            self._begun.add((repo, revision))
            return
        body = {"new_branch_name": revision, "old_branch_name": DEFAULT_BRANCH}
        call(f"{repo}@{revision}", lambda: self.hub.ask("POST", f"{repo}/branches", body))

    def fetch(self, repo: str, commit: str, name: str) -> bytes:
        """All of a small file, as it is at a commit."""
        return small_file(self.hub, Listing(f"aistudio://{repo}", repo, commit, {}), name)

    def upload(self, repo: str, revision: str, file: LocalFile) -> bool:
        """To the hub's storage, which is asked afterwards whether it has it; a small file travels with the commit."""
        self._large[file.name] = self._storage.upload(repo, revision, file)
        return self._large[file.name]

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

        call(repo, work)
        return call(repo, lambda: self._tree(repo, revision))[0]

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

        call(f"{repo}: is published as {commit[:12]}, but the tag {name}", work)
        if call(repo, lambda: self.hub.tagged(repo, name)) != commit:
            raise HubError(f"{repo}: is published as {commit[:12]}, but the tag {name} does not lead there")


def _change(file: LocalFile, large: bool, before: str | None) -> dict[str, Any]:
    """What a commit says of one file; as aistudio_sdk/requests/hub.py, prepare_entry."""
    if large:
        data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{file.sha256}\nsize {file.nbytes}\n".encode()
    else:
        data = file.path.read_bytes() if file.path else b""
        check(file, hashlib.sha256(data).hexdigest())
    change = {"operation": "update" if before else "create", "path": file.name, "lfsPointer": large}
    return change | {"content": base64.b64encode(data).decode()} | ({"sha": before} if before else {})
