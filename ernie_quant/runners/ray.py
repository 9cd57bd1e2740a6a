"""Files on the nodes of a Ray cluster, as many at a time as it has room for."""

from __future__ import annotations

import importlib
import socket
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ernie_quant.devices import CUDA
from ernie_quant.disk import FULL
from ernie_quant.errors import ClusterError, ErnieQuantError, RetryError
from ernie_quant.planning.steps import ShardJob
from ernie_quant.runners import Common, Result, Work
from ernie_quant.runners._ray import AUTO, connected, look_around, stand_in, token_in, why
from ernie_quant.sources.elsewhere import Elsewhere
from ernie_quant.threads import TICK, Progress

THREADS = 4  # about so many can work on one file before they wait for each other
RETRIES = 5  # of a file whose worker or node has died, or had trouble with a disk or a network
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
        with connected(self.address) as ray, token_in(common.folder) as token:
            nodes = self._nodes(ray, common.workers)
            threads = common.workers or min(THREADS, *(int(node["Resources"]["CPU"]) for node in nodes))
            look_around(ray, nodes, token, common)
            task = ray.remote(
                num_cpus=threads, num_gpus=self.gpus, max_retries=RETRIES, retry_exceptions=[OSError],
                scheduling_strategy="SPREAD",
            )(_on_a_node)  # fmt: skip
            refs: dict[str, Any] = {}  # of each file
            for job in jobs:
                job = replace(job, device=CUDA) if self.gpus else job
                before = [refs[name] for name in job.shard.after if name in refs]
                refs[job.shard.filename] = task.remote(Path.cwd(), work, job, threads, elsewhere, token, *before)
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


# --- one file --------------------------------------------------------------------------------------------------------


def _on_a_node(
    here: Path, work: Work[Result], job: ShardJob, threads: int, elsewhere: Elsewhere, token: Path, *before: object
) -> Result | Exception:
    """What the work gives, or an error that another try would meet again; Ray tries again after any other OSError."""
    for error in before:
        if isinstance(error, Exception):
            return error
    stand_in(here)
    _import_whole("torch", "numba")
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


def _import_whole(*packages: str) -> None:
    """In a thread, which nothing interrupts: a task that is cancelled in the middle of an import would leave half of a package
    to the next task of its process."""
    for package in packages:
        thread = threading.Thread(target=importlib.import_module, args=(package,))
        thread.start()
        thread.join()


def _result(ray: ModuleType, ref: Any, job: ShardJob) -> Any:
    try:
        result = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise RetryError(f"{job.shard.filename}: {why(error)}; the same command goes on where it stopped") from None
    if isinstance(result, Exception):
        raise result
    return result


def _cancel(ray: ModuleType, refs: Sequence[Any]) -> None:
    """Tasks that nobody wants any more: asked first, so that they leave nothing behind; then killed."""
    for force in (False, True):
        for ref in refs:
            with suppress(Exception):
                ray.cancel(ref, force=force)
        if refs:
            with suppress(Exception):
                _, refs = ray.wait(list(refs), num_returns=len(refs), timeout=STOP)
