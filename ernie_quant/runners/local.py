"""One file after the other, in this process; the threads are inside of a file."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from ernie_quant.planning.steps import ShardJob
from ernie_quant.runners import Common, Result, Work
from ernie_quant.threads import Progress, default_workers


def map_jobs(
    work: Work[Result], jobs: Sequence[ShardJob], progress: Progress, common: Common
) -> Generator[Result, None, None]:  # fmt: skip
    """Jobs are in an order in which what comes before is before."""
    with common.source.download([job.shard.needs for job in jobs], common.disk_budget) as download:
        for number, job in enumerate(jobs):
            result = work(job, workers=common.workers or default_workers(), progress=progress, download=download)
            download.done(number)
            yield result
