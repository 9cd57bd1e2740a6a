"""ModelScope as modelscope_hub/_legacy_api.py and _openapi.py expect it."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Collection

from .base import Commit, FakeHub, Repo, Request

LARGE = (".safetensors", ".png")
V1 = "/api/v1/"


class FakeModelScope(FakeHub):
    unhashed: frozenset[str] | set[str] = frozenset()  # files
    names_commits = True  # listings can be asked for by commit, as far as we know

    def route(self, request: Request) -> None:
        at, method = request.at, request.command
        if at.startswith("/object/"):
            sha256 = at.removeprefix("/object/")
            self.store(request, sha256) if method == "PUT" else request.send_range(self.objects[sha256])
        elif found := re.fullmatch(r"/openapi/v1/models/(\w+/[\w.-]+)", at):
            repo = self.repos.get(found[1])
            answer = {"success": True, "data": {"id": found[1], "private": repo.private}} if repo else {"success": False}
            request.say(answer, 200 if repo else 404)
        elif at == V1 + "models" and method == "POST":
            body = request.json()
            made = Repo(private=body["Visibility"] == 1)
            made.commit("master", {".gitattributes": b"*.safetensors filter=lfs\n", "README.md": b"# new\n"})
            self.repos[f"{body['Path']}/{body['Name']}"] = made
            request.say({"Code": 200, "Success": True, "Data": {"Name": body["Name"], "Path": body["Path"]}})
        elif found := re.fullmatch(V1 + r"(?:repos/)?models/(\w+/[\w.-]+)(/.*)?", at):
            if found[1] not in self.repos:
                request.say({"Code": 10010205001, "Message": "模型不存在", "Success": False}, 404)
            else:
                self._repo(request, self.repos[found[1]], found[2] or "")
        else:
            request.say({"Message": "no such route"}, 404)

    def _repo(self, request: Request, repo: Repo, at: str) -> None:
        commit = repo.resolve(request.query.get("Revision", "master"))
        asked_by_commit = request.query.get("Revision") in repo.commits
        if at in ("/repo/files", "/repo") and (commit is None or (asked_by_commit and not self.names_commits)):
            request.say({"Code": 404, "Message": "no such revision", "Success": False}, 404)
        elif at == "/repo/files":
            request.say(
                {
                    "Code": 200,
                    "Success": True,
                    "Data": {"Files": _entries(repo, commit, self.unhashed), "LatestCommitter": {"Id": ""}},
                }
            )
        elif at == "/repo":
            data = commit.files.get(request.query["FilePath"])
            if data is None:
                request.say({"Code": 404, "Message": "no such file"}, 404)
            elif request.query["FilePath"].endswith(LARGE):
                sha256 = hashlib.sha256(data).hexdigest()
                self.objects[sha256] = data
                request.redirect(f"{self.storage}/object/{sha256}?signature=very-secret")
            else:
                request.answer(200, data)  # whole, whatever Range says
        elif at == "/info/lfs/objects/batch":
            missing = [o["oid"] for o in request.json()["objects"] if o["oid"] not in self.objects]
            objects = [{"oid": oid, "actions": {"upload": {"href": f"{self.storage}/object/{oid}?s=1"}}} for oid in missing]
            request.say({"Code": 200, "Data": {"objects": objects}})
        elif found := re.fullmatch(r"/commit/(.+)", at):
            self._commit(request, repo, found[1])
        elif at == "/repo/tag":
            body = request.json()
            repo.tags[body["TagName"]] = repo.resolve(body["Ref"]).name
            request.say({"Code": 200, "Data": {}})
        elif not at:
            request.say({"Code": 200, "Data": {"Visibility": 1 if repo.private else 5}})
        else:
            request.say({"Message": "no such route"}, 404)

    def _commit(self, request: Request, repo: Repo, branch: str) -> None:
        put, drop = {}, []
        for action in request.json()["actions"]:
            if action["action"] == "delete":
                drop.append(action["path"])
            elif action["path"] not in self.leave_out:
                large = action["type"] == "lfs"
                put[action["path"]] = self.objects[action["sha256"]] if large else base64.b64decode(action["content"])
        repo.commit(branch, put, tuple(drop))
        request.say({"Code": 200, "Success": True, "Data": {}})


def _entries(repo: Repo, commit: Commit, unhashed: Collection[str]) -> list[dict[str, object]]:
    folders = sorted({name.rpartition("/")[0] for name in commit.files} - {""})
    trees = [{"Path": name, "Name": name, "Type": "tree", "Size": 0, "Sha256": "", "Revision": commit.name} for name in folders]
    return trees + [
        {
            "Path": name,
            "Name": name.rpartition("/")[2],
            "Type": "blob",
            "Size": len(data),
            "Sha256": "" if name in unhashed else hashlib.sha256(data).hexdigest(),
            "Revision": commit.changed[name],
            "CommittedDate": repo.commits[commit.changed[name]].when,
        }
        for name, data in commit.files.items()
    ]
