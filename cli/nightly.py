"""`ernie-quant nightly`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from ernie_quant.cli import _options
from ernie_quant.cli._show import print_json

if TYPE_CHECKING:
    from ernie_quant.nightly.job import Job
    from ernie_quant.nightly.outcome import JobResult


@click.command()
@click.argument("job_files", metavar="JOB.toml...", type=_options.TOML, nargs=-1, required=True)
@click.option("--work", type=_options.FOLDER, default=Path("nightly"), show_default=True, help="Folder for what is being made.")
@click.option("--max-hours", type=click.FloatRange(0, min_open=True), help="Stop after so many hours; the next run goes on.")
@click.option("--log", "log_file", type=_options.FILE, help="Append JSON lines here.  [default: WORK/log.jsonl]")
@click.option("--check", is_flag=True, help="Read and judge the job files, and do nothing.")
@click.option("--dry-run", is_flag=True, help="Say which targets would be made, and try the tokens; write nothing.")
@_options.json_option
def command(
    job_files: tuple[Path, ...], work: Path, max_hours: float | None, log_file: Path | None, check: bool, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Keep published repositories up to date with a source: make, verify and publish what is missing, or do nothing.

    Targets whose published manifest has the same source commit, recipe, options and versions of codecs and formats are
    left alone. A run that is killed goes on the next time; a second one at the same time exits with 75. Several jobs are
    done one after the other; one that fails does not stop the others.

    Exit codes: 0 published or up to date, 1 a target failed, 75 worth retrying (network, disk, time, another run).

    \b
    ernie-quant nightly job.toml --dry-run
    ernie-quant nightly job.toml vl.toml --work /data/nightly --max-hours 8
    """
    from ernie_quant.nightly import job
    from ernie_quant.run.memory import return_freed_memory

    jobs = job.read_jobs(job_files)
    if check:
        for file, found in zip(job_files, jobs, strict=True):
            click.echo(f"{file}: {len(found.targets)} target(s), no mistakes")
        return
    if dry_run:
        _tell([_looked(found, work) for found in jobs], as_json)
    return_freed_memory()
    work.mkdir(parents=True, exist_ok=True)
    with _log(log_file or work / "log.jsonl") as log:
        _tell(_all(jobs, work, max_hours, log), as_json)


def _looked(job: Job, work: Path) -> JobResult:
    from ernie_quant.errors import ErnieQuantError
    from ernie_quant.nightly import outcome, run

    try:
        return run.look(job, work)
    except ErnieQuantError as error:
        return outcome.failed(job.source, error)


def _all(jobs: tuple[Job, ...], work: Path, max_hours: float | None, log: Callable[..., None]) -> list[JobResult]:
    """One after the other. Raises what ends the only one of them."""
    from ernie_quant.errors import ErnieQuantError
    from ernie_quant.nightly import outcome, run

    end = time.monotonic() + 3600 * max_hours if max_hours else None
    results = []
    for job in jobs:
        hours = max((end - time.monotonic()) / 3600, 1e-9) if end else None
        try:
            results.append(run.run_job(job, work, max_hours=hours, log=log))
        except ErnieQuantError as error:
            if len(jobs) == 1:
                raise
            results.append(outcome.failed(job.source, error))
    return results


@contextmanager
def _log(file: Path) -> Iterator[Callable[..., None]]:
    """A line of JSON for everything that happens."""
    with open(file, "a", encoding="utf-8", errors="backslashreplace") as lines:

        def log(**entry: Any) -> None:
            time = datetime.now(UTC).isoformat(timespec="seconds")
            lines.write(json.dumps({"time": time, **entry}, ensure_ascii=False) + "\n")
            lines.flush()

        yield log


def _tell(results: list[JobResult], as_json: bool) -> None:
    """Print what became of the jobs, and exit with the code of the worst."""
    from ernie_quant.nightly import outcome

    status = outcome.worst(results)
    if not as_json:
        click.echo("\n".join(map(outcome.summary, results)))
    elif len(results) == 1:
        print_json(outcome.as_json(results[0]))
    else:
        print_json({"status": status, "jobs": [outcome.as_json(result) for result in results]})
    sys.exit(next(result.exit_code for result in results if result.status == status))
