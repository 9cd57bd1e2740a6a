"""Under which names programs know a layer in memory: those that they look up in config.json, for every linear of a file.

The one place that says so. A file holds `q_proj`, `k_proj` and `v_proj`, but a program has one `qkv_proj`; it may number an
MTP block as one more layer, and keep the experts of VL models in two modules. Sources: vllm-project/vllm
(model_executor/models/ernie45_moe.py, ernie45_vl.py, ernie45_vl_moe.py, ernie_mtp.py), sgl-project/sglang
(srt/models/ernie4.py, ernie4_eagle.py, ernie45_vl.py, ernie45_moe_vl.py), huggingface/transformers (models/ernie4_5_moe).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ernie_quant.codecs.keep import Keep
from ernie_quant.names import EXPERT, EXPERT_ROLES, MTP, ROUTER, VISION, VISION_EXPERT
from ernie_quant.runtimes import Linear

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


@dataclass(frozen=True)
class _Model:
    """What the names depend on: layers before the MTP block, text experts before the vision experts (0: a text model)."""

    layers: int
    text_experts: int


def names(linears: Sequence[Linear], *, whole: bool = False) -> dict[str, tuple[str, ...]]:
    """Linear -> the names of its layer in every program, its own in the file first.

    The experts of a layer are one module, of which programs ask whether it is kept: kept experts have its name too, and
    quantized ones where it is asked for as `whole`. (compressed-tensors must not take it for a linear.)
    """
    model = _Model(1 + _highest(r"\.layers\.(\d+)\.", linears), _text_experts(linears))
    found = {}
    for linear in linears:
        mine = [linear.module, *(name for program in PROGRAMS.values() for name in program(linear, model))]
        if linear.role in EXPERT_ROLES and (whole or isinstance(linear.codec, Keep)):
            mine += [re.sub(r"\.\d+\.\w+$", "", name) for name in mine]
        found[linear.name] = tuple(dict.fromkeys(mine))
    return found


def _highest(pattern: str, linears: Sequence[Linear]) -> int:
    return max((int(m[1]) for li in linears if (m := re.search(pattern, li.module))), default=-1)


def _text_experts(linears: Sequence[Linear]) -> int:
    if all(li.role != VISION_EXPERT for li in linears):
        return 0
    return 1 + _highest(r"\.experts\.(\d+)\.", [li for li in linears if li.role == EXPERT])


def fused(module: str) -> str:
    """The layer that q, k and v, or gate and up, are parts of; any other is its own."""
    head, dot, last = module.rpartition(".")
    return head + dot + FUSED.get(last, last)


def _vllm(linear: Linear, model: _Model) -> list[str]:
    """The MTP block is a layer after the last, in a model of its own. Experts are asked for by their projections."""
    module = re.sub(r"\.mtp_block\.(\d+)\.", lambda m: f".layers.{model.layers + int(m[1])}.", linear.module)
    return _split_vl(linear, module, model) if linear.role in (*EXPERT_ROLES, ROUTER) else [module, fused(module)]


def _transformers(linear: Linear, model: _Model) -> list[str]:
    """Names of the file."""
    return [linear.module]


def _sglang(linear: Linear, model: _Model) -> list[str]:
    """Every MTP block is a model of its own, without a number. VL models do not say of what their fused layers are made."""
    if linear.role in (*EXPERT_ROLES, ROUTER):
        return _split_vl(linear, linear.module, model)
    if linear.role == VISION:
        return [re.sub(r"\.attn\.qkv$", ".attn.qkv_proj", linear.module)]
    module = re.sub(r"\.mtp_block\.\d+\.", ".mtp_block.", linear.module) if linear.role == MTP else linear.module
    return [module, fused(module)]


def _split_vl(linear: Linear, module: str, model: _Model) -> list[str]:
    """VL models have `text_experts` and `vision_experts`, numbered from 0 each, with a router each."""
    if not model.text_experts:
        return [module]
    if linear.role == ROUTER:
        return [re.sub(r"\.gate$", f".{kind}_experts_gate", module) for kind in ("text", "vision")]
    kind, first = ("vision", model.text_experts) if linear.role == VISION_EXPERT else ("text", 0)
    return [re.sub(r"\.experts\.(\d+)\.", lambda m: f".{kind}_experts.{int(m[1]) - first}.", module)]


PROGRAMS: dict[str, Callable[[Linear, _Model], list[str]]] = {
    "vLLM": _vllm,
    "transformers": _transformers,
    "SGLang": _sglang,
}
