"""What the loopback hub holds: blobs on disk by sha256, repositories with immutable commits and references to them."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import IO

PIECE = 1 << 18  # bytes that are held in memory at once
FIRST_DAY = datetime(2024, 1, 1, tzinfo=UTC)  # commits are a minute apart from there: dates are the same in every run
LFS_SUFFIXES = ("7z", "bin", "ckpt", "gguf", "h5", "model", "msgpack", "npy", "npz", "onnx", "parquet")
MORE_LFS_SUFFIXES = ("pdparams", "pickle", "pkl", "pt", "pth", "safetensors", "tar", "zip", "tgz")
GITATTRIBUTES = "".join(f"*.{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES + MORE_LFS_SUFFIXES)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
STALE = "A commit has happened since. Please refresh and try again."
LFS_FROM = 10 * 1000 * 1000  # bytes; a larger file is LFS whatever its name


class HubError(Exception):
    """An answer that is not 2xx; `code` is what the client calls X-Error-Code."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = dict(headers or {})
        self.extra: dict[str, object] = {}  # further keys of the JSON body


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class File:
    """One path of a commit. `oid` is git's: of the content, or of the pointer if `lfs`."""

    size: int
    sha256: str
    lfs: bool
    oid: str

    @staticmethod
    def large(sha256: str, size: int) -> File:
        return File(size, sha256, True, git_blob_id(POINTER.format(sha256, size).encode()))

    @property
    def pointer_size(self) -> int:
        return len(POINTER.format(self.sha256, self.size))


@dataclass(frozen=True)
class Commit:
    """Immutable; the id follows from the parent, the content and the message."""

    id: str
    parent: str | None
    files: Mapping[str, File] = field(repr=False)
    title: str
    description: str
    date: str

    @staticmethod
    def make(parent: Commit | None, files: Mapping[str, File], title: str, description: str, number: int) -> Commit:
        content = sorted((path, file.oid) for path, file in files.items())
        text = json.dumps([parent.id if parent else None, content, title, description])
        date = (FIRST_DAY + timedelta(minutes=number)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        known = MappingProxyType(dict(sorted(files.items())))
        return Commit(hashlib.sha1(text.encode()).hexdigest(), parent.id if parent else None, known, title, description, date)


class BlobWriter:
    """Receives bytes into a temporary file; `keep()` makes it a blob."""

    def __init__(self, blobs: Blobs, file: IO[bytes], path: Path) -> None:
        self._blobs, self._file, self._path = blobs, file, path
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, piece: bytes) -> None:
        self._file.write(piece)
        self._sha256.update(piece)
        self.size += len(piece)

    def write_file(self, path: Path) -> None:
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                self.write(piece)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def keep(self) -> str:
        self._file.flush()
        place = self._blobs.path(self.sha256)
        place.parent.mkdir(parents=True, exist_ok=True)
        self._path.replace(place)
        return self.sha256


class Blobs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "incoming").mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    @contextmanager
    def writer(self) -> Iterator[BlobWriter]:
        with tempfile.NamedTemporaryFile(dir=self.folder / "incoming", delete=False) as file:
            path = Path(file.name)
            try:
                yield BlobWriter(self, file.file, path)
            finally:
                path.unlink(missing_ok=True)

    def add(self, content: bytes | Path, *, lfs: bool) -> File:
        with self.writer() as writer:
            if isinstance(content, bytes):
                writer.write(content)
            else:
                writer.write_file(content)
            sha256, size = writer.keep(), writer.size
        if lfs:
            return File.large(sha256, size)
        return File(size, sha256, False, git_blob_id(self.path(sha256).read_bytes()))


