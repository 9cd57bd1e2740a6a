"""A plan in a few lines."""

from __future__ import annotations

from typing import Any

from ernie_quant import names
from ernie_quant.planning.steps import Plan


def summary(plan: Plan) -> list[dict[str, Any]]:
    """What happens to each group of tensors; names folded over their numbers."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for step in plan.steps:
        key = (names.folded(step.name), step.codec.describe())
        row = groups.setdefault(
            key, {"name": key[0], "role": step.role, "codec": key[1], "tensors": 0, "bytes_in": 0, "bytes_out": 0}
        )
        row["tensors"] += 1
        row["bytes_in"] += step.spec.nbytes
        row["bytes_out"] += step.nbytes
    return list(groups.values())


def bits_per_weight(plan: Plan) -> float:
    """Stored bits per element over all tensors."""
    return 8 * plan.nbytes / max(1, plan.weights or sum(s.spec.numel for s in plan.steps))
