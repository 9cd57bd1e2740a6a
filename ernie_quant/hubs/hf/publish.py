"""The Hugging Face hub, through its own client: preupload file by file, one commit with a parent, a tag."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ernie_quant.errors import HubError
from ernie_quant.hubs import Conflict, Head, Listing, LocalFile, RemoteFile
from ernie_quant.hubs._patience import patiently, small_file
from ernie_quant.hubs.hf.read import HuggingFace, client_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi


Result = TypeVar("Result")
CONFLICT = 412
DEFAULT_BRANCH = "main"


def connect(endpoint: str | None = None, token: str | None = None) -> HuggingFacePublisher:
    """The hub of huggingface_hub's settings (HF_TOKEN, HF_ENDPOINT)."""
    return HuggingFacePublisher(endpoint, token)


class HuggingFacePublisher:
    """A `Publisher`."""

    default_branch = DEFAULT_BRANCH
    pull_requests = True

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        self.endpoint, self.token = endpoint, token
        self._uploaded: dict[str, Any] = {}  # operations of the client, which know what is there

    def _api(self) -> HfApi:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

        disable_progress_bars()  # the command has its own
        if "HF_HUB_VERBOSITY" not in os.environ:
            logging.set_verbosity_error()  # type: ignore[no-untyped-call] # its warnings of retries show signed addresses
        return HfApi(self.endpoint, token=self.token)

    def _call(self, what: str, work: Callable[[HfApi], Result]) -> Result:
        def once() -> Result:
            with client_errors(what):
                return work(self._api())

        return patiently(once, what, time.sleep)

    def account(self) -> str:
        """Whose token it is."""
        from huggingface_hub.errors import LocalTokenNotFoundError

        def work(api: HfApi) -> str:
            try:
                return str(api.whoami().get("name", ""))
            except LocalTokenNotFoundError:
                raise HubError("Hugging Face: there is no token: `hf auth login`, or HF_TOKEN") from None

        return self._call("the token of Hugging Face", work)

    def is_private(self, repo: str) -> bool | None:
        """None if there is no such repository, or none that the token may see."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def work(api: HfApi) -> bool | None:
            try:
                return bool(api.model_info(repo).private)
            except RepositoryNotFoundError:
                return None

        return self._call(repo, work)

    def create(self, repo: str, *, private: bool) -> None:
        """A model repository."""
        self._call(repo, lambda api: api.create_repo(repo, private=private, exist_ok=True))

    def head(self, repo: str, revision: str) -> Head | None:
        """Names, sizes and hashes at the end of a branch."""
        from huggingface_hub.errors import RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        def work(api: HfApi) -> Head | None:
            try:
                commit = str(api.model_info(repo, revision=revision).sha)
            except RevisionNotFoundError:
                return None
            entries = [e for e in api.list_repo_tree(repo, recursive=True, revision=commit) if isinstance(e, RepoFile)]
            files = {e.path: RemoteFile(e.path, e.size, e.lfs.sha256 if e.lfs else "", e.blob_id) for e in entries}
            return Head(commit, files)

        return self._call(f"{repo}@{revision}", work)

    def branch(self, repo: str, revision: str) -> None:
        """From the head of main."""
        self._call(f"{repo}@{revision}", lambda api: api.create_branch(repo, branch=revision, exist_ok=True))

    def fetch(self, repo: str, commit: str, name: str) -> bytes:
        """A small file."""
        return small_file(HuggingFace(self.endpoint, self.token), Listing(f"hf://{repo}", repo, commit, {}), name)

    def upload(self, repo: str, revision: str, file: LocalFile) -> bool:
        """To the hub's large file storage; a small file travels with the commit. Hashed here, whatever the manifest says."""
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.lfs import UploadInfo

        if file.path is None:  # uploaded and deleted before: the hub knows it by its hash
            operation = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=b"")
            operation.upload_info = UploadInfo(sha256=bytes.fromhex(file.sha256), size=file.nbytes, sample=b"")
            operation._upload_mode, operation._is_uploaded = "lfs", True
        else:
            operation = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file.path))
            if operation.upload_info.sha256.hex() != file.sha256:
                raise HubError(f"{file.path}: is not the file of the manifest any more; nothing was published")
            self._call(
                f"{repo}: {file.name}",
                lambda api: api.preupload_lfs_files(repo, [operation], revision=revision, free_memory=False),
            )
        self._uploaded[file.name] = operation
        return bool(operation._is_uploaded)

    def commit(
        self, repo: str, revision: str, parent: str, files: Sequence[LocalFile], drop: Sequence[str], message: str, pr: bool
    ) -> str:
        """Returns the revision at which it can be read: the commit, or `refs/pr/N`."""
        from huggingface_hub import CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError

        operations = [*(self._uploaded[f.name] for f in files), *(CommitOperationDelete(path_in_repo=name) for name in drop)]
        for operation in operations:
            operation._is_committed = False  # a commit that was lost may be tried again

        def work(api: HfApi) -> str:
            try:
                info = api.create_commit(
                    repo, operations, commit_message=message, revision=revision, parent_commit=parent, create_pr=pr
                )
            except HfHubHTTPError as error:
                if error.response is not None and error.response.status_code == CONFLICT:
                    raise Conflict from None
                raise
            return str(info.pr_revision or info.oid)

        return self._call(repo, work)

    def tag(self, repo: str, name: str, commit: str) -> None:
        """Lightweight."""
        self._call(f"{repo}: tag {name}", lambda api: api.create_tag(repo, tag=name, revision=commit, exist_ok=True))