class Repo:
    """A model repository. Everything public here is what tests look at."""

    def __init__(self, name: str, blobs: Blobs, *, private: bool = False) -> None:
        self.name, self.private, self.gated = name, private, ""
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.pull_requests: dict[int, str] = {}
        self.merged: set[int] = set()
        self.objects: set[str] = set()  # sha256 of the LFS objects that were uploaded to this repository
        self._commits: dict[str, Commit] = {}
        self._blobs = blobs
        self._lock = threading.RLock()
        first = Commit.make(None, {".gitattributes": blobs.add(GITATTRIBUTES.encode(), lfs=False)}, "initial commit", "", 0)
        self._commits[first.id] = first
        self.branches["main"] = first.id

    def find(self, revision: str = "main") -> Commit:
        """The commit that a branch, tag, refs/…, full or shortened commit id stands for. Raises HubError."""
        refs = {f"refs/pr/{number}": commit for number, commit in self.pull_requests.items()}
        refs |= {f"refs/tags/{name}": commit for name, commit in self.tags.items()} | self.tags
        refs |= {f"refs/heads/{name}": commit for name, commit in self.branches.items()} | self.branches
        if revision in refs:
            return self._commits[refs[revision]]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            for commit in self._commits.values():
                if commit.id.startswith(revision):
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, File]:
        return dict(self.find(revision).files)

    def read(self, path: str, revision: str = "main") -> bytes:
        return self._blobs.path(self.find(revision).files[path].sha256).read_bytes()

    def commits(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        found, commit = [], self.find(revision)
        while commit.parent:
            found.append(commit)
            commit = self._commits[commit.parent]
        return [*found, commit]

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The commit that gave a file, or anything in a folder, its present content."""
        while commit.parent and self._same(commit, self._commits[commit.parent], path):
            commit = self._commits[commit.parent]
        return commit

    @staticmethod
    def _same(one: Commit, other: Commit, path: str) -> bool:
        def below(commit: Commit) -> dict[str, File]:
            return {p: f for p, f in commit.files.items() if p == path or p.startswith(path + "/")}

        return below(one) == below(other)

    def commit(
        self,
        revision: str,
        changes: Mapping[str, File | None],
        title: str,
        description: str = "",
        *,
        parent: str | None = None,
        pull_request: bool = False,
    ) -> tuple[Commit, int | None]:
        """Add (or, at None, delete) files on a branch or on refs/pr/N; or as a new pull request, whose number is returned."""
        with self._lock:
            head = self.find(parent or revision if pull_request else revision)
            number = len(self.pull_requests) + 1 if pull_request else self._writable(revision)
            if parent and not pull_request and not head.id.startswith(parent):
                raise HubError(412, STALE)
            files = {path: file for path, file in {**head.files, **changes}.items() if file is not None}
            made = Commit.make(head, files, title, description, len(self._commits))
            self._commits[made.id] = made
            if number:
                self.pull_requests[number] = made.id
            else:
                self.branches[revision.removeprefix("refs/heads/")] = made.id
            return made, number

    def _writable(self, revision: str) -> int | None:
        """The number of the pull request whose reference `revision` is; None for a branch."""
        if revision.removeprefix("refs/heads/") in self.branches:
            return None
        if number := re.fullmatch(r"refs/pr/(\d+)", revision):
            return int(number[1])
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def open_pull_request(self) -> int:
        with self._lock:
            self.pull_requests[number := len(self.pull_requests) + 1] = self.branches["main"]
            return number

    def merge(self, number: int) -> None:
        """Bring what the pull request changed since it left main onto main."""
        with self._lock:
            mine, on_main = self.commits(f"refs/pr/{number}"), {c.id for c in self.commits()}
            base = next(c for c in mine if c.id in on_main)
            gone: dict[str, File | None] = dict.fromkeys(set(base.files) - set(mine[0].files))
            changed = {p: f for p, f in mine[0].files.items() if base.files.get(p) != f}
            self.commit("main", {**gone, **changed}, f"Merge pull request #{number}")
            self.merged.add(number)

    def is_lfs(self, path: str, size: int, sample: bytes, revision: str = "main") -> bool:
        """The hub's own choice: .gitattributes, the size, and a zero byte in the first 512."""
        attributes = self.find(revision).files.get(".gitattributes")
        lines = self._blobs.path(attributes.sha256).read_text().splitlines() if attributes else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        name = path.rsplit("/", 1)[-1]
        return size > 0 and (size > LFS_FROM or b"\0" in sample or any(fnmatch(n, p) for p in patterns for n in (name, path)))


class Store:
    """All repositories, and who may do what."""

    def __init__(self, folder: Path) -> None:
        self.blobs = Blobs(folder / "blobs")
        self.uploads = folder / "uploads"  # parts of multipart uploads that are not complete
        self.repos: dict[str, Repo] = {}
        self.lock = threading.RLock()

    def create(self, name: str, *, private: bool = False) -> Repo:
        with self.lock:
            if name in self.repos:
                raise HubError(409, "You already created this model repo")
            self.repos[name] = Repo(name, self.blobs, private=private)
            return self.repos[name]

    def put(self, name: str, content: Path | Mapping[str, bytes | Path | None], revision: str, message: str) -> Commit:
        """Commit a folder or {path: bytes, a file, or None to delete it}, as if somebody had pushed it."""
        with self.lock:
            repo = self.repos[name] if name in self.repos else self.create(name)
        if isinstance(content, Path):
            content = {p.relative_to(content).as_posix(): p for p in sorted(content.rglob("*")) if p.is_file()}
        if revision not in repo.branches:
            repo.branches[revision] = repo.commits()[-1].id
        changes = {path: None if value is None else self._add(repo, path, value) for path, value in content.items()}
        return repo.commit(revision, changes, message)[0]

    def _add(self, repo: Repo, path: str, content: bytes | Path) -> File:
        if isinstance(content, bytes):
            size, sample = len(content), content[:512]
        else:
            with open(content, "rb") as opened:
                size, sample = content.stat().st_size, opened.read(512)
        file = self.blobs.add(content, lfs=repo.is_lfs(path, size, sample))
        if file.lfs:
            repo.objects.add(file.sha256)
        return file
