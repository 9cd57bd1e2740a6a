"""Files on the nodes of a Ray cluster, as many at a time as it has room for. Only here is the package `ray` imported."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ernie_quant.disk import FULL
from ernie_quant.errors import ClusterError, ErnieQuantError, RetryError, line_of
from ernie_quant.needs import require
from ernie_quant.paths import STATE
from ernie_quant.planning.identity import libraries
from ernie_quant.planning.steps import ShardJob
from ernie_quant.runners import Common, Result, Work
from ernie_quant.sources.elsewhere import Elsewhere
from ernie_quant.threads import TICK, Progress
from ernie_quant.version import __version__

AUTO = "auto"
TOKENS = "RAY_AUTH_MODE and the token must be the same here as on the nodes"
THREADS = 4  # about so many can work on one file before they wait for each other
RETRIES = 5  # of a file whose worker or node has died, or had trouble with a disk or a network
LOOK = 60.0  # seconds in which a node must answer
KNOCK = 10.0  # seconds in which the head must take a connection
STOP = 5.0  # seconds that tasks have for their end when nobody wants them any more


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs already: `auto` for that of this machine, or the address of its head. `gpus`: for each file."""

    address: str = AUTO
    gpus: int = 0

    def map_jobs(
        self, work: Work[Result], jobs: Sequence[ShardJob], progress: Progress, common: Common
    ) -> Generator[Result, None, None]:
        """Raises ClusterError for a cluster that cannot do it, what the work raises, or RetryError."""
        if not jobs:
            return
        elsewhere = Elsewhere.of(common.source, [job.shard.needs for job in jobs], common.disk_budget)
        with _connected(self.address) as ray, _token(common.folder) as token:
            nodes = self._nodes(ray, common.workers)
            threads = common.workers or min(THREADS, *(int(node["Resources"]["CPU"]) for node in nodes))
            _look_around(ray, nodes, token, common)
            task = ray.remote(
                num_cpus=threads, num_gpus=self.gpus, max_retries=RETRIES, retry_exceptions=[OSError],
                scheduling_strategy="SPREAD",
            )(_on_a_node)  # fmt: skip
            refs: dict[str, Any] = {}  # of each file
            for job in jobs:
                job = replace(job, device="cuda") if self.gpus else job
                before = [refs[name] for name in job.shard.after if name in refs]
                refs[job.shard.filename] = task.remote(work, job, threads, elsewhere, token, *before)
            left = {refs[job.shard.filename]: job for job in jobs}
            try:
                while left:
                    done, _ = ray.wait(list(left), timeout=TICK)
                    if not done:
                        progress(0)
                        self._nodes(ray, threads)
                    for ref in done:
                        job = left.pop(ref)
                        result = _result(ray, ref, job)
                        progress(job.shard.nbytes_in)
                        yield result
            finally:
                _cancel(ray, list(left))

    def _nodes(self, ray: ModuleType, threads: int) -> list[Mapping[str, Any]]:
        """Those that have room for a file. Raises ClusterError if none has."""
        alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        for what, wanted, option in (("GPU", self.gpus, "--ray-gpus"), ("CPU", threads, "--workers")):
            most = max((int(node["Resources"].get(what, 0)) for node in alive), default=0)
            if most < wanted:
                raise ClusterError(
                    f"{option} {wanted}: the largest of the {len(alive)} node(s) of the Ray cluster has {most} {what}s"
                )
            alive = [node for node in alive if node["Resources"].get(what, 0) >= wanted]
        if not alive:
            raise ClusterError(f"--ray {self.address}: no node of the cluster is left that has a CPU")
        return alive


def map_jobs(
    work: Work[Result], jobs: Sequence[ShardJob], progress: Progress, common: Common
) -> Generator[Result, None, None]:  # fmt: skip
    """On the cluster of this machine, without GPUs."""
    return Cluster().map_jobs(work, jobs, progress, common)


