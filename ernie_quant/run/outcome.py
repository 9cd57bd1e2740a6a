"""What became of a run, in short: for the library and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ernie_quant.planning.command import command_of
from ernie_quant.planning.steps import Plan
from ernie_quant.planning.summary import bits_per_weight, summary
from ernie_quant.reporting.rows import TensorReport, Total, total
from ernie_quant.result.card import run_commands
from ernie_quant.run.whole import RunResult
from ernie_quant.runtimes import Spread

DONE, COMPLETE, PLANNED = "done", "complete", "planned"


@dataclass(frozen=True, repr=False)
class Result:
    """A folder that was written, was complete before, or would be written; sizes in bytes.

    `tensors` has a row for each weight with its relative error ||W - W'||^2 / ||W||^2; it is empty for a result that was
    complete before, whose report is in the folder (`report`). `gpus`: memory of a GPU -> how the fewest of them share it.
    """

    status: str
    out: Path
    bytes_in: int
    bytes_out: int
    disk_bytes: int
    files: int
    files_before: int
    bits_per_weight: float
    tp_sizes: tuple[int, ...]
    gpus: Mapping[str, Spread]
    notes: tuple[str, ...]
    command: str  # that makes it again
    run: tuple[tuple[str, str], ...]  # (program, command) that run it
    groups: tuple[Mapping[str, Any], ...]  # what happens to each group of tensors
    tensors: tuple[TensorReport, ...] = ()

    @cached_property
    def changed(self) -> Total:
        """Sums over the weights that were quantized or fitted."""
        return total([row for row in self.tensors if row.changed])

    @property
    def rel_error(self) -> float:
        """Of all changed weights as one vector; 0 where none is changed or known."""
        return self.changed.rel_error

    def __repr__(self) -> str:
        error = f", relative error {self.rel_error:.3g}" if self.changed.tensors else ""
        sizes = f"{self.bytes_in / 1e9:.2f} -> {self.bytes_out / 1e9:.2f} GB, {self.bits_per_weight:.2f} bits per weight"
        return f"<Result {self.status}: {self.out}, {sizes}{error}>"


def planned(plan: Plan, out: Path) -> Result:
    """Of a dry run."""
    return _result(PLANNED, plan, out)


def result_of(done: RunResult, out: Path) -> Result:
    """Of a run."""
    status = COMPLETE if done.complete_before else DONE
    return _result(status, done.plan, out, done.reports, done.files_before)


def _result(status: str, plan: Plan, out: Path, rows: tuple[TensorReport, ...] = (), before: int = 0) -> Result:
    first = plan.quantized_by or plan
    return Result(
        status, out, plan.origin.nbytes, plan.nbytes, plan.disk_bytes * (2 if plan.calibration else 1), len(plan.shards), before,
        round(bits_per_weight(plan), 4), plan.tp_sizes, first.gpus, plan.notes, command_of(plan), tuple(run_commands(plan, out)),
        tuple(summary(plan)), rows,
    )  # fmt: skip
