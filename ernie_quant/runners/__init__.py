"""Runners, one file each: where the files of a plan are written. All of them give the same bytes.

A runner maps a function over jobs; it knows neither formats nor models. What it is given can be sent to another process.
A runner is an object with `map_jobs`: a file of this folder, or what it makes where there is something to say of it.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, cast

from ernie_quant import plugins
from ernie_quant.checkpoint import Checkpoint, Download
from ernie_quant.planning.steps import ShardJob
from ernie_quant.threads import Progress

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Work(Protocol[Result_co]):
    """Writes the file of a job; can be sent to another process."""

    def __call__(self, job: ShardJob, *, workers: int, progress: Progress, download: Download) -> Result_co:
        """With `workers` threads. Raises what the work raises."""
        ...


@dataclass(frozen=True)
class Common:
    """What the jobs of a run have in common: the source, the folder that is written to, and how much of a machine they take.

    `workers`: threads per file, 0 for as many as suit the runner. `disk_budget`: bytes of a hub's files that may lie on a
    disk at a time.
    """

    source: Checkpoint
    folder: Path
    workers: int = 0
    disk_budget: int | None = None


class Runner(Protocol):
    """What the file of a runner has."""

    def map_jobs(
        self, work: Work[Result], jobs: Sequence[ShardJob], progress: Progress, common: Common
    ) -> Generator[Result, None, None]:  # fmt: skip
        """The results, as they come; to `progress` goes what `work` does not tell itself.

        A job is begun when those that its shard names in `after` have ended.
        """
        ...


def find(name: str) -> Runner:
    """The runner of that name, as it is when nothing is said of it."""
    return cast(Runner, plugins.load(sys.modules[__name__], name))
