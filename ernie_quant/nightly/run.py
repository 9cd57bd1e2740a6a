"""The nightly job: for every target, make it if it is not published already, verify it, publish it, and forget the files.

A run that was killed, missed or doubled is harmless: what is begun goes on, what is published is known by its fingerprint.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ernie_quant import hubs
from ernie_quant.check.verify import verify
from ernie_quant.disk import FULL, hold
from ernie_quant.errors import AnotherPlanError, ErnieQuantError, RetryError
from ernie_quant.hubs import Publisher
from ernie_quant.jsonio import read_object
from ernie_quant.nightly.job import Job, JobTarget
from ernie_quant.nightly.outcome import PLANNED, UP_TO_DATE, JobResult, TargetResult, worst
from ernie_quant.nightly.planned import plan_of
from ernie_quant.paths import MANIFEST
from ernie_quant.planning.identity import fingerprint
from ernie_quant.planning.reshard import shared_identity
from ernie_quant.planning.steps import Plan
from ernie_quant.publish import Destination, publish
from ernie_quant.publish.files import refuse_odd, repair
from ernie_quant.publish.places import remote_name
from ernie_quant.reporting.rows import FILENAME, TensorReport, total
from ernie_quant.result.room import unknown_space
from ernie_quant.run.asked import text_of
from ernie_quant.run.shared import run_shared
from ernie_quant.run.whole import FileDone, run_plan
from ernie_quant.sources import open_source

SAMPLE = 100  # about so many tensors, of which the quantized are decoded and recoded before they are published
DROPPED = ".dropped"  # in the work folder: what is being deleted

Log = Callable[..., None]


def run_job(job: Job, work: Path, *, max_hours: float | None = None, log: Log = lambda **_: None) -> JobResult:
    """All targets, one after the other; one that fails does not stop the others. Raises RetryError if a run is at work."""
    work.mkdir(parents=True, exist_ok=True)
    hours = max_hours or job.max_hours
    deadline = time.monotonic() + 3600 * hours if hours else None
    with _logged(log), hold(work / "lock", f"{work}: another run of a job is at work here"):
        shutil.rmtree(work / DROPPED, ignore_errors=True)
        texts = [text_of(target.recipe.calibration) for target in job.targets]
        source = open_source(job.source, links=job.follow_links)
        log(event="source", source=job.source, commit=source.revision, bytes=source.nbytes)
        plans = [  # every refusal comes before any work
            plan_of(source, target, text, job.disk_budget) for target, text in zip(job.targets, texts, strict=True)
        ]
        publishers = {t.scheme: hubs.publisher(t.scheme) for t in job.targets}
        results = tuple(
            _attempt(target, plan, job, work, publishers[target.scheme], deadline, log)
            for target, plan in zip(job.targets, plans, strict=True)
        )
        result = JobResult(worst(results), job.source, source.revision, results)
        log(event="end", status=result.status)
    return result


def look(job: Job, work: Path) -> JobResult:
    """What `run_job` would do: every target is planned from headers and looked for on its hub, and every token is tried."""
    texts = [text_of(target.recipe.calibration) for target in job.targets]
    source = open_source(job.source, links=job.follow_links)
    plans = [plan_of(source, target, text, job.disk_budget) for target, text in zip(job.targets, texts, strict=True)]
    results = tuple(_look(target, plan, work) for target, plan in zip(job.targets, plans, strict=True))
    return JobResult(worst(results), job.source, source.revision, results)


def _look(target: JobTarget, plan: Plan, work: Path) -> TargetResult:
    try:
        hub = hubs.publisher(target.scheme)
        account = hub.account()
        if (commit := _published(hub, target, fingerprint(shared_identity(plan, target.tp)))) is not None:
            return TargetResult(target.repo, UP_TO_DATE, commit, account=account)
    except ErnieQuantError as error:
        return TargetResult(target.repo, "retry" if isinstance(error, RetryError) else "failed", error=str(error))
    begun = (work / target.folder).is_dir()
    return TargetResult(target.repo, PLANNED, bytes=plan.nbytes, account=account, begun=begun)


def _attempt(
    target: JobTarget, plan: Plan, job: Job, work: Path, hub: Publisher, deadline: float | None, log: Log
) -> TargetResult:
    """What became of a target; its failure is a result too."""
    log(event="target", repo=target.repo)
    try:
        result = _target(target, plan, job, work, hub, deadline, log)
    except ErnieQuantError as error:
        status = "retry" if isinstance(error, RetryError) else "failed"
        result = TargetResult(target.repo, status, error=str(error))
    except OSError as error:
        status = "retry" if error.errno in FULL else "failed"
        result = TargetResult(target.repo, status, error=f"{error.filename or 'input/output'}: {error.strerror}")
    log(event="result", **asdict(result))
    return result


def _target(
    target: JobTarget, plan: Plan, job: Job, work: Path, hub: Publisher, deadline: float | None, log: Log
) -> TargetResult:
    out = work / target.folder
    wanted = fingerprint(shared_identity(plan, target.tp))
    tag = f"{plan.source.revision[:12] or 'local'}-{wanted[:12]}" if target.tag else ""
    if (commit := _published(hub, target, wanted)) is not None:
        _tag(hub, target, tag, commit)  # a run may have been killed just before it
        _forget(out)
        return TargetResult(target.repo, UP_TO_DATE, commit)
    repair(out, target.place_of_repo)  # the last run may have been killed while it wrote the card
    report = _make(target, plan, job, out, deadline, log)
    checked = verify(out, progress=_until(deadline), sample=SAMPLE)
    log(event="verified", repo=target.repo, files=checked.files, tensors=checked.tensors, recoded=checked.recoded)
    place = Destination(
        target.repo, target.revision, target.private, odd=target.allow_odd_values, hub=target.scheme, name=target.name,
        base_model=target.base_model,
    )  # fmt: skip
    done = publish(out, hub, place, _until(deadline))
    _tag(hub, target, tag, done.commit)
    _forget(out)
    return replace(report, status=done.status, commit=done.commit)


def _published(hub: Publisher, target: JobTarget, wanted: str) -> str | None:
    """The commit of the target's branch, if that holds this very result: same source, recipe, options and versions."""
    if hub.is_private(target.repo) is None:
        return None
    head, folder = hub.head(target.repo, target.revision), target.place
    if head is None or remote_name(MANIFEST, folder) not in head.files:
        return None
    try:
        manifest = json.loads(hub.fetch(target.repo, head.commit, remote_name(MANIFEST, folder)))
        same = manifest["fingerprint"] == wanted and all(
            (there := head.files.get(remote_name(name, folder))) is not None
            and there.nbytes == entry["bytes"]
            and there.sha256 in ("", entry["sha256"])
            for name, entry in manifest["files"].items()
        )
    except (ValueError, KeyError, TypeError, AttributeError):  # not a manifest of ours, or damaged
        return None
    return head.commit if same else None


