"""ModelScope, through the package modelscope-hub: large files to its storage one by one, then one commit of everything.

The package's own uploads (modelscope_hub/_upload.py) commit in batches, retry what fails and leave files out; so what is used
here is `HubApi.legacy` below them: `validate_blobs`, `upload_blob` and `create_commit` (modelscope_hub/_legacy_api.py).
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ernie_quant.errors import HubError
from ernie_quant.hubs import Conflict, Head, Listing, LocalFile
from ernie_quant.hubs._patience import Transient, patiently, small_file
from ernie_quant.hubs.modelscope.read import COMMIT, DEFAULT_BRANCH, KIND, ModelScope, client_errors

Result = TypeVar("Result")


def connect(endpoint: str | None = None, token: str | None = None) -> ModelScopePublisher:
    """The hub of modelscope_hub's settings (MODELSCOPE_API_TOKEN, MODELSCOPE_ENDPOINT). Raises HubError."""
    hub = ModelScope(endpoint, token)
    _ = hub.api  # tell at once that the package is missing
    return ModelScopePublisher(hub)


class ModelScopePublisher:
    """A `Publisher`.

    The commit endpoint takes no parent: the head is compared just before the commit, and the files after it. The package makes
    no branches and no pull requests.
    """

    default_branch = DEFAULT_BRANCH
    pull_requests = False

    def __init__(self, hub: ModelScope) -> None:
        self.hub = hub
        self._ready: dict[str, dict[str, Any]] = {}  # actions of the commit that follows

    def _call(self, what: str, work: Callable[[Any], Result]) -> Result:
        def once() -> Result:
            with client_errors(what):
                return work(self.hub.api)

        return patiently(once, what, time.sleep)

    def account(self) -> str:
        """Whose token it is."""
        return self._call("the token of ModelScope", lambda api: str(api.whoami().username or ""))

    def is_private(self, repo: str) -> bool | None:
        """None if there is no such repository, or none that the token may see; "internal" is not public."""
        errors = importlib.import_module("modelscope_hub.errors")
        public = importlib.import_module("modelscope_hub.constants").Visibility.PUBLIC

        def work(api: Any) -> bool | None:
            try:
                visibility = api.get_repo(repo, KIND).visibility
            except errors.NotExistError:
                return None
            if visibility is None:
                raise HubError(f"{repo}: the hub does not say whether it is private")
            return bool(visibility != public)

        return self._call(repo, work)

    def create(self, repo: str, *, private: bool) -> None:
        """A model repository; what the hub then says of it must be what was asked for."""
        errors = importlib.import_module("modelscope_hub.errors")

        def work(api: Any) -> None:
            with suppress(errors.AlreadyExistsError):  # by an answer that was lost
                api.create_repo(repo, KIND, visibility="private" if private else "public")

        self._call(repo, work)
        if self.is_private(repo) is (not private):
            raise HubError(f"{repo}: was made, but the hub says that it is {'public' if private else 'private'}")

    def head(self, repo: str, revision: str) -> Head | None:
        """Names, sizes and hashes at the end of a branch; "commit" is what `ModelScope` pins it to."""
        errors = importlib.import_module("modelscope_hub.errors")

        def work(_: Any) -> Head | None:
            try:
                return Head(*self.hub.pinned(repo, revision))
            except errors.NotExistError:
                return None

        return self._call(f"{repo}@{revision}", work)

    def branch(self, repo: str, revision: str) -> None:
        """Raises HubError: the package has no call for it."""
        raise HubError(f"{repo}: has no branch {revision}; ModelScope's is {DEFAULT_BRANCH}, others are made on its site")

    def fetch(self, repo: str, commit: str, name: str) -> bytes:
        """A small file."""
        return small_file(self.hub, Listing(f"modelscope://{repo}", repo, commit, {}), name)

    def upload(self, repo: str, revision: str, file: LocalFile) -> bool:
        """To the hub's storage, which is asked afterwards whether it has it; a small file travels with the commit."""
        if not _is_large(file):
            if file.path is None:
                raise HubError(f"{file.name}: was deleted here, and the hub does not have it")
            data = file.path.read_bytes()
            _check(file, hashlib.sha256(data).hexdigest())
            content = {"type": "normal", "sha256": "", "content": base64.b64encode(data).decode(), "encoding": "base64"}
            self._ready[file.name] = {"action": "create", "path": file.name, "size": file.nbytes} | content
            return False
        if file.path is not None:
            with open(file.path, "rb") as data_of:
                _check(file, hashlib.file_digest(data_of, "sha256").hexdigest())
        what = f"{repo}: {file.name}"
        self._call(what, lambda api: _send(api, repo, file, file.path))
        content = {"type": "lfs", "sha256": file.sha256, "content": "", "encoding": ""}
        self._ready[file.name] = {"action": "create", "path": file.name, "size": file.nbytes} | content
        return True

    def commit(
        self, repo: str, revision: str, parent: str, files: Sequence[LocalFile], drop: Sequence[str], message: str, pr: bool
    ) -> str:
        """All of it at once; no parent is checked by the hub, so there is a moment in which another commit goes unseen."""
        if pr:
            raise HubError(f"{repo}: ModelScope's package opens no pull requests; publish without --pr")
        gone = {"action": "delete", "type": "normal", "size": 0, "sha256": "", "content": "", "encoding": ""}
        actions = [*(self._ready[file.name] for file in files), *(gone | {"path": name} for name in drop)]

        def work(api: Any) -> None:
            if self.hub.pinned(repo, revision)[0] != parent:  # or the answer to our own commit was lost
                raise Conflict
            api.legacy.create_commit(repo, KIND, actions, message, revision)

        self._call(repo, work)
        head = self.head(repo, revision)
        if head is None:
            raise HubError(f"{repo}@{revision}: cannot be listed any more")
        return head.commit

    def tag(self, repo: str, name: str, commit: str) -> None:
        """Name a commit, and see that the name leads to it."""
        if not COMMIT.fullmatch(commit):
            raise HubError(f"{repo}: is published, but the hub names no commit that the tag {name} could stand for")
        errors = importlib.import_module("modelscope_hub.errors")

        def work(api: Any) -> None:
            with suppress(errors.AlreadyExistsError):
                api.create_repo_tag(repo, KIND, name, revision=commit)

        self._call(f"{repo}: tag {name}", work)
        head = self.head(repo, name)
        if head is None or head.commit != commit:
            raise HubError(f"{repo}: is published as {commit[:12]}, but the tag {name} does not lead there")


