"""A plan from beginning to end: what is left of it is written, then what completes the folder."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from ernie_quant.checkpoint import Stamp
from ernie_quant.devices import CPU, found
from ernie_quant.disk import crowds, drop_partials
from ernie_quant.planning.steps import Plan, Shard, ShardJob, in_order
from ernie_quant.reporting.rows import ShardResult, TensorReport
from ernie_quant.result.carry import changed_since
from ernie_quant.result.finish import finish
from ernie_quant.result.folder import OutputFolder
from ernie_quant.run.shard import run_shard
from ernie_quant.runners import Common, Runner, local
from ernie_quant.threads import Progress, Watch, default_workers


@dataclass(frozen=True)
class RunResult:
    """What a run did, by which plan; no reports where the folder was complete before."""

    plan: Plan
    complete_before: bool
    reports: tuple[TensorReport, ...]
    files_before: int = 0  # weight files that an earlier run had finished
    changed: tuple[str, ...] = ()  # notes on what a finished result has carried along, and is otherwise today


@dataclass(frozen=True)
class FileDone:
    """A weight file that has just been finished: number `number` of `of`; bytes of its source and of its own.

    `seconds` since the one before it, or since the first was begun.
    """

    filename: str
    number: int
    of: int
    nbytes_in: int
    nbytes: int
    seconds: float


Each = Callable[[FileDone], None]  # is told of every file


def run_plan(
    plan: Plan, out: Path, *, workers: int = 0, restart: bool = False, disk_budget: int | None = None,
    progress: Progress = lambda _: None, runner: Runner = local, space_check: bool = True, watch: Watch = lambda *_: None,
    each: Each = lambda _: None, device: str = CPU,
) -> RunResult:  # fmt: skip
    """Write the whole result to `out`, or what is left of it. Raises OutputError, RetryError or CheckpointError.

    `workers`: threads per file, 0 for as many as there are processors, at most 8. `disk_budget`: bytes of a hub's files
    that may lie on disk at a time. `runner`: where files are written. `space_check`: must the disk have room for it?
    `watch` is told which layer and expert is calibrated, `each` of every file that is finished.
    `device`: `cpu`, `cuda` or `cuda:1`.
    """
    found(device)
    folder = OutputFolder(out)
    copies = 2 if plan.calibration else 1  # calibrated weights lie on disk before the files of the result are written
    with folder.begin(plan, restart=restart, copies=copies, space_check=space_check) as complete:
        if complete:
            return finished_before(plan, folder)
        if plan.calibration:
            plan = calibrate(plan, folder, workers, watch)
        return write_all(plan, folder, workers, disk_budget, progress, runner, each, device)


def calibrate(plan: Plan, folder: OutputFolder, workers: int, watch: Watch) -> Plan:
    """The plan with weights that text has been run through; a folder that was begun."""
    from ernie_quant.calibration.calibrated import calibrated

    made: Plan = calibrated(plan, folder.calibration, workers or default_workers(), watch)
    return made


def finished_before(plan: Plan, folder: OutputFolder) -> RunResult:
    """Nothing is done; what is carried along may have changed since."""
    notes = tuple(changed_since(plan, folder.path))
    return RunResult(replace(plan, notes=(*plan.notes, *notes)), complete_before=True, reports=(), changed=notes)


def write_all(
    plan: Plan, folder: OutputFolder, workers: int = 0, disk_budget: int | None = None,
    progress: Progress = lambda _: None, runner: Runner = local, each: Each = lambda _: None, device: str = CPU,
) -> RunResult:  # fmt: skip
    """The files of `plan` that are not finished yet, in a folder that was begun, and what completes it."""
    plan.origin.bring(plan.copies)
    results, before = write_files(plan, plan.shards, folder, workers, disk_budget, progress, runner, each, device)
    ordered = [results[shard.filename] for shard in plan.shards]
    reports = plan.reports
    if reports is None:
        reports = tuple(row for result in ordered for row in result.reports)
    plan = finish(folder, plan, ordered, reports)
    return RunResult(plan, complete_before=False, reports=reports, files_before=before)


def write_files(
    plan: Plan, shards: Sequence[Shard], folder: OutputFolder, workers: int, disk_budget: int | None, progress: Progress,
    runner: Runner, each: Each, device: str = CPU,
) -> tuple[dict[str, ShardResult], int]:  # fmt: skip
    """Those of `shards` that are not finished yet; what became of all of them, and how many were finished before."""
    results = {shard.filename: known for shard in shards if (known := folder.finished(shard, progress)) is not None}
    before = len(results)
    left = in_order([shard for shard in shards if shard.filename not in results])
    work = functools.partial(run_shard, folder=folder.path)
    stamps = {**plan.source.changeable, **{file: Stamp.of(file) for shard in left for file in shard.statistics_files}}
    once = crowds(sum(shard.nbytes_in + sum(spec.nbytes for spec in shard.specs.values()) for shard in left))
    jobs = [
        ShardJob(shard, plan.runtime, plan.metadata_of(shard), {f: stamps[f] for f in shard.files if f in stamps}, device, once)
        for shard in left
    ]
    common = Common(plan.source, folder.path, workers, disk_budget)
    then, sizes = time.monotonic(), {shard.filename: shard.nbytes_in for shard in left}
    try:
        with closing(runner.map_jobs(work, jobs, progress, common)) as written:
            for result in written:
                results[result.filename] = result
                folder.record(result)
                now = time.monotonic()
                done = (len(results), len(shards), sizes[result.filename], result.nbytes, now - then)
                each(FileDone(result.filename, *done))
                then = now
    finally:  # of processes that were killed
        drop_partials(folder.path / shard.filename for shard in left)
    return results, before
