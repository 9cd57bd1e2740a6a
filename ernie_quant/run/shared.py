"""Quantize once, share among ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ernie_quant.devices import CPU
from ernie_quant.planning.reshard import check_size, make_reshard_plan, shared_identity
from ernie_quant.planning.steps import Plan
from ernie_quant.result.folder import OutputFolder
from ernie_quant.run.whole import Each, RunResult, finished_before, run_plan, write_all
from ernie_quant.runners import Runner, local
from ernie_quant.sources import open_source
from ernie_quant.threads import Progress, Watch, in_proportion


def run_shared(
    plan: Plan, out: Path, tp: int, *, workers: int, restart: bool, progress: Progress, disk_budget: int | None = None,
    space_check: bool = True, watch: Watch = lambda *_: None, each: Each = lambda _: None, runner: Runner = local,
    device: str = CPU,
) -> RunResult:  # fmt: skip
    """Quantize once and unsplit, in the private state of `out`, then share among `tp` ranks as `reshard` would.

    `progress` hears of `shared_bytes`. Raises PlanError before anything is written if the widths do not fit.
    """
    check_size(plan, tp)
    known = shared_identity(plan, tp)
    folder = OutputFolder(out)
    with folder.begin(replace(plan, identity=known), restart=restart, copies=2, space_check=space_check) as complete:
        if complete:
            return finished_before(plan, folder)
        how: dict[str, Any] = {"workers": workers, "disk_budget": disk_budget, "space_check": space_check}
        how |= {"watch": watch, "each": each, "runner": runner, "device": device}
        unsplit = replace(plan, copies=())  # they are copied once, at the end
        quantized = run_plan(unsplit, folder.unsplit, progress=progress, **how)
        if quantized.complete_before:
            progress(plan.nbytes_in)
        ranked = make_reshard_plan(open_source(folder.unsplit), tp, known=known, shard_bytes=plan.shard_bytes)
        share = in_proportion(progress, ranked.nbytes_in, plan.nbytes)
        ranked = replace(ranked, quantized_by=plan, copies=plan.copies)
        return write_all(ranked, folder, workers, progress=share, runner=runner, each=each)


def shared_bytes(plan: Plan, tp: int) -> int:
    """What a run for `tp` ranks has to do: the source's bytes, and those of the result where it is shared after that."""
    return plan.nbytes_in + (plan.nbytes if tp > 1 else 0)
