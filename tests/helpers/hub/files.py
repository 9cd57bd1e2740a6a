"""Files of the loopback hub: what goes in (preupload, LFS, commits) and what comes out (resolve and the other host)."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from .repos import ANONYMOUS, content_readable, readable, role, writable
from .storage import PIECE, Commit, File, HubError, Repo
from .wire import Wire

SHA256 = re.compile(r"[0-9a-f]{64}")
NO_OBJECT = "Your push was rejected because an LFS pointer pointed to a file that does not exist. Offending file: - {}"


# --- commits


def preupload(wire: Wire, name: str, revision: str) -> None:
    """LFS or not, for each file, and what is there already."""
    repo, asked = _committable(wire, name), wire.json()
    commit = repo.find(revision)
    ignore = asked.get("gitIgnore") or (_text(wire, commit.files[".gitignore"]) if ".gitignore" in commit.files else "")
    answers = []
    for file in asked["files"]:
        path, known = file["path"], commit.files.get(file["path"])
        mode = "lfs" if repo.is_lfs(path, file["size"], base64.b64decode(file.get("sample", "")), revision) else "regular"
        there = {"oid": known.sha256 if known.lfs else known.oid} if known else {}
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": _ignored(path, ignore), **there})
    wire.answer(200, {"files": answers})


def _committable(wire: Wire, name: str) -> Repo:
    """Whoever may read a repository may open a pull request."""
    if wire.query.get("create_pr") != "1":
        return writable(wire, name)
    repo = readable(wire, name)
    if not role(wire):
        raise HubError(401, ANONYMOUS)
    return repo


def _text(wire: Wire, file: File) -> str:
    return wire.hub.store.blobs.path(file.sha256).read_text()


def _ignored(path: str, rules: str) -> bool:
    """Plain patterns of names, paths and folders; no negation."""
    patterns = [line.strip().strip("/") for line in rules.splitlines() if line.strip() and not line.startswith("#")]
    parts = path.split("/")
    candidates = [*parts, *("/".join(parts[: i + 1]) for i in range(len(parts)))]
    return any(fnmatch(candidate, pattern) for candidate in candidates for pattern in patterns)


def commit(wire: Wire, name: str, revision: str) -> None:
    """NDJSON: a header, then one line for each file."""
    repo = _committable(wire, name)
    lines = [json.loads(line) for line in b"".join(wire.body()).splitlines() if line.strip()]
    header = next((line["value"] for line in lines if line["key"] == "header"), None)
    if not header or not header.get("summary"):
        raise HubError(400, 'the commit needs a "header" with a "summary"')
    pull_request = wire.query.get("create_pr") == "1"
    if not pull_request and (fault := wire.take("stale_parent")):
        theirs = {path: wire.hub.store.blobs.add(content, lfs=False) for path, content in fault.files.items()}
        repo.commit(revision, theirs, f"somebody else's commit {fault.struck}")
    changes = _changes(wire, repo, repo.find(revision), [line for line in lines if line["key"] != "header"])
    made, number = repo.commit(
        revision,
        changes,
        header["summary"],
        header.get("description", ""),
        parent=header.get("parentCommit"),
        pull_request=pull_request,
    )
    url = f"{wire.hub.endpoint}/{name}"
    answer = {"success": True, "commitOid": made.id, "commitUrl": f"{url}/commit/{made.id}", "hookOutput": ""}
    wire.answer(200, {**answer, **({"pullRequestUrl": f"{url}/discussions/{number}"} if pull_request else {})})


def _changes(wire: Wire, repo: Repo, head: Commit, lines: list[dict[str, Any]]) -> dict[str, File | None]:
    changes: dict[str, File | None] = {}
    for line in lines:
        key, value = line["key"], line["value"]
        path = value["path"].rstrip("/")
        if key == "file":
            changes[path] = wire.hub.store.blobs.add(_decoded(value), lfs=False)
        elif key == "lfsFile":
            changes[path] = _uploaded(wire, repo, value)
        elif key == "copyFile":
            source = repo.find(value["srcRevision"]) if value.get("srcRevision") else head
            changes[path] = _existing(source, value.get("srcPath", ""))
        elif key == "deletedFile":
            _existing(head, path)
            changes[path] = None
        elif key == "deletedFolder":
            inside = [p for p in head.files if p.startswith(path + "/")]
            changes.update(dict.fromkeys(inside or [_missing(path)]))
        else:
            raise HubError(400, f"unknown operation {key!r}")
    return changes


def _decoded(value: dict[str, Any]) -> bytes:
    return base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()


def _uploaded(wire: Wire, repo: Repo, value: dict[str, Any]) -> File:
    oid = value["oid"]
    if value.get("algo") != "sha256" or oid not in repo.objects:
        raise HubError(400, NO_OBJECT.format(value["path"]))
    size = wire.hub.store.blobs.path(oid).stat().st_size
    if value.get("size", size) != size:
        raise HubError(400, f"{value['path']}: is said to have {value['size']} bytes, the uploaded object has {size}")
    return File.large(oid, size)


def _existing(commit: Commit, path: str) -> File:
    if path not in commit.files:
        _missing(path)
    return commit.files[path]


def _missing(path: str) -> str:
    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")


# --- LFS uploads


def lfs_batch(wire: Wire, name: str) -> None:
    asked = wire.json()
    # a pull request comes without a reference: then reading is enough
    repo = writable(wire, name) if asked.get("ref") else readable(wire, name)
    if not role(wire):
        raise HubError(401, ANONYMOUS)
    if asked.get("operation") != "upload" or asked.get("hash_algo", "sha256") != "sha256":
        raise HubError(422, "the loopback hub takes uploads by sha256 only")
    transfers = asked.get("transfers") or ["basic"]
    objects = [_upload_actions(wire, repo, o["oid"], o["size"], "multipart" in transfers) for o in asked["objects"]]
    several = any("chunk_size" in o.get("actions", {}).get("upload", {}).get("header", {}) for o in objects)
    headers = {"Content-Type": "application/vnd.git-lfs+json"}
    wire.answer(200, {"transfer": "multipart" if several else "basic", "objects": objects}, headers)


def _upload_actions(wire: Wire, repo: Repo, oid: str, size: int, multipart: bool) -> dict[str, Any]:
    known = {"oid": oid, "size": size, "authenticated": True}
    if not SHA256.fullmatch(oid) or size <= 0:
        return {**known, "error": {"code": 422, "message": f"{oid[:80]} of {size} bytes cannot be an LFS object"}}
    if oid in repo.objects:
        return known  # nothing to do
    hub, chunk = wire.hub, wire.hub.chunk_bytes
    place = f"/upload/{repo.name}/{oid}"
    verify = {"href": f"{hub.endpoint}/{repo.name}.git/info/lfs/verify"}
    if size <= chunk or not multipart:
        return {**known, "actions": {"upload": {"href": hub.signed(hub.cdn, place, size=size)}, "verify": verify}}
    count = -(-size // chunk)
    parts = {f"{i + 1:05}": hub.signed(hub.cdn, f"{place}/{i + 1}", size=min(chunk, size - i * chunk)) for i in range(count)}
    complete = hub.signed(hub.endpoint, "/api/complete_multipart", repo=repo.name, oid=oid, size=size)
    return {**known, "actions": {"upload": {"href": complete, "header": {"chunk_size": str(chunk), **parts}}, "verify": verify}}


def put_object(wire: Wire, name: str, oid: str) -> None:
    """PUT to the other host, the whole object at once."""
    wire.hub.check_signature(wire)
    with wire.hub.store.blobs.writer() as writer:
        for piece in wire.body():
            writer.write(piece)
        _same(oid, int(wire.query["size"]), writer.sha256, writer.size)
        writer.keep()
    wire.hub.store.repos[name].objects.add(oid)
    wire.answer(200, "", {"ETag": f'"{oid[:32]}"'})


def put_part(wire: Wire, name: str, oid: str, number: str) -> None:
    wire.hub.check_signature(wire)
    digest, size, folder = hashlib.md5(usedforsecurity=False), 0, _parts(wire, name, oid)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        for piece in wire.body():
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    if size != int(wire.query["size"]):
        raise HubError(400, f"part {number} has {size} bytes, not {wire.query['size']}")
    Path(file.name).replace(_part(folder, int(number), digest.hexdigest()))
    wire.answer(200, "", {"ETag": f'"{digest.hexdigest()}"'})


def _part(folder: Path, number: int, etag: str) -> Path:
    return folder / f"{number:05}-{etag}"


def _parts(wire: Wire, name: str, oid: str) -> Path:
    return wire.hub.store.uploads / name.replace("/", "--") / oid


def complete_multipart(wire: Wire) -> None:
    """Join the parts that the client names; all of them must be there, and make up the object."""
    asked = wire.json()
    wire.hub.check_signature(wire)
    name, oid, size = wire.query["repo"], wire.query["oid"], int(wire.query["size"])
    folder = _parts(wire, name, oid)
    files = [_part(folder, part["partNumber"], part["etag"].strip('"')) for part in asked["parts"]]
    if asked["oid"] != oid or not all(file.exists() for file in files):
        raise HubError(400, "InvalidPart: a part was not uploaded, or has another etag")
    with wire.hub.store.blobs.writer() as writer:
        for file in files:
            writer.write_file(file)
        _same(oid, size, writer.sha256, writer.size)
        writer.keep()
    shutil.rmtree(folder)
    wire.hub.store.repos[name].objects.add(oid)
    wire.answer(200, {"success": True})


def _same(oid: str, size: int, found_oid: str, found_size: int) -> None:
    if found_size != size:
        raise HubError(400, f"the object {oid} has {size} bytes; {found_size} arrived")
    if found_oid != oid:
        raise HubError(400, f"BadDigest: the object should have the sha256 {oid}; {found_oid} arrived")


def verify(wire: Wire, name: str) -> None:
    repo, asked = readable(wire, name), wire.json()
    if asked["oid"] not in repo.objects:
        raise HubError(404, f"the object {asked['oid']} was not uploaded")
    if wire.hub.store.blobs.path(asked["oid"]).stat().st_size != asked["size"]:
        raise HubError(422, f"the object {asked['oid']} has another size than {asked['size']}")
    wire.answer(200, {"success": True})


# --- downloads


def resolve(wire: Wire, name: str, revision: str, path: str) -> None:
    """Large files redirect to the other host, small ones to an address of the same one that names the commit."""
    repo = content_readable(wire, name)
    found = repo.find(revision)
    headers = {"X-Repo-Commit": found.id}
    if path not in found.files:
        raise HubError(404, "Entry not found", "EntryNotFound", headers)
    file = found.files[path]
    headers |= {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256 if file.lfs else file.oid}"'}
    if file.lfs:
        target = wire.hub.signed(wire.hub.cdn, f"/lfs/{name}/{file.sha256}/{path}", size=file.size)
        return wire.answer(302, f"Found. Redirecting to {target}", {**headers, "Location": target, "ETag": f'"{file.sha256}"'})
    query = urlencode({"etag": f'"{file.oid}"'})
    target = f"/api/resolve-cache/models/{name}/{found.id}/{quote(path)}?{query}"
    return wire.answer(307, f"Temporary Redirect. Redirecting to {target}", {**headers, "Location": target})


def resolve_cache(wire: Wire, name: str, revision: str, path: str) -> None:
    found = content_readable(wire, name).find(revision)
    if path not in found.files:
        raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": found.id})
    _serve(wire, path, found.files[path], {"X-Repo-Commit": found.id, "ETag": f'"{found.files[path].oid}"'})


def lfs_object(wire: Wire, name: str, sha256: str, path: str) -> None:
    """The other host: a signed address, no token; and an ETag that is not the sha256, as object stores have."""
    wire.hub.check_signature(wire)
    if name not in wire.hub.store.repos or sha256 not in wire.hub.store.repos[name].objects:
        raise HubError(404, "NoSuchKey")
    size = wire.hub.store.blobs.path(sha256).stat().st_size
    _serve(wire, path, File.large(sha256, size), {"ETag": f'"{sha256[:32]}-{size // PIECE + 1}"'})


def _serve(wire: Wire, path: str, file: File, headers: dict[str, str]) -> None:
    last = path.rsplit("/", 1)[-1]
    disposition = f"inline; filename*=UTF-8''{quote(last)}; filename=\"{quote(last)}\";"
    wire.answer_file(wire.hub.store.blobs.path(file.sha256), {"Content-Disposition": disposition, **headers})
