"""One process that has imported and compiled everything, and forks one `ernie-quant` after another from it.

Starting Python with torch and numba takes seconds, a fork takes milliseconds. Whoever breaks runs (tests, scripts)
starts this file as a process of its own and talks to it in lines of JSON; so nobody who has threads ever forks.
Faults are installed in the forked process before the command begins.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

TESTS = Path(__file__).resolve().parents[1]
BUG = 70  # exit code of a run that ends with an exception of its own
PLENTY = 1 << 50
WIDTH = 512


def widths(width: int) -> dict[str, int]:
    """A dense layer, one with WINT4 and one with WINT2 experts, an MTP block: 22 MB at 512; two ranks can share it from 256."""
    return {
        "hidden_size": width, "intermediate_size": width, "moe_intermediate_size": width, "num_attention_heads": width // 64,
        "num_key_value_heads": 2, "head_dim": 64, "moe_num_experts": 2, "moe_num_shared_experts": 2, "moe_k": 1, "vocab_size": 64,
    }  # fmt: skip


# --- who asks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code (minus the signal that killed it; None while it is stopped) and what it said."""

    code: int | None
    out: str
    err: str

    @property
    def one_line(self) -> bool:
        said = self.err.removeprefix("\n")  # click ends the line that a terminal begins with ^C
        return said.count("\n") == 1 and said.endswith("\n")

    def __str__(self) -> str:
        said = self.err.strip().splitlines()
        return f"exit code {self.code}, {len(said)} line(s) on stderr: {' | '.join(said)[-300:]!r}"


@dataclass(frozen=True)
class Run:
    """A run that was started. It is not reaped before `wait`, so its number stays its own."""

    forks: Forks
    pid: int
    log: str

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Outcome:
        code = self.forks.ask(wait=self.pid)["code"]
        files = [Path(f"{self.log}.{what}") for what in ("out", "err")]
        outcome = Outcome(code, *(file.read_text() for file in files))
        if code is not None:
            for file in files:
                file.unlink()
        return outcome


class Forks:
    """The forking process, and the folder in which it has made `src`, a checkpoint."""

    def __init__(self, folder: Path, width: int = WIDTH) -> None:
        self.folder, self._runs = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, __file__, folder, str(width)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.ask()  # it is ready then

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the forking process has ended; what it said last is on stderr"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(self, *arguments: object, **faults: Any) -> Run:
        """Fork a run; `faults` are those of `install`."""
        self._runs += 1
        log = f"{self.folder}/{self._runs}"
        for what in ("out", "err"):  # here: it may be killed before it can
            Path(f"{log}.{what}").touch()
        pid = self.ask(arguments=[str(a) for a in arguments], log=log, faults=faults)["pid"]
        return Run(self, pid, log)

    def run(self, *arguments: object, **faults: Any) -> Outcome:
        return self.start(*arguments, **faults).wait()


# --- the forking process ---------------------------------------------------------------------------------------------


