"""POST /_admin/<call> with the arguments as JSON: what a test does to a hub that runs as a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .storage import Commit, HubError
from .wire import Wire

FAULTS = {"fail", "drop", "corrupt", "slow", "stale_parent"}


def call(wire: Wire, name: str) -> None:
    arguments = wire.json()
    if name in FAULTS:
        if "files" in arguments:
            arguments["files"] = {path: text.encode() for path, text in arguments["files"].items()}
        getattr(wire.hub, name)(**arguments)
        return wire.answer(200, len(wire.hub.faults.all) - 1)
    if name not in CALLS:
        raise HubError(404, f"{name} is none of {', '.join(sorted(FAULTS | set(CALLS)))}")
    return wire.answer(200, CALLS[name](wire, **arguments))


def _put(wire: Wire, repo: str, folder: str, revision: str = "main", private: bool = False) -> dict[str, str]:
    return {"commit": wire.hub.put(repo, Path(folder), revision=revision, private=private)}


def _repo(wire: Wire, repo: str, revision: str = "main") -> dict[str, Any]:
    found = wire.hub.repo(repo)
    about = {"private": found.private, "gated": found.gated, "branches": found.branches, "tags": found.tags}
    return {**about, "pull_requests": found.pull_requests, "commits": [_commit(c) for c in found.commits(revision)]}


def _commit(commit: Commit) -> dict[str, Any]:
    files = {path: asdict(file) for path, file in commit.files.items()}
    return {"id": commit.id, "parent": commit.parent, "title": commit.title, "files": files}


CALLS: dict[str, Callable[..., Any]] = {
    "put": _put,
    "repo": _repo,
    "requests": lambda wire: [asdict(request) for request in wire.hub.requests],
    "struck": lambda wire: [fault.struck for fault in wire.hub.faults.all],
}
