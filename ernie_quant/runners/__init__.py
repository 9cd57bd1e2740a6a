"""Runners, one file each: where the files of a plan are written. All of them give the same bytes.

A runner maps a function over jobs; it knows neither formats nor models. What it is given can be sent to another process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar, cast

from ernie_quant import plugins
from ernie_quant.checkpoint import Download
from ernie_quant.planning.steps import ShardJob
from ernie_quant.threads import Progress

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Work(Protocol[Result_co]):
    """Writes the file of a job; can be sent to another process."""

    def __call__(self, job: ShardJob, *, progress: Progress, download: Download) -> Result_co:
        """Raises what the work raises."""
        ...


class Runner(Protocol):
    """What the file of a runner has."""

    def map_jobs(self, work: Work[Result], jobs: Sequence[ShardJob], progress: Progress, download: Download) -> Iterator[Result]:
        """The results, in order of `jobs`; `download.done(i)` when job i has read its files.

        A job is begun when those that its shard names in `after` have ended.
        """
        ...


def find(name: str) -> Runner:
    """The runner of that name."""
    return cast(Runner, plugins.load(sys.modules[__name__], name))
