"""Several files at a time, each in a process of this machine: for machines with more processors than threads can use."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from ernie_quant.checkpoint import OnDisk
from ernie_quant.planning.steps import ShardJob
from ernie_quant.runners import Common, Result, Work
from ernie_quant.threads import Progress, default_workers, ordered

THREADS = 4  # about so many can work on one file before they wait for each other


def map_jobs(
    work: Work[Result], jobs: Sequence[ShardJob], progress: Progress, common: Common
) -> Generator[Result, None, None]:  # fmt: skip
    """A thread for each job that is at work waits for its files and for its process, so that nothing waits for us here:
    a job's files may have no room on disk before an older one is done with its own."""
    processes, threads = max(2, (os.cpu_count() or 1) // THREADS), common.workers or default_workers()
    ended = {job.shard.filename: threading.Event() for job in jobs}
    with (
        common.source.download([job.shard.needs for job in jobs], common.disk_budget) as download,
        ProcessPoolExecutor(processes, get_context("spawn")) as pool,
    ):

        def one(job: ShardJob) -> Result:
            try:
                for name in job.shard.after:
                    if name in ended:
                        ended[name].wait()
                places = {path: download.path(path) for path in job.shard.needs}
                return pool.submit(_in_child, work, job, threads, OnDisk(job.stamps, places)).result()
            finally:
                ended[job.shard.filename].set()

        for number, result in enumerate(ordered(one, jobs, processes, download.stop, lambda: progress(0))):
            download.done(number)
            progress(jobs[number].shard.nbytes_in)
            yield result


def _in_child(work: Work[Result], job: ShardJob, threads: int, download: OnDisk) -> Result:
    return work(job, workers=threads, progress=lambda _: None, download=download)
