"""A headless Chromium, driven through its debugging pipe.

PAGE_SCREENSHOTS=folder keeps the pictures that the tests take, to be looked at.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Headless Chromium. It reads JSON messages from descriptor 3 and writes them to 4, each with a zero byte at its end."""

    def __init__(self, chromium: str, profile: Path) -> None:
        theirs_in, self.outgoing = map(_high, os.pipe())
        self.incoming, theirs_out = map(_high, os.pipe())
        flags = (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}",
            "--remote-debugging-pipe", "about:blank",
        )  # fmt: skip
        actions = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4)]
        actions += [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        self.pid = os.posix_spawn(chromium, [chromium, *flags], os.environ, file_actions=actions)
        os.close(theirs_in)
        os.close(theirs_out)
        self.numbers, self.buffer, self.session = itertools.count(1), b"", {}
        self.events: list[dict[str, Any]] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        os.write(
            self.outgoing, json.dumps({"id": number, "method": method, "params": parameters, **self.session}).encode() + b"\0"
        )
        while (message := self.receive()).get("id") != number:
            pass
        assert "error" not in message, message
        found: dict[str, Any] = message["result"]
        return found

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            assert select.select([self.incoming], [], [], 60)[0], "the browser says nothing"
            data = os.read(self.incoming, 1 << 20)
            assert data, "the browser has gone"
            self.buffer += data
        raw, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self.events.append(message)
        return message

    def of(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event["method"] == method]

    def open(self, file: Path, width: int = 1280, height: int = 900, *, phone: bool = False, dark: bool = False) -> None:
        """Until all is drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        scale = 2 if phone else 1
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=file.as_uri())
        while not self.of("Page.loadEventFired"):
            self.receive()
        end = time.monotonic() + 60
        while self.js("document.documentElement.dataset.ready") != "yes":
            assert time.monotonic() < end, self.complaints()
            time.sleep(0.02)
        self.settle()

    def settle(self) -> None:
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def js(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[dict[str, Any]]:
        return [p for kind in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled") for p in self.of(kind)]

    def screenshot(self, name: str) -> bytes:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])
        if folder := os.environ.get("PAGE_SCREENSHOTS"):
            (Path(folder) / f"{name}.png").write_bytes(data)
        return data

    def press(self, key: str) -> None:
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def close(self) -> None:
        self.session = {}
        self.call("Browser.close")
        os.close(self.outgoing)
        os.close(self.incoming)
        os.waitpid(self.pid, 0)


def _high(fd: int) -> int:
    """The same descriptor above those that the browser expects."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved
