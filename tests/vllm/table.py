"""Results for people: one line each while it runs, and a Markdown table at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EXACT, WRONG, FAILS, REFUSED, CLOSE = "exact", "wrong values", "fails", "refused", "close"
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Verdict:
    """`exact`, or in a word what is not; the largest difference of two logprobs, where there are any."""

    word: str
    why: str = ""
    logprobs: float | None = None


@dataclass(frozen=True)
class Result:
    """Of one start of vLLM, with the plain checkpoint's beside it."""

    case: str
    run: str
    verdict: Verdict
    seconds: float
    wanted: str = EXACT  # WRONG or REFUSED, of what was damaged on purpose

    @property
    def fine(self) -> bool:
        """As it should be."""
        return self.verdict.word == self.wanted


def some(problems: Sequence[str]) -> str:
    """The first, and how many more."""
    return problems[0] + (f" (and {len(problems) - 1} more)" if problems[1:] else "")


def line(result: Result) -> str:
    """While it runs."""
    why = f": {' '.join(result.verdict.why.split())}" if result.verdict.why else ""
    mark = "ok " if result.fine else "BAD"
    return f"{mark} {result.seconds:5.1f} s  {result.case:42} {result.run:18} {result.verdict.word}{_difference(result)}{why}"


def _difference(result: Result) -> str:
    if result.verdict.logprobs is None:
        return ""
    return f" {result.verdict.logprobs:g}" if math.isfinite(result.verdict.logprobs) else " not a number"


def markdown(results: Sequence[Result], versions: Mapping[str, str]) -> str:
    """With the versions that it holds for."""
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    fine = sum(r.fine for r in results)
    rows = [
        "| | source and command | run | result | largest logprob difference | s |",
        "|---|---|---|---|---|---|",
        *(
            f"| {'ok' if r.fine else '**bad**'} | {r.case} | {r.run} | {_cell(r)} | {_difference(r).strip()} | {r.seconds:.0f} |"
            for r in results
        ),
    ]
    return "\n".join([f"{fine} of {len(results)} as they should be. {named}; {cpu()}.", "", *rows, ""])


def _cell(result: Result) -> str:
    why = " ".join(result.verdict.why.split()).replace("|", "\\|")
    return f"{result.verdict.word}: {why[:300]}" if why else result.verdict.word


def cpu() -> str:
    """What it ran on."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next((text.partition(": ")[2] for text in lines if text.startswith("model name")), "an unknown CPU")
