"""The only loop over tensors.

Read `run_shard` from top to bottom and you know the program: what is read, encoded, measured, packed and written,
and in which order. Threads work ahead on slabs; results are taken in order, so that a file and its report do not
depend on how many there are.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ernie_quant import runtimes
from ernie_quant.checkpoint import Delivery
from ernie_quant.measure import Difference, compare
from ernie_quant.output import OutputFolder
from ernie_quant.plan import Plan, Shard, Step, file_metadata
from ernie_quant.report import TensorReport
from ernie_quant.views import Files, read, row_bytes
from ernie_quant.writer import ShardWriter

if TYPE_CHECKING:
    import torch

Progress = Callable[[int], None]  # is told the bytes of source data that are done
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ShardResult:
    """A finished file and what it cost."""

    filename: str
    nbytes: int
    sha256: str
    reports: tuple[TensorReport, ...]


@dataclass(frozen=True)
class RunResult:
    """What a run did, by which plan; no reports where the folder was complete before."""

    plan: Plan
    complete_before: bool
    reports: tuple[TensorReport, ...]
    files_before: int = 0  # weight files that an earlier run had finished


@dataclass(frozen=True)
class Slab:
    """A finished slab of rows of one step's tensor."""

    step: Step
    rows: tuple[int, int]
    parts: dict[str, torch.Tensor]
    difference: Difference


def run_shard(plan: Plan, shard: Shard, folder: Path, workers: int, progress: Progress, delivery: Delivery) -> ShardResult:
    """Write one file of the result. Raises CheckpointError; nothing stays under the final name then."""
    runtime = runtimes.find(plan.runtime)

    def work(item: tuple[Step, tuple[int, int]]) -> Slab:
        step, rows = item
        weight = read(step.view, files, rows)
        encoded = step.codec.encode(weight)
        difference = compare(step.name, weight, step.codec.decode(encoded)) if step.quantized else Difference()
        parts = runtime.pack(step.name, step.codec, encoded)
        return Slab(step, rows, parts, difference)

    sums: dict[str, Difference] = {}
    (folder / shard.filename).parent.mkdir(parents=True, exist_ok=True)
    with (
        Files(delivery.stamps, delivery.path) as files,
        ShardWriter(folder / shard.filename, shard.specs, file_metadata(plan)) as writer,
    ):
        for step in shard.steps:
            for name, tensor in runtime.constants(step.name, step.codec, step.spec).items():
                writer.write(name, tensor)
        slabs = [(step, rows) for step in shard.steps for rows in step.slabs()]
        for slab in _ordered(work, slabs, workers, delivery.stop):
            for name, tensor in slab.parts.items():
                writer.write(name, tensor, slab.rows[0], of=max((1, *slab.step.spec.shape[:1])))
            sums[slab.step.name] = sums.get(slab.step.name, Difference()) + slab.difference
            progress((slab.rows[1] - slab.rows[0]) * row_bytes(slab.step.spec))
        files.check()
        sha256 = writer.close()
    reports = tuple(TensorReport.of(step, sums.get(step.name, Difference()), writer.crc32(step.parts)) for step in shard.steps)
    return ShardResult(shard.filename, writer.nbytes, sha256, reports)


def _ordered(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, stop: Callable[[], object] = lambda: None
) -> Iterator[Result]:
    """`map` on threads, in order, with at most one finished result waiting per worker: memory stays bounded.

    `stop` is called when no more results are wanted, and must wake whoever waits in `work`.
    """
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BaseException:
            stop()
            raise
        finally:
            for future in ahead:
                future.cancel()


def default_workers() -> int:
    """The processors that this process may use; more than 8 wait for the disk."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)


def run_plan(
    plan: Plan, out: Path, *, workers: int = 0, restart: bool = False, disk_budget: int | None = None,
    progress: Progress = lambda _: None,
) -> RunResult:  # fmt: skip
    """Write the whole result to `out`, or what is left of it. Raises OutputError, RetryError or CheckpointError.

    `disk_budget`: bytes of a hub's files that may lie on disk at a time.
    """
    folder = OutputFolder(out)
    with folder.begin(plan, restart=restart) as complete:
        if complete:
            return RunResult(plan, complete_before=True, reports=())
        return write_all(plan, folder, workers, disk_budget, progress)


def write_all(
    plan: Plan, folder: OutputFolder, workers: int = 0, disk_budget: int | None = None, progress: Progress = lambda _: None
) -> RunResult:
    """The files of `plan` that are not finished yet, in a folder that was begun, and what completes it."""
    finished = {shard.filename: known for shard in plan.shards if (known := folder.finished(shard)) is not None}
    left = [shard for shard in plan.shards if shard.filename not in finished]
    progress(sum(shard.nbytes_in for shard in plan.shards if shard.filename in finished))
    written = dict(finished)
    with one_torch_thread(), plan.source.deliver([shard.needs for shard in left], disk_budget) as delivery:
        for number, shard in enumerate(left):
            result = run_shard(plan, shard, folder.path, workers or default_workers(), progress, delivery)
            delivery.done(number)
            written[shard.filename] = ({"bytes": result.nbytes, "sha256": result.sha256}, list(result.reports))
            folder.record(shard, *written[shard.filename])
    reports = plan.reports
    if reports is None:
        reports = tuple(row for shard in plan.shards for row in written[shard.filename][1])
    folder.finish(plan, {shard.filename: written[shard.filename][0] for shard in plan.shards}, reports)
    return RunResult(plan, complete_before=False, reports=reports, files_before=len(finished))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Slabs are the parallel work; threads inside torch's operations would fight with ours."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
