"""Job files, and nights that work on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ernie_quant.nightly.job import read_job
from ernie_quant.nightly.run import JobResult, run_job
from helpers.hub import LoopbackHub
from helpers.hubs import ADDRESS

WINT4 = '[[target]]\nrepo = "me/tiny-wint4"\nrecipe = "wint4"\ngroup_size = 32\nmax_shard_size = "60kB"\n'
PT = '[[target]]\nrepo = "me/tiny-pt"\nrecipe = "pt"\n'


def job_file(folder: Path, *targets: str, source: object = ADDRESS, more: str = "") -> Path:
    path = folder / "job.toml"
    path.write_text(f'[source]\nrepo = "{source}"\n{"".join(targets)}{more}')
    return path


class Night:
    """Runs a job in a work folder; `events` are those of the last night."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.events: list[dict[str, Any]] = []

    def __call__(self, *targets: str, source: object = ADDRESS, more: str = "", **options: Any) -> JobResult:
        self.events = []
        path = job_file(self.folder, *targets, source=source, more=more)
        return run_job(read_job(path), self.work, log=lambda **e: self.events.append(e), **options)

    def place(self, target: str) -> Path:
        """The folder in which it is made."""
        return self.work / read_job(job_file(self.folder, target)).targets[0].folder

    @property
    def left(self) -> set[str]:
        return {p.name for p in self.work.iterdir()} - {"lock", "log.jsonl"}


def manifest(hub: LoopbackHub, repo: str) -> dict[str, Any]:
    return dict(json.loads(hub.repo(repo).read("ernie-quant.json")))


def statuses(result: JobResult) -> list[str]:
    return [target.status for target in result.targets]
