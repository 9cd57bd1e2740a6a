"""What became of jobs and their targets, for programs and for a mail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ernie_quant.errors import RetryError

UP_TO_DATE, PLANNED = "up-to-date", "planned"
ORDER = ("failed", "retry", "published", PLANNED, UP_TO_DATE)  # the worst first


@dataclass(frozen=True)
class TargetResult:
    """What became of a target: published, up-to-date, failed, retry, or planned by a dry run.

    The commit is that of the published repository, the account that of the token; `begun`: a part of it lies here already.
    """

    repo: str
    status: str
    commit: str = ""
    bytes: int = 0
    rel_error: float = 0.0
    error: str = ""
    account: str = ""
    begun: bool = False


@dataclass(frozen=True)
class JobResult:
    """What became of a job; `status` is the worst of the targets'."""

    status: str
    source: str
    source_commit: str
    targets: tuple[TargetResult, ...]
    error: str = ""

    @property
    def exit_code(self) -> int:
        """0 done, 1 something failed that will fail again, 75 worth retrying."""
        return {"failed": 1, "retry": RetryError.exit_code}.get(self.status, 0)


def worst(results: Sequence[TargetResult] | Sequence[JobResult]) -> str:
    """The status of all of them together."""
    statuses = {result.status for result in results}
    return next(status for status in ORDER if status in statuses)


def failed(source: str, error: Exception) -> JobResult:
    """Of a job that did not come to its targets."""
    status = "retry" if isinstance(error, RetryError) else "failed"
    return JobResult(status, source, "", (), str(error))


def summary(result: JobResult) -> str:
    """Text for a mail: one line for the job, one for each target."""
    why = f": {result.error}" if result.error else ""
    lines = [f"{result.status}: {result.source}{f' at {result.source_commit[:12]}' if result.source_commit else ''}{why}"]
    return "\n".join([*lines, *(f"  {target.status}: {target.repo}: {_more(target)}" for target in result.targets)])


def _more(target: TargetResult) -> str:
    token = f"; token of {target.account}" if target.account else ""
    if target.status == "published":
        return f"{target.bytes / 1e9:.2f} GB, relative error {target.rel_error:.3g}, commit {target.commit[:12]}"
    if target.status == UP_TO_DATE:
        return f"commit {target.commit[:12]}{token}"
    if target.status == PLANNED:
        return f"{target.bytes / 1e9:.2f} GB would be {'finished' if target.begun else 'made'} and published{token}"
    return target.error


def as_json(result: JobResult) -> dict[str, Any]:
    """What the command prints with --json."""
    return asdict(result)
