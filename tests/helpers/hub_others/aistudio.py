"""AI Studio as aistudio_sdk/requests/hub.py, file_download.py, snapshot_download.py and hub.py expect it: a Gitea, and a site."""

from __future__ import annotations

import base64
import hashlib
import re

from .base import FakeHub, Repo, Request

LARGE = (".safetensors", ".png")
API = "/api/v1/repos/"


def pointer(data: bytes) -> bytes:
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(data).hexdigest()}\nsize {len(data)}\n".encode()
    )


def in_git(name: str, data: bytes) -> bytes:
    return pointer(data) if name.endswith(LARGE) else data


def oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeAiStudio(FakeHub):
    owner = "me"  # of the token: where repositories are made, whatever is asked for
    page = 3  # entries
    shows_pointers = "contents"  # or "blobs", or "" for neither
    multipart = False  # large objects go to the storage in parts, with keys of their own
    suffixes: tuple[str, ...] = ()  # that are forbidden
    card_refused = ""

    def route(self, request: Request) -> None:
        at, method = request.at, request.command
        if at.startswith("/object/"):
            sha256 = at.removeprefix("/object/")
            self.store(request, sha256) if method == "PUT" else request.send_range(self.objects[sha256])
        elif at.startswith("/v1/bucket/") or at.startswith("/bucket/"):
            self._parts(request, at.rpartition("/")[2])
        elif at == "/modelcenter/v2/models/sdk/add":
            body = request.json()
            made = self.repos.setdefault(f"{self.owner}/{body['repoName']}", Repo(private=body["repoType"] == 0))
            made.commit("master", {".gitattributes": b"*.safetensors filter=lfs\n", "README.md": b"# new\n"})
            request.say(
                {"errorCode": 0, "result": {"repoName": f"{self.owner}/{body['repoName']}", "repoType": body["repoType"]}}
            )
        elif at == "/modelcenter/v2/models/getSuffixBlackList":
            request.say({"errorCode": 0, "result": list(self.suffixes)})
        elif at == "/modelcenter/v2/models/checkYaml":
            request.say({"errorCode": 1 if self.card_refused else 0, "errorMsg": self.card_refused})
        elif found := re.fullmatch(r"/(\w+/[\w.-]+)\.git/info/lfs/(objects/batch|verify)", at):
            self._lfs(request, found[2])
        elif (found := re.match(API + r"(\w+/[\w.-]+)", at)) and found[1] in self.repos:
            self._repo(request, self.repos[found[1]], f"{self.endpoint}{API}{found[1]}", at.removeprefix(found[0]))
        else:
            request.say({"message": "The target couldn't be found."}, 404)

    def _lfs(self, request: Request, what: str) -> None:
        if what == "verify":
            request.answer(200, b"")
            return
        (wanted,) = request.json()["objects"]
        answer: dict[str, object] = dict(wanted)
        if wanted["oid"] not in self.objects:
            upload: dict[str, object] = {"href": f"{self.storage}/object/{wanted['oid']}?s=1"}
            if self.multipart:
                upload["sts_token"] = {
                    "bosHost": self.storage, "bucketName": "bucket", "key": wanted["oid"], "accessKeyId": "a",
                    "secretAccessKey": "b", "sessionToken": "c",
                }  # fmt: skip
            verify = request.at.replace("objects/batch", "verify")
            answer["actions"] = {"upload": upload, "verify": {"href": f"{self.endpoint}{verify}"}}
        request.say({"objects": [answer]})

    def _parts(self, request: Request, key: str) -> None:
        """A storage's upload in parts, as far as baidubce asks."""
        if request.command == "PUT":
            self.parts[int(request.query["partNumber"])] = request.body
            request.answer(200, b"", {"ETag": '"x"'})
        elif "uploads" in request.query:
            self.parts: dict[int, bytes] = {}
            request.say({"bucket": "bucket", "key": key, "uploadId": "u"})
        else:
            self.objects[key] = b"".join(self.parts[n] for n in sorted(self.parts))
            request.say({"bucket": "bucket", "key": key, "eTag": "x"})

    def _repo(self, request: Request, repo: Repo, url: str, at: str) -> None:
        method = request.command
        if not at:
            request.say({"private": repo.private, "empty": not repo.commits})
        elif not repo.commits and method == "GET":
            request.say({"message": "Git Repository is empty."}, 409)
        elif found := re.fullmatch(r"/git/trees/(.+)", at):
            commit = repo.resolve(found[1])
            if commit is None:
                request.say({"message": "sha not found"}, 404)
                return
            page = int(request.query["page"])
            entries = [
                {"path": name, "type": "blob", "sha": oid(in_git(name, data)), "size": len(in_git(name, data))}
                for name, data in sorted(commit.files.items())
            ]
            entries += [{"path": "a-folder", "type": "tree", "sha": "0" * 40, "size": 0}]
            shown = entries[(page - 1) * self.page : page * self.page]
            more = page * self.page < len(entries)
            request.say({"sha": commit.name, "url": f"{url}/git/trees/{commit.name}", "tree": shown, "truncated": more})
        elif found := re.fullmatch(r"/(contents|media)/(.+)", at):
            commit = repo.resolve(request.query.get("ref", "master"))
            data = commit.files.get(found[2]) if commit else None
            if data is None:
                request.say({"message": "object does not exist"}, 404)
            elif found[1] == "contents":
                inner = in_git(found[2], data)
                shown = inner if self.shows_pointers == "contents" else b"something else"
                content = base64.encodebytes(shown).decode()
                request.say({"path": found[2], "sha": oid(inner), "size": len(data), "content": content, "encoding": "base64"})
            elif found[2].endswith(LARGE):
                sha256 = hashlib.sha256(data).hexdigest()
                self.objects[sha256] = data
                request.redirect(f"{self.storage}/object/{sha256}?signature=very-secret")
            else:
                request.send_range(data)
        elif found := re.fullmatch(r"/git/blobs/(.+)", at):
            blobs = {oid(in_git(n, d)): in_git(n, d) for c in repo.commits.values() for n, d in c.files.items()}
            content = base64.b64encode(blobs[found[1]]).decode() if self.shows_pointers == "blobs" else None
            request.say({"sha": found[1], "content": content})
        elif re.fullmatch(r"/preupload/.+", at):
            files = request.json()["files"]
            request.say({"files": [{"path": f["path"], "lfs": f["path"].endswith(LARGE)} for f in files]})
        elif at == "/contents" and method == "POST":
            self._commit(request, repo)
        elif at == "/branches" and method == "POST":
            body = request.json()
            repo.branches[body["new_branch_name"]] = repo.branches[body["old_branch_name"]]
            request.say({"name": body["new_branch_name"]}, 201)
        elif at == "/tags" and method == "POST":
            body = request.json()
            repo.tags[body["tag_name"]] = body["target"]
            request.say({"name": body["tag_name"]}, 201)
        elif (found := re.fullmatch(r"/tags/(.+)", at)) and found[1] in repo.tags:
            request.say({"name": found[1], "commit": {"sha": repo.tags[found[1]]}})
        else:
            request.say({"message": "The target couldn't be found."}, 404)

    def _commit(self, request: Request, repo: Repo) -> None:
        body = request.json()
        before = repo.resolve(body["branch"])
        now = {name: oid(in_git(name, data)) for name, data in before.files.items()} if before else {}
        put, drop = {}, []
        for change in body["files"]:
            name = change["path"]
            if change.get("sha") != now.get(name) or (change["operation"] == "create") != (name not in now):
                request.say({"message": f"sha does not match [given: {change.get('sha')}]"}, 422)
                return
            if change["operation"] == "delete":
                drop.append(name)
            elif name not in self.leave_out:
                data = base64.b64decode(change["content"])
                found = re.search(rb"oid sha256:(\w+)", data) if change["lfsPointer"] else None
                put[name] = self.objects[found[1].decode()] if found else data
        repo.commit(body["branch"], put, tuple(drop))
        request.say({"commit": {}}, 201)
