"""What the small hubs share: repositories, large objects, HTTP, a log of requests, and faults."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "secret-token"


@dataclass
class Commit:
    name: str  # 40 hex digits
    files: dict[str, bytes]
    changed: dict[str, str]  # file -> the commit that changed it last
    when: int


@dataclass
class Repo:
    private: bool = True
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit | None:
        name = self.tags.get(revision) or self.branches.get(revision) or revision
        return self.commits.get(name)

    def commit(self, branch: str, put: dict[str, bytes], drop: tuple[str, ...] = ()) -> Commit:
        """On a branch, which is made if there is none."""
        before = self.commits.get(self.branches.get(branch, ""))
        files, changed = (dict(before.files), dict(before.changed)) if before else ({}, {})
        number = len(self.commits) + 1
        name = hashlib.sha1(f"{number}{sorted(put)}{drop}".encode()).hexdigest()
        files |= put
        changed |= dict.fromkeys(put, name)
        for gone in drop:
            del files[gone], changed[gone]
        self.commits[name] = Commit(name, files, changed, number)
        self.branches[branch] = name
        return self.commits[name]


@dataclass
class Fault:
    method: str
    where: str  # a regex on path and query, decoded
    what: int | str  # a status, or "drop": half of the body, or "wrong": other bytes, as many
    times: int = 1


@dataclass(frozen=True)
class Asked:
    method: str
    path: str  # decoded, with the query
    host: str
    secret: bool  # the token came along
    range: str


class FakeHub:
    """Base: subclasses have `route(request) -> Answer`. Large objects lie on another host: the same port, as `localhost`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # sha256 -> large object
        self.faults: list[Fault] = []
        self.log: list[Asked] = []
        self.leave_out: set[str] = set()  # what a commit loses without a word
        self.forget: set[str] = set()  # suffixes of large objects that are accepted and lost
        self.lock = threading.Lock()
        hub = self

        class Bound(Request):
            fake = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint, self.storage = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    def __enter__(self) -> Any:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def put(self, name: str, folder: Path) -> Repo:
        repo = self.repos.setdefault(name, Repo(private=False))
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        repo.commit("master", files)
        return repo

    def asked(self, pattern: str, method: str = "GET") -> list[Asked]:
        return [r for r in self.log if r.method == method and re.search(pattern, r.path)]

    def fault(self, request: Request) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == request.command and re.search(fault.where, request.whole):
                    fault.times -= 1
                    return fault
        return None

    def route(self, request: Request) -> None:
        raise NotImplementedError

    def store(self, request: Request, sha256: str) -> None:
        """PUT of a large object; its hash is not looked at, as in a bucket."""
        if not any(sha256.startswith(start) for start in self.forget):
            self.objects[sha256] = request.body
        request.answer(200, b"", {"Content-Md5": "x", "ETag": '"x"'})


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.raw, self.at, self.whole = split.path, unquote(split.path), unquote(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(split.query, keep_blank_values=True).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        secret = TOKEN in str(self.headers)
        host = str(self.headers["Host"]).partition(":")[0]
        with self.fake.lock:
            self.fake.log.append(Asked(self.command, self.whole, host, secret, self.headers.get("Range", "")))
        self.late = self.fake.fault(self)
        if self.late and isinstance(self.late.what, int):
            self.answer(self.late.what, b'{"message": "not now"}', {"Retry-After": "7"})
            return
        self.fake.route(self)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def json(self) -> Any:
        return json.loads(self.body)

    def say(self, value: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        what = self.late.what if self.late else ""
        if what == "wrong":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if what == "drop":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data)

    def send_range(self, data: bytes) -> None:
        """As a storage does."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self.answer(200, data)
            return
        start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(data)
        part = data[start:stop]
        self.answer(206, part, {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"})

    def redirect(self, url: str) -> None:
        self.answer(302, b"", {"Location": url})
