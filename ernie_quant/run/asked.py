"""The plan of what somebody asks for, with the text that it is calibrated on."""

from __future__ import annotations

from typing import Any

from ernie_quant.checkpoint import Checkpoint
from ernie_quant.planning.calibration import Asked, Calibration
from ernie_quant.planning.make import make_plan
from ernie_quant.planning.recipe import Recipe, with_method
from ernie_quant.planning.steps import Plan


def text_of(asked: Asked | None) -> Calibration | None:
    """Which bytes the texts have that are asked for, if there are any. Raises TextError."""
    if asked is None:
        return None
    from ernie_quant.calibration.asked import calibration_of

    found: Calibration = calibration_of(asked)
    return found


def plan_of(source: Checkpoint, rules: Recipe, runtime: str, text: Calibration | None, **options: Any) -> Plan:
    """As `make_plan`, with codecs that look at the text. Raises PlanError, TextError, ConfigError or CheckpointError."""
    if text is not None:
        from ernie_quant.calibration.asked import check_source

        check_source(source)
        rules = with_method(rules, text.method)
    return make_plan(source, runtime=runtime, recipe=rules, calibration=text, **options)