def _tag(hub: Publisher, target: JobTarget, tag: str, commit: str) -> None:
    """Name a commit after source and recipe; one that has the name already holds the same files."""
    if tag and hub.head(target.repo, tag) is None:
        hub.tag(target.repo, tag, commit)


def _make(target: JobTarget, plan: Plan, job: Job, out: Path, deadline: float | None, log: Log) -> TargetResult:
    """Make the result of a target: go on with what was begun for this very plan, begin anew otherwise."""
    progress = _until(deadline)
    progress(0)
    if job.space_check and (note := unknown_space(out)):
        log(event="note", repo=target.repo, note=note)
    how: dict[str, Any] = {"disk_budget": job.disk_budget, "progress": progress, "workers": 0, "space_check": job.space_check}
    how["watch"] = lambda *_: progress(0)
    how["each"] = lambda done: log(event="file", repo=target.repo, **asdict(done), gb_per_second=_rate(done))

    def run(restart: bool) -> Any:
        if target.tp > 1:
            return run_shared(plan, out, target.tp, restart=restart, **how)
        return run_plan(plan, out, restart=restart, **how)

    try:
        result = run(restart=False)
    except AnotherPlanError as error:  # of a night that never ended, for a source or recipe of then
        log(event="restart", repo=target.repo, why=str(error))
        result = run(restart=True)
    rows = result.reports or [TensorReport.from_json(row) for row in read_object(out / FILENAME)["tensors"]]
    if not target.allow_odd_values:
        refuse_odd(target.repo, rows)
    changed = total([r for r in rows if r.changed])
    log(event="made", repo=target.repo, bytes=result.plan.nbytes, files_before=result.files_before, rel_error=changed.rel_error)
    return TargetResult(target.repo, "", bytes=result.plan.nbytes, rel_error=changed.rel_error)


def _rate(done: FileDone) -> float:
    """GB of the source a second."""
    return round(done.nbytes_in / 1e9 / max(done.seconds, 1e-9), 3)


def _until(deadline: float | None) -> Callable[[int], None]:
    """A progress that raises RetryError once the time is up."""

    def progress(_: int) -> None:
        if deadline is not None and time.monotonic() > deadline:
            raise RetryError("max_hours have passed; the next run goes on where this one stopped")

    return progress


def _forget(out: Path) -> None:
    """A published result needs no files here. It goes at once, so that half of it is not taken for something else."""
    if out.is_dir():
        (out.parent / DROPPED).mkdir(exist_ok=True)
        os.replace(out, out.parent / DROPPED / out.name)
        shutil.rmtree(out.parent / DROPPED)


@contextmanager
def _logged(log: Log) -> Iterator[None]:
    """What ends the whole job is in its log too."""
    try:
        yield
    except ErnieQuantError as error:
        log(event="error", error=str(error), exit_code=error.exit_code)
        raise
