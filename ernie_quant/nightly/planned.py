"""The plan of a target, with the text that it is calibrated on."""

from __future__ import annotations

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.nightly.job import JobTarget
from ernie_quant.plan.calibration import Calibration
from ernie_quant.plan.make import make_plan
from ernie_quant.plan.recipe import with_method
from ernie_quant.plan.reshard import check_size
from ernie_quant.plan.steps import Plan


def text_of(target: JobTarget) -> Calibration | None:
    """The text of a target, if it has any. Raises TextError."""
    if target.recipe.calibration is None:
        return None
    from ernie_quant.calibration.asked import calibration_of

    found: Calibration = calibration_of(target.recipe.calibration)
    return found


def plan_of(source: Checkpoint, target: JobTarget, text: Calibration | None, disk_budget: int | None) -> Plan:
    """What is to be done for a target. Raises PlanError, TextError, ConfigError or CheckpointError."""
    rules = target.recipe
    if text is not None:
        from ernie_quant.calibration.asked import check_source

        check_source(source)
        rules = with_method(rules, text.method)
    plan = make_plan(
        source, runtime=target.runtime, recipe=rules, shard_bytes=target.shard_bytes, copy=target.copy, calibration=text
    )
    if target.tp > 1:
        check_size(plan, target.tp)
    if disk_budget is not None and source.downloader is not None:
        source.downloader.check_budget([shard.needs for shard in plan.shards], disk_budget)
    return plan