def _send(api: Any, repo: str, file: LocalFile, path: Path | None) -> None:
    """An address to upload to comes only for what the hub does not have yet."""
    wanted = [{"oid": file.sha256, "size": file.nbytes}]
    href = api.legacy.validate_blobs(repo, KIND, wanted).get(file.sha256)
    if href is None:
        return
    if path is None:
        raise HubError(f"{file.name}: was deleted here, and the hub does not have it")
    with open(path, "rb") as data:
        api.legacy.upload_blob(href, data, file.nbytes)
    if api.legacy.validate_blobs(repo, KIND, wanted).get(file.sha256) is not None:
        raise Transient("was uploaded, but the hub does not have it")


def _is_large(file: LocalFile) -> bool:
    """As modelscope_hub/_upload.py, _is_lfs: by suffix and size, but for what the hub itself reads."""
    constants = importlib.import_module("modelscope_hub.constants")
    name = PurePosixPath(file.name)
    if name.name.upper() in constants.UPLOAD_INLINE_METADATA_PATHS:
        return False
    return file.nbytes > constants.UPLOAD_LFS_FORCE_THRESHOLD_BYTES or name.suffix.lower() in constants.MODEL_LFS_SUFFIX


def _check(file: LocalFile, sha256: str) -> None:
    if sha256 != file.sha256:
        raise HubError(f"{file.path}: is not the file of the manifest any more; nothing was published")
