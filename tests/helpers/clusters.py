"""A Ray cluster of two nodes on this machine, and work that meets with trouble on it."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ernie_quant.checkpoint import Download
from ernie_quant.errors import CheckpointError
from ernie_quant.planning.steps import ShardJob
from ernie_quant.runners import Common, Work
from ernie_quant.runners import ray as ray_runner
from ernie_quant.threads import Progress

CPUS = (5, 1)  # of the head and the other node, as Ray counts them; it starts a process for each
TOKEN = secrets.token_hex(32)  # Ray reads it once in a process, when it is imported


@contextmanager
def ray_environment() -> Iterator[dict[str, str]]:
    """A token and a folder of its own for what Ray writes; sockets lie in it, whose paths must be short."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    own = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("RAY_ADDRESS", raising=False)
        for name, value in own.items():
            patched.setenv(name, value)
        yield own
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def nodes() -> Iterator[Any]:
    """A cluster that other processes find by `auto`."""
    with ray_environment(), pytest.MonkeyPatch.context() as patched:
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS[0], "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=CPUS[1])
            patched.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            cluster.shutdown()


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster that this process is connected to."""
    if find_spec("ray") is None:
        pytest.skip("the package ray is not installed")
    with nodes() as cluster:
        import ray

        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield cluster
        finally:
            ray.shutdown()


def at_work() -> list[int]:
    """Processes of this cluster that write a file just now."""
    mine, found = f"RAY_TMPDIR={os.environ['RAY_TMPDIR']}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if b"ray::_on_a_node" in (process / "cmdline").read_bytes() and mine in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


@dataclass(frozen=True)
class On:
    """The Ray runner, whose work is done by `kind`, which has a folder for its marks."""

    kind: Any
    marks: Path

    def map_jobs(
        self, work: Work[Any], jobs: Sequence[ShardJob], progress: Progress, common: Common
    ) -> Generator[Any, None, None]:  # fmt: skip
        self.marks.mkdir(exist_ok=True)
        return ray_runner.map_jobs(self.kind(work, self.marks), jobs, progress, common)


@dataclass(frozen=True)
class Troubled:
    """Work that meets with trouble once, in the middle of the second file."""

    work: Work[Any]
    marks: Path

    def __call__(self, job: ShardJob, *, workers: int, progress: Progress, download: Download) -> Any:
        (self.marks / f"{job.shard.filename}-{secrets.token_hex(4)}").touch()
        half = job.shard.nbytes_in // 2
        done = 0

        def told(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if self.meant(job) and done >= half and self.first():
                self.trouble()

        return self.work(job, workers=workers, progress=told, download=download)

    def meant(self, job: ShardJob) -> bool:
        """Is it the file that meets with trouble?"""
        return "-00002-" in job.shard.filename

    def first(self) -> bool:
        """Is it the first time?"""
        try:
            (self.marks / "trouble").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def trouble(self) -> None:
        raise NotImplementedError


class Killed(Troubled):
    """kill -9."""

    def trouble(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Shaken(Troubled):
    """A network drive that is away for a moment."""

    def trouble(self) -> None:
        raise OSError(errno.EIO, "Input/output error")


class Broken(Troubled):
    """A file of the source that is no good, every time."""

    def trouble(self) -> None:
        raise CheckpointError("model.safetensors: is no good")


class Full(Troubled):
    """A disk without room, every time."""

    def first(self) -> bool:
        return True

    def trouble(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model-2")


class Stuck(Troubled):
    """Stands still in the first file on the node whose name lies among the marks."""

    def meant(self, job: ShardJob) -> bool:
        import ray

        return bool(ray.get_runtime_context().get_node_id() == (self.marks / "node").read_text())

    def trouble(self) -> None:
        (self.marks / "stuck").touch()
        time.sleep(600)


def sees_nothing(*_: object) -> tuple[str, bool, dict[str, str]]:
    """What a node says that does not share the folder."""
    from ernie_quant.runners._ray import _programs

    return "does not see it", True, _programs()


def sees_no_source(here: Path, token: Path, source: Path) -> tuple[str, bool, dict[str, str]]:
    from ernie_quant.runners._ray import _programs

    token.with_name(f"{token.name}-x").touch()
    return token.read_text(), False, _programs()


def has_another_torch(here: Path, token: Path, source: Path) -> tuple[str, bool, dict[str, str]]:
    from ernie_quant.runners._ray import _programs

    return token.read_text(), True, {**_programs(), "torch": "1.0"}
