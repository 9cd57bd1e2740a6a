"""The API of repositories: who am I, create and delete, settings, references, listings, pull requests."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from .storage import Commit, File, HubError, Repo
from .wire import Wire

ANONYMOUS = "Invalid username or password."
OPTIONAL = ("author", "createdAt", "disabled", "gated", "lastModified", "private", "sha", "siblings", "tags", "usedStorage")


def role(wire: Wire) -> str:
    """ "" without a token, else what the token may do: write, read (private ones too), or stranger. Raises HubError."""
    header = wire.headers.get("Authorization")
    if header is None:
        return ""
    known = wire.hub.tokens.get(header.removeprefix("Bearer "))
    if known is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    return known


def readable(wire: Wire, name: str) -> Repo:
    """A repository that the caller may know of: a private one is, to others, one that does not exist."""
    who, repo = role(wire), wire.hub.store.repos.get(name)
    if repo and (not repo.private or who in ("read", "write")):
        return repo
    if who:
        raise HubError(404, "Repository not found", "RepoNotFound")
    # without the code the client takes a 401 for a missing repository on https addresses only
    raise HubError(401, ANONYMOUS, "RepoNotFound")


def content_readable(wire: Wire, name: str) -> Repo:
    """The same for what a gate hides: files and commits."""
    repo = readable(wire, name)
    who = role(wire)
    if repo.gated and not who:
        text = f"Access to model {name} is restricted. You must have access to it and be authenticated to access it."
        raise HubError(401, text + " Please log in.", "GatedRepo")
    if repo.gated and who == "stranger":
        text = f"Access to model {name} is restricted and you are not in the authorized list."
        raise HubError(403, text, "GatedRepo")
    return repo


def writable(wire: Wire, name: str) -> Repo:
    repo = readable(wire, name)
    _may_write(wire)
    return repo


def _may_write(wire: Wire) -> None:
    who = role(wire)
    if not who:
        raise HubError(401, ANONYMOUS)
    if who != "write":
        raise HubError(403, "Forbidden: you need a token with write access to this namespace")


# --- accounts and repositories


def whoami(wire: Wire) -> None:
    who = role(wire)
    if not who:
        raise HubError(401, ANONYMOUS)
    organizations = [{"type": "org", "id": o, "name": o, "roleInOrg": "write"} for o in sorted(wire.hub.organizations())]
    auth = {"type": "access_token", "accessToken": {"displayName": who, "role": "write" if who == "write" else "read"}}
    user = {"type": "user", "id": who, "name": wire.hub.user, "fullname": "Loop Back", "isPro": False}
    wire.answer(200, {**user, "orgs": organizations, "auth": auth})


def create(wire: Wire) -> None:
    asked = wire.json()
    _may_write(wire)
    name = f"{asked.get('organization') or wire.hub.user}/{asked['name']}"
    if asked.get("type", "model") != "model":
        raise HubError(400, "the loopback hub holds models only")
    url = f"{wire.hub.endpoint}/{name}"
    try:
        wire.hub.store.create(name, private=_private(asked, default=False))
    except HubError as error:
        error.extra["url"] = url
        raise
    wire.answer(200, {"url": url, "name": name, "id": hashlib.sha1(name.encode()).hexdigest()[:24]})


def _private(asked: dict[str, Any], *, default: bool) -> bool:
    """Clients say `visibility`; older ones say `private`."""
    if "visibility" in asked:
        return bool(asked["visibility"] == "private")
    return bool(asked.get("private", default))


def delete(wire: Wire) -> None:
    asked = wire.json()
    repo = writable(wire, f"{asked.get('organization') or wire.hub.user}/{asked['name']}")
    del wire.hub.store.repos[repo.name]
    wire.answer(200, {})


def settings(wire: Wire, name: str) -> None:
    repo, asked = writable(wire, name), wire.json()
    repo.private = _private(asked, default=repo.private)
    repo.gated = str(asked.get("gated", repo.gated) or "")
    wire.answer(200, {"private": repo.private, "gated": repo.gated or False})


def auth_check(wire: Wire, name: str) -> None:
    content_readable(wire, name)
    wire.answer(200, {})


def validate_yaml(wire: Wire) -> None:
    """Only what makes the client warn: a card without metadata."""
    bare = not wire.json()["content"].startswith("---\n")
    warnings = [{"message": "empty or missing yaml metadata in repo card"}] if bare else []
    wire.answer(200, {"errors": [], "warnings": warnings})


def info(wire: Wire, name: str, revision: str = "main") -> None:
    repo = readable(wire, name)
    commit = repo.find(revision)
    siblings = [{"rfilename": p, **(_blob(f) if "blobs" in wire.query else {})} for p, f in commit.files.items()]
    known = {
        "author": name.split("/")[0],
        "createdAt": repo.commits()[-1].date,
        "disabled": False,
        "gated": repo.gated or False,
        "lastModified": commit.date,
        "private": repo.private,
        "sha": commit.id,
        "siblings": siblings,
        "tags": [],
        "usedStorage": sum({f.sha256: f.size for c in repo.commits(revision) for f in c.files.values()}.values()),
    }
    asked = [v for k, values in parse_qs(wire.query_string).items() if k in ("expand", "expand[]") for v in values]
    chosen = {key: known[key] for key in asked if key in known} if asked else known
    wire.answer(200, {"_id": hashlib.sha1(name.encode()).hexdigest()[:24], "id": name, "modelId": name, **chosen})


def _blob(file: File) -> dict[str, Any]:
    large = {"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}} if file.lfs else {}
    return {"size": file.size, "blobId": file.oid, **large}


# --- references


def refs(wire: Wire, name: str) -> None:
    repo = readable(wire, name)

    def listed(table: dict[Any, str], kind: str) -> list[dict[str, str]]:
        return [{"name": str(n), "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in table.items()]

    found: dict[str, Any] = {"branches": listed(repo.branches, "heads"), "converts": [], "tags": listed(repo.tags, "tags")}
    if wire.query.get("include_prs") == "1":
        found["pullRequests"] = listed(repo.pull_requests, "pr")
    wire.answer(200, found)


def create_branch(wire: Wire, name: str, branch: str) -> None:
    repo, asked = writable(wire, name), wire.json()
    if branch.startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {branch}")
    if branch in repo.branches:
        raise HubError(409, f"Reference already exists: refs/heads/{branch}")
    repo.branches[branch] = repo.find(asked.get("startingPoint") or "main").id
    wire.answer(200, {})


def delete_branch(wire: Wire, name: str, branch: str) -> None:
    repo = writable(wire, name)
    if branch == "main":
        raise HubError(403, "The main branch cannot be deleted")
    _remove(repo.branches, branch)
    wire.answer(200, {})


def create_tag(wire: Wire, name: str, revision: str) -> None:
    repo, tag = writable(wire, name), wire.json()["tag"]
    commit = repo.find(revision)
    if tag in repo.tags:
        raise HubError(409, f"Tag reference exists already: refs/tags/{tag}")
    repo.tags[tag] = commit.id
    wire.answer(200, {})


def delete_tag(wire: Wire, name: str, tag: str) -> None:
    _remove(writable(wire, name).tags, tag)
    wire.answer(200, {})


def _remove(table: dict[str, str], name: str) -> None:
    if name not in table:
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    del table[name]


# --- listings


def tree(wire: Wire, name: str, revision: str, folder: str = "") -> None:
    repo = readable(wire, name)
    commit = repo.find(revision)
    recursive, expand = (wire.query.get(key, "").lower() in ("true", "1") for key in ("recursive", "expand"))
    entries = list(_entries(commit, folder.strip("/"), recursive))
    if folder and not entries:
        raise HubError(404, f'{folder} does not exist on "{revision}"', "EntryNotFound")
    size = min(int(wire.query.get("limit", wire.hub.page_size)), 1000)
    after = base64.urlsafe_b64decode(wire.query.get("cursor", "")).decode()
    left = [path for path in entries if path > after]
    headers = {}
    if len(left) > size:
        cursor = base64.urlsafe_b64encode(left[size - 1].encode()).decode()
        following = urlencode({**wire.query, "limit": size, "cursor": cursor})
        headers["Link"] = f'<{wire.hub.endpoint}{wire.raw_path}?{following}>; rel="next"'
    wire.answer(200, [_described(repo, commit, path, expand) for path in left[:size]], headers)


def _entries(commit: Commit, folder: str, recursive: bool) -> Iterable[str]:
    """Sorted paths of files and folders below `folder`."""
    prefix, found = f"{folder}/" if folder else "", set()
    for path in commit.files:
        if path.startswith(prefix):
            parts = path.removeprefix(prefix).split("/")
            depth = len(parts) if recursive else 1
            found |= {prefix + "/".join(parts[: i + 1]) for i in range(depth)}
    return sorted(found)


def _described(repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    file = commit.files.get(path)
    if file is None:
        inside = sorted((p, f.oid) for p, f in commit.files.items() if p.startswith(path + "/"))
        entry: dict[str, Any] = {"type": "directory", "oid": hashlib.sha1(repr(inside).encode()).hexdigest(), "size": 0}
    else:
        entry = {"type": "file", "oid": file.oid, "size": file.size}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    entry["path"] = path
    if expand:
        last = repo.last_change(commit, path)
        entry["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
    if expand and file:
        scan = {"status": "unscanned"}
        entry["securityFileStatus"] = {"status": "unscanned", "avScan": scan, "pickleImportScan": scan}
    return entry


def paths_info(wire: Wire, name: str, revision: str) -> None:
    repo = readable(wire, name)
    if wire.headers.get("Content-Type", "").startswith("application/json"):
        asked = wire.json()
        paths, expand = asked["paths"], bool(asked.get("expand"))
    else:
        form = parse_qs(b"".join(wire.body()).decode())
        paths, expand = form.get("paths", []), form.get("expand", ["false"])[0].lower() in ("true", "1")
    commit = repo.find(revision)
    known = set(_entries(commit, "", recursive=True))
    wire.answer(200, [_described(repo, commit, path, expand) for p in paths if (path := p.strip("/")) in known])


def commits(wire: Wire, name: str, revision: str) -> None:
    repo = content_readable(wire, name)
    found, page, size = repo.commits(revision), int(wire.query.get("p", 0)), int(wire.query.get("limit", wire.hub.page_size))
    headers = {"X-Total-Count": str(len(found))}
    if len(found) > (page + 1) * size:
        following = urlencode({**wire.query, "p": page + 1})
        headers["Link"] = f'<{wire.hub.endpoint}{wire.raw_path}?{following}>; rel="next"'
    wire.answer(200, [_commit(wire, c) for c in found[page * size : (page + 1) * size]], headers)


def _commit(wire: Wire, commit: Commit) -> dict[str, Any]:
    authors = [{"user": wire.hub.user, "avatar": ""}]
    return {"id": commit.id, "title": commit.title, "message": commit.description, "date": commit.date, "authors": authors}


# --- pull requests


def open_discussion(wire: Wire, name: str) -> None:
    repo, asked = readable(wire, name), wire.json()
    if not role(wire):
        raise HubError(401, ANONYMOUS)
    if not asked.get("pullRequest"):
        raise HubError(400, "the loopback hub has pull requests, but no discussions")
    wire.answer(200, {"num": repo.open_pull_request(), "pullRequest": True})


def discussion(wire: Wire, name: str, number: str) -> None:
    repo = _with_pull_request(readable(wire, name), number)
    made = repo.find(f"refs/pr/{number}")
    about = {"num": int(number), "title": made.title, "author": {"name": wire.hub.user}, "createdAt": made.date}
    status = "merged" if int(number) in repo.merged else "draft"
    more = {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "events": [], "diff": "", "isPullRequest": True}
    wire.answer(200, {**about, **more, "status": status, "repo": {"name": name, "type": "model"}})


def merge(wire: Wire, name: str, number: str) -> None:
    _with_pull_request(writable(wire, name), number).merge(int(number))
    wire.answer(200, {})


def _with_pull_request(repo: Repo, number: str) -> Repo:
    if int(number) not in repo.pull_requests:
        raise HubError(404, f"there is no pull request {quote(number)}")
    return repo
