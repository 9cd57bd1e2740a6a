"""Publish a finished result: every file by hash, one commit, and nothing believed that the hub does not report itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ernie_quant.disk import write_file
from ernie_quant.errors import HubError, RetryError, VerifyError
from ernie_quant.hubs import Conflict, Head, LocalFile, Publisher, RemoteFile
from ernie_quant.paths import MANIFEST, README
from ernie_quant.publish.files import delete, entitled, local_files, refuse_odd, reported
from ernie_quant.publish.places import folder_of, front_page, manifests, remote_name
from ernie_quant.runtimes import Place

FRONT_PAGE = ".ernie-quant-front-page.md"  # in the folder of a result; no file of it
RACES = 5  # lost ones before we give up
# a repository that holds no more is as good as empty
NEUTRAL = (".gitattributes", README, "LICENSE", ".gitignore", "configuration.json")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Destination:
    """Where to: `private` None leaves a repository as it is and makes a new one private."""

    repo: str
    revision: str = ""  # the hub's default branch
    private: bool | None = None
    pr: bool = False
    tag: str = ""
    delete: bool = False  # weight files, as soon as they are uploaded
    odd: bool = False  # even if weights hold NaN or infinity
    hub: str = "hf"  # by the scheme of its addresses
    name: str = ""  # of the model, as its card says it; of the repository, if there is none
    base_model: str = ""  # ORG/NAME of the source; known already if that was on a hub

    @property
    def place(self) -> Place:
        """Where commands look for it."""
        return Place(self.repo, self.hub)


@dataclass(frozen=True)
class Published:
    """What the hub reports now."""

    status: str  # published or up-to-date
    repo: str
    commit: str
    tag: str
    uploaded: int
    bytes_uploaded: int
    dropped: int


def publish(
    out: Path, hub: Publisher, destination: Destination, progress: Progress = lambda _: None, evaluated: Path | None = None
) -> Published:  # fmt: skip
    """Make the repository hold what `out` holds, with a kept evaluation of it if there is one.

    Raises HubError, OutputError, VerifyError or RetryError.
    """
    destination = replace(destination, revision=destination.revision or hub.default_branch)
    if destination.pr and not hub.pull_requests:
        raise HubError(f"{destination.repo}: this hub has no pull requests that a program could open; leave --pr out")
    if not destination.odd:
        refuse_odd(destination.repo, reported(out))
    said = {"name": destination.name, "base_model": destination.base_model}
    manifest = entitled(out, destination.place, evaluated, said)
    files = local_files(out, manifest, destination.repo)
    folder = folder_of(manifest)
    _open_repository(hub, destination)
    sent: dict[str, LocalFile] = {}
    tagged = hub.head(destination.repo, destination.tag) if destination.tag and not destination.pr else None
    for _ in range(RACES):
        head = _head(hub, destination)
        drop = _left_behind(hub, destination, head, files, folder)
        page = _page(out, manifest, head, files, destination.place) if folder else []
        missing = [file for file in [*files, *page] if not _is_there(file, head.files.get(file.name))]
        if tagged and (missing or drop or tagged.commit != head.commit):
            raise HubError(
                f"{destination.repo}: the tag {destination.tag} names commit {tagged.commit[:12]} already; choose another"
            )
        if not missing and not drop:  # or the answer to our commit was lost, not the commit
            status = "published" if sent else "up-to-date"
            return _done(hub, destination, head.commit, status, list(sent.values()), drop, tagged is not None)
        for file in (f for f in missing if f.name not in sent):
            stored = hub.upload(destination.repo, destination.revision, file)
            sent[file.name] = file
            if stored and destination.delete:
                delete(out, destination.repo, file)
            progress(file.nbytes)
        message = f"{manifest['recipe']['name']} of {manifest['source_name']}, ernie-quant {manifest['version']}"
        try:
            commit = hub.commit(destination.repo, destination.revision, head.commit, missing, drop, message, destination.pr)
        except (Conflict, RetryError) as error:
            if isinstance(error, RetryError) and _is_published(hub, destination, files):
                continue
            if isinstance(error, RetryError):
                raise
            continue
        _verify(hub, destination, commit, [*files, *page])
        return _done(hub, destination, commit, "published", missing, drop)
    raise RetryError(f"{destination.repo}: others committed {RACES} times while this was at work")


def _open_repository(hub: Publisher, destination: Destination) -> None:
    """Make it if there is none, private if nobody says otherwise; the visibility of one that is there is left alone."""
    if destination.repo.count("/") != 1:  # a hub would make it in the namespace of the token's owner
        raise HubError(f"{destination.repo}: is not ORG/NAME")
    private = hub.is_private(destination.repo)
    if private is None:
        hub.create(destination.repo, private=destination.private is not False)
    elif destination.private is not None and private != destination.private:
        is_, asked = ("private", "--public") if private else ("public", "--private")
        raise HubError(f"{destination.repo}: is {is_}, and {asked} was asked for; change it on the hub, or leave {asked} out")


def _head(hub: Publisher, destination: Destination) -> Head:
    """The branch that is published to, made if there is none."""
    head = hub.head(destination.repo, destination.revision)
    if head is None:
        hub.branch(destination.repo, destination.revision)
        head = hub.head(destination.repo, destination.revision)
    if head is None:
        raise HubError(f"{destination.repo}: has no branch {destination.revision}, and none could be made")
    return head


def _page(out: Path, manifest: Mapping[str, Any], head: Head, files: list[LocalFile], place: Place) -> list[LocalFile]:
    """README.md at the top of a repository of several types, as it is with this one."""
    now = {file.name: RemoteFile(file.name, file.nbytes, file.sha256) for file in files}
    data = front_page(manifest, {**head.files, **now}, place)
    write_file(out / FRONT_PAGE, data)
    return [LocalFile(README, len(data), hashlib.sha256(data).hexdigest(), out / FRONT_PAGE)]


def _left_behind(
    hub: Publisher, destination: Destination, head: Head, files: list[LocalFile], folder: str
) -> list[str]:  # fmt: skip
    """Files of an earlier result that this one has no more. Raises HubError for a repository that is not ours."""
    now = {file.name for file in files}
    there = manifests(head.files)
    if there and ("" in there) == bool(folder):
        what = "a result that has it to itself" if folder else f"GGUF files ({', '.join(sorted(there))})"
        raise HubError(f"{destination.repo}: holds {what}; choose another repository or branch")
    if there and folder not in there:
        return []
    if not there:
        if others := sorted(set(head.files) - set(NEUTRAL)):
            shown = ", ".join(others[:3])
            raise HubError(
                f"{destination.repo}: holds {shown} and was not made by ernie-quant; choose another repository or branch"
            )
        return []
    try:
        before = json.loads(hub.fetch(destination.repo, head.commit, there[folder]))["files"]
        theirs = {remote_name(name, folder) for name in before}
        return sorted(name for name in head.files if name in theirs and name not in now)
    except (ValueError, KeyError, TypeError):
        raise HubError(f"{destination.repo}: its {MANIFEST} cannot be read; choose another repository or branch") from None


def _is_there(file: LocalFile, remote: RemoteFile | None) -> bool:
    """Does the hub report this very file?"""
    if remote is None or remote.nbytes != file.nbytes:
        return False
    if remote.sha256:
        return remote.sha256 == file.sha256
    if file.path is None:
        return False
    digest = remote.hasher()
    digest.update(file.path.read_bytes())
    return digest.hexdigest() == remote.digest


def _is_published(hub: Publisher, destination: Destination, files: list[LocalFile]) -> bool:
    head = hub.head(destination.repo, destination.revision)
    return head is not None and all(_is_there(file, head.files.get(file.name)) for file in files)


def _verify(hub: Publisher, destination: Destination, commit: str, files: list[LocalFile]) -> None:
    """Names, sizes and hashes as the hub reports them after the commit. Raises VerifyError."""
    head = hub.head(destination.repo, commit)
    there = head.files if head else {}
    wrong = [
        f"{f.name}: {'is not there' if f.name not in there else 'has another size or hash'}"
        for f in files
        if not _is_there(f, there.get(f.name))
    ]
    if wrong:
        raise VerifyError(f"{destination.repo}@{commit[:12]}: {len(wrong)} file(s) are not on the hub as they are here", wrong)


def _done(
    hub: Publisher,
    destination: Destination,
    commit: str,
    status: str,
    uploaded: list[LocalFile],
    dropped: list[str],
    tagged: bool = False,
) -> Published:
    if destination.tag and not destination.pr and not tagged:
        hub.tag(destination.repo, destination.tag, commit)
    nbytes = sum(file.nbytes for file in uploaded)
    return Published(
        status, destination.repo, commit, "" if destination.pr else destination.tag, len(uploaded), nbytes, len(dropped)
    )


def as_json(result: Published) -> dict[str, Any]:
    """What the command prints with --json."""
    return asdict(result)
