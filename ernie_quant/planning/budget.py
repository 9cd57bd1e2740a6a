"""How large a result may be: bytes, bits per weight, or what GPUs have room for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ernie_quant import runtimes
from ernie_quant.planning.capacity import Question
from ernie_quant.planning.fit import missing
from ernie_quant.planning.gpus import Gpu, Limits, find
from ernie_quant.planning.held import Held, Item, Model
from ernie_quant.planning.steps import Plan
from ernie_quant.planning.units import Units
from ernie_quant.runtimes import Linear

SEVERAL = re.compile(r"\s*(?:(\d+)\s*[x*]\s*)?(.+?)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Gpus:
    """So many of a kind."""

    count: int
    gpu: Gpu

    @staticmethod
    def of(text: str) -> Gpus:
        """`2 x 80GiB`, `4xH100`, `H200`. Raises ValueError."""
        found = SEVERAL.fullmatch(text)
        count, name = (int(found[1] or 1), found[2]) if found else (0, text)
        if not 1 <= count <= 64:
            raise ValueError(f"{text!r} is no number of GPUs from 1 to 64 and their memory or name, such as '2 x 80GiB'")
        return Gpus(count, find(name))


@dataclass(frozen=True)
class Budget:
    """One of: bytes of the weight files, bits per weight over all tensors, GPUs."""

    nbytes: int | None = None
    bits: float | None = None
    gpus: Gpus | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if sum(limit is not None for limit in (self.nbytes, self.bits, self.gpus)) != 1:
            raise ValueError("say how large it may be: in bytes, in bits per weight, or by GPUs, one of them")

    def describe(self) -> str:
        """For people."""
        if self.nbytes is not None:
            return f"{self.nbytes} bytes of weight files"
        if self.bits is not None:
            return f"{self.bits:g} bits per weight"
        assert self.gpus is not None
        return (
            f"{self.gpus.count} x {self.gpus.gpu.name} with a sequence of {self.limits.max_model_len} tokens"
            f" ({self.limits.kv_dtype} KV cache)"
        )

    def first(self, units: Units) -> int:
        """Bytes of tensors to begin with."""
        if self.nbytes is not None:
            return self.nbytes
        return units.most if self.bits is None else int(self.bits * units.weights / 8)

    def excess(self, plan: Plan, config: Mapping[str, Any]) -> float:
        """Bytes that a result is too large by; of a source with this flat config."""
        if self.nbytes is not None:
            return sum(plan.format.lay_out(s.specs, plan.metadata_of(s)).nbytes for s in plan.shards) - self.nbytes
        if self.bits is not None:
            return plan.nbytes - self.bits * sum(step.spec.numel for step in plan.steps) / 8
        assert self.gpus is not None
        model, target = Model.of(config, plan.dims), runtimes.find(plan.runtime)
        items = [Item(step.name, step.role, step.nbytes) for step in plan.steps]
        question = Question(self.limits, (self.gpus.gpu,), self.gpus.count)
        ways = question.ways(target, _linears(plan), model)
        return missing(Held.of(items, model.layers), ways, model, self.gpus.gpu, self.limits, self.gpus.count)


def _linears(plan: Plan) -> list[Linear]:
    """The layers that ranks share."""
    rows = [(step, step.row.rule) for step in plan.steps if step.row is not None and step.row.rule.linear]
    return [plan.layout.linear(step.name, rule, step.codec, step.spec) for step, rule in rows]
