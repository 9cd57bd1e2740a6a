"""What a process does while it reads a stranger's file: every open, change, import and execution, by an audit hook.

A hook cannot be taken away again; it sleeps until `watching`.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ernie_quant

# events that nothing here may cause, by their names or the first part of them
FORBIDDEN = frozenset(
    ["subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "socket",
     "pickle.find_class", "ctypes.dlopen", "urllib.Request", "webbrowser.open", "ftplib", "http", "smtplib", "sqlite3.connect",
     "os.putenv", "os.kill", "signal.pthread_kill", "os.chroot", "shutil.unpack_archive", "code.__new__", "pty.spawn"]
)  # fmt: skip
CHANGES = frozenset(
    ["os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "os.utime",
     "os.setxattr", "os.removexattr", "shutil.copyfile", "shutil.move", "shutil.rmtree"]
)  # fmt: skip
LOOKS = frozenset(["os.listdir", "os.scandir", "os.chdir", "os.walk"])
CODE = frozenset(["exec", "compile", "marshal.loads", "marshal.load"])
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Python itself may load a module that an error message needs; and versions of packages are read from their metadata
LIBRARY = (
    *(os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    str(Path(ernie_quant.__file__).resolve().parent),  # plug-ins are looked up in its folders
    *(path for path in sys.path if path.endswith(".zip")),  # where Python looks for metadata too
    *(os.path.realpath(path) for path in sys.path if Path(path).name == "site-packages"),  # of another environment
)
LIBRARY_FILES = (".py", ".pyc", ".so", ".zip", "METADATA", "entry_points.txt", "RECORD")


class _Watch:
    def __init__(self) -> None:
        self.installed = self.active = self.busy = False
        self.readable: tuple[str, ...] = ()
        self.writable: tuple[str, ...] = ()
        self.code = True
        self.path: set[str] = set()
        self.seen: list[str] = []

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active or self.busy:
            return
        self.busy = True  # what the hook itself does is not looked at
        try:
            found = self.judge(event, args)
        finally:
            self.busy = False
        if found:
            self.seen.append(found)
            if event in FORBIDDEN:
                raise RuntimeError(f"stopped by the watch: {found}")

    def judge(self, event: str, args: tuple[Any, ...]) -> str:
        if event == "open":
            return self.opened(*args[:3])
        if event in LOOKS:
            if not isinstance(args[0], int) and os.path.realpath(args[0] or ".") in self.path:
                return ""  # importlib.metadata looks for a version there
            return self.outside(args[0], self.readable + LIBRARY, event)
        if event in CHANGES:
            count = 2 if event in ("os.rename", "os.link", "shutil.copyfile", "shutil.move") else 1
            paths = [_placed(p, args[-1]) for p in args[:count]]
            return next((why for p in paths if (why := self.outside(p, self.writable, event))), "")
        if event in FORBIDDEN or event.partition(".")[0] in FORBIDDEN:
            return f"{event}{args!r}"[:300]
        if event == "import":
            name = str(args[0]).partition(".")[0]
            return "" if name in sys.stdlib_module_names or name == "ernie_quant" else f"import of {args[0]}"
        if event in CODE and self.code and not _within_import():
            return f"{event}{args!r}"[:300]
        return ""

    def opened(self, path: Any, mode: Any, flags: Any) -> str:
        if isinstance(path, int):
            return ""
        writes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool((flags or 0) & WRITING)
        if not writes and os.fsdecode(path).endswith(LIBRARY_FILES) and not self.outside(path, LIBRARY, ""):
            return ""
        return self.outside(path, self.writable if writes else self.readable, "open for writing" if writes else "open")

    @staticmethod
    def outside(path: Any, allowed: tuple[str, ...], event: str) -> str:
        """A word on a path that leads out of all of `allowed`."""
        if isinstance(path, int):
            return ""
        real = os.path.realpath(os.fsdecode(path if path is not None else "."))
        return "" if any(real == a or real.startswith(a + os.sep) for a in allowed) else f"{event}: {path!r}, which is {real}"


def _placed(path: Any, folder: Any) -> Any:
    """A path that is relative to an open folder, as rmtree uses them."""
    if isinstance(folder, int) and folder >= 0 and isinstance(path, str | bytes):
        return Path(f"/proc/self/fd/{folder}") / os.fsdecode(path)  # an absolute path stays what it is
    return path


def _within_import() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


_watch = _Watch()


@contextmanager
def watching(readable: Path, writable: Path, *, code: bool = True) -> Iterator[list[str]]:
    """Collects what leaves `readable` and `writable`; with `code`, what compiles or executes any too."""
    if not _watch.installed:
        sys.addaudithook(_watch.hook)
        _watch.installed = True
    out = os.path.realpath(writable)
    _watch.readable, _watch.writable, _watch.code, _watch.seen = (os.path.realpath(readable), out), (out,), code, []
    _watch.path = {os.path.realpath(path or ".") for path in sys.path}
    _watch.active = True
    try:
        yield _watch.seen
    finally:
        _watch.active = False
