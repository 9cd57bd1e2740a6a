"""HTTP/1.1 of the loopback hub: bodies in and out, ranges, errors, the log of requests, and faults at the socket."""

from __future__ import annotations

import json
import re
import socket
import struct
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from .faults import Fault
from .storage import PIECE, HubError

if TYPE_CHECKING:
    from .loopback import LoopbackHub


ADMIN = "/_admin/"  # not part of the hub that is tested: no faults, no log


@dataclass(frozen=True)
class Request:
    """One line of the hub's log."""

    method: str
    host: str  # "hub" or "cdn"
    path: str  # decoded, without the query
    query: str
    status: int  # 0: the connection ended, by either side, without an answer
    authorization: bool
    range: str  # the Range header, or empty
    fault: str  # what struck, or empty


class Cut(Exception):
    """The connection ends here, whatever was promised."""

    def __init__(self, *, reset: bool = False) -> None:
        self.reset = reset


class Wire(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    host_name = "hub"
    hub: LoopbackHub

    def route(self) -> None:
        raise NotImplementedError

    def _serve(self) -> None:
        self.hub = self.server.hub  # type: ignore[attr-defined]
        split = urlsplit(self.path)
        self.raw_path, self.query_string, self.decoded = split.path, split.query, unquote(split.path)
        self.query = {key: values[-1] for key, values in parse_qs(split.query, keep_blank_values=True).items()}
        self._body_read = self._body_ended = self._answered = False
        self._struck: list[str] = []
        self._late: Fault | None = None
        try:
            self._fail_or_route()
            self._rest()
        except Cut as cut:
            self._cut(cut)
        except ConnectionError:  # the client went away
            self.close_connection = True
            if not self._answered:
                self._log(0)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _fail_or_route(self) -> None:
        try:
            fault = self.take("fail")
            if fault and not fault.late:
                return self._answer_fault(fault)
            self._late = fault
            return self.route()
        except HubError as error:
            return self.answer_error(error)
        except (Cut, ConnectionError):
            raise
        except Exception as error:
            self.hub.broken.append(f"{self.command} {self.path}: {traceback.format_exc()}")
            if self._answered:
                raise Cut from error
            return self.answer_error(HubError(500, f"the loopback hub itself failed: {error!r}"))

    # --- in

    def body(self) -> Iterator[bytes]:
        """The request's body, in pieces."""
        self._body_read = True
        drop, slow = self.take("drop"), self.take("slow")
        seen = 0
        for piece in self._pieces():
            if drop and seen + len(piece) >= drop.after_bytes:
                raise Cut(reset=drop.reset)
            self._wait(slow, len(piece))
            seen += len(piece)
            yield piece
        self._body_ended = True
        if drop:  # the body was shorter: it arrived whole, and nobody says so
            raise Cut(reset=drop.reset)

    def _pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield from self._exactly(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield from self._exactly(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _exactly(self, left: int) -> Iterator[bytes]:
        while left:
            piece = self.rfile.read1(min(left, PIECE))
            if not piece:
                raise ConnectionError("the client went away in the middle of a body")
            left -= len(piece)
            yield piece

    def json(self) -> dict[str, Any]:
        return dict(json.loads(b"".join(self.body()) or b"{}"))

    def _rest(self) -> None:
        """What of the body nobody read must not be taken for the next request."""
        if self._body_read and not self._body_ended:
            self.close_connection = True
        elif not self._body_read:
            self._body_read = self._body_ended = True
            for _ in self._pieces():
                pass

    # --- out

    def answer(self, status: int, content: Any = None, headers: Mapping[str, str] | None = None) -> None:
        """JSON, text, or nothing."""
        if self._late:
            return self._answer_fault(self._late)
        self._rest()
        text = content if isinstance(content, str) else "" if content is None else json.dumps(content)
        kind = "text/plain; charset=utf-8" if isinstance(content, str) else "application/json; charset=utf-8"
        body = text.encode()
        self._head(status, {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)
        return None

    def answer_error(self, error: HubError) -> None:
        headers = {**({"X-Error-Code": error.code} if error.code else {}), "X-Error-Message": error.message, **error.headers}
        self.answer(error.status, {"error": error.message, **error.extra}, headers)

    def answer_file(self, path: Path, headers: Mapping[str, str]) -> None:
        """A file, or the range of it that was asked for."""
        if self._late:
            return self._answer_fault(self._late)
        size = path.stat().st_size
        start, stop, status = self._asked_range(size)
        length = {"Content-Length": str(stop - start), "Accept-Ranges": "bytes", **headers}
        if status == 416:
            return self.answer(416, "", {"Content-Range": f"bytes */{size}"})
        if status == 206:
            length["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        corrupt = self.take("corrupt") if stop > start else None
        drop, slow = (self.take("drop"), self.take("slow")) if self.command == "GET" else (None, None)
        self._head(status, {"Content-Type": "application/octet-stream", **length})
        if self.command == "GET":
            self._send(path, start, stop, corrupt, drop, slow)
        return None

    def _send(self, path: Path, start: int, stop: int, corrupt: Fault | None, drop: Fault | None, slow: Fault | None) -> None:
        wrong = (start + stop) // 2 if corrupt else -1
        end = min(stop, start + drop.after_bytes) if drop else stop
        with open(path, "rb") as file:
            file.seek(start)
            while start < end:
                piece = file.read(min(self._piece_bytes(slow), end - start))
                if start <= wrong < start + len(piece):
                    changed = bytearray(piece)
                    changed[wrong - start] ^= 0xFF
                    piece = bytes(changed)
                self.wfile.write(piece)
                self._wait(slow, len(piece))
                start += len(piece)
        if drop:
            raise Cut(reset=drop.reset)

    def _asked_range(self, size: int) -> tuple[int, int, int]:
        """First byte, the one after the last, and the status; anything but one plain range is ignored, as HTTP allows."""
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "").replace(" ", ""))
        if not match or match[0] == "bytes=-":
            return 0, size, 200
        if not match[1]:
            start, stop = max(0, size - int(match[2])), size
        else:
            start, stop = int(match[1]), min(size, int(match[2]) + 1 if match[2] else size)
        return (start, stop, 206) if start < stop else (0, 0, 416)

    def _head(self, status: int, headers: Mapping[str, str]) -> None:
        self._answered = True
        self._log(status)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    # --- faults

    def take(self, kind: str) -> Fault | None:
        if self.decoded.startswith(ADMIN):
            return None
        fault = self.hub.faults.take(kind, self.command, self.decoded)
        if fault:
            self._struck.append(kind)
        return fault

    def _answer_fault(self, fault: Fault) -> None:
        self._late = None
        if fault.status is None:
            raise Cut(reset=fault.reset)
        error = HubError(fault.status, "the loopback hub was told to fail", headers=fault.headers)
        self.answer_error(error)

    def _piece_bytes(self, slow: Fault | None) -> int:
        return max(1, min(PIECE, int(slow.bytes_per_second / 20))) if slow else PIECE

    def _wait(self, slow: Fault | None, sent: int) -> None:
        if slow and self.hub.closing.wait(sent / slow.bytes_per_second):
            raise Cut

    def _cut(self, cut: Cut) -> None:
        self.close_connection = True
        if not self._answered:
            self._log(0)
        if cut.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    # --- log

    def _log(self, status: int) -> None:
        if self.decoded.startswith(ADMIN):
            return
        line = Request(
            method=self.command,
            host=self.host_name,
            path=self.decoded,
            query=self.query_string,
            status=status,
            authorization="Authorization" in self.headers,
            range=self.headers.get("Range", ""),
            fault=",".join(self._struck),
        )
        self.hub.requests.append(line)

    def log_message(self, format: str, *args: object) -> None:
        pass
