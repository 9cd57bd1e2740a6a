"""One file after the other, in this process; the threads are inside of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ernie_quant.checkpoint import Download
from ernie_quant.planning.steps import ShardJob
from ernie_quant.runners import Result, Work
from ernie_quant.threads import Progress


def map_jobs(work: Work[Result], jobs: Sequence[ShardJob], progress: Progress, download: Download) -> Iterator[Result]:
    """Jobs are in an order in which what comes before is before."""
    for number, job in enumerate(jobs):
        result = work(job, progress=progress, download=download)
        download.done(number)
        yield result