@contextmanager
def _connected(address: str) -> Iterator[ModuleType]:
    """Ray, with a connection that is closed at the end if it was opened here. Raises NeedsError or ClusterError."""
    require("ray")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of this process; what there is to say, we say
    import ray

    if ray.is_initialized():  # by a program that uses the library
        yield ray
        return
    try:
        _knock(os.environ.get("RAY_ADDRESS", address) if address == AUTO else address)
        with _own_signals():
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        why = line_of(str(error).strip().partition("\n")[0])
        hint = f"; {TOKENS}" if "oken" in str(error) or "Failed to connect" in why else ""
        raise ClusterError(f"--ray {address}: no Ray cluster can be reached there ({why}){hint}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Does anything listen there? Ray asks for minutes. Raises OSError or ValueError."""
    if address in (AUTO, "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("auto, or HOST:PORT of the head, as `ray start --head` says it")
    socket.create_connection((host.strip("[]"), int(port)), KNOCK).close()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself; whoever had it gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


# --- one folder for all nodes ----------------------------------------------------------------------------------------


@contextmanager
def _token(folder: Path) -> Iterator[Path]:
    """A file in the private state of the output folder, with a text that nobody can guess."""
    token = folder / STATE / f"seen-{secrets.token_hex(8)}"
    token.write_text(secrets.token_hex(16))
    try:
        yield token
    finally:
        for path in token.parent.glob(f"{token.name}*"):
            path.unlink(missing_ok=True)


def _look_around(ray: ModuleType, nodes: Sequence[Mapping[str, Any]], token: Path, common: Common) -> None:
    """Does every node see and write the output folder, see the source, and have the same programs? Raises ClusterError."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    source = None if common.source.downloader else common.source.folder
    look = ray.remote(num_cpus=0, max_retries=1)(_seen_from_a_node)
    refs = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(token, source): node
        for node in nodes
    }
    done, late = ray.wait(list(refs), num_returns=len(refs), timeout=LOOK)
    for ref in late:
        raise ClusterError(f"{_name(refs[ref])}: a node of the Ray cluster that did not answer in {LOOK:.0f} s")
    own = (token.read_text(), True, _programs())
    for ref in done:
        who, out = f"node {_name(refs[ref])}", token.parent.parent
        try:
            seen, there, programs = ray.get(ref)
        except ray.exceptions.RayError as error:
            raise ClusterError(f"{who}: cannot run ernie-quant: {_why(error)}") from None
        if seen != own[0]:
            raise ClusterError(
                f"{out}: {who} {seen or 'has another folder of this name'}; all nodes must share the output folder"
            )
        if not there:
            raise ClusterError(f"{source}: is not there on {who}; all nodes must see the source in the same place")
        if differ := [
            f"{name} {programs.get(name)}, here {version}" for name, version in own[2].items() if programs.get(name) != version
        ]:
            raise ClusterError(f"{who} has {'; '.join(differ)}; all nodes must have the same versions, for the same bytes")


def _seen_from_a_node(token: Path, source: Path | None) -> tuple[str, bool, dict[str, str]]:
    """On a node: the text of the token or what is wrong with the folder, whether the source is there, and versions."""
    there = source is None or source.is_dir()
    try:
        text = token.read_text()
        token.with_name(f"{token.name}-{secrets.token_hex(4)}").touch()
    except FileNotFoundError:
        return "does not see it", there, _programs()
    except OSError as error:
        return f"cannot write to it ({error.strerror})", there, _programs()
    return text, there, _programs()


def _programs() -> dict[str, str]:
    return {"ernie-quant": __version__, **libraries()}


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


# --- one file --------------------------------------------------------------------------------------------------------


def _on_a_node(
    work: Work[Result], job: ShardJob, threads: int, elsewhere: Elsewhere, token: Path, *before: object
) -> Result | Exception:
    """What the work gives, or an error that another try would meet again; Ray tries again after any other OSError."""
    for error in before:
        if isinstance(error, Exception):
            return error
    try:
        if not token.is_file():
            return ClusterError(f"{token.parent.parent}: node {socket.gethostname()} does not see it; all nodes must share it")
        with elsewhere.download(job.shard.needs, job.stamps) as download:
            return work(job, workers=threads, progress=lambda _: None, download=download)
    except ErnieQuantError as error:
        return error
    except OSError as error:
        if error.errno in FULL:
            return error
        raise


def _result(ray: ModuleType, ref: Any, job: ShardJob) -> Any:
    try:
        result = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise RetryError(f"{job.shard.filename}: {_why(error)}; the same command goes on where it stopped") from None
    if isinstance(result, Exception):
        raise result
    return result


def _why(error: Exception) -> str:
    return line_of(next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__))


def _cancel(ray: ModuleType, refs: Sequence[Any]) -> None:
    """Tasks that nobody wants any more: asked first, so that they leave nothing behind; then killed."""
    for force in (False, True):
        for ref in refs:
            with suppress(Exception):
                ray.cancel(ref, force=force)
        if refs:
            with suppress(Exception):
                _, refs = ray.wait(list(refs), num_returns=len(refs), timeout=STOP)
