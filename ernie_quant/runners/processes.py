"""Several files at a time, each in a process of this machine: for machines with more processors than threads can use."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from ernie_quant.checkpoint import Download, OnDisk
from ernie_quant.planning.steps import ShardJob
from ernie_quant.runners import Result, Work
from ernie_quant.threads import Progress, ordered

THREADS = 4  # about so many can work on one file before they wait for each other


def map_jobs(work: Work[Result], jobs: Sequence[ShardJob], progress: Progress, download: Download) -> Iterator[Result]:
    """A thread for each job that is at work waits for its files and for its process, so that nothing waits for us here:
    a job's files may have no room on disk before an older one is done with its own."""
    processes = max(2, (os.cpu_count() or 1) // THREADS)
    ended = {job.shard.filename: threading.Event() for job in jobs}
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:

        def one(job: ShardJob) -> Result:
            try:
                for name in job.shard.after:
                    if name in ended:
                        ended[name].wait()
                places = {path: download.path(path) for path in job.shard.needs}
                return pool.submit(_in_child, work, job, OnDisk(job.stamps, places)).result()
            finally:
                ended[job.shard.filename].set()

        for number, result in enumerate(ordered(one, jobs, processes, download.stop, lambda: progress(0))):
            download.done(number)
            progress(jobs[number].shard.nbytes_in)
            yield result


def _in_child(work: Work[Result], job: ShardJob, download: OnDisk) -> Result:
    return work(job, progress=lambda _: None, download=download)
