"""The plan of a target."""

from __future__ import annotations

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.nightly.job import JobTarget
from ernie_quant.planning.calibration import Calibration
from ernie_quant.planning.reshard import check_size
from ernie_quant.planning.steps import Plan
from ernie_quant.run import asked


def plan_of(source: Checkpoint, target: JobTarget, text: Calibration | None, disk_budget: int | None) -> Plan:
    """What is to be done for a target. Raises PlanError, TextError, ConfigError or CheckpointError."""
    plan = asked.plan_of(source, target.recipe, target.runtime, text, shard_bytes=target.shard_bytes, copy=target.copy)
    if target.tp > 1:
        check_size(plan, target.tp)
    if disk_budget is not None and source.downloader is not None:
        source.downloader.check_budget([shard.needs for shard in plan.shards], disk_budget)
    return plan
