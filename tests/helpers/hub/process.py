"""The loopback hub as a process of its own: it survives whatever happens to the clients."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Self

from .loopback import client_environment


class HubProcess:
    """`with HubProcess(folder) as hub:` has `endpoint`, `cdn`, `token`; everything else goes through `call`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "helpers.hub.server", "--until-eof", "--folder", str(folder), *arguments]
        tests = Path(__file__).parents[2]
        self.process = subprocess.Popen(command, cwd=tests, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        about = json.loads(self.process.stdout.readline())
        self.endpoint, self.cdn, self.token = about["endpoint"], about["cdn"], about["token"]

    def call(self, name: str, **arguments: Any) -> Any:
        """fail, drop, corrupt, slow, stale_parent (the number of the fault), struck, put, repo, requests."""
        body = json.dumps(arguments).encode()
        request = urllib.request.Request(f"{self.endpoint}/_admin/{name}", body, {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return json.load(answer)

    def environment(self, home: Path) -> dict[str, str]:
        return client_environment(self.endpoint, self.token, home)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=30)  # closes its stdin, and the hub ends with that
