"""The loopback hub itself: two servers in threads of this process, and what tests see of it."""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import quote, urlencode

from .faults import FaultMaker
from .routes import CdnWire, HubWire
from .storage import HubError, Repo, Store
from .wire import Request, Wire

TOKEN = "hf_loopbackWrites"
READ_TOKEN = "hf_loopbackReads"  # private repositories too
STRANGER_TOKEN = "hf_loopbackStranger"  # a valid account, without any rights here


def client_environment(endpoint: str, token: str, home: Path) -> dict[str, str]:
    """What a client process needs beside its own environment."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # with hf_xet installed, clients upload by Xet without asking the hub
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, handler: type[Wire], hub: LoopbackHub) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.hub = hub
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def close_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._open.discard(request)
        super().close_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            self.hub.broken.append(repr(error))

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self.server_close()


class LoopbackHub(FaultMaker):
    """Two servers: `endpoint` (127.0.0.1) is the hub, `cdn` (localhost) is where it sends for large files."""

    def __init__(self, folder: Path, *, port: int = 0, chunk_bytes: int = 64 << 20, page_size: int = 50) -> None:
        super().__init__()
        self.folder, self.chunk_bytes, self.page_size = Path(folder), chunk_bytes, page_size
        self.user = "loopback"
        self.token, self.read_token, self.stranger_token = TOKEN, READ_TOKEN, STRANGER_TOKEN
        self.tokens = {TOKEN: "write", READ_TOKEN: "read", STRANGER_TOKEN: "stranger"}
        self.store = Store(self.folder / "hub")
        self.requests: list[Request] = []
        self.broken: list[str] = []  # what went wrong in the hub itself
        self.closing = threading.Event()
        self._cdn_server = _Server(0, CdnWire, self)
        self._hub_server = _Server(port, HubWire, self)
        self.endpoint = f"http://127.0.0.1:{self._hub_server.server_address[1]}"
        self.cdn = f"http://localhost:{self._cdn_server.server_address[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        assert not self.broken, "\n".join(self.broken)

    def close(self) -> None:
        self.closing.set()
        self._hub_server.stop()
        self._cdn_server.stop()

    # --- what tests look at, and how they get something to look at

    def repo(self, name: str) -> Repo:
        return self.store.repos[name]

    def organizations(self) -> set[str]:
        return {name.split("/")[0] for name in self.store.repos} - {self.user}

    def put(
        self,
        name: str,
        content: Path | Mapping[str, bytes | Path | None],
        *,
        revision: str = "main",
        private: bool | None = None,
        message: str = "seed",
    ) -> str:
        """Commit a folder, or {path: bytes, a file, or None to delete it}, directly; the commit's id."""
        made = self.store.put(name, content, revision, message)
        if private is not None:
            self.repo(name).private = private
        return made.id

    @property
    def leaks(self) -> list[Request]:
        """Requests that took the token to the other host."""
        return [request for request in self.requests if request.host == "cdn" and request.authorization]

    def environment(self, home: Path) -> dict[str, str]:
        return client_environment(self.endpoint, self.token, home)

    # --- signed addresses of the other host

    def signed(self, host: str, path: str, **query: object) -> str:
        return f"{host}{quote(path)}?{urlencode({**query, 'signature': self._signature(path, query)})}"

    def check_signature(self, wire: Wire) -> None:
        given = {key: value for key, value in wire.query.items() if key != "signature"}
        if wire.query.get("signature") != self._signature(wire.decoded, given):
            raise HubError(403, "SignatureDoesNotMatch")

    def _signature(self, path: str, query: Mapping[str, object]) -> str:
        text = json.dumps([self.token, path, sorted((k, str(v)) for k, v in query.items())])
        return hashlib.sha256(text.encode()).hexdigest()[:32]
