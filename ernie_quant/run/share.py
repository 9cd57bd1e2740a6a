"""A plan in shares: several processes, perhaps of several machines, write its files, then one completes the folder."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ernie_quant.devices import CPU, found
from ernie_quant.errors import OutputError
from ernie_quant.planning.share import Share, check_sharing, shares
from ernie_quant.planning.steps import Plan, ShardJob
from ernie_quant.result.shares import SharedFolder
from ernie_quant.run.whole import Each, RunResult, finished_before, run_plan, write_files
from ernie_quant.runners import Common, Result, Work, local
from ernie_quant.sources.elsewhere import side_by_side
from ernie_quant.threads import Progress

SHOWN = 8  # files that an error names


@dataclass(frozen=True)
class ShareResult:
    """The files of a share, which are all there now, and how many of them were before."""

    share: Share
    files: tuple[str, ...]
    files_before: int


def run_share(
    plan: Plan, out: Path, share: Share, request: Mapping[str, Any], *, workers: int = 0, disk_budget: int | None = None,
    progress: Progress = lambda _: None, space_check: bool = True, each: Each = lambda _: None,
    device: str = CPU,
) -> ShareResult | RunResult:  # fmt: skip
    """Write what `out` lacks of the files of a share; of a folder that is complete already, what `run_plan` says of it.

    `request`: what `merge` shall know. Raises PlanError where the plan has no shares, and what `run_plan` raises.
    """
    check_sharing(plan)
    found(device)
    folder = SharedFolder(out, share, request)
    with folder.begin(plan, restart=False, space_check=space_check) as complete:
        if complete:
            return finished_before(plan, folder)
        mine = share.files(plan)
        beside = replace(plan, source=side_by_side(plan.source))
        results, before = write_files(beside, mine, folder, workers, disk_budget, progress, local, each, device)
        return ShareResult(share, tuple(results[shard.filename].filename for shard in mine), before)


def merge_shares(plan: Plan, out: Path, of: int, *, progress: Progress = lambda _: None) -> RunResult:
    """Complete a folder whose shares are all done. Raises OutputError that names the files which are not there."""
    return run_plan(plan, out, progress=progress, runner=_Nobody(plan, out, of), space_check=False)


@dataclass(frozen=True)
class _Nobody:
    """A runner that writes nothing, and says whose the files are that are not there."""

    plan: Plan
    out: Path
    of: int

    def map_jobs(
        self, work: Work[Result], jobs: Sequence[ShardJob], progress: Progress, common: Common
    ) -> Generator[Result, None, None]:
        """Raises OutputError if there is anything to do."""
        owner = {shard.filename: index for index, files in enumerate(shares(self.plan.shards, self.of)) for shard in files}
        missing = [f"{job.shard.filename} (--shard-index {owner[job.shard.filename]})" for job in jobs]
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            few = ", ".join(missing[:SHOWN])
            raise OutputError(
                f"{self.out}: {len(missing)} of {len(owner)} files are not there: {few}{more}; run those shares again"
            )
        yield from ()
