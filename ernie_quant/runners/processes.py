"""Several files at a time, each in a process of this machine: for machines with more processors than threads can use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing import get_context

from ernie_quant.checkpoint import Download, OnDisk
from ernie_quant.plan.steps import ShardJob
from ernie_quant.runners import Result, Work
from ernie_quant.threads import Progress

THREADS = 4  # about so many can work on one file before they wait for each other


def map_jobs(work: Work[Result], jobs: Sequence[ShardJob], progress: Progress, download: Download) -> Iterator[Result]:
    """At most one file per process is begun before the oldest is taken."""
    processes = max(2, (os.cpu_count() or 1) // THREADS)
    begun: dict[str, Future[Result]] = {}
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        try:
            for number, job in enumerate(jobs):
                if number >= processes:
                    yield _taken(number - processes, jobs, begun, progress, download)
                wait([begun[name] for name in job.shard.after if name in begun])
                places = {path: download.path(path) for path in job.shard.needs}
                begun[job.shard.filename] = pool.submit(_in_child, work, job, OnDisk(job.stamps, places))
            for number in range(max(0, len(jobs) - processes), len(jobs)):
                yield _taken(number, jobs, begun, progress, download)
        except BaseException:
            download.stop()
            pool.shutdown(cancel_futures=True)
            raise


def _in_child(work: Work[Result], job: ShardJob, download: OnDisk) -> Result:
    return work(job, progress=lambda _: None, download=download)


def _taken(
    number: int, jobs: Sequence[ShardJob], begun: dict[str, Future[Result]], progress: Progress, download: Download
) -> Result:
    job = jobs[number]
    result = begun[job.shard.filename].result()
    download.done(number)
    progress(job.shard.nbytes_in)
    return result