def serve(folder: Path, width: int) -> None:
    """Answer requests until nobody can ask any more."""
    # Python's own handlers come with the command; until then a signal waits
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _warm_up(folder, width)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, int | None] = {}
        if "arguments" in request:
            answer["pid"] = _fork(request)
        elif "wait" in request:
            answer["code"] = _wait(request["wait"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _warm_up(folder: Path, width: int) -> None:
    """Import and compile all that the commands need."""
    sys.path.insert(0, str(TESTS))
    from helpers.models import invoke, random_model

    source = random_model(folder / "src", "pt", "moe_mtp", **widths(width))
    warm = folder / "warm"
    invoke("convert", source, warm / "convert", "--to", "paddle")
    invoke("wint4", source, warm / "wint4", "--mtp", "--workers", 2)
    invoke("wint2", source, warm / "wint2", "--wint4-layers", 2, "--effort", 1)
    invoke("reshard", warm / "wint2", warm / "reshard", "--tp", 2)
    invoke("verify", warm / "wint2")
    shutil.rmtree(warm)


def _fork(request: dict[str, Any]) -> int:
    if Path("/proc/self/task").is_dir():
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not fork"
    pid = os.fork()
    if not pid:
        _run(request["arguments"], request["log"], request["faults"])
    return pid


def _run(arguments: list[str], log: str, faults: dict[str, Any]) -> NoReturn:
    """The forked process: the command, then nothing of what a Python process does at its end."""
    code = None
    try:
        for fd, name in ((0, os.devnull), (1, f"{log}.out"), (2, f"{log}.err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), fd)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from ernie_quant.cli.main import main

        install(**faults)
        sys.argv = ["ernie-quant", *arguments]
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):  # a signal that comes now is too late
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(BUG if code is None else code)


def _wait(pid: int, seconds: float = 120) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if found:
            return None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGABRT)
        time.sleep(0.001)


# --- faults, in the forked process -----------------------------------------------------------------------------------

Watcher = Callable[[str, str], None]  # kind and path of what is about to happen
CHANGES = {
    "os.rename": (0, 2), "os.remove": (0, 1), "os.mkdir": (0, 2), "os.rmdir": (0, 1), "os.link": (1, 3), "os.symlink": (1, 2),
    "os.truncate": (0, None),
}  # fmt: skip
# of each audit event that changes a folder: where its path is, and the folder's descriptor that the path starts from


def install(
    watch: str, *, at: int = 0, action: str = "", target: str = "", budget: int | None = None, number: str = "ENOSPC",
    free: int | None = None, readonly: bool = False, backwards: bool = False, fsync: bool = True, list_to: str = "",
) -> None:  # fmt: skip
    """Install faults that concern what lies under `watch`.

    at, action, target: before its at-th operation the process kills or stops itself, or damages the file `target`
    budget, number: bytes that the disk has; beyond them every write fails with the error `number`
    free: what the system says is free    readonly: nothing can be changed
    backwards: the clock runs backwards   fsync: False saves the time   list_to: a file that lists the operations
    """
    real_fsync = os.fsync if fsync else lambda fd: None
    watchers: list[Watcher] = []
    if list_to:
        file = open(list_to, "w", buffering=1)  # noqa: SIM115 - until the process ends
        watchers.append(lambda kind, path: print(kind, os.path.relpath(path, watch), file=file))
    if at:
        watchers.append(_at(at, action, target))
    if readonly:
        watchers.append(_refuse)
    disk = Disk(watch, budget, number) if budget is not None else None
    if disk is not None:
        watchers.append(disk.operation)
    _watch(watch, watchers, real_fsync, disk)
    if free is not None:
        shutil.disk_usage = lambda path: SimpleNamespace(total=PLENTY, used=0, free=free)  # type: ignore[assignment]
    if backwards:
        _turn_back_the_clock()


def _watch(folder: str, watchers: list[Watcher], real_fsync: Callable[[int], None], disk: Disk | None) -> None:
    """Tell the watchers of every change under `folder` before it happens, and let signals in at the first open."""
    waiting = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal waiting
        if event == "open":
            path, _, flags = arguments
            if waiting and str(path).endswith("config.json"):  # the command is at work
                waiting = False
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not isinstance(path, int):
                tell("open", _full(path))
        elif event in CHANGES:
            where, base = CHANGES[event]
            tell(event, _full(arguments[where], arguments[base] if base is not None else -1))

    def tell(kind: str, path: str) -> None:
        if f"{path}/".startswith(f"{folder}/"):
            for watcher in watchers:
                watcher(kind, path)

    real_pwrite, real_write = os.pwrite, os.write
    runs: dict[int, int] = {}  # writes to each open file since its last other operation

    def pwrite(fd: int, data: Any, at: int) -> int:
        runs[fd] = runs.get(fd, 0) + 1
        if runs[fd].bit_count() == 1:  # the 1st, 2nd, 4th, 8th …: thousands of rows are one moment
            tell("pwrite", _full(fd))
        return disk.write(lambda part: real_pwrite(fd, part, at), fd, data, at) if disk else real_pwrite(fd, data, at)

    def write(fd: int, data: Any) -> int:
        tell("write", _full(fd))
        return disk.write(lambda part: real_write(fd, part), fd, data) if disk else real_write(fd, data)

    def sync(fd: int) -> None:
        runs.pop(fd, None)
        tell("fsync", _full(fd))
        real_fsync(fd)

    os.pwrite, os.write, os.fsync, os.fdatasync = pwrite, write, sync, sync
    if disk:
        disk.limit_files()
    sys.addaudithook(hook)


def _full(path: Any, folder: int = -1) -> str:
    """The path of a file, or of an open one; relative to an open folder as rmtree has it."""
    if isinstance(path, int):
        with contextlib.suppress(OSError):
            return str(Path(f"/proc/self/fd/{path}").readlink())
        return ""
    path = os.fsdecode(path)
    return os.path.join(_full(folder) if folder >= 0 else Path.cwd(), path)  # noqa: PTH118 - keeps an absolute path


def _at(at: int, action: str, target: str) -> Watcher:
    left = at

    def operation(kind: str, path: str) -> None:
        nonlocal left
        left -= 1
        if left:
            return
        if action in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        else:
            _damage(Path(target), action)

    return operation


def _damage(file: Path, how: str) -> None:
    if how == "delete":
        file.unlink()
        return
    before = file.stat()
    if how == "truncate":
        os.truncate(file, before.st_size // 2)
    else:
        with open(file, "r+b") as opened:
            opened.seek(before.st_size * 3 // 4)
            byte = opened.read(1)[0]
            opened.seek(-1, os.SEEK_CUR)
            opened.write(bytes([byte ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))  # a copy of the same moment has the same time


def _refuse(kind: str, path: str) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)


def _turn_back_the_clock() -> None:
    real, real_ns = time.time, time.time_ns
    start, start_ns = real(), real_ns()
    time.time = lambda: 2 * start - real() - 3600
    time.time_ns = lambda: 2 * start_ns - real_ns() - 3600 * 10**9


class Disk:
    """A disk with room for `budget` bytes: what does not fit is cut short first, then fails."""

    def __init__(self, folder: str, budget: int, number: str) -> None:
        self.folder, self.budget, self.number = Path(folder), budget, getattr(errno, number)
        self._used: int | None = None

    def error(self, path: str | None = None) -> OSError:
        return OSError(self.number, os.strerror(self.number), *([path] if path else []))

    def left(self) -> int:
        if self._used is None:
            self._used = sum(p.lstat().st_size for p in self.folder.rglob("*") if p.is_file())
        return self.budget - self._used

    def operation(self, kind: str, path: str) -> None:
        """A new name needs room too."""
        if kind in ("pwrite", "write"):
            return
        creates = kind == "os.mkdir" or (kind == "open" and not os.path.lexists(path))
        if creates and self.left() <= 0:
            raise self.error(path)
        self._used = None  # counted anew when it is needed: something is renamed, cut or removed

    def write(self, real: Callable[[memoryview], int], fd: int, data: Any, at: int | None = None) -> int:
        view, status = memoryview(data).cast("B"), os.fstat(fd)
        if not _full(fd).startswith(f"{self.folder}/"):
            return real(view)
        end = (os.lseek(fd, 0, os.SEEK_CUR) if at is None else at) + len(view)
        beyond = max(0, end - status.st_size) - self.left()
        if beyond >= len(view) > 0:
            raise self.error()
        done = real(view[:-beyond] if beyond > 0 else view)
        self._used = (self._used or 0) + max(0, os.fstat(fd).st_size - status.st_size)
        return done

    def limit_files(self) -> None:
        """The same for files that are opened with `open`, reserved, or copied by the system."""
        disk, real_open, real_reserve = self, builtins.open, getattr(os, "posix_fallocate", None)

        class Limited(io.FileIO):
            def write(self, data: Any) -> int:
                return disk.write(super().write, self.fileno(), data)

        def limited(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *rest: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax") or not _full(file).startswith(f"{disk.folder}/"):
                return real_open(file, mode, buffering, encoding, *rest, **options)
            raw = io.BufferedWriter(Limited(file, mode.replace("b", "").replace("t", "")))
            return raw if "b" in mode else io.TextIOWrapper(raw, encoding or "utf-8", *rest, **options)

        def reserve(fd: int, at: int, count: int) -> None:
            if at + count - os.fstat(fd).st_size > disk.left():
                raise disk.error()
            real_reserve(fd, at, count)  # type: ignore[misc]
            disk._used = None

        builtins.open = io.open = limited  # type: ignore[assignment]
        os.posix_fallocate = reserve
        os.sendfile = _unsupported  # then shutil copies with read and write
        os.copy_file_range = _unsupported


def _unsupported(*_: object) -> NoReturn:
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
