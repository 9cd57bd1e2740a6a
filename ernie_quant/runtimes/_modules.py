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

from ernie_quant.codecs import Codec
from ernie_quant.codecs.keep import Keep
from ernie_quant.names import EXPERT, EXPERT_ROLES, MTP, ROUTER, VISION, VISION_EXPERT
from ernie_quant.runtimes import Linear

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


@dataclass(frozen=True)
class _Model:
    """What the names depend on: layers before the MTP block, text experts before the vision experts (0: a text model)."""

    layers: int
    text_experts: int


@dataclass(frozen=True)
class Names:
    """What a linear is called: by every program, its name in the file first; and all experts of its layer together."""

    own: tuple[str, ...]
    whole: tuple[str, ...] = ()

    def asked(self, codec: Codec) -> tuple[str, ...]:
        """Those that config.json has to say this codec of.

        Whether a layer's experts are kept is asked of the whole; as quantized it must not be named, it is no linear.
        """
        return self.own + self.whole if isinstance(codec, Keep) else self.own


def names(linears: Sequence[Linear]) -> dict[str, Names]:
    """Linear -> its names."""
    model = _Model(1 + _highest(r"\.layers\.(\d+)\.", linears), _text_experts(linears))
    found = {}
    for linear in linears:
        own = dict.fromkeys(name for program in PROGRAMS.values() for name in program(linear, model))
        whole = [name.rsplit(".", 2)[0] for name in own] if linear.role in EXPERT_ROLES else []
        found[linear.name] = Names(tuple(own), tuple(whole))
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


def _transformers(linear: Linear, model: _Model) -> list[str]:
    """Its own name."""
    return [linear.module]


def _vllm(linear: Linear, model: _Model) -> list[str]:
    """The MTP block is a layer after the last, in a model of its own. Experts are asked for by their projections."""
    if linear.role in (*EXPERT_ROLES, ROUTER):
        return _split_vl(linear, model)
    module = linear.module
    if linear.role == MTP:
        module = re.sub(r"\.mtp_block\.(\d+)\.", lambda m: f".layers.{model.layers + int(m[1])}.", module)
    return [module, fused(module)]


def _sglang(linear: Linear, model: _Model) -> list[str]:
    """Every MTP block is a model of its own, without a number. VL models do not say of what their fused layers are made."""
    if linear.role in (*EXPERT_ROLES, ROUTER):
        return _split_vl(linear, model)
    if linear.role == VISION:
        return [re.sub(r"\.attn\.qkv$", ".attn.qkv_proj", linear.module)]
    module = re.sub(r"\.mtp_block\.\d+\.", ".mtp_block.", linear.module) if linear.role == MTP else linear.module
    return [module, fused(module)]


def _split_vl(linear: Linear, model: _Model) -> list[str]:
    """VL models have `text_experts` and `vision_experts`, numbered from 0 each, with a router each."""
    if not model.text_experts:
        return [linear.module]
    if linear.role == ROUTER:
        return [f"{linear.module.removesuffix('gate')}{kind}_experts_gate" for kind in ("text", "vision")]
    kind, first = ("vision", model.text_experts) if linear.role == VISION_EXPERT else ("text", 0)
    layer, number, projection = linear.module.rsplit(".", 2)
    return [f"{layer.removesuffix('experts')}{kind}_experts.{int(number) - first}.{projection}"]


# the name in the file first
PROGRAMS: dict[str, Callable[[Linear, _Model], list[str]]] = {
    "transformers": _transformers,
    "vLLM": _vllm,
    "SGLang": _sglang,
}
