"""`ernie-quant nightly`."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from ernie_quant.cli import _options
from ernie_quant.cli._execute import return_freed_memory
from ernie_quant.cli._show import print_json


@click.command()
@click.argument("job_file", metavar="JOB.toml", type=_options.TOML)
@click.option("--work", type=_options.FOLDER, default=Path("nightly"), show_default=True, help="Folder for what is being made.")
@click.option("--max-hours", type=click.FloatRange(0, min_open=True), help="Stop after so many hours; the next run goes on.")
@click.option("--log", "log_file", type=_options.FILE, help="Append JSON lines here.  [default: WORK/log.jsonl]")
@click.option("--check", is_flag=True, help="Read and judge the job file, and do nothing.")
@_options.json_option
def command(
    job_file: Path, work: Path, max_hours: float | None, log_file: Path | None, check: bool, as_json: bool
) -> None:  # fmt: skip
    """Keep published repositories up to date with a source: make, verify and publish what is missing, or do nothing.

    Targets whose published manifest has the same source commit, recipe, options and versions are left alone. A run that
    is killed goes on the next time; a second one at the same time exits with 75.

    Exit codes: 0 published or up to date, 1 a target failed, 75 worth retrying (network, disk, time, another run).

    \b
    ernie-quant nightly job.toml --work /data/nightly --max-hours 8
    """
    from ernie_quant.nightly import job, run

    found = job.read_job(job_file)
    if check:
        click.echo(f"{job_file}: {len(found.targets)} target(s), no mistakes")
        return
    return_freed_memory()
    work.mkdir(parents=True, exist_ok=True)
    with open(log_file or work / "log.jsonl", "a", encoding="utf-8", errors="backslashreplace") as lines:

        def log(**entry: Any) -> None:
            time = datetime.now(UTC).isoformat(timespec="seconds")
            lines.write(json.dumps({"time": time, **entry}, ensure_ascii=False) + "\n")
            lines.flush()

        result = run.run_job(found, work, max_hours=max_hours, log=log)
    if as_json:
        print_json(run.as_json(result))
    else:
        click.echo(run.summary(result))
    sys.exit(result.exit_code)
